"""When to skip: one decision per evaluation, from rails, a policy and, where the policy wants one, an indicator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..evaluation import Call, Evaluation
from .indicator import TransformRate
from .policy import Accumulator, Rails
from .probe import Probe


class Policy(Protocol):
    """Turns steps and signals into "this one may be skipped"."""

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Return whether ``evaluation`` may be skipped. Asked once per evaluation, on rails too, so that sums stay right."""

    def computed(self) -> None:
        """The evaluation asked about last was computed."""

    def reset(self) -> None:
        """A new trajectory has begun."""

    def words(self, skip: bool) -> str:
        """Why, in words, after :meth:`skip`."""


@dataclass
class MaskPolicy:
    """Skip by a mask over steps, known before sampling (True: computed)."""

    mask: tuple[bool, ...]

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Look the step up."""
        return not self.mask[evaluation.step]

    def computed(self) -> None:
        """Nothing to learn."""

    reset = computed

    def words(self, skip: bool) -> str:
        """Why."""
        return "between computed steps" if skip else "scheduled"


@dataclass
class ThresholdPolicy:
    """Skip while the signal, a distance to the last computed evaluation, stays below a threshold."""

    threshold: float
    signal: float | None = None

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Compare; unknown computes."""
        self.signal = signal
        return signal is not None and signal < self.threshold

    def computed(self) -> None:
        """Nothing to learn."""

    reset = computed

    def words(self, skip: bool) -> str:
        """Why."""
        return _compared(self.signal, self.threshold, skip)


@dataclass
class AccumulatePolicy:
    """Skip while the shaped signals since the last computed evaluation add up to less than a threshold."""

    accumulator: Accumulator
    shape: Callable[[float], float] | None = None
    known: bool = False

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Add and compare; unknown computes."""
        self.known = signal is not None
        return self.accumulator.skip(self.shape(signal) if self.known and self.shape else signal)

    def computed(self) -> None:
        """Start a new sum."""
        self.accumulator.reset()

    reset = computed

    def words(self, skip: bool) -> str:
        """Why."""
        return _compared(self.accumulator.total if self.known else None, self.accumulator.threshold, skip)


def _compared(value: float | None, threshold: float, skip: bool) -> str:
    return "no estimate yet" if value is None else f"change {value:.3f} {'<' if skip else '>='} {threshold:g}"


@dataclass
class Decision:
    """One decision per evaluation, shared by its guidance branches.

    Attributes:
        rails: steps that are always computed.
        steps: steps of the run.
        policy: what may be skipped.
        rate: indicator on network input and output, or None.
        probe: indicator inside the network, or None. With one, the first network call of an evaluation decides.
        max_skips: most evaluations skipped in a row; 0 for no limit.
    """

    rails: Rails
    steps: int
    policy: Policy
    rate: TransformRate | None = None
    probe: Probe | None = None
    max_skips: int = 0
    _in_a_row: int = 0
    _learned: int = field(default=-1, repr=False)

    def begin(self, evaluation: Evaluation) -> None:
        """Decide, or leave the decision pending until a probe has been measured."""
        if self.probe is not None:
            evaluation.pending = True
            return
        self.settle(evaluation, None if self.rate is None else self.rate.change(evaluation.network_input))

    def settle(self, evaluation: Evaluation, signal: float | None) -> None:
        """Set ``skip``, ``reason`` and ``signal`` of the evaluation."""
        evaluation.pending, evaluation.signal = False, signal
        wanted = self.policy.skip(evaluation, signal)
        rail = self.rails.reason(evaluation.step, self.steps)
        if rail is None and wanted and self.max_skips and self._in_a_row >= self.max_skips:
            rail = f"{self.max_skips} skipped in a row"
        evaluation.skip = wanted and rail is None
        evaluation.reason = rail or self.policy.words(evaluation.skip)
        self._in_a_row += 1

    def computed(self, call: Call, prediction: Callable[[], torch.Tensor]) -> None:
        """A call of the evaluation was computed; ``prediction`` gives the network's output, if it is needed."""
        self._in_a_row = 0
        if call.evaluation.index == self._learned:
            return  # another call of the same evaluation has taught us
        index = deciding_branch(call)
        if self.rate is not None:
            if call.branches[index].name != "cond":
                return
            self.rate.observe(call.part(call.network_input, index), call.part(prediction(), index))
        self.policy.computed()
        self._learned = call.evaluation.index

    def reset(self) -> None:
        """Forget the trajectory."""
        self.policy.reset()
        self._in_a_row = 0
        for indicator in (self.rate, self.probe):
            if indicator is not None:
                indicator.reset()


def deciding_branch(call: Call) -> int:
    """The conditional branch of a call; the first one where there is none."""
    names = [branch.name for branch in call.branches]
    return names.index("cond") if "cond" in names else 0
