"""Searches that decide head by head from each head's own output: DiTFastAttnV2's and Sparse-vDiT's."""

import numpy as np
from torch import Tensor

from . import knapsack

#: Share of the heads that may be skipped: beyond, quality falls off (18 dB at 10 % on HunyuanVideo, arXiv 2506.03065).
SKIPPED_AT_MOST = 0.02


def rse(approximate: Tensor, exact: Tensor) -> Tensor:
    """Return fp32 [H], mean((O_m - O)^2) / mean((O - mean O)^2) of every head (DiTFastAttnV2, arXiv 2503.22796).

    Args:
        approximate: O_m [B, H, rows, d].
        exact: O, of the same shape.
    """
    exact, approximate = exact.float(), approximate.float()
    spread = (exact - exact.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    return (approximate - exact).square().mean((0, 2, 3)) / spread.clamp_min(1e-30)


def ditfastattn_v2(errors: np.ndarray, seconds: np.ndarray, alpha: float, solver: str = "exact") -> np.ndarray:
    """Return int [H]: the method of every head of one layer at one step; 0 is full attention.

    Most seconds are saved within sum RSE <= alpha; a method is admissible for a head where its RSE < 1.5 alpha / H.
    The paper asks an integer program; this is a multiple-choice knapsack of a few options.

    Args:
        errors: RSE [H, M]; column 0 is full attention, and 0.
        seconds: [M] or [H, M], what a head costs with each method.
        alpha: budget; the paper's are .05 to .8.
        solver: ``"exact"`` (dynamic programming) or ``"lagrangian"``.
    """
    errors = np.asarray(errors, float)
    cost = np.broadcast_to(np.asarray(seconds, float), errors.shape)
    losses = np.where(errors < 1.5 * alpha / len(errors), errors, np.inf)
    losses[:, 0] = 0.0
    gains = cost[:, :1] - cost
    return {"exact": knapsack.exact, "lagrangian": knapsack.lagrangian}[solver](gains, losses, alpha)


def sparse_vdit(
    errors: np.ndarray,
    cost: np.ndarray,
    weight: float = 0.5,
    limit: float = 1.0,
    skip: int | None = None,
    skipped_at_most: float = SKIPPED_AT_MOST,
) -> np.ndarray:
    """Return int [L, H]: the pattern of every head; 0 is full attention (Sparse-vDiT, arXiv 2506.03065).

    A pattern's loss is error + weight * cost; the least wins, unless all losses of sparse patterns exceed ``limit``:
    then attention stays full. The paper's error is absolute, and its cost the share of the blocks; ours are the
    relative squared error, which carries over between models, and measured seconds in units of full attention.

    Args:
        errors: [L, H, M]; column 0 is full attention.
        cost: [M], or as ``errors``.
        weight: the paper's lambda.
        limit: the paper's epsilon.
        skip: column of the pattern that skips a head, None without.
        skipped_at_most: share of all heads that may be skipped: those that lose least by it, compared with their next
            best pattern.
    """
    errors = np.asarray(errors, float)
    losses = errors + weight * np.broadcast_to(np.asarray(cost, float), errors.shape)
    if skip is not None:
        others = np.delete(losses, skip, -1).min(-1)
        regret = (losses[..., skip] - others).ravel()
        allowed = np.zeros(regret.shape, bool)
        allowed[np.argsort(regret, kind="stable")[: int(skipped_at_most * regret.size + 1e-9)]] = True
        losses[..., skip] = np.where(allowed.reshape(others.shape), losses[..., skip], np.inf)
    sparse = losses[..., 1:]
    return np.where(sparse.min(-1) > limit, 0, losses.argmin(-1))
