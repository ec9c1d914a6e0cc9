"""Active tokens as small maps over the picture: a character a cell, "0" never active to "9" always."""

from collections.abc import Sequence

import torch

Grid = tuple[int, int, int]
#: Most cells of a side.
SIDE = 64


def step_map(active: torch.Tensor | None, grid: Grid) -> list[str]:
    """Return the share of frames and tokens of each cell that were active at a step; None for all.

    Args:
        active: tokens, int64 [n].
        grid: tokens (t, h, w).
    """
    if active is None:
        return _characters(torch.ones(1, 1, *_sides(grid)))
    return _characters(_flags(active, grid))


def often(steps: Sequence[torch.Tensor], grid: Grid) -> list[str]:
    """Return the share of the partial steps at which each cell was active; empty without any."""
    return _characters(torch.stack([_flags(active, grid) for active in steps]).mean(dim=0)) if steps else []


def _flags(active: torch.Tensor, grid: Grid) -> torch.Tensor:
    flags = torch.zeros(grid[0] * grid[1] * grid[2])
    flags[active.cpu()] = 1.0
    frames = flags.reshape(1, *grid).mean(dim=1, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(frames, _sides(grid))


def _sides(grid: Grid) -> tuple[int, int]:
    return min(grid[1], SIDE), min(grid[2], SIDE)


def _characters(shares: torch.Tensor) -> list[str]:
    """[1, 1, h, w] in [0, 1] -> h rows of w characters."""
    return ["".join(str(round(float(cell) * 9)) for cell in row) for row in shares[0, 0]]
