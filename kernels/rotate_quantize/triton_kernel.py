"""Triton kernel of the activation quantizer: one program reads a row once, rotates it and rounds it to int8.

Only :mod:`kernels.rotate_quantize` imports this module, and only when Triton is there. With ``TRITON_INTERPRET=1`` in the
environment it runs on CPU tensors, which is how the tests compare it with the reference.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .reference import hadamard

_LIMIT = tl.constexpr(127.0)
_MIN_SCALE = tl.constexpr(1e-30)
#: Added and taken away, it rounds fp32 numbers below 2^22 to whole ones, halves to the even neighbour.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _rotate_quantize(
    x, pre, matrix, codes, scales, K,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, TWICE: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    # 64 bits: a video's activations may hold more than 2^31 numbers.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    y = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    if PRE:
        y *= tl.load(pre + column, mask=inside, other=0.0).to(tl.float32)
    if SIDE > 0:
        side = tl.arange(0, SIDE)
        h = tl.load(matrix + side[:, None] * SIDE + side[None, :])
        y = tl.dot(tl.reshape(y, (BLOCK // SIDE, SIDE)), h, input_precision="ieee")
        if TWICE:  # the matrix of side 256 is the Kronecker product of two of side 16
            y = tl.permute(tl.reshape(y, (BLOCK // (SIDE * SIDE), SIDE, SIDE)), (0, 2, 1))
            y = tl.dot(tl.reshape(y, (BLOCK // SIDE, SIDE)), h, input_precision="ieee")
            y = tl.permute(tl.reshape(y, (BLOCK // (SIDE * SIDE), SIDE, SIDE)), (0, 2, 1))
        y = tl.reshape(y, (BLOCK,))
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), 0), _LIMIT), _MIN_SCALE)
    steps = (tl.div_rn(y, scale) + _ROUND) - _ROUND
    steps = tl.minimum(tl.maximum(steps, -_LIMIT), _LIMIT)
    tl.store(codes + row * K + column, steps.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)


def rotate_quantize(
    x: torch.Tensor, size: int = 0, pre_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes like ``x`` and fp32 scales [..., 1]; the package's ``CONSTRAINTS`` are not checked again here.

    Args:
        x: floating [..., K], contiguous, K at most 16384.
        size: 0, 16, 64 or 256, dividing K.
        pre_scale: fp32 [K], or None.
    """
    columns = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    side, twice = (16, True) if size == 256 else (size, False)
    # The matrix units take tiles of 16 rows and more.
    block = max(triton.next_power_of_2(columns), 16 * max(side, 1))
    matrix = hadamard(side, x.device) if side else x
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _rotate_quantize[(scales.numel(),)](
            x, x if pre_scale is None else pre_scale, matrix, codes, scales, columns,
            BLOCK=block, SIDE=side, TWICE=twice, PRE=pre_scale is not None, num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return codes, scales
