"""Rotation of rows by a block-diagonal Hadamard matrix, and rounding of rows to int8."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from . import reference
from .reference import LIMIT, MIN_SCALE, SIZES, hadamard, quantize_rows

__all__ = [
    "CONSTRAINTS", "LIMIT", "MIN_SCALE", "SIZES", "hadamard", "quantize_rows", "rotate", "rotate_quantize", "why_not_bf16",
    "why_not_triton",
]  # fmt: skip


@dataclass(frozen=True)
class Constraint:
    """What the Triton kernel needs of its inputs: a check of (input, rotation), and the words for when it fails."""

    holds: Callable[[torch.Tensor, int], bool]
    otherwise: str


CONSTRAINTS = (
    Constraint(lambda x, size: x.is_cuda, "the input is not on a CUDA device"),
    Constraint(
        lambda x, size: x.dtype in (torch.bfloat16, torch.float16, torch.float32), "the input is no 16- or 32-bit float"
    ),
    Constraint(lambda x, size: size in (0, 16, 64, 256), "the rotation is none of 16, 64 and 256"),
    Constraint(lambda x, size: not size or x.shape[-1] % size == 0, "the rotation does not divide the channels"),
    Constraint(lambda x, size: 0 < x.shape[-1] <= 16384, "rows of more than 16,384 channels do not fit a program"),
    Constraint(lambda x, size: x.numel() > 0, "the input is empty"),
    Constraint(lambda x, size: x.is_contiguous(), "the input is not contiguous"),
    Constraint(lambda x, size: not (torch.is_grad_enabled() and x.requires_grad), "the input wants a gradient"),
    Constraint(lambda x, size: find_spec("triton") is not None, "Triton is not installed"),
)

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


def why_not_triton(x: torch.Tensor, size: int) -> str | None:
    """Return why :func:`rotate_quantize` does not use its Triton kernel for ``x``, or None."""
    broken = next((constraint.otherwise for constraint in CONSTRAINTS if not constraint.holds(x, size)), None)
    return broken or _triton_trial(x.device)


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
    if why_not_triton(x, size) is None:
        from .triton_kernel import rotate_quantize as kernel  # only here: Triton takes its time, and may be missing

        return kernel(x, size, pre_scale)
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
def _triton_trial(device: torch.device) -> str | None:
    """Run the kernel once on ``device`` and return why it cannot be used there, or None."""
    x = torch.linspace(-3, 5, 512).view(2, 256)
    right, scale = reference.rotate_quantize(x, 256)
    try:
        from .triton_kernel import rotate_quantize as kernel

        codes, scales = kernel(x.to(device), 256)
    except Exception as error:  # a missing compiler, driver or architecture shows as almost any error
        return f"Triton does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    near = int((codes.cpu().int() - right.int()).abs().max()) <= 1 and torch.allclose(scales.cpu(), scale, rtol=1e-5)
    return None if near else "Triton rotates or rounds wrongly here"


@cache
def _multiplies_bf16() -> bool:
    capability = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" in capability:
        return bool(capability["avx512_bf16"])
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known()) if known is not None else False
