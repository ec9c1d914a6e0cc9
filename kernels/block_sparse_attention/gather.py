"""Block-sparse attention by gathering the listed key blocks. Runs wherever torch runs.

On the CPU :mod:`.rows` does it, row by row. Elsewhere launches cost more than products, so many query blocks are computed
at once: they are sorted by the length of their lists, which keeps the padding of a batch small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows
from .lists import BlockList, Predicate, Tail

__all__ = ["attend"]

#: Gathered keys of one batch, in elements: 64 MiB in half precision, for the values as much again.
_ELEMENTS = 1 << 25


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
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return output [B, H, N, d] and log-sum-exp [B, H, N] or None. Waits for the device, which must tell the counts."""
    options = {"scale": scale, "kv_length": kv_length, "predicate": predicate, "tail": tail, "return_lse": return_lse}
    return (rows.attend if q.device.type == "cpu" else batched)(q, k, v, blocks, **options)


def batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    tail: Tail | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`attend`, many query blocks at a time. SDPA where it can, else the formula in fp32."""
    batch, heads, queries, size = q.shape
    keys, group, block = k.shape[2], heads // k.shape[1], blocks.kv_block
    query_blocks, key_blocks = blocks.index.shape[2], -(-keys // block)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = return_lse or tail is not None
    padded_q = F.pad(q, (0, 0, 0, query_blocks * blocks.q_block - queries)).reshape(-1, blocks.q_block, size)
    k, v = (F.pad(x, (0, 0, 0, key_blocks * block - keys)).reshape(-1, block * x.shape[3]) for x in (k, v))
    shape = (batch, heads, query_blocks)
    index = blocks.index.expand(*shape, -1).reshape(-1, blocks.index.shape[3])
    count = blocks.count.expand(shape).reshape(-1)
    full = count if predicate is None or blocks.full is None else blocks.full.expand(shape).reshape(-1)
    listed = None if tail is None else blocks.to_mask(key_blocks).expand(*shape, -1).reshape(-1, key_blocks)
    length = torch.full((batch,), keys, device=q.device) if kv_length is None else kv_length.clamp(0, keys)
    out = torch.empty(
        (batch * heads * query_blocks, blocks.q_block, size), dtype=wide if exact else q.dtype, device=q.device
    )
    lse = torch.empty(out.shape[:2], dtype=wide, device=q.device) if return_lse else None
    sizes, order = count.sort(descending=True, stable=True)
    sizes, place = sizes.tolist(), 0
    while place < len(sizes):
        width = max(sizes[place], 1)
        items = order[place : place + max(1, _ELEMENTS // (width * block * size))]
        place += items.numel()
        columns = torch.arange(width, device=q.device)
        ids = index[items][:, :width].long()
        row, head = items % query_blocks, items // query_blocks
        source = head // heads * (heads // group) + head % heads // group
        at = (source[:, None] * key_blocks + ids).flatten()
        some_k, some_v = (x[at].view(items.numel(), width * block, size) for x in (k, v))
        tokens = ids[..., None] * block + torch.arange(block, device=q.device)
        kept = (columns < count[items][:, None])[..., None] & (tokens < length[head // heads][:, None, None])
        kept, tokens = kept.flatten(1)[:, None], tokens.flatten(1)
        if predicate is not None and blocks.full is not None:
            positions = (row[:, None] * blocks.q_block + torch.arange(blocks.q_block, device=q.device)).clamp(
                max=queries - 1
            )
            whole = (columns < full[items][:, None]).repeat_interleave(block, 1)[:, None]
            kept = kept & (whole | predicate.keeps(positions, tokens.clamp(max=keys - 1)))
        if not exact:
            result = F.scaled_dot_product_attention(padded_q[items], some_k, some_v, attn_mask=kept, scale=scale)
            out[items] = result.masked_fill(~kept.any(-1, keepdim=True), 0)
            continue
        scores = padded_q[items].to(wide) @ some_k.to(wide).mT * scale
        scores = scores.masked_fill(~kept, -torch.inf)
        if tail is not None:
            pooled_k, pooled_v = (x.to(wide).flatten(0, 1)[source] for x in (tail.keys, tail.values))
            weight = tail.sizes.to(wide).log().expand(batch, -1)[head // heads]
            rest = padded_q[items].to(wide) @ pooled_k.mT * scale
            weight = weight.masked_fill(listed[items], -torch.inf)[:, None]
            scores, some_v = torch.cat((scores, rest + weight), -1), torch.cat((some_v.to(wide), pooled_v), 1)
        total = scores.logsumexp(-1)
        share = (scores - total.masked_fill(total == -torch.inf, 0)[..., None]).exp()
        out[items] = share @ some_v.to(wide)
        if lse is not None:
            lse[items] = total
    out = out.view(batch, heads, -1, size)[:, :, :queries]
    return out, None if lse is None else lse.view(batch, heads, -1)[:, :, :queries]
