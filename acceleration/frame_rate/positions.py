"""Rotary positions of a shortened video: as if its latents followed closely, or where they stood in the full one.

VGDFR (arXiv 2504.12259) finds that most layers look at neighbours ("local": 0, 1, 2, ...) and a few at the whole video
("global": the original indices of the kept latents).
"""

from typing import Any

import torch

#: Layers that VGDFR publishes as global, by (network, number of layers): HunyuanVideo's 20 double and 40 single blocks.
PUBLISHED = {("HunyuanVideo", 60): (4, 19, 23, 31, 35, 36, 37, 40)}


def embedder_of(network: Any) -> Any | None:
    """Return what turns positions [B, N, 3] (time, y, x) into rotary tables, None where a network has no such part."""
    return getattr(network, "rope_embedder", None) or getattr(network, "pe_embedder", None)


def tokens_of(network: Any, latent: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the grid of tokens (time, y, x) of a latent [B, C, L, h, w]."""
    size = network.patch_size
    patch = (size,) * 3 if isinstance(size, int) else tuple(size)
    return tuple(-(-side // step) for side, step in zip(latent[2:], patch, strict=True))


def ids_of(times: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Return positions [1, N, 3] of a grid of tokens whose time steps stand at ``times`` [grid[0]]."""
    ids = times.new_zeros(*grid, 3)
    ids[..., 0] += times.reshape(-1, 1, 1)
    ids[..., 1] += torch.arange(grid[1], device=times.device, dtype=times.dtype).reshape(1, -1, 1)
    ids[..., 2] += torch.arange(grid[2], device=times.device, dtype=times.dtype).reshape(1, 1, -1)
    return ids.reshape(1, -1, 3)


def global_table(network: Any, table: torch.Tensor, grid: tuple[int, int, int], times: tuple[int, ...]) -> torch.Tensor | None:
    """Return ``table`` with the video's tokens moved to the time steps ``times``; None where it cannot be told apart.

    The network's own part makes the new rows. It must reproduce the rows that are there when it is asked for positions
    0, 1, 2, ..., or somebody else has changed them and nothing is replaced.

    Args:
        network: with a part that :func:`embedder_of` finds.
        table: rotary table of a call; one axis holds the tokens, the video's first: [1, N, 1, d/2, 2, 2] (Wan) or
            [B, 1, N, d/2, 2, 2].
        grid: tokens of the short video (time, y, x).
        times: original indices of its time steps.
    """
    embedder = embedder_of(network)
    if embedder is None or table.ndim != 6 or len(times) != grid[0]:
        return None
    axis = 1 if table.shape[2] == 1 else 2
    count = grid[0] * grid[1] * grid[2]
    if table.shape[axis] < count:
        return None

    def rows(steps: torch.Tensor) -> torch.Tensor:
        made = embedder(ids_of(steps, grid))  # [1, 1, N, d/2, 2, 2]
        return made.movedim(1, 2) if axis == 1 else made

    near = rows(torch.arange(grid[0], device=table.device, dtype=torch.float32)).to(table.dtype)
    if not torch.allclose(near, table.narrow(axis, 0, count)[: near.shape[0]], atol=1e-3):
        return None
    far = rows(torch.tensor(times, device=table.device, dtype=torch.float32)).to(table.dtype)
    rest = table.narrow(axis, count, table.shape[axis] - count)
    return torch.cat([far.expand(table.shape[0], *far.shape[1:]), rest], axis)
