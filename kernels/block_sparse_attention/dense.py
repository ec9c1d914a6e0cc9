"""Block-sparse attention as SDPA with a boolean mask: no work is saved, but it runs wherever SDPA does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .lists import BlockList, Predicate, Tail

__all__ = ["attend"]

#: Mask elements made at a time; some of SDPA's kernels turn them into as many floats.
_PAIRS = 1 << 26


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
    """Return output [B, H, N, d] and log-sum-exp [B, H, N] or None. Differentiable.

    SDPA has neither pooled keys nor a public log-sum-exp; with either, :mod:`.reference` computes.
    """
    if return_lse or tail is not None:
        return reference.attend(q, k, v, blocks, scale=scale, kv_length=kv_length, predicate=predicate, tail=tail)
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    step = max(1, _PAIRS // max(1, batch * heads * k.shape[2] * blocks.q_block))
    parts = []
    for first in range(0, blocks.index.shape[2], step):
        last = min(first + step, blocks.index.shape[2])
        mask = reference.token_mask(blocks, first, last, queries, k.shape[2], kv_length, predicate)
        some = q[:, :, first * blocks.q_block : last * blocks.q_block]
        empty = ~mask.any(-1, keepdim=True)
        # An empty row would be 0/0: it may see everything for once, and is set to 0 afterwards.
        result = F.scaled_dot_product_attention(some, k, v, attn_mask=mask | empty, scale=scale)
        parts.append(result.masked_fill(empty, 0))
    return torch.cat(parts, 2), None
