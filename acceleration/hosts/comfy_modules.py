"""How ComfyUI's modules inside blocks are reached: object patches on ``forward``, and an attention override."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import Call
from ..models import ModelDescriptor, ModulePart, describe

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.current()
        if call is None or call.inside is None:
            return self.original(*args, **kwargs)
        return call.inside(call, self.part, lambda: self.original(*args, **kwargs))


def reach_modules(clone: Any, current: Current) -> None:
    """Patch the cacheable modules of a MODEL, in front of what patches them already; once, however often it is asked."""
    network = clone.model.diffusion_model
    descriptor = describe(network)
    for site in descriptor.module_sites(network) if descriptor else ():
        for part in site.parts:
            name = _forward_of(part.path)
            original = clone.get_model_object(name)
            if not isinstance(original, ModulePatch):
                clone.add_object_patch(name, ModulePatch(part, original, current))


def modules_in_place(patcher: Any, network: Any, descriptor: ModelDescriptor | None) -> bool:
    """Whether nobody has taken the place of our patches since: half a replaced attention would be nonsense."""
    sites = descriptor.module_sites(network) if descriptor else ()
    patches = patcher.object_patches
    return all(isinstance(patches.get(_forward_of(path)), ModulePatch) for site in sites for path in site.paths)


def skip_hollow_attention(options: dict[str, Any], current: Current) -> None:
    """Chain an attention override into model options that leaves out attention whose result nobody will see."""
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get("optimized_attention_override")

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
