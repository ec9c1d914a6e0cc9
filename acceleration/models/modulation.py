"""Adaptive layer norm as blocks apply it, for reading TeaCache's indicator (arXiv 2411.19108) without running one."""

import torch

#: Dtypes of weights that are numbers by themselves.
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``normed * (1 + scale) + shift``.

    Args:
        normed: [B, N, D].
        shift: [B, 1 or N, D].
        scale: like ``shift``.
    """
    return torch.addcmul(shift, normed, 1 + scale)


def shift_and_scale(modulation: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first two parts of a modulation [B, k * width], in the order in which most blocks keep them.

    Both are [B, 1, width].
    """
    return modulation[:, None, :width], modulation[:, None, width : 2 * width]


def leading(linear: torch.nn.Module, x: torch.Tensor, width: int) -> torch.Tensor:
    """Return the first ``width`` features of ``linear(x)``, without making the others where the layer is a plain one.

    A layer that somebody hooked or patched, whose weights are quantized, or that are on another device, runs whole.

    Args:
        linear: a linear layer of at least ``width`` features.
        x: [..., D].
        width: features wanted, no more than the layer has.
    """
    own = vars(linear)
    weight, bias = (own["_parameters"].get(name) for name in ("weight", "bias"))
    plain = (
        type(weight) is torch.nn.Parameter
        and weight.dtype in _PLAIN
        and weight.dim() == 2
        and weight.device == x.device
        and not (own["_forward_hooks"] or own.get("weight_function") or "forward" in own)
    )
    if not plain:
        return linear(x)[..., :width]
    return torch.nn.functional.linear(x, weight[:width].to(x.dtype), None if bias is None else bias[:width].to(x.dtype))


def rms_norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return ``x`` [..., D] over its root mean square, without a learned gain."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=eps)
