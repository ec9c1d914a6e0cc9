"""A table of modules for a share of their cost, from what each module's output changes per step; after HarmoniCa's aim
(arXiv 2410.01723), by search instead of training."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import StrettoError
from ..models import MODULE_NAMES
from .masks import Table
from .policy import Rails

#: The first two steps lay the picture out; the last one takes the largest stride in noise.
RAILS = Rails(2, 1)
#: Longest run of skipped steps: changes were recorded along a run that skips nothing.
MOST_SKIPS = 4


@dataclass(frozen=True)
class Unit:
    """One module of one block, as it was recorded.

    Attributes:
        block: which block.
        names: columns of the table that speak for it.
        cost: of computing it once, >= 0, in any unit that all share.
        changes: per step, by how much its output differs from that of the step before, relative to it, >= 0. The first
            has no step before it and is not used.
    """

    block: int
    names: tuple[str, ...]
    cost: float
    changes: tuple[float, ...]


@dataclass(frozen=True)
class TableChoice:
    """A table and what it promises.

    Attributes:
        table: which modules are computed.
        error: predicted relative error of a module's output, the mean over all modules and steps by their importance.
        share: share of the modules' cost that is computed.
    """

    table: Table
    error: float
    share: float


def choose_table(
    units: Sequence[Unit],
    share: float,
    rails: Rails = RAILS,
    most_skips: int = MOST_SKIPS,
    importance: Sequence[float] | None = None,
) -> TableChoice:
    """Return a table that computes at most ``share`` of the cost, and skips where that errs least.

    What a module last returned is off by at most the sum of the changes since then. Starting from everything computed,
    the module and step with the least additional error for its cost is skipped, one after the other; skipping between
    two skipped steps makes the later ones older, too. The last skip may take the share a little below the one wanted.

    Args:
        units: every module of the network; equally many changes each.
        share: in (0, 1].
        rails: steps at which everything is computed; the first step always is.
        most_skips: longest run of steps that skip a module, >= 1.
        importance: per step, how much an error there counts, > 0 (:func:`~.prediction.amplification_prior`, or the width
            of the step); None counts all alike.

    Raises:
        StrettoError: an argument is out of range, or rails and runs leave more than ``share`` to compute.
    """
    steps = _checked(units, share, most_skips)
    weights = _weights(importance, steps)
    masks = [[True] * steps for _ in units]
    free = [step for step in range(1, steps) if rails.reason(step, steps) is None]
    queue = [
        (_price(unit, mask, step, weights), index, step)
        for index, (unit, mask) in enumerate(zip(units, masks, strict=True))
        for step in free
    ]
    heapq.heapify(queue)
    whole = steps * math.fsum(unit.cost for unit in units)
    left, error = whole, 0.0
    while queue and left > share * whole * (1 + 1e-9):
        _, index, step = heapq.heappop(queue)
        unit, mask = units[index], masks[index]
        if _run(mask, step) > most_skips:
            continue
        price = _price(unit, mask, step, weights)
        if queue and price > queue[0][0]:  # prices only rise as neighbours are skipped
            heapq.heappush(queue, (price, index, step))
            continue
        error += _added_error(unit, mask, step, weights)
        mask[step] = False
        left -= unit.cost
    if left > share * whole * (1 + 1e-9):
        raise StrettoError(
            f"table search: {left / whole:.0%} of the modules' cost is left to compute in {steps} steps with at most "
            f"{most_skips} skipped in a row, {share:.0%} was wanted; use more steps, longer runs or a larger share"
        )
    return TableChoice(_table(units, masks), error / (steps * len(units)), left / whole)


def _checked(units: Sequence[Unit], share: float, most_skips: int) -> int:
    """Return the number of steps of valid arguments."""
    if not units:
        raise StrettoError("table search: there are no modules to choose among")
    lengths = {len(unit.changes) for unit in units}
    if len(lengths) != 1:
        raise StrettoError(f"table search: modules were recorded over {sorted(lengths)} steps; expected equally many")
    for unit in units:
        fine = all(math.isfinite(change) and change >= 0 for change in unit.changes[1:])
        if not fine or not math.isfinite(unit.cost) or unit.cost < 0:
            raise StrettoError(
                f"table search: {'/'.join(unit.names)} of block {unit.block} has a cost or a change that is no number >= 0"
            )
    if not any(unit.cost for unit in units):
        raise StrettoError("table search: every cost is 0; give relative seconds or operations")
    if not 0 < share <= 1:
        raise StrettoError(f"table search: share is {share!r}; it must be in (0, 1]")
    if most_skips < 1:
        raise StrettoError(f"table search: most_skips is {most_skips!r}; it must be at least 1")
    return lengths.pop()


def _weights(importance: Sequence[float] | None, steps: int) -> list[float]:
    """Return the importance of every step, 1 in the mean."""
    if importance is None:
        return [1.0] * steps
    if len(importance) != steps or not all(math.isfinite(value) and value > 0 for value in importance):
        raise StrettoError(f"table search: importance is {list(importance)!r:.80}; expected {steps} numbers > 0")
    return [value * steps / math.fsum(importance) for value in importance]


def _added_error(unit: Unit, mask: Sequence[bool], step: int, weights: Sequence[float]) -> float:
    """Return by how much the sum of errors grows when ``step`` is skipped, too.

    The step and every skipped one right behind it are older by the changes since the step computed last.
    """
    last = step - 1
    while not mask[last]:
        last -= 1
    counted = math.fsum(weights[step : step + 1 + _skipped_after(mask, step)])
    return math.fsum(unit.changes[last + 1 : step + 1]) * counted


def _price(unit: Unit, mask: Sequence[bool], step: int, weights: Sequence[float]) -> float:
    return _added_error(unit, mask, step, weights) / unit.cost if unit.cost else math.inf


def _skipped_after(mask: Sequence[bool], step: int) -> int:
    end = step + 1
    while end < len(mask) and not mask[end]:
        end += 1
    return end - step - 1


def _run(mask: Sequence[bool], step: int) -> int:
    """Return how many steps in a row are skipped when ``step`` is, too."""
    start = step
    while not mask[start - 1]:
        start -= 1
    return step - start + 1 + _skipped_after(mask, step)


def _table(units: Sequence[Unit], masks: Sequence[Sequence[bool]]) -> Table:
    """Return the table of the units' masks; what no unit speaks for is computed."""
    known = {name for unit in units for name in unit.names}
    modules = tuple(name for name in MODULE_NAMES if name in known)
    mask_of = {(unit.block, name): mask for unit, mask in zip(units, masks, strict=True) for name in unit.names}
    blocks, steps = 1 + max(unit.block for unit in units), len(masks[0])
    always = [True] * steps
    return Table(
        tuple(
            tuple(tuple(mask_of.get((block, name), always)[step] for name in modules) for block in range(blocks))
            for step in range(steps)
        ),
        modules,
    )
