"""What of a plan can run on a transformer of diffusers, and why not what cannot."""

from dataclasses import replace
from typing import Any

import torch

from ..compatibility import TECHNIQUES
from ..errors import StrettoError
from ..facts import OFF, Facts, Outcome
from ..models.diffusers import PACKED, TRANSFORMERS, LatentDescriptor, Transformer
from ..plan import Plan, Request
from ..resolve import Execution, resolve

#: Where a module keeps what ``module.compile()`` made of it.
COMPILED = "_compiled_call_impl"
#: Techniques that act inside attention.
ATTENTION = ("attention", "attention_plan")
#: Techniques that work here.
SUPPORTED = ("measure", "cache", "table", "guidance", *ATTENTION)
#: Why the others do not.
ELSEWHERE = {
    "resolution": "it is a sampler that runs in stages, and here the pipeline steps its scheduler itself",
    "frame_rate": "it samples twice, at two lengths, and here the pipeline samples",
    "region": "which tokens a block can leave out is described for ComfyUI's blocks only",
    "temporal_features": "its tables stand for weights that ComfyUI's loader keeps",
}
RECORDS = "it records a run for a node of ComfyUI, which makes a file that works here too"
UNSAID = "if this pipeline makes a second call for it, which it does not say beforehand"
#: Hooks of diffusers that skip parts of a network.
SKIPPING_HOOKS = frozenset(
    {
        "fbc_leader_block_hook",
        "mag_cache_leader_block_hook",
        "taylorseer_cache",
        "pyramid_attention_broadcast",
        "faster_cache_denoiser",
        "faster_cache_block",
    }
)


def resolve_here(plan: Plan, facts: Facts, obstacle: str, may_guide: bool = False) -> Execution:
    """Resolve what can run in this host; all else is off with the reason.

    Args:
        plan: what is wanted.
        facts: what is known.
        obstacle: why nothing but timing can run, "" where nothing stands in the way.
        may_guide: whether a second branch may come although ``facts`` know of one.

    Raises:
        StrettoError: a request marked as required cannot run.
    """
    outcomes: list[Outcome] = []
    for name, technique in TECHNIQUES.items():
        for request in plan.of(name):
            reason = _why_not(request, facts, obstacle)
            if not reason:
                (outcome,) = resolve(Plan((request,)), _facts_for(name, facts, may_guide)).outcomes
                if name == "guidance" and may_guide and outcome.session is not None:
                    outcome = replace(outcome, reason=f"{outcome.reason}; {UNSAID}")
                outcomes.append(outcome)
                continue
            if request.required:
                raise StrettoError(f"{technique.label(request)} is marked as required but cannot run: {reason}.")
            outcomes.append(Outcome(name, OFF, reason))
    return Execution(tuple(outcomes))


def _why_not(request: Request, facts: Facts, obstacle: str) -> str:
    """Return why a request cannot run here, "" where its technique is to decide."""
    name, descriptor = request.technique, facts.descriptor
    if name == "measure":
        return ""
    if name not in SUPPORTED:
        return f"{TECHNIQUES[name].label(request)} works in ComfyUI only: {ELSEWHERE.get(name, RECORDS)}"
    if not obstacle and name in ATTENTION and descriptor is not None:
        if descriptor.no_blocks and not descriptor.module_lists:
            return f"{descriptor.no_blocks}, and with them their attention"
        if descriptor.latents == PACKED and descriptor.sides is None:
            return (
                "the sides of the picture are not known: the network was given no positions of packed tokens, or those of "
                "reference pictures among them"
            )
    return obstacle


def _facts_for(name: str, facts: Facts, may_guide: bool) -> Facts:
    """Return what a technique is told: modules inside blocks are reached for attention alone, so caches know of none."""
    if name == "guidance" and may_guide:
        facts = replace(facts, branches=2)
    if name in ATTENTION or facts.descriptor is None:
        return facts
    return replace(facts, descriptor=replace(facts.descriptor, module_lists=()))


def as_reachable(known: Transformer | None, network: Any) -> tuple[Transformer | None, str]:
    """Return the transformer as its instance can be reached, and why nothing can be done with it, "" where something can."""
    if known is None:
        families = ", ".join(name for each in TRANSFORMERS for name in each.descriptor.networks)
        return None, f"the transformer {type(network).__name__} is not supported (supported: {families})"
    if getattr(network, COMPILED, None) is not None:
        return known, "the transformer is compiled as a whole: accelerate it first, or compile nothing"
    blocks = [block for _, name in known.descriptor.block_lists for block in getattr(network, name, ())]
    closed = ""
    if not blocks or any("hidden_states" not in parameters(block) for block in blocks):
        closed = "this version of diffusers has other blocks in it"
    elif any(("encoder_hidden_states" not in parameters(block)) for block in blocks if len(known.returns) > 1):
        closed = "this version of diffusers keeps picture and text in one stream"
    elif any(getattr(inner, COMPILED, None) is not None for block in blocks for inner in block.modules()):
        closed = "its blocks are compiled one by one"
    elif any(_offloaded_in_groups(block) for block in blocks):
        closed = "its blocks are moved to the device in groups, one ahead of the other"
    if not closed:
        return known, ""
    modules = () if "compiled" in closed else known.descriptor.module_lists
    descriptor: LatentDescriptor = replace(known.descriptor, block_lists=(), no_blocks=closed, module_lists=modules)
    return replace(known, descriptor=descriptor), ""


def _offloaded_in_groups(block: torch.nn.Module) -> bool:
    return "group_offloading" in _hooks(block)


def _hooks(module: torch.nn.Module) -> set[str]:
    """Names of the hooks of diffusers on a module and inside it."""
    registries = (getattr(inner, "_diffusers_hook", None) for inner in module.modules())
    return {name for registry in registries if registry is not None for name in getattr(registry, "hooks", {})}


def foreign_cache(network: Any, plan: Plan) -> str:
    """Return why a cache of somebody else's stands in the way of a plan, "" where none does.

    A cache of ours would skip steps beside it; the guidance saver would hand it half a batch, or leave out calls that it counts.
    """
    request = next((request for name in ("cache", "table", "guidance") for request in plan.of(name)), None)
    if request is None:
        return ""
    node = "Stretto Guidance Saver" if request.technique == "guidance" else "Stretto Cache"
    why = "the cache counts calls that would be left out" if request.technique == "guidance" else "both would skip steps"
    hooks = sorted(_hooks(network) & SKIPPING_HOOKS)
    if hooks or getattr(network, "is_cache_enabled", False):
        return (
            f"{node} and a cache of diffusers ({hooks[0] if hooks else 'enable_cache'}) are on the same transformer; "
            f"{why}. Call its disable_cache() first, or remove the hook."
        )
    if getattr(network, "_is_cached", False):
        return f"{node} and cache-dit are on the same transformer; {why}. Disable cache-dit first."
    return ""


def parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's own ``forward``, in order, without ``self``."""
    code = _unwrapped(type(module).forward).__code__
    return code.co_varnames[1 : code.co_argcount]


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
