"""What a profile predicts: the error of every forecast and mask, and the fits that make them small.

A skipped step m costs ``weight_m * |forecast_m - feature_m|``: the solver moves by the step's
width, and what it gets wrong changes until the end of the run by the step's amplification.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from .forecast import FORECASTERS, damped_line_weights
from .polynomial import ClampedPolynomial
from .profile import Profile


def amplification_prior(steps: int) -> tuple[float, ...]:
    """Return ``max(1, 10 exp(-3.5 p / steps))``: how much more an error counts the earlier in the run it is made."""
    return tuple(max(1.0, 10.0 * math.exp(-3.5 * p / steps)) for p in range(steps))


def measured_amplification(
    final_changes: Mapping[int, float], sigmas: Sequence[float], changes: Sequence[float]
) -> dict[int, float]:
    """Return the amplification of probed steps.

    Args:
        final_changes: step j -> Euclidean change of the final latent when only step j reuses step j - 1.
        sigmas: N + 1 noise levels of the run.
        changes: ``changes[j]`` is the Euclidean distance of the network's outputs at j and j - 1; N entries.

    Returns:
        Step -> factor; steps whose output did not change are left out.
    """
    local = {j: (sigmas[j] - sigmas[j + 1]) * changes[j] for j in final_changes}
    return {j: change / local[j] for j, change in final_changes.items() if local[j] > 0}


def interpolate_amplification(probed: Mapping[int, float], steps: int) -> tuple[float, ...]:
    """Return the amplification of every step from a few probed ones.

    The prior times a correction whose logarithm is linear between probed steps and constant
    beyond them: four or five probes are enough. Without any this is the prior.
    """
    prior = np.asarray(amplification_prior(steps))
    known = sorted((step, factor) for step, factor in probed.items() if factor > 0)
    if not known:
        return tuple(prior.tolist())
    at = [step for step, _ in known]
    corrections = [math.log(factor / prior[step]) for step, factor in known]
    return tuple((prior * np.exp(np.interp(range(steps), at, corrections))).tolist())


def step_weights(profile: Profile) -> np.ndarray:
    """Return, per step, its width in sigma times its amplification (the profile's, or the prior); [N] fp64."""
    factors = profile.amplification or amplification_prior(profile.steps)
    return np.asarray(factors) * -np.diff(profile.sigmas)


def pair_errors(profile: Profile, forecaster: str = "reuse", damping: float = 1.0) -> np.ndarray:
    """Return how far a forecast from computed steps lies from the feature it replaces, before any weighting.

    Args:
        profile: the run.
        forecaster: ``"reuse"`` or ``"line"``.
        damping: of the line.

    Returns:
        fp64. For reuse [N, N]: entry [i, m] is the error of step i's feature at step m. For the line
        [N, N, N]: entry [h, i, m] is the error at m of the line through h < i; [i, i, m] that of reuse, for
        when nothing before i is known. Entries that no run can need (m <= i, h > i) are infinite.

    Raises:
        ValueError: another forecaster; :func:`mask_error` scores masks with any of them.
    """
    steps, gram = profile.steps, _gram(profile)
    own = np.diag(gram)[:steps]
    squared = own[:, None] + own[None, :] - 2.0 * gram[:steps, :steps]
    reuse = np.where(np.tri(steps, dtype=bool), np.inf, np.sqrt(np.maximum(squared, 0.0)))
    if forecaster == "reuse":
        return reuse
    if forecaster != "line":
        raise ValueError(f"pair errors exist for reuse and line, not for {forecaster!r}")
    errors = np.full((steps, steps, steps), np.inf)
    for i in range(steps):
        errors[i, i] = reuse[i]
        for h in range(i):
            for m in range(i + 1, steps):
                positions = (profile.positions[i], profile.positions[h])
                newest, older = damped_line_weights(positions, profile.positions[m], damping)
                errors[h, i, m] = _combined(gram, (i, h, m), (newest, older, -1.0))
    return errors


def mask_error(profile: Profile, mask: Sequence[bool], forecaster: str = "reuse", **settings: float) -> float:
    """Return the predicted error of a mask under any forecaster, weighted by :func:`step_weights`.

    The forecast sees the features of the profiled run, not those of a run that has drifted.

    Args:
        profile: the run.
        mask: N booleans, the first one True.
        forecaster: name in :data:`~.forecast.FORECASTERS`.
        settings: of the forecaster.
    """
    chosen, gram, weights = FORECASTERS[forecaster], _gram(profile), step_weights(profile)
    depth, history, total = chosen.depth(**settings), [], 0.0
    for step, computed in enumerate(mask):
        if computed:
            history = [step, *history][:depth]
        elif not history:
            return math.inf  # nothing to reuse
        else:
            positions = [profile.positions[i] for i in history]
            shares = chosen.weights(positions, profile.positions[step], profile.steps, **settings)
            total += float(weights[step]) * _combined(gram, (*history[: len(shares)], step), (*shares, -1.0))
    return total


def fit_damping(profile: Profile, gap: int = 1) -> float:
    """Return the damping of the line that fits the profile best, in [0, 1].

    Least squares of ``F_m - F_i`` on the line's step from i, over all triples ``gap`` steps apart,
    weighted like errors.
    """
    gram, weights = _gram(profile), step_weights(profile)
    above, below = 0.0, 0.0
    for m in range(2 * gap, profile.steps):
        i, h = m - gap, m - 2 * gap
        p = profile.positions
        reach = (p[m] - p[i]) / (p[i] - p[h])
        block = gram[np.ix_((h, i, m), (h, i, m))]
        line, truth = np.array([-reach, reach, 0.0]), np.array([0.0, -1.0, 1.0])
        above += weights[m] ** 2 * float(line @ block @ truth)
        below += weights[m] ** 2 * float(line @ block @ line)
    return min(max(above / below, 0.0), 1.0) if below > 0 else 0.0


def fit_rescaling(changes: Sequence[float | None], outputs: Sequence[float | None]) -> ClampedPolynomial:
    """Fit a rescaling of an indicator to the output's relative changes: ``a + b x + c x^2`` with a, b, c >= 0.

    Unlike TeaCache's free polynomial of degree 4 (arXiv 2411.19108) it is monotone and never
    negative, so it cannot stop a model from computing. Steps where either is None are left out.

    Raises:
        ValueError: fewer than two usable steps.
    """
    pairs = [(x, y) for x, y in zip(changes, outputs) if x is not None and y is not None]
    if len(pairs) < 2:
        raise ValueError("a rescaling needs two or more steps with both values")
    x, y = np.asarray(pairs, dtype=np.float64).T
    columns = np.stack([x * x, x, np.ones_like(x)], axis=1)
    best, least = np.zeros(3), float(y @ y)
    # Three unknowns: trying every set of those that are not zero is the exact non-negative least squares.
    for size in (1, 2, 3):
        for used in combinations(range(3), size):
            solution = np.linalg.lstsq(columns[:, used], y, rcond=None)[0]
            residual = float(np.sum((columns[:, used] @ solution - y) ** 2))
            if (solution >= 0).all() and residual < least:
                best, least = np.zeros(3), residual
                best[list(used)] = solution
    return ClampedPolynomial(tuple(best.tolist()), float(x.min()), float(x.max()))


def _gram(profile: Profile) -> np.ndarray:
    """Return the products [N + 1, N + 1] of all features less their mean, and of the mean itself (last)."""
    mean = profile.sketches.mean(axis=0, dtype=np.float64)
    # Weights of forecasts sum to 1, so the mean nearly always drops out; without it far fewer digits are lost.
    rows = np.vstack((profile.sketches.astype(np.float64) - mean, mean))
    return rows @ rows.T


def _combined(gram: np.ndarray, steps: Sequence[int], weights: Sequence[float]) -> float:
    """Return the Euclidean norm of a weighted sum of features."""
    w = np.asarray([*weights, math.fsum(weights)])
    used = (*steps, len(gram) - 1)
    return math.sqrt(max(float(w @ gram[np.ix_(used, used)] @ w), 0.0))
