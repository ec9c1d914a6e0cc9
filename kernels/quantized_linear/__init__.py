"""Linear layers with quantized weights: torch's integer and fp8 products where they run, the reference elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..rotate_quantize import rotate_quantize
from . import reference
from .reference import dequantized_linear

__all__ = ["INT8", "SCALED_FP8", "dequantized_linear", "fp8_linear", "int8_linear", "why_not_fp8", "why_not_int8"]

#: Entries of an int32 product made at once: 256 MiB.
CHUNK = 1 << 26
_SMALL = 1 << 17
FP8_LIMIT = 448.0


@dataclass(frozen=True)
class Constraint:
    """What a product of torch needs: a check of (input, weight), and the words for when it fails."""

    holds: Callable[[torch.Tensor, torch.Tensor], bool]
    otherwise: str


#: ``torch._int_mm``. On CUDA its library wants both sides in multiples of 8; rows are padded to 32 here.
INT8 = (
    Constraint(lambda x, w: w.dtype == torch.int8, "the weight is not int8"),
    Constraint(lambda x, w: x.device == w.device, "input and weight are on different devices"),
    Constraint(lambda x, w: x.device.type in ("cpu", "cuda"), "torch has no int8 product on this device"),
    Constraint(lambda x, w: not w.is_cuda or w.shape[1] % 8 == 0, "the input channels are no multiple of 8"),
    Constraint(lambda x, w: not w.is_cuda or w.shape[0] % 8 == 0, "the output channels are no multiple of 8"),
    Constraint(lambda x, w: w.shape[1] <= 133_144, "32-bit sums could overflow beyond 133,144 input channels"),
    Constraint(lambda x, w: hasattr(torch, "_int_mm"), "this torch has no int8 product"),
)
#: ``torch._scaled_mm`` with a scale per row of both factors.
SCALED_FP8 = (
    Constraint(lambda x, w: w.dtype == torch.float8_e4m3fn, "the weight is not fp8 e4m3"),
    Constraint(lambda x, w: x.device == w.device, "input and weight are on different devices"),
    Constraint(lambda x, w: x.is_cuda, "fp8 products pay only on a GPU"),
    Constraint(lambda x, w: w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0, "a side is no multiple of 16"),
    Constraint(
        lambda x, w: torch.cuda.get_device_capability(w.device) >= (9, 0), "the GPU has no fp8 product with row scales"
    ),
)


def why_not_int8(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why :func:`int8_linear` uses the reference, or None for ``torch._int_mm``."""
    broken = next((c.otherwise for c in INT8 if not c.holds(x, weight)), None)
    return broken or _int8_trial(weight.device)


def why_not_fp8(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why :func:`fp8_linear` cannot multiply in fp8, or None."""
    broken = next((c.otherwise for c in SCALED_FP8 if not c.holds(x, weight)), None)
    return broken or _fp8_trial(weight.device)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotation: int = 0,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` on the int8 grid; see :func:`.reference.int8_linear`, which it equals.

    Rows are taken in chunks, so that the int32 product never holds more than 2^26 entries.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if why_not_int8(x, weight) is not None:
        return reference.int8_linear(x, weight, scale, bias, rotation, pre_scale)
    reference.check(x, weight, scale, bias)
    flat = x.reshape(-1, x.shape[-1])
    columns = scale.float().reshape(1, -1)
    bias = None if bias is None else bias.float()
    y = torch.empty(flat.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    step = max(CHUNK // max(weight.shape[0], 1), 32)
    for start in range(0, flat.shape[0], step):
        codes, rows = rotate_quantize(flat[start : start + step], rotation, pre_scale)
        product = _int_mm(codes, weight)
        # On a processor a few rows at a time, so that what is between two operations stays in the caches.
        small = max(_SMALL // weight.shape[0], 1) if x.device.type == "cpu" else step
        for at in range(0, product.shape[0], small):
            part = product[at : at + small].float().mul_(rows[at : at + small])
            part = part.mul_(columns) if bias is None else torch.addcmul(bias, part, columns)
            y[start + at : start + at + part.shape[0]] = part
    return y.view(*x.shape[:-1], weight.shape[0])


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` with both factors in fp8 e4m3; the activation is scaled token by token.

    Args:
        x: floating [..., K].
        weight: fp8 e4m3 [N, K].
        scale: fp32 of N numbers, or one.
        bias: [N] or None.

    Raises:
        ValueError: the shapes do not belong together, or :func:`why_not_fp8` has a reason.
    """
    reason = why_not_fp8(x, weight)
    if reason is not None:
        raise ValueError(f"fp8 product: {reason}")
    reference.check(x, weight, scale, bias)
    flat = x.reshape(-1, x.shape[-1]).float()
    rows = (flat.abs().amax(-1, keepdim=True) / FP8_LIMIT).clamp_(min=1e-30)
    codes = (flat / rows).clamp_(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn)
    columns = scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    y = torch._scaled_mm(codes, weight.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)
    y = y.to(x.dtype) if bias is None else (y.float() + bias.float()).to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _int_mm(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 [M, N]; on CUDA the product refuses 16 rows and fewer, so rows of zeros fill up to 32."""
    short = 32 - codes.shape[0] if codes.is_cuda and codes.shape[0] < 32 else 0
    if short:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, short))
    product = torch._int_mm(codes, weight.t())
    return product[: product.shape[0] - short] if short else product


@cache
def _int8_trial(device: torch.device) -> str | None:
    """Multiply once on ``device`` and return why that cannot be used there, or None."""
    a = (torch.arange(64 * 32, device=device) % 255 - 127).to(torch.int8).view(64, 32)
    try:
        product = _int_mm(a, a)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's int8 product does not run here ({str(error).strip().splitlines()[0][:80]})"
    right = torch.equal(product, reference.int8_product(a.cpu(), a.cpu()).to(device))
    return None if right else "torch's int8 product gives wrong sums here"


@cache
def _fp8_trial(device: torch.device) -> str | None:
    a = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    ones = torch.ones(32, 1, device=device)
    try:
        product = torch._scaled_mm(a, a.t(), scale_a=ones, scale_b=ones.t().contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's fp8 product does not run here ({str(error).strip().splitlines()[0][:80]})"
    return None if bool((product == 32).all()) else "torch's fp8 product gives wrong sums here"
