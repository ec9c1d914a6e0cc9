"""What cutting an order of tokens into blocks means on the grid: which pairs of blocks hold which pairs of tokens.

Everything here is about visual tokens alone, static, and made on the CPU.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import View


def spans(view: "View", block: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last visual token of every visual block."""
    first = torch.arange(0, view.geometry.visual, block)
    return first, (first + block).clamp(max=view.geometry.visual) - 1


def tile_of(view: "View", tile: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return the tile (t, y, x) of every visual token in the view's order, int64 [visual, 3], and tiles by axis [3]."""
    coordinates = view.order.coordinates[: view.geometry.visual].cpu().long()
    size = torch.tensor(tile)
    return coordinates // size, -(-torch.tensor(view.geometry.grid) // size)


def flat_index(tiles: Tensor, counts: Tensor) -> Tensor:
    """Return the number of each tile, int64, from its (t, y, x) [n, 3] and the tiles by axis [3]."""
    return (tiles[:, 0] * counts[1] + tiles[:, 1]) * counts[2] + tiles[:, 2]


def by_groups(view: "View", group: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return which blocks hold any pair of tokens of ``kept`` groups, and which only such pairs.

    Args:
        view: what is cut into blocks.
        group: int64 [visual], the group of each token.
        kept: bool [groups, groups].
    """

    def members(block: int, blocks: int) -> Tensor:
        inside = torch.zeros(blocks, len(kept))
        inside[torch.arange(len(group)) // block, group] = 1.0
        return inside

    queries, keys = members(view.q_block, view.visual_query_blocks), members(view.kv_block, view.visual_key_blocks)
    reached = queries @ kept.float()
    missed = queries @ (~kept).float()
    return reached @ keys.T > 0, missed @ keys.T == 0


def pieces(view: "View", block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut raster order at blocks and frames: frame, first and last position inside it, and block of every piece."""
    visual, frame = view.geometry.visual, view.geometry.frame
    first = torch.cat([torch.arange(0, visual, block), torch.arange(0, visual, frame)]).unique()
    last = torch.cat([first[1:], torch.tensor([visual])]) - 1
    return first // frame, first % frame, last % frame, first // block


def _runs(view: "View", block: int) -> tuple[Tensor, Tensor]:
    """Cut the view's order into horizontal runs within blocks: int32 [R, 4] of (t, y, first x, last x); block [R]."""
    coordinates = view.order.coordinates[: view.geometry.visual].cpu().int()
    owner = torch.arange(len(coordinates)) // block
    step = coordinates[1:] - coordinates[:-1]
    goes_on = (step == torch.tensor([0, 0, 1])).all(-1) & (owner[1:] == owner[:-1])
    first = torch.cat([torch.tensor([True]), ~goes_on]).nonzero().flatten()
    last = torch.cat([first[1:], torch.tensor([len(coordinates)])]) - 1
    return torch.cat([coordinates[first], coordinates[last, 2:]], -1), owner[first]


def by_runs(
    view: "View", near: Callable[[Tensor, Tensor, Tensor], Tensor], reach: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return which blocks hold any pair of tokens that are ``near``, and which only such pairs; exact.

    Args:
        view: what is cut into blocks.
        near: of absolute differences (dt, dy, dx), whether a pair is kept; true for smaller ones where for greater.
        reach: greatest dt and dy that can be near: what need not be looked at.
    """
    (queries, query_owner), (keys, key_owner) = _runs(view, view.q_block), _runs(view, view.kv_block)
    shape = (view.visual_query_blocks, view.visual_key_blocks)
    found, whole = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    for rows, columns in _neighbours(queries, keys, reach):
        query, key = queries[rows][:, None], keys[columns]
        dt, dy = (query[..., 0] - key[:, 0]).abs(), (query[..., 1] - key[:, 1]).abs()
        gap = torch.maximum(key[:, 2] - query[..., 3], query[..., 2] - key[:, 3]).clamp_min(0)
        span = torch.maximum(key[:, 3] - query[..., 2], query[..., 3] - key[:, 2])
        flat = query_owner[rows][:, None] * shape[1] + key_owner[columns]
        for total, kept in ((found, near(dt, dy, gap)), (whole, near(dt, dy, span))):
            total.view(-1).index_add_(0, flat[kept], torch.ones((), dtype=torch.int32).expand(int(kept.sum())))
    runs = torch.bincount(query_owner, minlength=shape[0])[:, None] * torch.bincount(key_owner, minlength=shape[1])
    return found > 0, whole == runs


def _neighbours(queries: Tensor, keys: Tensor, reach: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices of query runs, some rows of the grid at a time, with those of all key runs within reach."""
    place = queries[:, 0].long() * (int(queries[:, 1].max()) + 1) + queries[:, 1]
    for rows in place.argsort(stable=True).split(512):
        low, high = queries[rows, :2].amin(0), queries[rows, :2].amax(0)
        inside = (keys[:, 0] >= low[0] - reach[0]) & (keys[:, 0] <= high[0] + reach[0])
        if low[0] == high[0]:
            inside &= (keys[:, 1] >= low[1] - reach[1]) & (keys[:, 1] <= high[1] + reach[1])
        yield rows, inside.nonzero().flatten()


def by_pieces(kept: Tensor, query_owner: Tensor, key_owner: Tensor, view: "View") -> Tensor:
    """Return which blocks hold a kept pair of pieces."""
    rows = torch.zeros(view.visual_query_blocks, kept.shape[1], dtype=torch.int32).index_add_(0, query_owner, kept.int())
    blocks = torch.zeros(view.visual_query_blocks, view.visual_key_blocks, dtype=torch.int32)
    return blocks.index_add_(1, key_owner, rows) > 0
