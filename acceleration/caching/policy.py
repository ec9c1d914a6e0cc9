"""Which evaluations to compute. Every policy respects a warm-up, a tail and a part of the run."""

from collections.abc import Sequence
from dataclasses import dataclass


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
        rails.reason(step, steps) is not None or (step - rails.warmup + 1) % interval == 0
        for step in range(steps)
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
