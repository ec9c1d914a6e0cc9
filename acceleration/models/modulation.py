"""Adaptive layer norm as blocks apply it, for reading TeaCache's indicator (arXiv 2411.19108) without running one."""

import torch


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


def rms_norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return ``x`` [..., D] over its root mean square, without a learned gain."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=eps)
