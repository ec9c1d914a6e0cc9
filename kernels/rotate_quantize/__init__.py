"""Rotation of rows by a block-diagonal Hadamard matrix, and rounding of rows to int8."""

from functools import cache

import torch

from . import reference
from .reference import LIMIT, MIN_SCALE, SIZES, hadamard, quantize_rows

__all__ = ["LIMIT", "MIN_SCALE", "SIZES", "hadamard", "quantize_rows", "rotate", "rotate_quantize", "why_not_bf16"]

#: Blocks rotated at a time: what the caches of a core hold.
_PIECE = 512


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``x`` with every block of ``size`` entries of its last axis rotated; :func:`.reference.rotate` is the specification.

    The matrix of side 256 is the Kronecker product of two of side 16: two small products take a third of the time of one with
    all of it on a processor, and sums are in another order. A GPU's matrix units take the large one as it is.
    """
    if size != 256 or x.device.type != "cpu" or x.shape[-1] % 256:
        return reference.rotate(x, size)
    side = hadamard(16, x.device).to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def product(piece: torch.Tensor) -> torch.Tensor:
        return torch.matmul(side, (piece.to(side.dtype).reshape(-1, 16) @ side).view(-1, 16, 16)).view(-1, 256)

    blocks = x.reshape(-1, 256)
    if blocks.shape[0] <= _PIECE:
        return product(blocks).view(x.shape)
    rotated = torch.empty(blocks.shape, dtype=side.dtype)
    for piece, place in zip(blocks.split(_PIECE), rotated.split(_PIECE)):
        place.copy_(product(piece))
    return rotated.view(x.shape)


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
    if x.device.type != "cpu":
        return reference.rotate_quantize(x, size, pre_scale)
    flat = x.reshape(-1, x.shape[-1])
    step = max(256 * _PIECE // max(x.shape[-1], 1), 1)
    if flat.shape[0] <= step:
        codes, scales = _piece(flat, size, pre_scale)
    else:
        codes = torch.empty(flat.shape, dtype=torch.int8)
        scales = torch.empty(flat.shape[0], 1)
        for start in range(0, flat.shape[0], step):
            codes[start : start + step], scales[start : start + step] = _piece(flat[start : start + step], size, pre_scale)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def _piece(x: torch.Tensor, size: int, pre_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if pre_scale is not None:
        x = x.float() * pre_scale.float()
    if why_not_bf16(x, size) is not None or x.shape[-1] % size:
        return quantize_rows(rotate(x, size))
    rotated = x.reshape(-1, size) @ hadamard(size, x.device).to(torch.bfloat16)
    return quantize_rows(rotated.view(x.shape))


@cache
def _multiplies_bf16() -> bool:
    capability = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" in capability:
        return bool(capability["avx512_bf16"])
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known()) if known is not None else False
