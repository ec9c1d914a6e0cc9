"""Published schedules, for models that nobody has searched: every head of every layer does the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..order import OrderSpec
from ..reuse import Mode, ModeTable, ditfastattn, re_ttention
from ..search import ModelTag, Pattern, PlanFile, from_steps


@dataclass(frozen=True)
class Schedule:
    """A row of :data:`SCHEDULES`.

    Attributes:
        name: what a user calls it.
        summary: what it does, in words.
        table: (steps, layers, full_until, period, guided) -> modes of one head per layer.
        keep: share of the visual tokens that its lists keep.
        full_until: share of the steps that are full.
        period: steps from one full step to the next.
        guided: whether guidance branches may share.
        rho_step: lambda of Re-ttention.
        routed: whether the lists are each query block's best, found anew at every full step, not a window.
        source: where the numbers come from.
    """

    name: str
    summary: str
    table: Callable[[int, int, float, int, bool], ModeTable]
    keep: float
    full_until: float
    period: int
    guided: bool = False
    rho_step: float = 0.0
    routed: bool = False
    source: str = ""

    def pattern(self, video: bool, keep: float) -> tuple[Pattern, ...]:
        """Return the patterns of its plan, the last of which its heads follow.

        Args:
            video: whether there is more than one frame: then a window is laid between all pairs of frames.
            keep: share of the visual tokens.
        """
        if self.routed:
            return (Pattern(),)
        return Pattern(), Pattern("frame band" if video else "band", keep / 2)

    def plan(
        self, family: str, layers: int, heads: int, sigmas: Sequence[float], grid: tuple[int, int, int], block: int,
        keep: float, full_until: float, period: int, guided: bool,
    ) -> PlanFile:  # fmt: skip
        """Return the schedule as a plan for a run.

        Args:
            family: architecture.
            layers: attentions of the network.
            heads: of each.
            sigmas: noise level of every step, falling.
            grid: (T, Y, X) of the tokens.
            block: tokens in a block.
            keep: see :class:`Schedule`, as are the others.
        """
        one = self.table(len(sigmas), layers, full_until, period, guided and self.guided)
        table = ModeTable(*(np.repeat(x, heads, -1) for x in (one.modes, one.cfg)))
        return self.laid(table, family, sigmas, grid, block, keep)

    def laid(
        self, table: ModeTable, family: str, sigmas: Sequence[float], grid: tuple[int, int, int], block: int, keep: float,
        **fields: Any,
    ) -> PlanFile:  # fmt: skip
        """Return modes as a plan whose lists are this schedule's; ``fields`` are further ones of the plan."""
        patterns = self.pattern(grid[0] > 1, keep)
        return from_steps(
            table,
            sigmas,
            pattern=np.full(table.modes.shape, len(patterns) - 1, np.uint8),
            budget=np.full(table.modes.shape, keep if self.routed else 0.0, np.float32),
            patterns=patterns,
            grid=grid,
            tokens=grid[0] * grid[1] * grid[2],
            block=(block, block),
            order=OrderSpec("tiles", (1, 8, 8)) if self.routed else OrderSpec(),
            rho_step=self.rho_step,
            **{"model": ModelTag(family), "provenance": {"source": self.source}, **fields},
        )


def _ditfastattn(steps: int, layers: int, full_until: float, period: int, guided: bool) -> ModeTable:
    return ditfastattn(steps, layers, 1, period, guided, full_until)


def _re_ttention(mode: Mode) -> Callable[[int, int, float, int, bool], ModeTable]:
    return lambda steps, layers, full_until, period, _: re_ttention(steps, layers, 1, full_until, period, mode)


_PAPER = "Re-ttention, arXiv 2505.22918"
#: Every schedule, by name.
SCHEDULES = {
    row.name: row
    for row in (
        Schedule(
            "DiTFastAttn",
            "a window, and what full attention added to it at the last full step",
            _ditfastattn, 0.25, 0.2, 4, guided=True,
            source="modes of DiTFastAttn, arXiv 2406.08552; the schedule is ours, theirs is searched for every model",
        ),
        Schedule(
            "Re-ttention",
            "a narrow window, weighed and completed as full attention did at the last full step",
            _re_ttention(Mode.RHO), 0.03125, 0.25, 5, rho_step=0.04, source=f"{_PAPER}, section 4.1",
        ),
        Schedule(
            "Re-ttention, rho only",
            "a window, weighed as at the last full step, and the mean of what it leaves out; keeps next to nothing in memory",
            _re_ttention(Mode.MEAN), 0.25, 0.25, 5, source=f"after {_PAPER}; without its residual",
        ),
        Schedule(
            "Re-ttention, routed",
            "each block's best blocks as of the last full step, weighed and completed as full attention did there",
            _re_ttention(Mode.RHO), 0.1, 0.25, 5, routed=True, source=f"after {_PAPER}; lists by block mass",
        ),
    )
}  # fmt: skip
