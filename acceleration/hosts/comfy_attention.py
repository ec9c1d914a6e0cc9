"""How ComfyUI's attention is reached: one override, chained in front of what others put there."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..evaluation import Attention, Call

#: Returns the network call in progress, None outside of one.
Current = Callable[[], Call | None]
#: Computes an attention [B, H, N, d], or None to leave it to ComfyUI.
Attend = Callable[[Call, Attention], torch.Tensor | None]


def attend_with(options: dict[str, Any], current: Current, attend: Attend) -> None:
    """Chain an override into model options that offers every attention of the network to ``attend`` first.

    What ``attend`` leaves goes on to the override that was there, or to the user's own attention function, with its
    arguments as they came.
    """
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get("optimized_attention_override")

    @torch.compiler.disable  # who attends, and to what, is decided outside of a compiled network's graphs
    def attention(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any):
        call = current()
        if call is not None and call.attending is not None:
            made = attend(call, _asked(q, k, v, heads, *args, **kwargs))
            if made is not None:
                return made if kwargs.get("skip_output_reshape") else made.transpose(1, 2).flatten(2)
        if previous is not None:
            return previous(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    transformer_options["optimized_attention_override"] = attention


def _asked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    *_: Any,
    skip_reshape: bool = False,
    scale: float | None = None,
    low_precision_attention: bool = True,
    transformer_options: dict[str, Any] | None = None,
    **__: Any,
) -> Attention:
    """Return a call of ComfyUI's attention function in one form, without a copy."""
    if not skip_reshape:
        q, k, v = (_to_heads(tensor, q.shape[-1] // heads) for tensor in (q, k, v))
    image = (transformer_options or {}).get("img_slice")
    return Attention(
        q,
        k,
        v,
        mask,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        exact=low_precision_attention is False,
        image_slice=None if image is None else (int(image[0]), int(image[1])),
    )


def _to_heads(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """[B, N, H * d] or [B, N, H, d] -> [B, H, N, d], a view."""
    return (tensor if tensor.ndim == 4 else tensor.unflatten(-1, (-1, width))).transpose(1, 2)
