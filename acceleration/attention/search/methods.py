"""The published searches, and ours, on the curves of one probe: a knob from 0 (fast) to 1 (full) -> what every head does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..reuse import Mode
from .curves import Allocation, within_cost
from .find import Problem
from .heads import ditfastattn_v2, sparse_vdit
from .probe import Option

#: Windows over the sequence, as DiTFastAttn has them.
WINDOWS = ("arrow", "band")


@dataclass(frozen=True)
class SearchMethod:
    """A row of :data:`SEARCHES`.

    Attributes:
        name: what a user calls it.
        summary: what it decides, in words.
        allowed: which options its heads may take; full attention always.
        choose: (problem, knob) -> choice.
        source: paper.
    """

    name: str
    summary: str
    allowed: Callable[[Option, str], bool]
    choose: Callable[[Problem, float], Allocation]
    source: str

    def search(self, problem: Problem) -> Callable[[float], Allocation]:
        """Return knob in [0, 1] -> choice among the options that the method has.

        Raises:
            ValueError: the probe has tried none of them.
        """
        kinds = [problem.curves.patterns[option.pattern].kind for option in problem.curves.options]
        fine = [option.mode == Mode.FULL or self.allowed(option, kind) for option, kind in zip(problem.curves.options, kinds)]
        error = np.where(np.array(fine), problem.error, np.inf)
        if not np.isfinite(error[:, 1:]).any():
            raise ValueError(f"{self.name} has nothing to choose from")
        some = replace(problem, error=error)
        return lambda knob: self.choose(some, min(max(knob, 0.0), 1.0))


def tied(problem: Problem, axes: tuple[int, ...], cost: float) -> Allocation:
    """Return the best choice within a cost where groups along ``axes`` of [S, L, H] all do the same."""
    shape = (*problem.curves.error.shape[:3], -1)
    sums = [table.reshape(shape).sum(axes, keepdims=True) for table in (problem.cost, problem.error)]
    flat = [table.reshape(-1, table.shape[-1]) for table in sums]
    found = within_cost(*flat, cost).chosen.reshape(sums[0].shape[:3])
    return _allocation(problem, np.broadcast_to(found, shape[:3]).ravel())


def _ditfastattn_v2(problem: Problem, knob: float) -> Allocation:
    """Per layer and bucket the most seconds saved within a budget of relative error, which the knob sets from 2 to 0.0002."""
    buckets, layers, heads = problem.curves.error.shape[:3]
    alpha, places = 2.0 * 10 ** (-4 * knob), _usable(problem)
    lost, cost = (x[:, places].reshape(buckets, layers, heads, -1) for x in (_relative(problem), problem.cost))
    chosen = np.zeros((buckets, layers, heads), np.int64)
    for bucket in range(buckets):
        for layer in range(layers):
            seconds = np.where(np.isfinite(lost[bucket, layer]), cost[bucket, layer], 0.0)
            chosen[bucket, layer] = ditfastattn_v2(lost[bucket, layer], seconds, alpha)
    return _allocation(problem, np.asarray(places)[chosen].ravel())


def _sparse_vdit(problem: Problem, knob: float) -> Allocation:
    """Per head the pattern of least error + weight x cost; the knob sets the weight from 10 to 0.001, the paper's is 0.5."""
    buckets, layers, heads = problem.curves.error.shape[:3]
    weight, places = 10 ** (1 - 4 * knob), _usable(problem)
    lost, cost = (x[:, places].reshape(buckets, layers, heads, -1) for x in (_relative(problem), problem.cost))
    skip = next((at for at, place in enumerate(places) if problem.curves.options[place].mode == Mode.ZERO), None)
    units = cost / cost[..., :1]  # of a full attention
    found = [sparse_vdit(lost[bucket], units[bucket], weight, np.inf, skip) for bucket in range(buckets)]
    return _allocation(problem, np.asarray(places)[np.stack(found)].ravel())


def _relative(problem: Problem) -> np.ndarray:
    """Return [S L H, O]: squared relative errors, each times its weight; inf for what may not be chosen."""
    return problem.error * len(problem.error)  # which are shares of the whole


def _usable(problem: Problem) -> list[int]:
    """Return the options that some head may take, full attention first."""
    return [place for place in range(problem.error.shape[1]) if place == 0 or np.isfinite(problem.error[:, place]).any()]


def _allocation(problem: Problem, chosen: np.ndarray) -> Allocation:
    rows = np.arange(len(chosen))
    return Allocation(chosen, float(problem.cost[rows, chosen].sum()), float(problem.error[rows, chosen].sum()))


BUDGETS = "Budgets"
#: Every search, by name.
SEARCHES = {
    row.name: row
    for row in (
        SearchMethod(
            BUDGETS, "every head its own mode and its own share of the blocks, chosen together",
            lambda option, kind: True, lambda problem, knob: problem.best(0.02 + 0.98 * knob),
            "after SubBlock and DiTFastAttnV2, arXiv 2503.22796",
        ),
        SearchMethod(
            "DiTFastAttn", "per layer and part of the run: full, window with residual, or the output of an earlier step",
            lambda option, kind: option.mode == Mode.SHARE or (option.mode == Mode.RESIDUAL and kind in WINDOWS),
            lambda problem, knob: tied(problem, (2,), 0.02 + 0.98 * knob),
            "arXiv 2406.08552; searched on the probe's curves",
        ),
        SearchMethod(
            "DiTFastAttnV2", "per head: full, one of three arrow windows, or the output of an earlier step",
            lambda option, kind: option.mode == Mode.SHARE or (option.mode == Mode.LIST and kind in WINDOWS),
            _ditfastattn_v2, "arXiv 2503.22796",
        ),
        SearchMethod(
            "Sparse-vDiT", "per head: full, a diagonal, diagonals between frames, stripes, or nothing",
            lambda option, kind: option.mode == Mode.ZERO or (option.mode == Mode.LIST and kind != "router"),
            _sparse_vdit, "arXiv 2506.03065",
        ),
        SearchMethod(
            "Re-ttention", "per part of the run: which window, weighed and completed as at the last full step",
            lambda option, kind: option.mode == Mode.RHO and kind != "router",
            lambda problem, knob: tied(problem, (1, 2), 0.02 + 0.98 * knob), "arXiv 2505.22918",
        ),
    )
}  # fmt: skip
