"""Triton kernels of quantized linear layers: the int8 product with all that follows it, and the decoding of 4- and 6-bit weights.

Only the package's dispatcher imports this module, and only when Triton is there. With ``TRITON_INTERPRET=1`` in the
environment it runs on CPU tensors, which is how the tests compare it with the reference.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)
_LIMIT = tl.constexpr(127.0)
#: Tiles by number of rows: rows, columns, depth, warps, stages.
_TILES = ((64, (16, 128, 128, 4, 4)), (512, (64, 128, 128, 4, 4)), (1 << 62, (128, 256, 64, 8, 3)))
_GROUP = 8
_DECODE = 1024


@triton.jit
def _product(
    a, w, row_scale, column_scale, bias, low, up, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    # Tiles in groups of GROUP rows, so that neighbouring programs share what they read.
    tile, across = tl.program_id(0), tl.cdiv(N, BN)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inner = tile % (GROUP * across)
    rows = (first + inner % height) * BM + tl.arange(0, BM)
    columns = (inner // height) * BN + tl.arange(0, BN)
    # Rows beyond the end read the last one: cheaper than a mask in the loop. Offsets have 64 bits.
    m = tl.minimum(rows, M - 1).to(tl.int64)
    n = tl.minimum(columns, N - 1).to(tl.int64)
    k = tl.arange(0, BK)
    left = a + m[:, None] * K + k[None, :]
    right = w + n[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for _ in range(0, K, BK):
        total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        left += BK
        right += BK
    y = total.to(tl.float32) * tl.load(row_scale + m)[:, None] * tl.load(column_scale + n)[None, :]
    if BIAS:
        y += tl.load(bias + n)[None, :]
    if RANK > 0:  # a LoRA beside the weight: [M, r] x [r, N]
        r = tl.arange(0, RANK)
        y += tl.dot(tl.load(low + m[:, None] * RANK + r[None, :]), tl.load(up + n[None, :] * RANK + r[:, None]))
    place = out + m[:, None] * N + n[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def int8_product(
    codes: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``(codes @ weight.T) * rows * columns + bias + low @ up.T``, [M, N], in one pass over the result.

    Args:
        codes: int8 [M, K], K a multiple of 128.
        rows: fp32 of M numbers.
        weight: int8 [N, K].
        columns: fp32 of N numbers.
        bias: fp32 [N], or None.
        dtype: of the result.
        low: fp16 or bf16 [M, r], or None.
        up: the same dtype, [N, r].
    """
    height, depth = codes.shape
    width = weight.shape[0]
    out = torch.empty(height, width, dtype=dtype, device=codes.device)
    rank = 0
    if low is not None:
        rank = max(triton.next_power_of_2(low.shape[1]), 16)  # the matrix units take no less
        low, up = (torch.nn.functional.pad(factor, (0, rank - factor.shape[1])).contiguous() for factor in (low, up))
    bm, bn, bk, warps, stages = next(tiles for most, tiles in _TILES if height <= most)
    grid = (triton.cdiv(height, bm) * triton.cdiv(width, bn),)
    with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():
        _product[grid](
            codes, weight, rows, columns, *(rows if one is None else one for one in (bias, low, up)), out, height, width, depth,
            BM=bm, BN=bn, BK=bk, GROUP=_GROUP, BIAS=bias is not None, RANK=rank, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@triton.jit
def _decode(
    packed, relative, table, out, K, COUNT, GROUP: tl.constexpr, SIX: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    row, column = at // K, at % K
    start = row * (K * 3 // 4 if SIX else K // 2)
    code = (tl.load(packed + start + column // 2, mask=inside, other=0).to(tl.int32) >> ((column % 2) * 4).to(tl.int32)) & 15
    if SIX:
        high = tl.load(packed + start + K // 2 + column // 4, mask=inside, other=0).to(tl.int32)
        code |= ((high >> ((column % 4) * 2).to(tl.int32)) & 3) << 4
    if TABLE:
        level = tl.load(table + code)
    else:
        level = (code - (32 if SIX else 8)).to(tl.float32)
    # e4m3 by hand: GPUs before Ada have no conversion.
    raw = tl.load(relative + at // GROUP, mask=inside, other=0).to(tl.int32) & 127
    normal = ((raw + 960) << 20).to(tl.float32, bitcast=True)  # the exponent's bias goes from 7 to 127
    scale = tl.where(raw < 8, raw.to(tl.float32) * 0.001953125, normal)
    value = (level * scale + _ROUND) - _ROUND
    tl.store(out + at, tl.minimum(tl.maximum(value, -_LIMIT), _LIMIT).to(tl.int8), mask=inside)


def decode_grid(
    packed: torch.Tensor, relative: torch.Tensor, table: torch.Tensor | None, group: int, bits: int
) -> torch.Tensor:
    """Return int8 [N, K] of 4- or 6-bit codes on the int8 grid: ``round(level[code] * scale)``.

    Args:
        packed: int8 [N, K * bits / 8].
        relative: fp8 e4m3 [N, K / group].
        table: fp32 [16], or None for whole numbers around 0.
        group: input channels that share a scale.
        bits: 4 or 6.
    """
    rows, columns = relative.shape[0], relative.shape[1] * group
    out = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    grid = (triton.cdiv(out.numel(), _DECODE),)
    with torch.cuda.device(packed.device) if packed.is_cuda else nullcontext():
        _decode[grid](
            packed.view(torch.uint8), relative.view(torch.uint8), relative if table is None else table, out, columns,
            out.numel(), GROUP=group, SIX=bits == 6, TABLE=table is not None, BLOCK=_DECODE,
        )  # fmt: skip
    return out
