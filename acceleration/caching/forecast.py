"""Linear forecasters: every one is a list of weights over stored snapshots.

Weights are computed on the CPU in fp64 and applied by one fp32 weighted sum
(:mod:`kernels.weighted_sum`), so a forecaster costs one pass over its snapshots.
Snapshots are stored rather than differences: the same memory, any spacing, and the
coordinate (step position, sigma, log-SNR) stays a free choice.

Common arguments: ``coordinates`` are the snapshots' positions, newest first, all
different; ``target`` is the position to forecast. Every function raises ValueError for
no snapshot at all and for two at one position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def newton_weights(coordinates: Sequence[float], target: float, order: int) -> list[float]:
    """Weights of the polynomial through the newest ``order + 1`` snapshots, at ``target``.

    The Lagrange form of Newton's divided differences: exact for features that are a
    polynomial of degree <= ``order`` in the coordinate, whatever the spacing. With fewer
    snapshots the order drops to what they allow; order 0 is plain reuse.

    Args:
        coordinates: positions of the snapshots, newest first, all different.
        target: position to forecast.
        order: polynomial degree, >= 0.

    Returns:
        One weight per used snapshot, newest first; they sum to 1.
    """
    used = _distinct(coordinates, order + 1)
    weights = []
    for j, own in enumerate(used):
        weight = 1.0
        for m, other in enumerate(used):
            if m != j:
                weight *= (target - other) / (own - other)
        weights.append(weight)
    return weights


def damped_line_weights(coordinates: Sequence[float], target: float, damping: float) -> list[float]:
    """Weights of ``F_0 + damping * k * (F_0 - F_1) / d``: the line with a shortened slope.

    k is the distance to the newest snapshot, d the one between the two newest. Damping 0 is
    reuse, 0.5 HiCache's default first order (arXiv 2508.16984), 1 the straight line. One
    snapshot gives ``[1.0]``.
    """
    used = _distinct(coordinates, 2)
    if len(used) == 1:
        return [1.0]
    slope = damping * (target - used[0]) / (used[0] - used[1])
    return [1.0 + slope, -slope]


def taylor_weights(coordinates: Sequence[float], target: float, order: int) -> list[float]:
    """Weights of TaylorSeer's recursion (arXiv 2503.06923), as its code runs it.

    After a computed step with gap d: ``D_0 = F_0`` and ``D_{i+1} = (D_i - D_i before) / d``; the
    forecast is ``sum_i D_i k^i / i!``. Each difference divides by the newest gap only, so from
    order 2 on this is not Newton's form: it is exact for straight lines, no further. For
    results that compare with the publication; :func:`newton_weights` is the better forecast.
    """
    differences = _taylor_differences(_distinct(coordinates, order + 1))
    return _expand(differences, [(target - coordinates[0]) ** i for i in range(len(differences))])


def hermite_weights(coordinates: Sequence[float], target: float, order: int, scale: float = 0.5) -> list[float]:
    """Weights of HiCache's scaled Hermite expansion (arXiv 2508.16984).

    TaylorSeer's differences with ``k^i`` replaced by ``scale^i H_i(scale k)``, physicists'
    H. The first order moves by ``2 scale^2 k``: half a slope at the default scale, the whole
    line at ``sqrt(1/2)``.
    """
    differences = _taylor_differences(_distinct(coordinates, order + 1))
    x = scale * (target - coordinates[0])
    polynomials = [1.0, 2.0 * x]
    for i in range(2, len(differences)):
        polynomials.append(2.0 * x * polynomials[-1] - 2.0 * (i - 1) * polynomials[-2])
    return _expand(differences, [scale**i * polynomials[i] for i in range(len(differences))])


def chebyshev_weights(
    coordinates: Sequence[float],
    target: float,
    steps: int,
    degree: int = 4,
    ridge: float = 0.1,
    anchored: bool = True,
    blend: float = 0.5,
) -> list[float]:
    """Weights of Spectrum's ridge regression on Chebyshev polynomials (arXiv 2603.01623).

    All given snapshots are fitted by T_0 .. T_degree in ``2 u / steps - 1`` with the penalty
    ``ridge * |coefficients|^2``, and the fit is mixed with the line through the two newest
    snapshots: ``blend * fit + (1 - blend) * line``. Fit and prediction are linear in the
    features, so the coefficients (degree + 1 tensors) need never exist.

    The published form penalises T_0 too: its weights sum to about 0.9, which shrinks every
    feature towards zero. The anchored form fits ``F - F_0`` by ``T_m(u) - T_m(u_0)``, m >= 1,
    with F_0 the newest snapshot: weights sum to 1 for any penalty, a large penalty becomes
    reuse, and a forecast at u_0 is F_0 itself.

    Args:
        coordinates: step positions, newest first.
        target: position to forecast.
        steps: steps of the whole run, which span the polynomials' domain.
        degree: highest polynomial. Anchored, it drops to what the snapshots determine.
        ridge: penalty, >= 0; without one (0) the fit is plain least squares.
        anchored: False gives the published form.
        blend: share of the fit, in [0, 1].
    """
    used = _distinct(coordinates, len(coordinates))
    if len(used) == 1 and anchored:
        return [1.0]
    degree = min(degree, len(used) - 1) if anchored else degree
    basis = np.polynomial.chebyshev.chebvander(2.0 * np.asarray([*used, target]) / steps - 1.0, degree)
    if anchored:
        basis = (basis - basis[0])[:, 1:]
    fitted, wanted = basis[:-1], basis[-1]
    # Ridge as extra rows: the pseudo-inverse then never squares the condition number.
    stacked = np.vstack((fitted, np.sqrt(ridge) * np.eye(fitted.shape[1])))
    weights = blend * (wanted @ np.linalg.pinv(stacked)[:, : len(used)])
    if anchored:
        weights[0] += blend - weights.sum()
    for index, weight in enumerate(newton_weights(used, target, 1)):
        weights[index] += (1.0 - blend) * weight
    return weights.tolist()


def probe_weights(distance: float, last_distance: float, limit: float = 1.5) -> list[float]:
    """Weights of DiCache's two-point step (arXiv 2508.17356): ``F_1 + g (F_0 - F_1)``.

    Args:
        distance: relative distance of the probe feature now from the one at F_1.
        last_distance: the same distance when F_0 was computed.
        limit: g = distance / last_distance is clipped to [1, limit].

    Returns:
        Two weights, newest first; plain reuse where the last distance is zero.
    """
    gain = min(max(distance / last_distance, 1.0), limit) if last_distance > 0 else 1.0
    return [gain, 1.0 - gain]


@dataclass(frozen=True)
class Forecaster:
    """A forecaster by name, called alike whatever it needs.

    Attributes:
        name: key in :data:`FORECASTERS`.
        depth: ``depth(**settings)`` -> snapshots it wants; fewer are always enough to forecast something.
        weights: ``weights(coordinates, target, steps, **settings)`` -> weights, newest first, possibly
            fewer than coordinates.
        source: paper.

    Settings, each with a default and ignored where it has no meaning: ``order`` (1), ``damping`` (1.0),
    ``scale`` (0.5), ``degree`` (4), ``ridge`` (0.1), ``anchored`` (True), ``blend`` (0.5),
    ``snapshots`` (10, the window of ``chebyshev``).
    """

    name: str
    depth: Callable[..., int]
    weights: Callable[..., list[float]]
    source: str


FORECASTERS = {
    forecaster.name: forecaster
    for forecaster in (
        Forecaster("reuse", lambda **_: 1, lambda u, target, steps, **_: newton_weights(u, target, 0), "plain reuse"),
        Forecaster(
            "aligned",
            lambda **_: 2,
            lambda u, target, steps, **_: newton_weights(u, target, 0),
            "DiCache, arXiv 2508.17356: the probe's two weights (probe_weights), and reuse until it has any",
        ),
        Forecaster(
            "line",
            lambda damping=1.0, **_: 2 if damping else 1,
            lambda u, target, steps, damping=1.0, **_: damped_line_weights(u, target, damping),
            "HiCache order 1, arXiv 2508.16984, with a free damping",
        ),
        Forecaster(
            "newton",
            lambda order=1, **_: order + 1,
            lambda u, target, steps, order=1, **_: newton_weights(u, target, order),
            "divided differences",
        ),
        Forecaster(
            "taylor",
            lambda order=1, **_: order + 1,
            lambda u, target, steps, order=1, **_: taylor_weights(u, target, order),
            "TaylorSeer, arXiv 2503.06923",
        ),
        Forecaster(
            "hermite",
            lambda order=1, **_: order + 1,
            lambda u, target, steps, order=1, scale=0.5, **_: hermite_weights(u, target, order, scale),
            "HiCache, arXiv 2508.16984",
        ),
        Forecaster(
            "chebyshev",
            lambda degree=4, snapshots=10, **_: max(snapshots, degree + 2),
            lambda u, target, steps, degree=4, ridge=0.1, anchored=True, blend=0.5, **_: chebyshev_weights(
                u, target, steps, degree, ridge, anchored, blend
            ),
            "Spectrum, arXiv 2603.01623",
        ),
    )
}


def _distinct(coordinates: Sequence[float], count: int) -> list[float]:
    """Return the newest ``count`` coordinates; refuse none and duplicates."""
    used = [float(u) for u in coordinates[:count]]
    if not used:
        raise ValueError("a forecast needs at least one snapshot")
    repeated = sorted({u for u in used if used.count(u) > 1})
    if repeated:
        raise ValueError(f"snapshots share the position {repeated[0]:g}: {used}")
    return used


def _taylor_differences(coordinates: list[float]) -> list[np.ndarray]:
    """Return TaylorSeer's D_0 .. D_n as weights over the n + 1 snapshots, by running its recursion oldest first."""
    identity = np.eye(len(coordinates))
    differences: list[np.ndarray] = []
    for index in range(len(coordinates) - 1, -1, -1):
        previous, differences = differences, [identity[index]]
        for i, before in enumerate(previous):
            differences.append((differences[i] - before) / (coordinates[index] - coordinates[index + 1]))
    return differences


def _expand(differences: list[np.ndarray], powers: list[float]) -> list[float]:
    factorials = np.cumprod([1.0, *range(1, len(differences))])
    return sum(d * p / f for d, p, f in zip(differences, powers, factorials, strict=True)).tolist()
