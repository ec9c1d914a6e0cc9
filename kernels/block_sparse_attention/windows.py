"""Block-sparse attention as a few dense calls, for lists whose rows are contiguous runs of blocks.

Static plans with windows, frames or groups are such lists. Neighbouring query blocks with one run become one call of SDPA
on slices: nothing is gathered and no mask is made, so every dense kernel serves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .lists import BlockList

__all__ = ["attend", "runs"]


def runs(blocks: BlockList, key_blocks: int) -> list[list[tuple[int, int, int, int]]] | None:
    """Return (first row, last row, first key block, last key block) by list, or None where a row is no run.

    The outer list goes over batch rows and heads of the lists; ends are exclusive. Waits for the device.
    """
    columns = torch.arange(blocks.index.shape[3] - 1, device=blocks.index.device)
    gaps = (blocks.index[..., 1:] != blocks.index[..., :-1] + 1) & (columns + 1 < blocks.count[..., None])
    if bool(gaps.any()):
        return None
    starts, counts = blocks.index[..., 0].flatten(0, 1).tolist(), blocks.count.flatten(0, 1).tolist()
    found = []
    for start, count in zip(starts, counts, strict=True):
        pieces: list[tuple[int, int, int, int]] = []
        for row, (first, number) in enumerate(zip(start, count, strict=True)):
            last = min(first + number, key_blocks)
            if pieces and pieces[-1][2:] == (first, last):
                pieces[-1] = (pieces[-1][0], row + 1, first, last)
            else:
                pieces.append((row, row + 1, first, last))
        found.append(pieces)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float) -> Tensor:
    """Return the output [B, H, N, d] in the dtype of ``q``. The package's constraints for windows must hold."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    found = runs(blocks, -(-k.shape[2] // blocks.kv_block))
    if found is None:
        raise ValueError("a list is no contiguous run of key blocks")
    out = torch.zeros((batch, heads, queries, v.shape[3]), dtype=q.dtype, device=q.device)
    rows, columns = blocks.index.shape[:2]
    for place, pieces in enumerate(found):
        b = slice(None) if rows == 1 else slice(place // columns, place // columns + 1)
        h = slice(None) if columns == 1 else slice(place % columns, place % columns + 1)
        kv = slice(None) if columns == 1 else slice(place % columns // group, place % columns // group + 1)
        some_q, some_k, some_v = q[b, h], k[b, kv], v[b, kv]
        if some_q.shape[1] != some_k.shape[1]:
            some_k, some_v = (x.repeat_interleave(group, 1) for x in (some_k, some_v))
        for first, last, start, stop in pieces:
            if stop > start:
                tokens = slice(first * blocks.q_block, last * blocks.q_block)
                seen = slice(start * blocks.kv_block, stop * blocks.kv_block)
                out[b, h, tokens] = F.scaled_dot_product_attention(
                    some_q[:, :, tokens], some_k[:, :, seen], some_v[:, :, seen], scale=scale
                )
    return out
