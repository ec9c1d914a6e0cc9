"""Multiple-choice knapsack: one option per head, most gain within a limit on the total loss. No solver package needed."""

import numpy as np

#: Bins that the limit is divided into; losses are rounded up, so that the limit always holds.
BINS = 1000


def exact(gains: np.ndarray, losses: np.ndarray, limit: float, bins: int = BINS) -> np.ndarray:
    """Return int [G]: the options with the largest total gain whose losses, each rounded up to a bin, stay in ``limit``.

    Args:
        gains: [G, O].
        losses: [G, O], not negative; inf for options that are not admissible. Each group needs one of loss 0.
        limit: on the sum of the losses.
        bins: precision.

    Raises:
        ValueError: a group without an option of loss 0, or a limit below 0.
    """
    gains, losses = _checked(gains, losses, limit)
    unit = limit / bins if limit > 0 else 1.0
    scaled = np.where(np.isfinite(losses), np.minimum(losses / unit, bins + 1), bins + 1)
    weight = np.ceil(scaled - 1e-9).astype(np.int64)
    size = bins + 1 if limit > 0 else 1
    best, choice = np.zeros(size), np.zeros((len(gains), size), np.int64)
    for group in range(len(gains)):
        candidates = np.full((gains.shape[1], size), -np.inf)
        for option, (gain, need) in enumerate(zip(gains[group], weight[group])):
            if need < size:
                candidates[option, need:] = best[: size - need] + gain
        choice[group] = candidates.argmax(0)
        best = candidates.max(0)
    place, chosen = int(best.argmax()), np.zeros(len(gains), np.int64)
    for group in range(len(gains) - 1, -1, -1):
        chosen[group] = choice[group, place]
        place -= weight[group, chosen[group]]
    return chosen


def lagrangian(gains: np.ndarray, losses: np.ndarray, limit: float, rounds: int = 60) -> np.ndarray:
    """Return int [G]: for the smallest price p that keeps within ``limit``, each group's best of gain - p loss.

    Optimal among all choices that spend as much or less as its own; it may leave room that :func:`exact` uses.
    Arguments as there.
    """
    gains, losses = _checked(gains, losses, limit)
    finite = np.where(np.isfinite(losses), losses, 0.0)

    def at(price: float) -> np.ndarray:
        value = np.where(np.isfinite(losses), gains - price * finite, -np.inf)
        ties = value >= value.max(1, keepdims=True) - 1e-12
        return np.where(ties, losses, np.inf).argmin(1)

    def total(chosen: np.ndarray) -> float:
        return float(losses[np.arange(len(losses)), chosen].sum())

    if total(at(0.0)) <= limit:
        return at(0.0)
    low, high = 0.0, 1.0
    while total(at(high)) > limit and high < 1e18:
        high *= 4
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) > limit else (low, middle)
    return at(high)


def _checked(gains: np.ndarray, losses: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    gains, losses = np.asarray(gains, float), np.asarray(losses, float)
    if gains.shape != losses.shape or gains.ndim != 2:
        raise ValueError(
            f"gains and losses must have one shape [groups, options], got {gains.shape} and {losses.shape}"
        )
    if limit < 0 or np.nanmin(losses) < 0 or not (losses == 0).any(1).all():
        raise ValueError("the limit must not be negative, and every group needs an option without loss")
    return gains, losses
