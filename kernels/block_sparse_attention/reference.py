"""The specification of block-sparse attention: masked dense attention, in fp32 or wider, a few query blocks at a time."""

import torch
from torch import Tensor

from .lists import BlockList, Predicate, Tail

__all__ = ["attend", "block_sparse_attention", "token_mask"]

#: Scores held at a time.
_SCORES = 1 << 24


def token_mask(
    blocks: BlockList,
    first: int,
    last: int,
    queries: int,
    keys: int,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
) -> Tensor:
    """Return bool [B', H', rows, M]: the pairs that the query blocks ``first`` to ``last - 1`` attend to.

    Args:
        blocks: the lists.
        first: first query block.
        last: one after the last query block.
        queries: N.
        keys: M.
        kv_length: int [B], valid keys of each batch row.
        predicate: test of the pairs in partial blocks.
    """
    device = blocks.index.device
    part = _rows(blocks, first, last)
    row = torch.arange(first * blocks.q_block, min(last * blocks.q_block, queries), device=device)
    column = torch.arange(keys, device=device)
    key_blocks = -(-keys // blocks.kv_block)
    above = torch.div(row, blocks.q_block, rounding_mode="floor") - first
    beside = torch.div(column, blocks.kv_block, rounding_mode="floor")
    mask = part.to_mask(key_blocks)[:, :, above][..., beside]
    if predicate is not None and blocks.full is not None:
        mask = mask & (part.full_mask(key_blocks)[:, :, above][..., beside] | predicate.keeps(row, column))
    if kv_length is not None:
        mask = mask & (column < kv_length.to(device)[:, None, None, None])
    return mask


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
) -> tuple[Tensor, Tensor]:
    """Return output [B, H, N, d] and log-sum-exp [B, H, N], both in fp32 (fp64 for fp64 inputs).

    With S the scaled scores of the kept pairs, and of the tail one score plus log(size) for every block that the row does
    not list: ``softmax(S) V`` and ``log sum exp S``; 0 and -inf in rows without any score. Arguments as
    :func:`kernels.block_sparse_attention.block_sparse_attention` takes them.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    key_blocks = -(-keys // blocks.kv_block)
    q, k, v = q.to(wide), *(x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    if tail is not None:
        k = torch.cat((k, tail.keys.to(wide).repeat_interleave(group, 1)), 2)
        v = torch.cat((v, tail.values.to(wide).repeat_interleave(group, 1)), 2)
        weight = tail.sizes.to(wide).log().reshape(-1, 1, 1, key_blocks)  # an ignored block's is -inf
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    step = max(1, _SCORES // max(1, batch * heads * k.shape[2] * blocks.q_block))
    for first in range(0, blocks.index.shape[2], step):
        last = min(first + step, blocks.index.shape[2])
        rows = slice(first * blocks.q_block, min(last * blocks.q_block, queries))
        mask = token_mask(blocks, first, last, queries, keys, kv_length, predicate)
        scores = q[:, :, rows] @ k.mT * scale
        scores[..., :keys].masked_fill_(~mask, -torch.inf)
        if tail is not None:
            listed = _rows(blocks, first, last).to_mask(key_blocks).repeat_interleave(blocks.q_block, 2)
            scores[..., keys:] += weight
            scores[..., keys:].masked_fill_(listed[:, :, : scores.shape[2]], -torch.inf)
        total = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:3], -torch.inf)
        empty = total == -torch.inf
        share = (scores - total.masked_fill(empty, 0)[..., None]).exp()
        out[:, :, rows], lse[:, :, rows] = share @ v, total
    return out, lse


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    tail: Tail | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`kernels.block_sparse_attention.block_sparse_attention` shall return, before rounding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, blocks, scale=scale, kv_length=kv_length, predicate=predicate, tail=tail)
    if row_scale is not None:
        out = out * row_scale.to(out.dtype)[..., None]
    return out if residual is None else out + residual.to(out.dtype), lse


def _rows(blocks: BlockList, first: int, last: int) -> BlockList:
    full = None if blocks.full is None else blocks.full[:, :, first:last]
    return BlockList(
        blocks.index[:, :, first:last], blocks.count[:, :, first:last], full, blocks.q_block, blocks.kv_block
    )
