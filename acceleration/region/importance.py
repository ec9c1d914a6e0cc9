"""How much the model is working on each token: pure functions of the latent's last change.

RAS, arXiv 2502.10389, section 3: the standard deviation over the channels of the update, averaged over a patch, times
exp(k * steps left out). Its public code sorts ascending and leaves out the highest, so a token that was left out is left
out again; there the guard works backwards. Here there is one importance, and larger means keep.
"""

import math
from collections.abc import Sequence

import torch

Grid = tuple[int, int, int]


def change_per_token(update: torch.Tensor, grid: Grid, patch: Grid) -> torch.Tensor:
    """Return the standard deviation over channels of ``update``, averaged over each token's patch.

    Args:
        update: change of the latent [B, C, (T,) H, W]; of several items the largest counts for each token.
        grid: tokens (t, h, w); sides that are no multiple of the patch are padded up.
        patch: latent pixels of a token (t, h, w).

    Returns:
        fp32 [t * h * w], in the order of the tokens. Padding does not count.
    """
    spread = update.float().std(dim=1, correction=0)
    if spread.ndim == 3:
        spread = spread.unsqueeze(1)
    return (_sums(spread, grid, patch) / _sums(torch.ones_like(spread[:1]), grid, patch)).amax(dim=0)


def importance(change: torch.Tensor, drops: torch.Tensor, starvation: float) -> torch.Tensor:
    """Return the importance of tokens: what changes most, and what was left out longest, is kept.

    Args:
        change: fp32 [N], not negative.
        drops: int [N], steps in a row that each token has been left out.
        starvation: k of exp(k * drops).
    """
    return change * torch.exp(starvation * drops)


def published_importance(change: torch.Tensor, drops: torch.Tensor, starvation: float) -> torch.Tensor:
    """Return an importance that chooses what the published code chooses at its defaults (``high_ratio`` 1).

    It leaves out the tokens whose change * exp(k * drops) is highest. For comparisons; see :func:`importance`.
    """
    return -change * torch.exp(starvation * drops)


def spread_over_latent(tokens: torch.Tensor, grid: Grid, patch: Grid, shape: Sequence[int]) -> torch.Tensor:
    """Return a value per token [t * h * w] as a value per latent pixel, [1, 1, (T,) H, W] of a latent of ``shape``."""
    pixels = tokens.reshape(grid)
    for axis, size in enumerate(patch):
        pixels = pixels.repeat_interleave(size, dim=axis)
    sides = tuple(shape[2:]) if len(shape) == 5 else (1, *shape[2:])
    pixels = pixels[: sides[0], : sides[1], : sides[2]]
    return pixels[None, None] if len(shape) == 5 else pixels[None]


def mask_tokens(mask: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return which tokens a mask touches anywhere, bool [t * h * w].

    Args:
        mask: [..., H, W] over the picture at any size, or [B, C, T, H, W]; above 0 counts.
        grid: tokens (t, h, w). A mask without frames holds for all of them.
    """
    found = (mask.float() > 0).float()
    if found.ndim == 5:
        found = found.amax(dim=(0, 1))
    else:
        found = found.reshape(-1, *found.shape[-2:]).amax(dim=0, keepdim=True)
    t, h, w = grid
    found = torch.nn.functional.adaptive_max_pool3d(found[None, None], (min(t, found.shape[0]), h, w))[0, 0]
    if found.shape[0] != t:
        found = found[torch.arange(t, device=found.device) * found.shape[0] // t]
    return found.flatten() > 0


def _sums(values: torch.Tensor, grid: Grid, patch: Grid) -> torch.Tensor:
    """[B, T, H, W] -> sums over patches [B, t * h * w]."""
    missing = [side * size - have for side, size, have in zip(grid, patch, values.shape[1:], strict=True)]
    padded = torch.nn.functional.pad(values, [n for gap in reversed(missing) for n in (0, gap)])
    t, h, w = grid
    split = padded.reshape(-1, t, patch[0], h, patch[1], w, patch[2])
    return split.sum(dim=(2, 4, 6)).reshape(-1, math.prod(grid))
