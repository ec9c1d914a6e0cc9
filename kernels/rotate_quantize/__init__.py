"""Rotation of rows by a block-diagonal Hadamard matrix, and rounding of rows to int8."""

from functools import cache

import torch

from . import reference
from .reference import LIMIT, MIN_SCALE, SIZES, hadamard, quantize_rows, rotate

__all__ = ["LIMIT", "MIN_SCALE", "SIZES", "hadamard", "quantize_rows", "rotate", "rotate_quantize", "why_not_bf16"]


def why_not_bf16(x: torch.Tensor, size: int) -> str | None:
    """Return why :func:`rotate_quantize` rotates ``x`` in fp32, or None where it does so in bf16."""
    if x.dtype != torch.bfloat16:
        return "the input is not bf16"
    if x.device.type != "cpu":
        return "the input is not on the CPU"
    if size < 16:
        return "there is nothing, or little, to rotate"
    return None if _multiplies_bf16() else "this processor has no bf16 products"


def rotate_quantize(
    x: torch.Tensor, size: int = 0, pre_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the channels, rotate, and round every row to int8; :func:`.reference.rotate_quantize` is the specification.

    A bf16 input is rotated by bf16 products where the processor has them, several times faster than in fp32: the matrix is
    exact in bf16, sums are fp32, and the rounding of the result is a fiftieth of the noise that int8 adds.

    Args:
        x: floating [..., K].
        size: side of the rotated blocks, or 0.
        pre_scale: factor of every channel, [K], or None.

    Returns:
        int8 [..., K] and fp32 [..., 1].
    """
    if pre_scale is not None or why_not_bf16(x, size) is not None or x.shape[-1] % size:
        return reference.rotate_quantize(x, size, pre_scale)
    rotated = x.reshape(-1, size) @ hadamard(size, x.device).to(torch.bfloat16)
    return quantize_rows(rotated.view(x.shape))


@cache
def _multiplies_bf16() -> bool:
    capability = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" in capability:
        return bool(capability["avx512_bf16"])
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known()) if known is not None else False
