"""Block-sparse attention by torch's FlexAttention, compiled.

Eager FlexAttention ignores the lists of a BlockMask and computes whatever ``mask_mod`` allows, so ``mask_mod`` looks every
pair up, and the compiled form skips the blocks that are not listed. Blocks that need no look-up are passed as full ones.
"""

import torch
from torch import Tensor

from .lists import BlockList, Predicate

__all__ = ["attend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return output [B, H, N, d] and log-sum-exp [B, H, N] or None. The first call of a shape compiles."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(q, k, blocks, kv_length, predicate)
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if return_lse:
        out, lse = compiled(q, k, v, return_lse=True, **options)
    else:
        out, lse = compiled(q, k, v, **options), None
    # Whatever a kernel leaves in rows that attend to nothing, the contract says 0.
    empty = (blocks.count == 0).repeat_interleave(blocks.q_block, 2)[:, :, : q.shape[2], None]
    return out.masked_fill(empty, 0), lse if lse is None else lse.masked_fill(empty[..., 0], -torch.inf)


def block_mask(q: Tensor, k: Tensor, blocks: BlockList, kv_length: Tensor | None, predicate: Predicate | None):
    """Return torch's BlockMask of the lists, whose ``mask_mod`` agrees with them."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = q.shape[2], k.shape[2]
    key_blocks = -(-keys // blocks.kv_block)
    listed = blocks.to_mask(key_blocks)
    whole = blocks.full_mask(key_blocks) if predicate is not None else listed
    if kv_length is not None:
        # A block that reaches past the valid keys needs the look-up.
        ends = (torch.arange(key_blocks, device=q.device) + 1) * blocks.kv_block
        whole = whole & (ends.clamp(max=keys) <= kv_length[:, None, None, None])
        listed = listed.expand_as(whole)
    part = listed & ~whole
    rows, heads = listed.shape[:2]
    kind = None if predicate is None else predicate.kind
    limits = (0, 0, 0) if predicate is None else (*predicate.limits, 0, 0)[:3]
    place = None if predicate is None else predicate.coordinates.int()

    def allowed(b, h, i, j):
        block = (b if rows > 1 else 0, h if heads > 1 else 0, i // blocks.q_block, j // blocks.kv_block)
        kept = listed[block]
        if kv_length is not None:
            kept = kept & (j < kv_length[b])
        if kind is None:
            return kept
        t, y, x = (place[j, axis] - place[i, axis] for axis in range(3))
        if kind == "radius":
            passes = (t == 0) & (y * y + x * x < limits[0])
        elif kind == "band":
            passes = (x >= limits[0]) & (x <= limits[1])
        else:
            passes = (t.abs() <= limits[0]) & (y.abs() <= limits[1]) & (x.abs() <= limits[2])
        return kept & (passes | (place[i, 0] < 0) | (place[j, 0] < 0) | whole[block])

    partial, full = (BlockList.from_mask(mask, blocks.q_block, blocks.kv_block) for mask in (part, whole))

    def ids(chosen: BlockList) -> Tensor:
        wide = torch.zeros((*chosen.index.shape[:3], key_blocks), dtype=torch.int32, device=q.device)
        wide[..., : chosen.index.shape[3]] = chosen.index
        return wide

    return BlockMask.from_kv_blocks(
        partial.count, ids(partial), full.count, ids(full),
        BLOCK_SIZE=(blocks.q_block, blocks.kv_block), mask_mod=allowed, seq_lengths=(queries, keys),
    )  # fmt: skip
