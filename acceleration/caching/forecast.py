"""Linear forecasters: every one is a list of weights over stored snapshots.

Weights are computed on the CPU in fp64 and applied by one fp32 weighted sum
(:mod:`kernels.weighted_sum`), so a forecaster costs one pass over its snapshots.
"""

from collections.abc import Sequence


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
    used = coordinates[: order + 1]
    weights = []
    for j, own in enumerate(used):
        weight = 1.0
        for m, other in enumerate(used):
            if m != j:
                weight *= (target - other) / (own - other)
        weights.append(weight)
    return weights
