"""How ComfyUI's modules inside blocks are reached: object patches on ``forward``, and an attention override."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..caching.technique import keeps_text
from ..caching.text_features import TEXT
from ..compatibility import TECHNIQUES
from ..evaluation import Call
from ..models import ModelDescriptor, ModulePart, TextPart, describe
from ..plan import Plan, Request

#: Returns the network call in progress, None outside of one.
Current = Callable[[], Call | None]


@dataclass(frozen=True, eq=False)
class ModulePatch:
    """Object patch in the place of a part's ``forward``: passes through, unless the call in progress looks inside blocks.

    The module itself stays where it is: names of weights, LoRAs, offloading and quantized layers know nothing of it.
    """

    part: ModulePart
    original: Callable
    current: Current

    @torch.compiler.disable  # a compiled network would compile for every decision
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.current()
        if call is None or call.inside is None:
            return self.original(*args, **kwargs)
        return call.inside(call, self.part, lambda: self.original(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class TextPatch:
    """Object patch in the place of a text projection's ``forward``: passes through, unless the call keeps text features."""

    part: TextPart
    original: Callable
    current: Current

    def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled network takes the projection alone into its graph.
        call = None if args or kwargs or torch.compiler.is_compiling() else self.current()
        keep = None if call is None else call.scratch.get(TEXT)
        return self.original(given, *args, **kwargs) if keep is None else keep(self.part, given, self.original)


def reach_modules(clone: Any, plan: Plan, current: Current) -> None:
    """Patch what ``plan`` needs to reach inside blocks; once, however often it is asked.

    Cacheable modules are patched in front of what patches them already; text projections only where nobody does.
    """
    network = clone.model.diffusion_model
    descriptor = describe(network)
    if descriptor is None:
        return
    if any(_whole_modules(request) for request in plan.requests):
        _reach_sites(clone, network, descriptor, current)
    if any(keeps_text(request) for request in plan.requests):
        _reach_text(clone, network, descriptor, current)


def _whole_modules(request: Request) -> bool:
    """Whether a request acts on cacheable modules; one that keeps text features may reach inside blocks for these alone."""
    technique = TECHNIQUES[request.technique]
    return technique.inside_blocks(request) and (not keeps_text(request) or technique.whole_modules(request))


def _reach_sites(clone: Any, network: Any, descriptor: ModelDescriptor, current: Current) -> None:
    for site in descriptor.module_sites(network):
        for part in site.parts:
            name = _forward_of(part.path)
            original = clone.get_model_object(name)
            if not isinstance(original, ModulePatch):
                clone.add_object_patch(name, ModulePatch(part, original, current))


def _reach_text(clone: Any, network: Any, descriptor: ModelDescriptor, current: Current) -> None:
    for part in descriptor.text_parts(network):
        name = _forward_of(part.path)
        original = clone.get_model_object(name)
        if inspect.ismethod(original) and original.__self__ is network.get_submodule(part.path):
            clone.add_object_patch(name, TextPatch(part, original, current))


def modules_in_place(patcher: Any, network: Any, descriptor: ModelDescriptor | None) -> bool:
    """Whether nobody has taken the place of our patches since: half a replaced attention would be nonsense."""
    sites = descriptor.module_sites(network) if descriptor else ()
    patches = patcher.object_patches
    return all(isinstance(patches.get(_forward_of(path)), ModulePatch) for site in sites for path in site.paths)


def skip_hollow_attention(options: dict[str, Any], current: Current) -> None:
    """Chain an attention override into model options that leaves out attention whose result nobody will see."""
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get("optimized_attention_override")

    @torch.compiler.disable
    def attention(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any):
        call = current()
        if call is not None and call.hollow:
            return q.new_zeros(()).expand(_attention_shape(q, v, heads, **kwargs))
        if previous is not None:
            return previous(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    transformer_options["optimized_attention_override"] = attention


def layout(value: Any) -> Hashable:
    """Return the shapes, without the batch, of all tensors in nested sequences; anything else counts for nothing."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape[1:])
    return tuple(layout(item) for item in value) if isinstance(value, list | tuple) else None


def _forward_of(path: str) -> str:
    """Return the name under which ComfyUI patches the ``forward`` of a module of the network."""
    return f"diffusion_model.{path}.forward"


def _attention_shape(
    q: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **_: Any,
) -> tuple[int, ...]:
    """Return the shape of attention's result: [B, L, heads * D], or [B, heads, L, D] with ``skip_output_reshape``.

    Args:
        q: [B, L, heads * D], or [B, heads, L, D] with ``skip_reshape``.
        v: like ``q``, of any length.
        heads: number of heads.
        skip_reshape: see ``q``.
        skip_output_reshape: see above.
    """
    batch, length = q.shape[0], q.shape[2 if skip_reshape else 1]
    width = v.shape[-1] if skip_reshape else v.shape[-1] // heads
    return (batch, heads, length, width) if skip_output_reshape else (batch, length, heads * width)
