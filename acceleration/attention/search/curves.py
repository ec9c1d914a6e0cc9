"""Choosing one option per head under a total: lower convex hulls, and the steps along them by gain per cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, eq=False)
class Allocation:
    """One option for every group.

    Attributes:
        chosen: int [G], index of the option.
        cost: total.
        error: total.
    """

    chosen: np.ndarray
    cost: float
    error: float


@dataclass(frozen=True, eq=False)
class Steps:
    """All steps along all hulls, the best gain per cost first; those of one group come in their order."""

    group: np.ndarray
    option: np.ndarray
    cost: np.ndarray
    gain: np.ndarray
    start: np.ndarray


def hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the options on the lower convex hull of error over cost, from the cheapest to the best, by index.

    The first is the best among the cheapest, the last the cheapest among the best; options that are not finite are
    none.

    Raises:
        ValueError: no option is finite.
    """
    order = sorted(
        (index for index in range(len(costs)) if np.isfinite(costs[index]) and np.isfinite(errors[index])),
        key=lambda index: (costs[index], errors[index]),
    )
    if not order:
        raise ValueError("a group has no option with finite cost and error")
    found: list[int] = []
    for index in order:
        if found and errors[index] >= errors[found[-1]]:
            continue  # costs no less and is no better
        while len(found) > 1 and _above(costs, errors, found[-2], found[-1], index):
            found.pop()
        found.append(index)
    return found


def within_cost(costs: np.ndarray, errors: np.ndarray, budget: float, steps: Steps | None = None) -> Allocation:
    """Return the allocation of least total error whose cost is at most ``budget``.

    Steps along the hulls, taken by gain per cost: the optimum among all mixtures of options, up to the one step that
    does not fit. Where even the cheapest options exceed the budget, these.

    Args:
        costs: fp64 [G, O].
        errors: likewise; inf or nan for options that a group does not have.
        budget: in the costs' unit.
        steps: of :func:`steps_along`, where they are known.
    """
    steps = steps or steps_along(costs, errors)
    chosen, spent = steps.start.copy(), _total(costs, steps.start)
    stuck = np.zeros(len(costs), bool)
    for group, option, cost in zip(steps.group, steps.option, steps.cost):
        if stuck[group]:
            continue
        if spent + cost > budget * (1 + 1e-12):
            stuck[group] = True
            continue
        chosen[group], spent = option, spent + cost
    return Allocation(chosen, _total(costs, chosen), _total(errors, chosen))


def within_error(costs: np.ndarray, errors: np.ndarray, budget: float, steps: Steps | None = None) -> Allocation:
    """Return the allocation of least cost whose total error is at most ``budget``; the best one where none is.

    Arguments as :func:`within_cost`. Optimal but for the last step, which may do more than it must.
    """
    steps = steps or steps_along(costs, errors)
    chosen, error = steps.start.copy(), _total(errors, steps.start)
    for group, option, gain in zip(steps.group, steps.option, steps.gain):
        if error <= budget * (1 + 1e-12):
            break
        chosen[group], error = option, error - gain
    return Allocation(chosen, _total(costs, chosen), _total(errors, chosen))


def steps_along(costs: np.ndarray, errors: np.ndarray) -> Steps:
    """Return the steps along the hulls of all groups, to be taken by any number of searches.

    Args:
        costs: fp64 [G, O].
        errors: likewise; inf or nan for options that a group does not have.

    Raises:
        ValueError: shapes differ, or a group has no option.
    """
    if costs.shape != errors.shape or costs.ndim != 2:
        raise ValueError(
            f"costs and errors must have one shape [groups, options], got {costs.shape} and {errors.shape}"
        )
    start = np.zeros(len(costs), np.int64)
    rows = []
    for group, (cost, error) in enumerate(zip(costs, errors)):
        path = hull(cost, error)
        start[group] = path[0]
        for number, (a, b) in enumerate(pairwise(path)):
            spend, gain = cost[b] - cost[a], error[a] - error[b]
            rows.append((-gain / max(spend, 1e-300), group, number, b, spend, gain))
    rows.sort()
    group, option = (np.array([row[place] for row in rows], np.int64) for place in (1, 3))
    return Steps(group, option, *(np.array([row[place] for row in rows], float) for place in (4, 5)), start)


def _above(costs: Sequence[float], errors: Sequence[float], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (errors[b] - errors[a]) * (costs[c] - costs[a]) >= (errors[c] - errors[a]) * (costs[b] - costs[a])


def _total(table: np.ndarray, chosen: np.ndarray) -> float:
    return float(table[np.arange(len(table)), chosen].sum())
