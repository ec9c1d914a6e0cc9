"""Triton kernel of the weighted sum: one pass over its inputs, fp32 accumulation, one rounding.

The torch reference reads and writes a full-size fp32 accumulator for every term; here every
element is read once and written once, so k tensors of n bytes move (k + 1) n bytes.

Only :mod:`kernels.weighted_sum` imports this module, and only when Triton is there. With
``TRITON_INTERPRET=1`` in the environment it runs on CPU tensors, which is how the tests compare
it with the reference.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

#: Pointers and weights of the kernel's signature.
MAX_TENSORS = 16
_BLOCK = 1024


@triton.jit
def _weighted_sum(
    out, n,
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64 bits: a video's snapshots may hold more than 2^31 elements.
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    total = tl.load(p0 + offset, mask=inside, other=0.0).to(tl.float32) * w0
    if COUNT > 1:
        total += tl.load(p1 + offset, mask=inside, other=0.0).to(tl.float32) * w1
    if COUNT > 2:
        total += tl.load(p2 + offset, mask=inside, other=0.0).to(tl.float32) * w2
    if COUNT > 3:
        total += tl.load(p3 + offset, mask=inside, other=0.0).to(tl.float32) * w3
    if COUNT > 4:
        total += tl.load(p4 + offset, mask=inside, other=0.0).to(tl.float32) * w4
    if COUNT > 5:
        total += tl.load(p5 + offset, mask=inside, other=0.0).to(tl.float32) * w5
    if COUNT > 6:
        total += tl.load(p6 + offset, mask=inside, other=0.0).to(tl.float32) * w6
    if COUNT > 7:
        total += tl.load(p7 + offset, mask=inside, other=0.0).to(tl.float32) * w7
    if COUNT > 8:
        total += tl.load(p8 + offset, mask=inside, other=0.0).to(tl.float32) * w8
    if COUNT > 9:
        total += tl.load(p9 + offset, mask=inside, other=0.0).to(tl.float32) * w9
    if COUNT > 10:
        total += tl.load(p10 + offset, mask=inside, other=0.0).to(tl.float32) * w10
    if COUNT > 11:
        total += tl.load(p11 + offset, mask=inside, other=0.0).to(tl.float32) * w11
    if COUNT > 12:
        total += tl.load(p12 + offset, mask=inside, other=0.0).to(tl.float32) * w12
    if COUNT > 13:
        total += tl.load(p13 + offset, mask=inside, other=0.0).to(tl.float32) * w13
    if COUNT > 14:
        total += tl.load(p14 + offset, mask=inside, other=0.0).to(tl.float32) * w14
    if COUNT > 15:
        total += tl.load(p15 + offset, mask=inside, other=0.0).to(tl.float32) * w15
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return ``sum_j weights[j] * tensors[j]`` as a new contiguous tensor of the inputs' dtype.

    Args:
        tensors: 1 to 16, as the package's ``CONSTRAINTS`` demand; not checked again here.
        weights: as many numbers; rounded to fp32.
    """
    first, count = tensors[0], len(tensors)
    out = torch.empty_like(first)
    pointers = [*tensors, *[first] * (MAX_TENSORS - count)]
    factors = [*map(float, weights), *[0.0] * (MAX_TENSORS - count)]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        grid = (triton.cdiv(first.numel(), _BLOCK),)
        _weighted_sum[grid](out, first.numel(), *pointers, *factors, COUNT=count, BLOCK=_BLOCK)
    return out
