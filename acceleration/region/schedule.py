"""Which steps compute every token, and how many the others compute."""

import math
from dataclasses import dataclass

from ..sampling import Schedule
from .settings import CONSTANT, LINEAR, RegionSettings


@dataclass(frozen=True)
class RegionSchedule:
    """Full and partial steps of one run.

    Attributes:
        settings: what the user asked for.
        schedule: noise levels of the run.
        interval: part of the run that partial steps may lie in, as fractions of the steps.
    """

    settings: RegionSettings
    schedule: Schedule
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def first(self) -> int:
        """First step that may be partial; the step before it must have been seen."""
        return max(self.settings.start, math.ceil(self.interval[0] * self.schedule.steps - 1e-9), 1)

    @property
    def end(self) -> int:
        """First step after those that may be partial."""
        return min(self.schedule.steps - self.settings.tail, math.floor(self.interval[1] * self.schedule.steps + 1e-9))

    def partial(self, step: int, since: int) -> bool:
        """Return whether a step computes only some tokens.

        Args:
            step: counted from 0.
            since: partial steps since the last one that computed every token.
        """
        if not self.first <= step < self.end or step in self.settings.resets:
            return False
        every = self.settings.refresh_every
        return not every or since < every - 1

    def keeps(self, step: int) -> bool:
        """Return whether keys, values and outputs of ``step`` may be needed at a later one; a line needs two such steps."""
        return self.first - 2 <= step < self.end - 1

    def ratio(self, step: int) -> float:
        """Return the share of active tokens at a partial ``step``."""
        ratio = self.settings.ratio
        if self.settings.schedule == CONSTANT:
            return ratio
        if self.settings.schedule == LINEAR:
            ahead = (step - self.first) / max(self.end - 1 - self.first, 1)
            return 1.0 - (1.0 - ratio) * min(max(ahead, 0.0), 1.0)
        sigmas = self.schedule.sigmas
        return ratio + (1.0 - ratio) * min(max(sigmas[step] / sigmas[self.first], 0.0), 1.0)

    def planned(self) -> tuple[bool, ...]:
        """Return per step whether it is to be partial, as far as nothing else interferes."""
        found, since = [], 0
        for step in range(self.schedule.steps):
            found.append(self.partial(step, since))
            since = since + 1 if found[-1] else 0
        return tuple(found)

    def work(self) -> float:
        """Return the share of all tokens that the planned run computes, in (0, 1]."""
        shares = [self.ratio(step) if partial else 1.0 for step, partial in enumerate(self.planned())]
        return sum(shares) / max(len(shares), 1)
