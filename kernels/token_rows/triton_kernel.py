"""Triton kernels that take rows of tokens out of a sequence and put them back: each element is read and written once.

Only :mod:`kernels.token_rows` imports this module, and only when Triton is there. With ``TRITON_INTERPRET=1`` in the
environment it runs on CPU tensors, which is how the tests compare it with the reference.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

_MOST = 1024


@triton.jit
def _copy_rows(source, target, rows, n, source_length, target_length, inner, TAKE: tl.constexpr, BLOCK: tl.constexpr):
    # 64 bits: keys of a long video may hold more than 2^31 elements.
    place = tl.program_id(0).to(tl.int64)
    outer, index = place // n, place % n
    row = tl.load(rows + index)
    read = outer * source_length + (row if TAKE else index)
    write = outer * target_length + (index if TAKE else row)
    offset = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < inner
    tl.store(target + write * inner + offset, tl.load(source + read * inner + offset, mask=inside), mask=inside)


def take_rows(x: torch.Tensor, rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the slices of contiguous ``x`` at ``rows`` along ``axis``; see the reference."""
    out = x.new_empty((*x.shape[:axis], len(rows), *x.shape[axis + 1 :]))
    _launch(x, out, rows, axis, take=True)
    return out


def put_rows(kept: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    """Write contiguous ``values`` into contiguous ``kept`` at ``rows`` along ``axis``; see the reference."""
    _launch(values, kept, rows, axis, take=False)
    return kept


def _launch(source: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, axis: int, take: bool) -> None:
    outer, inner = math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
    block = min(triton.next_power_of_2(inner), _MOST)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
        grid = (outer * len(rows), triton.cdiv(inner, block))
        _copy_rows[grid](
            source, target, rows, len(rows), source.shape[axis], target.shape[axis], inner, TAKE=take, BLOCK=block
        )
