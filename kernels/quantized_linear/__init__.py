"""Linear layers with quantized weights: the fastest of several integer products, torch's fp8 product, the reference elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch

from ..rotate_quantize import rotate_quantize
from . import reference
from .choices import Choices
from .reference import dequantized_linear

__all__ = [
    "INT8", "SCALED_FP8", "TRITON", "Choices", "decode_grid", "dequantized_linear", "fp8_linear", "int8_linear", "int8_ways",
    "why_not_fp8", "why_not_int8", "why_not_triton",
]  # fmt: skip

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
#: The Triton product: tensor cores' tiles without masks along K.
TRITON = (
    Constraint(lambda x, w: x.is_cuda and w.is_cuda, "the tensors are not on a CUDA device"),
    Constraint(lambda x, w: x.dtype in (torch.bfloat16, torch.float16, torch.float32), "the input is no 16- or 32-bit float"),
    Constraint(lambda x, w: w.shape[1] % 128 == 0, "the input channels are no multiple of 128"),
    Constraint(lambda x, w: w.shape[1] <= 133_144, "32-bit sums could overflow beyond 133,144 input channels"),
    Constraint(lambda x, w: find_spec("triton") is not None, "Triton is not installed"),
)


def why_not_int8(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why :func:`int8_linear` uses the reference, or None for ``torch._int_mm``."""
    broken = next((c.otherwise for c in INT8 if not c.holds(x, weight)), None)
    return broken or _int8_trial(weight.device)


def why_not_triton(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why the Triton product cannot be used, or None."""
    broken = next((c.otherwise for c in TRITON if not c.holds(x, weight)), None)
    return broken or _triton_trial(weight.device)


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
    branch: tuple[torch.Tensor, torch.Tensor] | None = None,
    choices: Choices | None = None,
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` on the int8 grid; see :func:`.reference.int8_linear`, which it equals.

    Args:
        x: floating [..., K].
        weight: int8 [N, K], rotated by ``rotation`` already.
        scale: fp32 of N numbers, or one.
        bias: [N] or None.
        rotation: side of the Hadamard blocks, or 0.
        pre_scale: [K] factors of the channels of x, or None.
        branch: factors [r, K] and [N, r] of a LoRA that is added beside the weight, or None.
        choices: the table that knows the fastest of :func:`int8_ways`; None takes the first.

    Raises:
        ValueError: the shapes do not belong together.
    """
    reference.check(x, weight, scale, bias)
    flat = x.reshape(-1, x.shape[-1])
    ways = int8_ways(flat, weight, scale, bias, rotation, pre_scale, branch)
    name = next(iter(ways))
    if choices is not None and len(ways) > 1 and not torch.compiler.is_compiling():
        rows = 1 << max(flat.shape[0] - 1, 0).bit_length()
        rank = branch[0].shape[0] if branch else 0
        key = f"{rows}x{weight.shape[1]}x{weight.shape[0]} {str(x.dtype).removeprefix('torch.')} rotation {rotation} rank {rank}"
        name = choices.fastest(key, ways, x.device)
    return ways[name]().view(*x.shape[:-1], weight.shape[0])


def int8_ways(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: int,
    pre_scale: torch.Tensor | None,
    branch: tuple[torch.Tensor, torch.Tensor] | None,
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what can make the product of :func:`int8_linear` here, by name, for ``x`` [M, K]; the safest first."""
    if why_not_int8(x, weight) is None:
        ways = {"torch._int_mm": partial(_torch_linear, x, weight, scale, bias, rotation, pre_scale, branch)}
    else:
        ways = {"reference": partial(_reference_linear, x, weight, scale, bias, rotation, pre_scale, branch)}
    if x.shape[0] and why_not_triton(x, weight) is None:
        ways["Triton"] = partial(_triton_linear, x, weight, scale, bias, rotation, pre_scale, branch)
    if x.is_cuda and pre_scale is None and _kitchen_trial(x.device) is None:
        ways["comfy-kitchen"] = partial(_kitchen_linear, x, weight, scale, bias, rotation, branch)
    return ways


def _reference_linear(x, weight, scale, bias, rotation, pre_scale, branch) -> torch.Tensor:
    return _beside(reference.int8_linear(x, weight, scale, bias, rotation, pre_scale), x, branch)


def _beside(y: torch.Tensor, x: torch.Tensor, branch: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    if branch is None:
        return y
    down, up = (factor.to(x.dtype) for factor in branch)
    return y.add_(torch.nn.functional.linear(torch.nn.functional.linear(x, down), up))


def _torch_linear(x, weight, scale, bias, rotation, pre_scale, branch) -> torch.Tensor:
    """Rows are taken in chunks, so that the int32 product never holds more than 2^26 entries."""
    columns = scale.float().reshape(1, -1)
    bias = None if bias is None else bias.float()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    step = max(CHUNK // max(weight.shape[0], 1), 32)
    for start in range(0, x.shape[0], step):
        codes, rows = rotate_quantize(x[start : start + step], rotation, pre_scale)
        product = _int_mm(codes, weight)
        # On a processor a few rows at a time, so that what is between two operations stays in the caches.
        small = max(_SMALL // weight.shape[0], 1) if x.device.type == "cpu" else step
        for at in range(0, product.shape[0], small):
            part = product[at : at + small].float().mul_(rows[at : at + small])
            part = part.mul_(columns) if bias is None else torch.addcmul(bias, part, columns)
            y[start + at : start + at + part.shape[0]] = part
    return _beside(y, x, branch)


def _triton_linear(x, weight, scale, bias, rotation, pre_scale, branch) -> torch.Tensor:
    from .triton_kernel import int8_product  # only here: Triton takes its time, and may be missing

    codes, rows = rotate_quantize(x.contiguous(), rotation, pre_scale)
    columns = scale.float().reshape(-1).expand(weight.shape[0]).contiguous()
    bias = None if bias is None else bias.float()
    if branch is None or x.dtype == torch.float32:  # the kernel adds in 16 bit
        return _beside(int8_product(codes, rows, weight, columns, bias, x.dtype), x, branch)
    down, up = (factor.to(x.dtype) for factor in branch)
    low = torch.nn.functional.linear(x, down)
    return int8_product(codes, rows, weight, columns, bias, x.dtype, low, up)


def _kitchen_linear(x, weight, scale, bias, rotation, branch) -> torch.Tensor:
    import comfy_kitchen

    bias = None if bias is None else bias.to(x.dtype)
    y = comfy_kitchen.int8_linear(
        x, weight, scale.float(), bias, out_dtype=x.dtype, convrot=rotation > 0, convrot_groupsize=rotation or 256
    )
    return _beside(y, x, branch)


def decode_grid(
    packed: torch.Tensor, relative: torch.Tensor, table: torch.Tensor | None, group: int, bits: int
) -> torch.Tensor | None:
    """Return int8 [N, K] of 4- or 6-bit codes by the Triton kernel, or None where it does not run.

    Args:
        packed: int8 [N, K * bits / 8].
        relative: fp8 e4m3 [N, K / group].
        table: fp32 [16] of levels, or None for whole numbers around 0.
        group: input channels that share a scale.
        bits: 4 or 6.
    """
    if not packed.is_cuda or find_spec("triton") is None or _triton_trial(packed.device) is not None:
        return None
    from .triton_kernel import decode_grid as kernel

    return kernel(packed.contiguous(), relative.contiguous(), table, group, bits)


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
def _triton_trial(device: torch.device) -> str | None:
    """Run the kernels once on ``device`` and return why they cannot be used there, or None."""
    try:
        from .triton_kernel import decode_grid as kernel
        from .triton_kernel import int8_product

        a = (torch.arange(32 * 128, device=device) % 255 - 127).to(torch.int8).view(32, 128)
        ones = torch.ones(32, device=device)
        sums = int8_product(a, ones, a, ones, None, torch.float32)
        packed, scales = torch.full((4, 8), 0x19, dtype=torch.int8, device=device), torch.full((4, 1), 2.0, device=device)
        decoded = kernel(packed, scales.to(torch.float8_e4m3fn), None, 16, 4)
    except Exception as error:  # a missing compiler, driver or architecture shows as almost any error
        return f"Triton does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    right = torch.equal(sums.to(torch.int32).cpu(), reference.int8_product(a.cpu(), a.cpu()))
    right = right and decoded[0].tolist() == [2, -14] * 8
    return None if right else "Triton computes wrong sums here"


@cache
def _kitchen_trial(device: torch.device) -> str | None:
    """Compare comfy-kitchen's layer with the reference on ``device`` and return why it cannot be used there, or None."""
    if find_spec("comfy_kitchen") is None:
        return "comfy-kitchen is not installed"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 256, generator=generator).to(device, torch.bfloat16)
    weight = torch.randint(-127, 128, (32, 256), generator=generator).to(device, torch.int8)
    scale = torch.full((32, 1), 0.01, device=device)
    try:
        y = _kitchen_linear(x, weight, scale, None, 256, None).float()
    except Exception as error:  # its interface is its own, and changes
        return f"comfy-kitchen does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    right = reference.int8_linear(x, weight, scale, None, 256).float()
    return None if float((y - right).norm()) <= 0.02 * float(right.norm()) else "comfy-kitchen computes something else here"


@cache
def _fp8_trial(device: torch.device) -> str | None:
    a = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
    ones = torch.ones(32, 1, device=device)
    try:
        product = torch._scaled_mm(a, a.t(), scale_a=ones, scale_b=ones.t().contiguous(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's fp8 product does not run here ({str(error).strip().splitlines()[0][:80]})"
    return None if bool((product == 32).all()) else "torch's fp8 product gives wrong sums here"
