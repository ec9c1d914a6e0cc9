"""ComfyUI host: the one module that touches ComfyUI's hooks.

A node's request lands in :func:`request`. When sampling starts, :func:`_outer_sample`
resolves the plan, makes the run's state and hangs closures over it into the run's own
copy of the model options; ``finally`` drops both. Nothing is stored on models, modules
or node classes, and nothing of ComfyUI is replaced.
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.patcher_extension import WrappersMP

from ..compatibility import add_request, inside_blocks
from ..errors import ConflictError
from ..evaluation import COMPUTED, Branch, Call, Evaluation
from ..facts import Facts
from ..models import BlockSite, describe
from ..plan import Plan, Request
from ..resolve import Execution, resolve
from ..run import RunState
from ..sampling import SamplerTraits, schedule_of, traits_of
from ..temporal_features.session import FeatureSession
from ..trace import TraceBuilder
from .comfy_attention import attend_with
from .comfy_features import reach_features, rehearsal, weights_identity
from .comfy_guidance import save_guidance
from .comfy_modules import layout, modules_in_place, reach_modules, skip_hollow_attention
from .comfy_region import reach_blocks, with_kept_keys
from .comfy_resolution import ProgressiveSampler, carried_request, in_stages, with_stage_obstacle
from .device import clock_for, peak_memory, start_peak_memory, synchronize
from .diffusers_pipeline import Pipeline
from .trace_store import TraceStore

KEY = "stretto"
PLAN_KEY = "stretto_plan"
#: Techniques that ComfyUI's own caches must not stand beside.
SKIPPING = ("cache", "table")
#: Beginnings of the names under which networks are given the latents of other pictures.
REFERENCES = ("ref_latent", "reference_latent", "time_dim_concat")
BRANCH_NAMES = {0: "cond", 1: "uncond"}
log = logging.getLogger("stretto")

#: The one process-wide object: traces that outlive their run.
TRACES = TraceStore()

#: The network call in progress, for hooks of blocks and modules, whose arguments do not always carry options.
_CALL: ContextVar[Call | None] = ContextVar("stretto_call", default=None)


def plan_of(model: Any) -> Plan:
    """Return the plan that a MODEL carries; an empty one when no Stretto node touched it."""
    return model.model_options.get("transformer_options", {}).get(PLAN_KEY, Plan())


def request(model: Any, wanted: Request) -> Any:
    """Return a clone of MODEL ``model`` whose plan also holds ``wanted``; a pipeline of diffusers is taken the same way.

    Raises:
        StrettoError: bad settings, or a request that cannot share the model with another.
    """
    if isinstance(model, Pipeline):
        return model.request(wanted)
    plan = add_request(plan_of(model), wanted)
    if wanted.technique in SKIPPING:
        _refuse_core_cache(model.model_options.get("transformer_options", {}))
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[PLAN_KEY] = plan
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    if inside_blocks(plan):
        reach_modules(clone, plan, _CALL.get)
    reach_features(clone, plan, _CALL.get)
    reach_blocks(clone, plan, _CALL.get)
    return clone


def progressive_sampler(sampler: Any, wanted: Request) -> Any:
    """Return a SAMPLER that runs ``sampler`` in the stages that ``wanted`` asks for.

    Raises:
        StrettoError: bad settings, or ``sampler`` already runs in stages.
    """
    return ProgressiveSampler(sampler, wanted, sampler_traits)


def _refuse_core_cache(options: dict[str, Any]) -> None:
    holder = options.get("easycache")
    if holder is not None:
        name = getattr(holder, "name", "EasyCache")
        raise ConflictError(
            f"Stretto Cache and ComfyUI's own {name} node are on the same model; both would skip steps. "
            "Remove or bypass one of the two nodes."
        )


def _outer_sample(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Resolve, run, record. Arguments: noise, latent_image, sampler, sigmas, denoise_mask, callback, ..."""
    guider, noise, sampler, sigmas = executor.class_obj, args[0], args[2], args[3]
    before = guider.model_options
    plan = before.get("transformer_options", {}).get(PLAN_KEY, Plan())
    sampler, plan = carried_request(sampler, plan)
    args = (*args[:2], sampler, *args[3:])
    if any(plan.of(name) for name in SKIPPING):
        _refuse_core_cache(before["transformer_options"])
    patcher = guider.model_patcher
    facts = _facts(guider, noise, sampler, sigmas, kwargs.get("latent_shapes"))
    if inside_blocks(plan):
        facts = replace(facts, modules_in_place=modules_in_place(patcher, facts.network, facts.descriptor))
    facts = replace(facts, worked_on=kwargs.get("denoise_mask", args[4] if len(args) > 4 else None))
    facts = with_stage_obstacle(facts, plan, guider, sampler, args, kwargs)
    execution = resolve(plan, facts, _notes(before))
    options = comfy.model_patcher.create_model_options_clone(before)
    seed = kwargs.get("seed", args[7] if len(args) > 7 else None)
    device = patcher.load_device
    run = RunState(
        facts.schedule,
        execution.sessions,
        {site.key: site for site in facts.descriptor.sites(facts.network)} if facts.descriptor else {},
        TraceBuilder(_header(plan, facts, execution, guider, seed)),
        clock_for(device),
    )
    _install(options, run, facts, execution)
    args = in_stages(args, run)
    for outcome in execution.outcomes:
        log.info("%s: %s. %s", outcome.technique, outcome.status, outcome.reason)
    outcome = "failed"
    guider.model_options = options
    synchronize(device)
    start_peak_memory(device)
    elapsed = run.clock()
    try:
        samples = executor(*args, **kwargs)
        outcome = "completed"
        return samples
    except comfy.model_management.InterruptProcessingException:
        outcome = "interrupted"
        raise
    finally:
        elapsed()
        synchronize(device)
        guider.model_options = before
        memory = {**peak_memory(device), "store_peak_bytes": run.peak_bytes}
        records = run.records() if outcome == "completed" else {}
        sections = run.sections()
        run.close()
        document = run.trace.document(outcome, elapsed(), run.overhead, memory) | sections
        document |= {"records": records} if records else {}
        TRACES.add(*execution_ids(), document)


def _facts(guider: Any, noise: torch.Tensor, sampler: Any, sigmas: torch.Tensor, latent_shapes: Any) -> Facts:
    patcher = guider.model_patcher
    network = patcher.model.diffusion_model
    cfg = getattr(guider, "cfg", None)
    dtype = getattr(patcher.model, "manual_cast_dtype", None) or patcher.model.get_dtype()
    return Facts(
        network=network,
        descriptor=describe(network),
        sampler=sampler_traits(sampler),
        schedule=schedule_of(sigmas.tolist()),
        latent_shape=tuple(noise.shape),
        branches=1 if cfg == 1.0 and not guider.model_options.get("disable_cfg1_optimization") else 2,
        element_bytes=torch.empty((), dtype=dtype).element_size(),
        free_bytes=int(comfy.model_management.get_free_memory(patcher.load_device)),
        free_system_bytes=int(comfy.model_management.get_free_memory(torch.device("cpu"))),
        nested=latent_shapes is not None and len(latent_shapes) > 1,
    )


def sampler_traits(sampler: Any) -> SamplerTraits:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_").removesuffix("_function")
    traits = traits_of(name)
    churn = getattr(sampler, "extra_options", {}).get("s_churn", 0.0)
    return replace(traits, stochastic=True) if churn else traits


def _notes(model_options: dict[str, Any]) -> list[str]:
    """Name what other packs have put on the model, since it takes part in the run."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = sorted({str(key) for by_key in wrappers.values() for key in by_key if key not in (KEY, None)})
    return [f"also on this model: {', '.join(keys)}"] if keys else []


def _header(plan: Plan, facts: Facts, execution: Execution, guider: Any, seed: Any) -> dict[str, Any]:
    model = guider.model_patcher.model
    return {
        "model": {
            "family": facts.descriptor.family if facts.descriptor else None,
            "network": type(facts.network).__name__,
            "blocks": len(facts.descriptor.sites(facts.network)) if facts.descriptor else 0,
            "dtype": str(getattr(model, "manual_cast_dtype", None) or model.get_dtype()).removeprefix("torch."),
            "device": str(guider.model_patcher.load_device),
        },
        "sampler": {
            "name": facts.sampler.name,
            "single_call": facts.sampler.single_call,
            "multistep": facts.sampler.multistep,
            "stochastic": facts.sampler.stochastic,
            "known": facts.sampler.known,
        },
        "latent_shape": list(facts.latent_shape),
        "sigmas": list(facts.schedule.sigmas),
        "cfg": getattr(guider, "cfg", None),
        "seed": seed,
        "plan": plan.to_json(),
        "techniques": [outcome.to_json() for outcome in execution.outcomes],
        "notes": list(execution.notes),
    }


def current_prompt_id() -> str | None:
    """Return the id of the prompt that ComfyUI executes now, or None outside its queue."""
    return execution_ids()[0]


def execution_ids() -> tuple[str | None, str | None]:
    """Return (prompt id, node id) of what ComfyUI executes now; (None, None) outside its queue."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None, None
    context = get_executing_context()
    return (context.prompt_id, context.node_id) if context is not None else (None, None)


def _install(options: dict[str, Any], run: RunState, facts: Facts, execution: Execution) -> None:
    """Hang the run's closures into its own copy of the model options."""
    add = comfy.patcher_extension.add_wrapper_with_key
    add(WrappersMP.PREDICT_NOISE, KEY, _predict_noise(run), options, is_model_options=True)
    if not run.sessions:
        return
    save_guidance(options, run)
    hooks = _install_blocks(options, run) if execution.needs_blocks else {}
    if run.inside_attention:
        attend_with(options, _CALL.get, run.attention)
    with_kept_keys(options, run, _CALL.get)
    if execution.needs_modules:
        skip_hollow_attention(options, _CALL.get)
    add(WrappersMP.APPLY_MODEL, KEY, _apply_model(run, hooks, facts), options, is_model_options=True)
    if execution.reserve_bytes:
        reserve = _prepare_sampling(execution.reserve_bytes)
        add(WrappersMP.PREPARE_SAMPLING, KEY, reserve, options, is_model_options=True)


@dataclass(frozen=True)
class _Hook:
    """Our replacement of one block, what it replaced (None: nothing), and the block's depth."""

    patch: Callable
    previous: Callable | None
    depth: int


def _install_blocks(options: dict[str, Any], run: RunState) -> dict[tuple[str, int], _Hook]:
    """Chain a replacement before every block and return ours by hook key."""
    transformer_options = options.setdefault("transformer_options", {})
    replaces = transformer_options["patches_replace"] = dict(transformer_options.get("patches_replace", {}))
    replaces["dit"] = dict(replaces.get("dit", {}))
    ours = {}
    for key, site in run.sites.items():
        previous = replaces["dit"].get(key)
        ours[key] = _Hook(_block_patch(run, site, previous), previous, site.depth)
        replaces["dit"][key] = ours[key].patch
    return ours


def _with_hooks(
    args: tuple,
    kwargs: dict[str, Any],
    options: dict[str, Any],
    hooks: dict[tuple[str, int], _Hook],
    depths: frozenset[int],
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a model call with only the hooks at ``depths`` left of ours.

    A replaced block costs time even when it is merely run: ComfyUI sends SD3's through torch.utils.checkpoint.
    """
    idle = {key: hook for key, hook in hooks.items() if hook.depth not in depths}
    if not idle:
        return args, kwargs
    replaces = dict(options["patches_replace"])
    replaces["dit"] = dict(replaces["dit"])
    for key, hook in idle.items():
        if replaces["dit"].get(key) is not hook.patch:
            continue  # somebody took its place later on
        if hook.previous is None:
            del replaces["dit"][key]
        else:
            replaces["dit"][key] = hook.previous
    slim = {**options, "patches_replace": replaces}
    swapped = tuple(slim if item is options else item for item in args)
    return swapped, {name: slim if item is options else item for name, item in kwargs.items()}


def _block_patch(run: RunState, site: BlockSite, previous: Callable | None) -> Callable:
    @torch.compiler.disable  # a compiled network would take decisions into its graphs, and compile for each of them
    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        def original(arguments: dict[str, Any]) -> dict[str, Any]:
            return extra["original_block"](arguments) if previous is None else previous(arguments, extra)

        call = _CALL.get()
        return original(args) if call is None else run.block(call, site, args, original)

    return patch


def _prepare_sampling(reserve_bytes: int) -> Callable:
    """Make room for stored features: pretend the batch were as much larger as they take memory."""

    def prepare_sampling(executor: Callable, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        shape = list(noise_shape)
        base = float(model.model.memory_required([shape[0] * 2, *shape[1:]]))
        extra = -(-shape[0] * reserve_bytes // max(int(base), 1))
        return executor(model, [shape[0] + int(extra), *shape[1:]], *args, **kwargs)

    return prepare_sampling


def _predict_noise(run: RunState) -> Callable:
    """One evaluation: all guidance branches of one noise level."""

    def predict_noise(executor: Callable, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        entered, elapsed = time.perf_counter(), run.clock()
        network_input = executor.class_obj.inner_model.model_sampling.calculate_input(timestep, x)
        run.begin(float(timestep.flatten()[0]), network_input)
        started = time.perf_counter()
        result = executor(x, timestep, *args, **kwargs)
        ended = time.perf_counter()
        elapsed()
        run.end(elapsed)
        run.overhead += started - entered + time.perf_counter() - ended
        return result

    return predict_noise


def _apply_model(run: RunState, hooks: dict[tuple[str, int], _Hook], facts: Facts) -> Callable:
    """One batched network call inside an evaluation."""

    def apply_model(executor: Callable, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = _options(args, kwargs)
        if run.evaluation is None or options is None:
            return executor(x, sigma, *args, **kwargs)
        entered, inside = time.perf_counter(), 0.0

        def compute() -> torch.Tensor:
            nonlocal inside
            depths = run.depths(call)
            arguments = (args, kwargs) if depths is None else _with_hooks(args, kwargs, options, hooks, depths)
            started = time.perf_counter()
            denoised = executor(x, sigma, *arguments[0], **arguments[1])
            inside += time.perf_counter() - started
            return denoised

        call = _make_call(run.evaluation, executor.class_obj, x, sigma, options, hooks, facts, _control(args, kwargs))
        call.context_tokens, call.references = _context_tokens(args, kwargs), _references(kwargs)
        if any(isinstance(session, FeatureSession) for session in run.sessions):
            call.weights = weights_identity(executor.class_obj), _weight_hooks(executor.class_obj)
            first = next(iter(run.sites), None)
            call.rehearse = first and rehearsal(executor, x, sigma, args, kwargs, options, first)
        if run.inside_blocks:
            call.layout = layout((x, args, sorted(kwargs.items())))
            call.inside = run.module
        token = _CALL.set(call)
        try:
            denoised = run.network(call, compute)
        finally:
            _CALL.reset(token)
        if call.decisions[0] == COMPUTED:
            run.overhead += time.perf_counter() - entered - inside
        return denoised

    return apply_model


def _options(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the transformer options of a model call, recognised by what they hold."""
    candidates = (kwargs.get("transformer_options"), *reversed(args))
    return next((item for item in candidates if isinstance(item, dict) and item.get("uuids")), None)


def _make_call(
    evaluation: Evaluation,
    model: Any,
    x: torch.Tensor,
    sigma: torch.Tensor,
    options: dict[str, Any],
    hooks: dict[tuple[str, int], _Hook],
    facts: Facts,
    control: bool,
) -> Call:
    model_sampling = model.model_sampling
    dit = options.get("patches_replace", {}).get("dit", {})
    window = options.get("context_window")
    shared = (
        tuple(window.index_list) if window is not None else None,
        _fingerprint(options.get("patches", {}), dit, hooks),
        control,
        _weight_hooks(model),
        x.device,
    )
    names = [BRANCH_NAMES.get(kind, "other") for kind in options["cond_or_uncond"]]
    branches = tuple(Branch(name, (uuid, *shared)) for name, uuid in zip(names, options["uuids"], strict=True))
    in_place = all(dit.get(key) is hook.patch for key, hook in hooks.items())
    return Call(
        evaluation=evaluation,
        branches=branches,
        rows=x.shape[0] // len(branches),
        tokens=facts.descriptor.tokens(facts.network, x.shape),
        network_input=model_sampling.calculate_input(sigma, x),
        to_prediction=lambda denoised: _prediction(model_sampling, sigma, denoised, x),
        to_denoised=lambda prediction: model_sampling.calculate_denoised(sigma, prediction, x),
        skippable=in_place and x.shape[0] % len(branches) == 0,
    )


def _control(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a ControlNet takes part: where it sets in or ends, features are others. (c_concat, c_crossattn, control)"""
    return (kwargs["control"] if "control" in kwargs else args[2] if len(args) > 2 else None) is not None


def _context_tokens(args: tuple, kwargs: dict[str, Any]) -> int:
    """Return the length of the text a model call is given. (c_concat, c_crossattn, control)"""
    context = kwargs["c_crossattn"] if "c_crossattn" in kwargs else args[1] if len(args) > 1 else None
    return context.shape[1] if isinstance(context, torch.Tensor) and context.ndim > 2 else 0


def _references(kwargs: dict[str, Any]) -> bool:
    """Whether a model call is given reference pictures, under any of ComfyUI's names for them."""
    return any(value is not None and name.startswith(REFERENCES) for name, value in kwargs.items())


def _weight_hooks(model: Any) -> tuple:
    """Identify the weight hooks in force, with their strengths: they make another network of the same module."""
    group = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return tuple((id(hook), getattr(hook, "strength", 1.0)) for hook in getattr(group, "hooks", ()))


def _fingerprint(patches: dict[str, Any], dit: dict[Any, Any], ours: dict[Any, _Hook]) -> tuple:
    """Identify the foreign patches of a call: features made under other patches are other features."""
    lists = tuple((name, *map(id, entries)) for name, entries in sorted(patches.items()))
    foreign = ((key, patch) for key, patch in dit.items() if key not in ours or ours[key].patch is not patch)
    return lists, tuple((key, id(patch)) for key, patch in foreign)


def _prediction(model_sampling: Any, sigma: torch.Tensor, denoised: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Invert ``calculate_denoised``, which is affine in the network's output for every parametrisation."""
    zero = x.new_zeros(x.shape[0], *(1,) * (x.ndim - 1))  # the gain is one number per row
    gain = model_sampling.calculate_denoised(sigma, torch.ones_like(zero), zero)
    return (denoised - model_sampling.calculate_denoised(sigma, zero, x)) / gain
