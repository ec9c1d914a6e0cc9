"""Which evaluations to compute. Every policy respects a warm-up, a tail and a part of the run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import StrettoError


@dataclass(frozen=True)
class Rails:
    """Steps that are always computed.

    Attributes:
        warmup: number of first steps (early errors change the composition).
        tail: number of last steps (late errors remove texture).
        interval: fractions of the run outside of which every step is computed.
        forced: single steps computed besides (an expert switch, the edge of a ControlNet's range).
    """

    warmup: int
    tail: int
    interval: tuple[float, float] = (0.0, 1.0)
    forced: frozenset[int] = frozenset()

    def reason(self, step: int, steps: int) -> str | None:
        """Return why ``step`` of ``steps`` must be computed, or None when it is free."""
        if step < self.warmup:
            return "warm-up"
        if step >= steps - self.tail:
            return "tail"
        if not self.interval[0] * steps <= step < self.interval[1] * steps:
            return "outside the interval"
        if step in self.forced:
            return "forced"
        return None


def interval_mask(steps: int, rails: Rails, interval: int) -> tuple[bool, ...]:
    """Return, per step, whether a fixed-interval policy computes it.

    After the warm-up the first ``interval - 1`` free steps are skipped, then one is
    computed, and so on: the last warm-up step counts as the computed one before them
    (TaylorSeer's schedule, arXiv 2503.06923, with a tail).
    """
    return tuple(
        rails.reason(step, steps) is not None or (step - rails.warmup + 1) % interval == 0 for step in range(steps)
    )


def limit_skips(mask: Sequence[bool], most: int) -> tuple[bool, ...]:
    """Return ``mask`` with a computed step after every ``most`` skipped ones in a row.

    Skips in one cluster cost far more than the same number spread out. ``most`` 0 computes everything.
    """
    limited: list[bool] = []
    run = 0
    for computed in mask:
        computed = bool(computed) or run >= most
        run = 0 if computed else run + 1
        limited.append(computed)
    return tuple(limited)


@dataclass
class Accumulator:
    """Sum of estimated relative changes since the last computed evaluation (EasyCache, arXiv 2507.02860)."""

    threshold: float
    total: float = 0.0

    def skip(self, change: float | None) -> bool:
        """Add ``change`` and return whether the sum still lies below the threshold.

        None (no estimate yet) always computes. The caller resets after computing.
        """
        if change is None:
            return False
        self.total += change
        return self.total < self.threshold

    def reset(self) -> None:
        """Start a new sum; call after a computed evaluation."""
        self.total = 0.0


@dataclass(frozen=True)
class Codebook:
    """How long a computed step lasts, by how fast features change (AdaCache, arXiv 2411.02397).

    Attributes:
        rungs: (change, rate) with rising changes: below the change, one step in ``rate`` is computed. Above the last
            rung's change every step is.

    Raises:
        StrettoError: no rung, changes that do not rise, or a rate below 1.
    """

    rungs: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        changes = [change for change, _ in self.rungs]
        fine = bool(changes) and changes == sorted(set(changes)) and all(rate >= 1 for _, rate in self.rungs)
        if not fine or not all(map(math.isfinite, changes)):
            raise StrettoError(f"codebook: {self.rungs}; expected rising changes, each with a rate of 1 or more")

    @classmethod
    def even(cls, width: float, most: int) -> "Codebook":
        """Return the codebook whose rate is ``most`` below ``width``, ``most - 1`` below twice that, and so on down to 2.

        Both published codebooks for 30 steps are of this form, with a width of 0.08 and 6 or 3 at most.
        """
        most = most if width > 0 else 1
        return cls(tuple((width * (rung + 1), most - rung) for rung in range(max(most - 1, 1))))

    @classmethod
    def parse(cls, text: str) -> "Codebook":
        """Return the codebook of a text such as ``"0.03:12 0.05:10 1:3"``; commas separate as spaces do."""
        rungs = []
        for word in re.split(r"[\s,]+", text.strip()):
            change, _, rate = word.partition(":")
            try:
                rungs.append((float(change), int(rate)))
            except ValueError:
                raise StrettoError(f"codebook: {word!r} is no rung; expected change:rate, such as 0.08:6") from None
        return cls(tuple(rungs))

    def rate(self, change: float) -> int:
        """Return how many steps a computed one stands for, itself included."""
        return next((rate for below, rate in self.rungs if change < below), 1)
