"""Triton kernel of block-sparse attention: one program per tile of query rows, one pass over the keys its list names.

Softmax is online and in base 2. Pooled tail keys come first, so that listed blocks can only raise the running maximum.
Blocks that lie wholly inside the valid keys and need no predicate take a loop without masks; the others follow. Head sizes
that are no power of two are cut in two (72 = 64 + 8, padded to 16), because padding 72 or 80 to 128 would nearly double the
products. Nothing is split over keys and no atomics are used: results are reproducible bit by bit on one device.

Only :mod:`kernels.block_sparse_attention` imports this module, and only when Triton is there. With ``TRITON_INTERPRET=1``
in the environment it runs on CPU tensors, which is how the tests compare it with the reference.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lists import BlockList, Predicate, Tail

__all__ = ["attend", "split_head"]

_LOG2_E = 1.4426950408889634
_KINDS = {None: 0, "radius": 1, "band": 2, "box": 3}
#: Upper bounds of (query rows, keys) of a tile, warps and stages; tiles never exceed the blocks of the list.
_CONFIGS = ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4))


@triton.jit
def _step(
    acc1, acc2, m, norm, q1, q2, k, v, start, stride_k, stride_v, length, scale,
    query_t, query_y, query_x, coordinates, tokens, limit0, limit1, limit2, whole,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of N keys, beginning at token ``start``, into the online softmax."""
    columns = start + tl.arange(0, N)
    inside = columns < length
    rows64 = columns.to(tl.int64)
    lanes1 = tl.arange(0, D1)
    k1 = k + rows64[None, :] * stride_k + lanes1[:, None]
    v1 = v + rows64[:, None] * stride_v + lanes1[None, :]
    if MASKED:
        k_tile = tl.load(k1, mask=inside[None, :] & (lanes1 < HEAD)[:, None], other=0.0)
        v_tile = tl.load(v1, mask=inside[:, None] & (lanes1 < HEAD)[None, :], other=0.0)
    elif D1 > HEAD:
        k_tile = tl.load(k1, mask=(lanes1 < HEAD)[:, None], other=0.0)
        v_tile = tl.load(v1, mask=(lanes1 < HEAD)[None, :], other=0.0)
    else:
        k_tile = tl.load(k1)
        v_tile = tl.load(v1)
    scores = tl.dot(q1, k_tile, input_precision=PRECISION)
    if D2 > 0:
        lanes2 = D1 + tl.arange(0, D2)
        k2 = k + rows64[None, :] * stride_k + lanes2[:, None]
        v2 = v + rows64[:, None] * stride_v + lanes2[None, :]
        if MASKED:
            k_rest = tl.load(k2, mask=inside[None, :] & (lanes2 < HEAD)[:, None], other=0.0)
            v_rest = tl.load(v2, mask=inside[:, None] & (lanes2 < HEAD)[None, :], other=0.0)
        elif D1 + D2 > HEAD:
            k_rest = tl.load(k2, mask=(lanes2 < HEAD)[:, None], other=0.0)
            v_rest = tl.load(v2, mask=(lanes2 < HEAD)[None, :], other=0.0)
        else:
            k_rest = tl.load(k2)
            v_rest = tl.load(v2)
        scores += tl.dot(q2, k_rest, input_precision=PRECISION)
    scores *= scale
    if MASKED:
        kept = inside[None, :]
        if KIND > 0:
            key_t = tl.load(coordinates + columns, mask=inside, other=0)[None, :]
            key_y = tl.load(coordinates + tokens + columns, mask=inside, other=0)[None, :]
            key_x = tl.load(coordinates + 2 * tokens + columns, mask=inside, other=0)[None, :]
            dt, dy, dx = key_t - query_t, key_y - query_y, key_x - query_x
            if KIND == 1:
                passes = (dt == 0) & (dy * dy + dx * dx < limit0)
            elif KIND == 2:
                passes = (dx >= limit0) & (dx <= limit1)
            else:
                passes = (tl.abs(dt) <= limit0) & (tl.abs(dy) <= limit1) & (tl.abs(dx) <= limit2)
            kept = kept & (passes | (key_t < 0) | (query_t < 0) | whole)
        scores = tl.where(kept, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # A row whose keys are all masked so far keeps m = -inf; subtracting that would make NaN of it.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    decay = tl.exp2(m - m_safe)
    share = tl.exp2(scores - m_safe[:, None])
    norm = norm * decay + tl.sum(share, 1)
    share = share.to(v_tile.dtype)
    acc1 = acc1 * decay[:, None] + tl.dot(share, v_tile, input_precision=PRECISION)
    if D2 > 0:
        acc2 = acc2 * decay[:, None] + tl.dot(share, v_rest, input_precision=PRECISION)
    return acc1, acc2, m_new, norm


@triton.jit
def _forward(
    q, k, v, out, lse, order, index, count, full, lengths, coordinates, row_scale, residual,
    tail_k, tail_v, tail_weight, listed,
    queries, keys, key_blocks, query_blocks, heads, group, scale, limit0, limit1, limit2, tokens,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ib, stride_ih, stride_in, stride_cb, stride_ch, stride_lb, stride_lh, stride_wb,
    stride_rb, stride_rh, stride_rn,
    HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    KIND: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = Q_BLOCK // M
    tiles: tl.constexpr = KV_BLOCK // N
    program = tl.program_id(0)
    item = tl.load(order + program // parts)
    block = item % query_blocks
    head = (item // query_blocks) % heads
    batch = item // query_blocks // heads
    # 64 bits: a video's queries may hold more than 2^31 elements.
    batch64, head64, key_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)

    rows = block * Q_BLOCK + (program % parts) * M + tl.arange(0, M)
    present = rows < queries
    rows64 = rows.to(tl.int64)
    lanes1 = tl.arange(0, D1)
    q += batch64 * stride_qb + head64 * stride_qh
    q1 = tl.load(
        q + rows64[:, None] * stride_qn + lanes1[None, :], mask=present[:, None] & (lanes1 < HEAD)[None, :], other=0.0
    )
    acc1 = tl.zeros([M, D1], tl.float32)
    # Without a second part these two are never touched, and the compiler drops them.
    q2 = tl.zeros([M, 16], q1.dtype)
    acc2 = tl.zeros([M, 16], tl.float32)
    lanes2 = D1 + tl.arange(0, 16)
    if D2 > 0:
        lanes2 = D1 + tl.arange(0, D2)
        q2 = tl.load(
            q + rows64[:, None] * stride_qn + lanes2[None, :],
            mask=present[:, None] & (lanes2 < HEAD)[None, :],
            other=0.0,
        )
        acc2 = tl.zeros([M, D2], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    norm = tl.zeros([M], tl.float32)

    query_t = tl.zeros([M, 1], tl.int32)
    query_y = tl.zeros([M, 1], tl.int32)
    query_x = tl.zeros([M, 1], tl.int32)
    if KIND > 0:
        query_t = tl.load(coordinates + rows, mask=present, other=0)[:, None]
        query_y = tl.load(coordinates + tokens + rows, mask=present, other=0)[:, None]
        query_x = tl.load(coordinates + 2 * tokens + rows, mask=present, other=0)[:, None]

    if HAS_TAIL:
        tail_k += (batch64 * (heads // group) + key_head) * key_blocks * HEAD
        tail_v += (batch64 * (heads // group) + key_head) * key_blocks * HEAD
        tail_weight += batch64 * stride_wb
        listed += batch64 * stride_lb + head64 * stride_lh + block.to(tl.int64) * key_blocks
        for start in range(0, key_blocks, 64):
            columns = start + tl.arange(0, 64)
            inside = columns < key_blocks
            taken = tl.load(listed + columns, mask=inside, other=1)
            weight = tl.load(tail_weight + columns, mask=inside, other=float("-inf"))
            weight = tl.where(taken == 0, weight, float("-inf"))
            k_tile = tl.load(
                tail_k + columns[None, :] * HEAD + lanes1[:, None],
                mask=inside[None, :] & (lanes1 < HEAD)[:, None],
                other=0.0,
            )
            v_tile = tl.load(
                tail_v + columns[:, None] * HEAD + lanes1[None, :],
                mask=inside[:, None] & (lanes1 < HEAD)[None, :],
                other=0.0,
            )
            scores = tl.dot(q1, k_tile, input_precision=PRECISION)
            if D2 > 0:
                k_rest = tl.load(
                    tail_k + columns[None, :] * HEAD + lanes2[:, None],
                    mask=inside[None, :] & (lanes2 < HEAD)[:, None],
                    other=0.0,
                )
                v_rest = tl.load(
                    tail_v + columns[:, None] * HEAD + lanes2[None, :],
                    mask=inside[:, None] & (lanes2 < HEAD)[None, :],
                    other=0.0,
                )
                scores += tl.dot(q2, k_rest, input_precision=PRECISION)
            scores = scores * scale + weight[None, :]
            m_new = tl.maximum(m, tl.max(scores, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            decay = tl.exp2(m - m_safe)
            share = tl.exp2(scores - m_safe[:, None])
            norm = norm * decay + tl.sum(share, 1)
            share = share.to(v_tile.dtype)
            acc1 = acc1 * decay[:, None] + tl.dot(share, v_tile, input_precision=PRECISION)
            if D2 > 0:
                acc2 = acc2 * decay[:, None] + tl.dot(share, v_rest, input_precision=PRECISION)
            m = m_new

    length = keys
    if HAS_LENGTH:
        length = tl.minimum(tl.load(lengths + batch), keys)
    k += batch64 * stride_kb + key_head * stride_kh
    v += batch64 * stride_vb + key_head * stride_vh
    ids = index + batch64 * stride_ib + head64 * stride_ih + block.to(tl.int64) * stride_in
    row = batch64 * stride_cb + head64 * stride_ch + block
    number = tl.load(count + row)
    whole = tl.load(full + row)
    # Full ids ascend, so those that reach past the valid keys stand at their end.
    clean = whole
    past = (tl.load(ids + tl.maximum(clean - 1, 0)) + 1) * KV_BLOCK > length
    while (clean > 0) & past:
        clean -= 1
        past = (tl.load(ids + tl.maximum(clean - 1, 0)) + 1) * KV_BLOCK > length
    for tile in range(0, clean * tiles):
        start = tl.load(ids + tile // tiles) * KV_BLOCK + (tile % tiles) * N
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k, v, start, stride_kn, stride_vn, length, scale,
            query_t, query_y, query_x, coordinates, tokens, limit0, limit1, limit2, True,
            HEAD, D1, D2, N, False, 0, PRECISION,
        )  # fmt: skip
    for tile in range(clean * tiles, number * tiles):
        start = tl.load(ids + tile // tiles) * KV_BLOCK + (tile % tiles) * N
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k, v, start, stride_kn, stride_vn, length, scale,
            query_t, query_y, query_x, coordinates, tokens, limit0, limit1, limit2, tile < whole * tiles,
            HEAD, D1, D2, N, True, KIND, PRECISION,
        )  # fmt: skip

    empty = norm == 0.0
    total = tl.where(empty, 1.0, norm)
    factor = tl.where(empty, 0.0, 1.0 / total)
    at = (batch64 * heads + head64) * queries
    tl.store(lse + at + rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453), mask=present)
    if HAS_SCALE:
        factor *= tl.load(row_scale + at + rows, mask=present, other=0.0)
    result = acc1 * factor[:, None]
    shown = present[:, None] & (lanes1 < HEAD)[None, :]
    if HAS_RESIDUAL:
        residual += batch64 * stride_rb + head64 * stride_rh
        result += tl.load(residual + rows64[:, None] * stride_rn + lanes1[None, :], mask=shown, other=0.0).to(
            tl.float32
        )
    place = out + (at + rows64)[:, None] * HEAD
    tl.store(place + lanes1[None, :], result.to(out.dtype.element_ty), mask=shown)
    if D2 > 0:
        result = acc2 * factor[:, None]
        shown = present[:, None] & (lanes2 < HEAD)[None, :]
        if HAS_RESIDUAL:
            rest = tl.load(residual + rows64[:, None] * stride_rn + lanes2[None, :], mask=shown, other=0.0)
            result += rest.to(tl.float32)
        tl.store(place + lanes2[None, :], result.to(out.dtype.element_ty), mask=shown)


def _prune(configs: list[triton.Config], named: dict, **constants: int) -> list[triton.Config]:
    """Clip the tiles to the blocks of the list, and drop what thereby becomes equal."""
    values = {**named, **constants}
    clipped = {}
    for config in configs:
        tile = min(config.kwargs["M"], values["Q_BLOCK"]), min(config.kwargs["N"], values["KV_BLOCK"])
        clipped[(*tile, config.num_warps, config.num_stages)] = triton.Config(
            {"M": tile[0], "N": tile[1]}, num_warps=config.num_warps, num_stages=config.num_stages
        )
    return list(clipped.values())


#: Tuned once per head size, blocks and features; never per length, which changes with every resolution.
_tuned = triton.autotune(
    configs=[triton.Config({"M": m, "N": n}, num_warps=w, num_stages=s) for m, n, w, s in _CONFIGS],
    key=["HEAD", "Q_BLOCK", "KV_BLOCK", "KIND", "HAS_TAIL"],
    prune_configs_by={"early_config_prune": _prune},
)(_forward)


def split_head(head: int) -> tuple[int, int]:
    """Return the two tile widths that a head size is computed in; the second is 0 where one is as good.

    72 -> (64, 16), 80 -> (64, 16), 96 -> (64, 32), 64 -> (64, 0), 120 -> (128, 0), 8 -> (16, 0).
    """
    padded = max(16, triton.next_power_of_2(head))
    first = padded // 2
    second = max(16, triton.next_power_of_2(max(head - first, 1)))
    return (first, second) if first >= 16 and first + second < padded else (padded, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    tail: Tail | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    tuned: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, N, d] in the dtype of ``q``, scaled and added to, and log-sum-exp fp32 [B, H, N].

    The package's constraints for Triton must hold; they are not checked again here. Never waits for the device, but for
    tuning, once per head size, block sizes and features. ``tuned``: False takes middling tiles instead.
    """
    batch, heads, queries, head = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    query_blocks, key_blocks = blocks.index.shape[2], -(-keys // blocks.kv_block)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, heads, queries, head), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tested = predicate is not None and blocks.full is not None
    index, count = blocks.index.contiguous(), blocks.count.contiguous()
    full = blocks.full.contiguous() if tested else count
    # Heavy rows first, so that none of them runs alone at the end; equal ones keep their order, for the cache's sake.
    size = torch.frexp(count.float()).exponent.expand(batch, heads, query_blocks).reshape(-1)
    order = torch.sort(size, descending=True, stable=True).indices.int()
    coordinates = predicate.coordinates.int().t().contiguous() if tested else count
    limits = (*predicate.limits, 0, 0)[:3] if tested else (0, 0, 0)
    if tail is not None:
        tail_k, tail_v = (x.to(q.dtype).contiguous() for x in (tail.keys, tail.values))
        tail_weight = tail.sizes.float().log2().reshape(-1, key_blocks).contiguous()
        listed = blocks.to_mask(key_blocks).to(torch.int8)
        listed = listed.contiguous()
    else:
        tail_k = tail_v = tail_weight = listed = count
    scaling = row_scale.float().expand(batch, heads, queries).contiguous() if row_scale is not None else lse
    added = q if residual is None else residual if residual.stride(-1) == 1 else residual.contiguous()
    lengths = count if kv_length is None else kv_length.int().contiguous()

    def step(x: Tensor, dim: int) -> int:
        return x.stride(dim) if x.ndim > dim and x.shape[dim] > 1 else 0

    first, second = split_head(head)
    arguments = (
        q, k, v, out, lse, order, index, count, full, lengths, coordinates, scaling, added,
        tail_k, tail_v, tail_weight, listed,
        queries, keys, key_blocks, query_blocks, heads, group, scale * _LOG2_E, *limits, coordinates.shape[-1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        step(index, 0), step(index, 1), index.stride(2), step(count, 0), step(count, 1),
        step(listed, 0), step(listed, 1), step(tail_weight, 0), *added.stride()[:3],
    )  # fmt: skip
    constants = {
        "HEAD": head, "D1": first, "D2": second, "Q_BLOCK": blocks.q_block, "KV_BLOCK": blocks.kv_block,
        "KIND": _KINDS[predicate.kind if tested else None], "HAS_LENGTH": kv_length is not None,
        "HAS_TAIL": tail is not None, "HAS_SCALE": row_scale is not None, "HAS_RESIDUAL": residual is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    items = batch * heads * query_blocks
    if not items:
        return out, lse
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if tuned and q.device.type != "cpu":
            _tuned[lambda meta: (items * (blocks.q_block // meta["M"]),)](*arguments, **constants)
        else:  # and the interpreter has nothing to tune
            m, n = min(64, blocks.q_block), min(64, blocks.kv_block)
            _forward[(items * (blocks.q_block // m),)](*arguments, **constants, M=m, N=n)
    return out, lse
