"""When to skip: one decision per evaluation, from rails, a policy and, where the policy wants one, an indicator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..evaluation import Call, Evaluation
from .indicator import FeatureDrift, TransformRate
from .policy import Accumulator, Codebook, Rails
from .probe import Probe


class Policy(Protocol):
    """Turns steps and signals into "this one may be skipped"."""

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Return whether ``evaluation`` may be skipped; tell it what was compared with which threshold, if anything was.

        Asked once per evaluation, on rails too, so that sums stay right.
        """

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
    """Skip while the signal, a distance to the last computed evaluation, stays below a threshold.

    SpeCa's threshold falls along the run (arXiv 2509.11628): ``max(threshold * decay ** (position / steps), floor)``.

    Attributes:
        threshold: at the run's start.
        decay: share of it that is left at the run's end.
        floor: what it never falls below.
        steps: steps of the run.
    """

    threshold: float
    decay: float = 1.0
    floor: float = 0.0
    steps: int = 1
    signal: float | None = None
    limit: float = 0.0

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Compare; unknown computes."""
        self.signal = signal
        self.limit = max(self.threshold * self.decay ** (evaluation.position / self.steps), self.floor)
        evaluation.compared, evaluation.threshold = signal, self.limit
        return signal is not None and signal < self.limit

    def computed(self) -> None:
        """Nothing to learn."""

    reset = computed

    def words(self, skip: bool) -> str:
        """Why."""
        return _compared(self.signal, self.limit, skip)


@dataclass
class AccumulatePolicy:
    """Skip while the shaped signals since the last computed evaluation add up to less than a threshold."""

    accumulator: Accumulator
    shape: Callable[[float], float] | None = None
    known: bool = False

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Add and compare; unknown computes."""
        self.known = signal is not None
        below = self.accumulator.skip(self.shape(signal) if self.known and self.shape else signal)
        evaluation.compared = self.accumulator.total if self.known else None
        evaluation.threshold = self.accumulator.threshold
        return below

    def computed(self) -> None:
        """Start a new sum."""
        self.accumulator.reset()

    reset = computed

    def words(self, skip: bool) -> str:
        """Why."""
        return _compared(self.accumulator.total if self.known else None, self.accumulator.threshold, skip)


@dataclass
class CodebookPolicy:
    """Skip as many steps after a computed one as a codebook says for the signal, which only computed ones change.

    AdaCache (arXiv 2411.02397, eq. 5): the schedule up to the next computed step is fixed when a step has been computed.
    """

    codebook: Codebook
    rate: int = 1
    signal: float | None = None
    asked: int = -1
    last: int | None = None

    def skip(self, evaluation: Evaluation, signal: float | None) -> bool:
        """Count from the last computed step; unknown computes. Evaluations of one step share its decision."""
        self.asked, self.signal = evaluation.step, signal
        self.rate = 1 if signal is None else self.codebook.rate(signal)
        return self.last is not None and 0 < evaluation.step - self.last < self.rate

    def computed(self) -> None:
        """Count from here."""
        self.last = self.asked

    def reset(self) -> None:
        """Know of no computed step."""
        self.last = None

    def words(self, skip: bool) -> str:
        """Why."""
        return "no estimate yet" if self.signal is None else f"change {self.signal:.3f} a step: one step in {self.rate}"


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
        drift: indicator on what is stored, or None.
        max_skips: most evaluations skipped in a row; 0 for no limit.
    """

    rails: Rails
    steps: int
    policy: Policy
    rate: TransformRate | None = None
    probe: Probe | None = None
    max_skips: int = 0
    drift: FeatureDrift | None = None
    _in_a_row: int = 0
    _learned: int = field(default=-1, repr=False)
    _stored: int = field(default=-1, repr=False)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weights of the forecast that the evaluation's measurement asks for; None leaves them to the forecaster."""
        return None if self.probe is None else self.probe.weights

    def begin(self, evaluation: Evaluation) -> None:
        """Decide, or leave the decision pending until a probe has been measured."""
        if self.probe is not None:
            evaluation.pending = True
            return
        if self.rate is not None:
            signal = self.rate.change(evaluation.network_input)
        else:
            signal = None if self.drift is None else self.drift.change()
        self.settle(evaluation, signal)

    def settle(self, evaluation: Evaluation, signal: float | None) -> None:
        """Set ``skip``, ``reason`` and ``signal`` of the evaluation."""
        evaluation.pending, evaluation.signal = False, signal
        wanted = self.policy.skip(evaluation, signal)
        rail = self.rails.reason(evaluation.step, self.steps)
        if rail is None and wanted and self.max_skips and self._in_a_row >= self.max_skips:
            rail = f"{self.max_skips} skipped in a row"
        evaluation.skip, evaluation.on_rails = wanted and rail is None, rail is not None
        evaluation.reason = rail or self.policy.words(evaluation.skip)
        self._in_a_row += 1

    def stored(self, call: Call, feature: torch.Tensor, before: torch.Tensor | None) -> None:
        """A computed call is about to store ``feature`` of its deciding branch, which stored ``before`` last."""
        decides = call.branches[deciding_branch(call)].name == "cond" and call.evaluation.index != self._stored
        if self.drift is not None and decides:
            self.drift.observe(call.evaluation.position, feature, before)
            self._stored = call.evaluation.index

    def computed(self, call: Call, prediction: Callable[[], torch.Tensor] | None = None) -> None:
        """A call of the evaluation was computed; ``prediction`` gives what the rate learns from, where there is one."""
        self._in_a_row = 0
        if call.evaluation.index == self._learned:
            return  # another call of the same evaluation has taught us
        if self.rate is not None:
            index = deciding_branch(call)
            if call.branches[index].name != "cond":
                return
            self.rate.observe(call.part(call.network_input, index), call.part(prediction(), index))
        self.policy.computed()
        self._learned = call.evaluation.index

    def reset(self) -> None:
        """Forget the trajectory."""
        self.policy.reset()
        self._in_a_row = 0
        for indicator in (self.rate, self.probe, self.drift):
            if indicator is not None:
                indicator.reset()


def deciding_branch(call: Call) -> int:
    """The conditional branch of a call; the first one where there is none."""
    return next((index for index, branch in enumerate(call.branches) if branch.name == "cond"), 0)
