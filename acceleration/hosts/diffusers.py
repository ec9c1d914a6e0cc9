"""diffusers host: the same plans, decisions and traces on the transformer of a diffusers pipeline.

    with accelerate(pipe, Request("cache", {"method": "Taylor"})) as run:
        picture = pipe("a lighthouse").images[0]
    print(run.trace["totals"])

Nothing of diffusers is replaced: while the ``with`` lasts, ``forward`` of the transformer, its blocks and attentions is wrapped
on the instances, whatever already stands there included, and given back at its end, however it ends. Neither ComfyUI nor
diffusers is imported.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..compatibility import add_request
from ..errors import ConflictError, StrettoError
from ..facts import Facts
from ..models import BlockSite, ModulePart
from ..models.diffusers import Transformer, transformer_of
from ..plan import Plan, Request
from ..sampling import SamplerTraits, schedule_of
from .device import free_memory
from .diffusers_attention import attend
from .diffusers_levels import Levels, given_levels, levels_of, place, scheduler_traits
from .diffusers_plan import COMPILED, as_reachable, foreign_cache, parameters, resolve_here
from .diffusers_run import Asked, Run
from .trace_store import TraceStore

#: Transformers of a pipeline: Wan 2.2 has two experts.
COMPONENTS = ("transformer", "transformer_2")
log = logging.getLogger("stretto")

#: The run and the network call in progress, for the blocks.
_CALL: ContextVar[tuple[Run, Any] | None] = ContextVar("stretto_diffusers_call", default=None)


def accelerate(
    pipeline: Any,
    plan: Plan | Request | Sequence[Request] | Mapping[str, Any],
    *,
    scheduler: Any = None,
    sigmas: Sequence[float] | None = None,
) -> "Acceleration":
    """Return a context in which a diffusers pipeline runs under ``plan``.

    Args:
        pipeline: a pipeline with a ``transformer`` (and perhaps a ``transformer_2``), or a transformer itself.
        plan: a plan, a request, several, or a ``plan@1`` document.
        scheduler: of a transformer that comes without its pipeline; it must be stepped.
        sigmas: noise levels of such a transformer where there is no scheduler either, one more than steps.

    Raises:
        StrettoError: ``pipeline`` holds no transformer, noise levels are missing, or the plan cannot work.
    """
    found = _networks(pipeline)
    scheduler = scheduler if scheduler is not None else getattr(pipeline, "scheduler", None)
    if scheduler is None and sigmas is None:
        raise StrettoError(
            f"accelerate: {type(pipeline).__name__} has no scheduler to read noise levels from; "
            "give scheduler=..., or sigmas=... with one value more than steps"
        )
    return Acceleration(pipeline, found, _plan(plan), scheduler, None if sigmas is None else given_levels(sigmas))


def _networks(pipeline: Any) -> list[torch.nn.Module]:
    """Return the transformers that ``pipeline`` holds, or is."""
    if isinstance(pipeline, torch.nn.Module):
        return [pipeline]
    found = [getattr(pipeline, name, None) for name in COMPONENTS]
    networks = [network for network in found if isinstance(network, torch.nn.Module)]
    if not networks:
        other = "; it has a U-Net, which no technique here works on" if hasattr(pipeline, "unet") else ""
        raise StrettoError(
            f"accelerate: {type(pipeline).__name__} has no transformer{other}. Expected a diffusers pipeline or transformer"
        )
    return networks


def _plan(wanted: Any) -> Plan:
    if isinstance(wanted, Plan):
        requests: Sequence[Request] = wanted.requests
    elif isinstance(wanted, Request):
        requests = (wanted,)
    elif isinstance(wanted, Mapping):
        requests = Plan.from_json(wanted).requests
    else:
        requests = tuple(wanted)
    plan = Plan()
    for request in requests:
        if not isinstance(request, Request):
            raise StrettoError(f"accelerate: a plan is made of requests, not of {type(request).__name__}")
        plan = add_request(plan, request)
    return plan


class Acceleration:
    """What :func:`accelerate` returns: a context, and the traces of the runs in it."""

    def __init__(
        self, pipeline: Any, networks: list[torch.nn.Module], plan: Plan, scheduler: Any, levels: Levels | None
    ) -> None:
        self.pipeline, self.plan, self.scheduler, self.levels = pipeline, plan, scheduler, levels
        self._attached = [_Attachment(self, network) for network in networks]
        self._traces = TraceStore(64)

    @property
    def traces(self) -> list[dict[str, Any]]:
        """``trace@1`` documents of the runs so far, oldest first. A run ends with its last step, or with the context."""
        return self._traces.all()

    @property
    def trace(self) -> dict[str, Any]:
        """The newest trace.

        Raises:
            StrettoError: no run has ended yet.
        """
        if not self.traces:
            raise StrettoError("accelerate: no run has ended yet; read traces after the pipeline has returned")
        return self.traces[-1]

    def __enter__(self) -> "Acceleration":
        entered = []
        try:
            for attached in self._attached:
                attached.attach()
                entered.append(attached)
        except BaseException:
            for attached in entered:
                attached.detach("failed")
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        outcome = "interrupted" if interrupted else "failed" if kind else None
        for attached in self._attached:
            attached.detach(outcome)

    def _hand_over(self, to: "_Attachment", levels: Levels) -> None:
        """A run begins: end those before it. Of two experts that share the noise levels, each has done its part."""
        for attached in self._attached:
            if attached.run is not None:
                part = attached is not to and attached.run.levels.source is levels.source
                attached.run.finish("completed" if part else None)

    def _keep(self, document: dict[str, Any]) -> None:
        self._traces.add(None, None, document)


class _Attachment:
    """One transformer while the context lasts, and the run in progress on it."""

    def __init__(self, owner: Acceleration, network: torch.nn.Module) -> None:
        self.owner, self.network = owner, network
        self.known: Transformer | None = transformer_of(network)
        self.run: Run | None = None
        self.order: tuple[str, ...] = ()
        self._restore: list[Callable[[], None]] = []
        self._reached: set[str] = set()
        self._active = self._told = False

    def attach(self) -> None:
        """Wrap the transformer's ``forward``; blocks follow when a run needs them."""
        if any(getattr(self.network.__dict__.get(name), "stretto", False) for name in ("forward", COMPILED)):
            raise ConflictError(
                f"accelerate: this {type(self.network).__name__} is already accelerated; leave the other `with` first, "
                "or put all requests into one plan"
            )
        obstacle = foreign_cache(self.network, self.owner.plan)
        if obstacle:
            raise ConflictError(obstacle)
        self.order = parameters(self.network)
        self._active = True
        self._wrap(self.network, self._network_forward)

    def detach(self, outcome: str | None) -> None:
        """End the run in progress and give back every ``forward``."""
        self._active = False
        try:
            if self.run is not None:
                self.run.finish(outcome)
        finally:
            self.run = None
            self._reached.clear()
            while self._restore:
                self._restore.pop()()

    def _wrap(self, module: torch.nn.Module, around: Callable) -> None:
        """Put ``around(original, args, kwargs)`` in the place of an instance's ``forward``, reversibly.

        A module that is compiled already stays whole: what it was compiled to is wrapped, not what went into its graphs.
        """
        name = "forward" if getattr(module, COMPILED, None) is None else COMPILED
        own, original = module.__dict__.get(name), getattr(module, name)

        @torch.compiler.disable
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return around(original, args, kwargs) if self._active else original(*args, **kwargs)

        forward.stretto = True
        setattr(module, name, forward)

        def restore() -> None:
            if module.__dict__.get(name) is not forward:
                return  # somebody has wrapped ours since; it passes straight through from now on
            if own is None:
                delattr(module, name)
            else:
                setattr(module, name, own)

        self._restore.append(restore)

    def _network_forward(self, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        found = self._run_of(args, kwargs)
        if found is None:
            return original(*args, **kwargs)
        run, index, asked = found

        def compute(call: Any, arguments: Mapping[str, Any]) -> Any:
            token = _CALL.set((run, call))
            try:
                return original(*args, **kwargs) if arguments is asked.arguments else original(**arguments)
            finally:
                _CALL.reset(token)

        return run.call(index, asked, compute)

    def _run_of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Run, int, Asked] | None:
        """Return the run that a call of the network belongs to, which of its calls it is, and its arguments."""
        if torch.is_grad_enabled():
            if not self._told:
                log.warning("accelerate: gradients are recorded here, so nothing is skipped; use torch.no_grad()")
            self._told = True
            return None
        levels, scheduler = self.owner.levels, None
        if levels is None:
            scheduler = self.owner.scheduler
            source = getattr(scheduler, "timesteps", None)
            same = self.run is not None and self.run.levels.source is source
            levels = self.run.levels if same else levels_of(scheduler)
            if levels is None:
                return None
        arguments = {**dict(zip(self.order, args, strict=False)), **kwargs}
        asked = Asked.of(arguments, self.known, self.network)
        if asked is None:
            return None
        same = self.run is not None and self.run.levels.source is levels.source
        given = self.known.timestep(asked.timestep, levels.train) if self.known else asked.timestep
        index = place(scheduler, levels, given, asked.timestep_dtype, self.run.index if same else -1)
        if index is None:
            return None
        if not same or index < self.run.index:
            self.owner._hand_over(self, levels)
            self.run = self._start(levels, asked)
        return None if self.run.done else (self.run, index, asked)

    def _start(self, levels: Levels, asked: Asked) -> Run:
        """Resolve the plan for a run that begins now."""
        owner, network = self.owner, self.network
        traits = scheduler_traits(owner.scheduler, levels) if owner.levels is None else SamplerTraits("given")
        known, obstacle = as_reachable(self.known, network)
        known = known.with_sides(asked.arguments, asked.latent_shape) if known else None
        facts = Facts(
            network=network,
            descriptor=known.descriptor if known else None,
            sampler=traits,
            schedule=schedule_of(levels.falling),
            latent_shape=asked.latent_shape,
            branches=2 if asked.branches == 1 and _guides(owner.pipeline) else asked.branches,
            element_bytes=asked.latent.element_size(),
            free_bytes=free_memory(asked.latent.device),
            free_system_bytes=free_memory(torch.device("cpu")),
        )
        execution = resolve_here(owner.plan, facts, obstacle, _may_guide(owner.pipeline, known))
        for outcome in execution.outcomes:
            log.info("%s: %s. %s", outcome.technique, outcome.status, outcome.reason)
        scale, device = _scale(owner.pipeline), asked.latent.device
        run = Run(network, known, levels, facts, execution, owner.plan, owner._keep, scale, device)
        if execution.needs_blocks:
            self._reach_blocks(run)
        if run.state.inside_attention:
            self._reach_attention(known)
        return run

    def _reach_blocks(self, run: Run) -> None:
        """Wrap the blocks, once."""
        if "blocks" in self._reached:
            return
        self._reached.add("blocks")
        network, lists = self.network, dict(run.known.descriptor.block_lists)
        for site in run.state.sites.values():
            block = getattr(network, lists[site.kind])[site.index]
            self._wrap(block, functools.partial(_block_forward, network, site, run.known, parameters(block)))

    def _reach_attention(self, known: Transformer) -> None:
        """Wrap the self-attentions inside the blocks, once."""
        if "attention" in self._reached:
            return
        self._reached.add("attention")
        for site in known.descriptor.module_sites(self.network):
            for part in site.parts:
                around = functools.partial(_module_forward, self.network, part)
                self._wrap(self.network.get_submodule(part.path), around)


def _block_forward(
    network: Any,
    site: BlockSite,
    known: Transformer,
    order: tuple[str, ...],
    original: Callable,
    args: tuple,
    kwargs: dict,
) -> Any:
    """One block: sent through the sessions where the call in progress wants that."""
    found = _CALL.get()
    if found is None or found[0].network is not network:
        return original(*args, **kwargs)
    run, call = found
    if call.scratch["depths"] is not None and site.depth not in call.scratch["depths"]:
        return original(*args, **kwargs)
    arguments = {**dict(zip(order, args, strict=False)), **kwargs}

    def compute(given: dict[str, Any]) -> dict[str, Any]:
        changed = {**arguments, "hidden_states": given["img"]}
        if "txt" in given:
            changed["encoder_hidden_states"] = given["txt"]
        out = original(**changed)
        return dict(zip(known.returns, out if len(known.returns) > 1 else (out,), strict=True))

    given = {"img": arguments["hidden_states"], "vec": arguments.get("temb", arguments.get("timestep"))}
    if "encoder_hidden_states" in arguments and site.kind in known.descriptor.txt_out:
        given["txt"] = arguments["encoder_hidden_states"]
    out = run.state.block(call, site, given, compute)
    made = tuple(out.get(name) for name in known.returns)
    return made if len(made) > 1 else made[0]


def _module_forward(network: Any, part: ModulePart, original: Callable, args: tuple, kwargs: dict) -> Any:
    """One self-attention inside a block, offered to the sessions where the call in progress has any for it."""
    found = _CALL.get()
    if found is None or found[0].network is not network or not found[0].state.inside_attention:
        return original(*args, **kwargs)
    run, call = found
    return attend(run.state, call, part, lambda: original(*args, **kwargs))


def _guides(pipeline: Any) -> bool:
    """Whether a pipeline says that it guides, as far as it says anything."""
    return bool(getattr(pipeline, "do_classifier_free_guidance", False))


def _may_guide(pipeline: Any, known: Transformer | None) -> bool:
    """Whether a pipeline may make a second call for guidance without saying so beforehand, as FLUX's do."""
    silent = not isinstance(pipeline, torch.nn.Module) and not hasattr(pipeline, "do_classifier_free_guidance")
    return silent and known is not None and not known.batched


def _scale(pipeline: Any) -> float | None:
    scale = getattr(pipeline, "guidance_scale", None)
    return float(scale) if isinstance(scale, int | float) else None
