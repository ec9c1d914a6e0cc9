"""A cache at work: two granularities over one store, driven by one decision per evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...kernels.weighted_sum import weighted_sum
from ..evaluation import COMPUTED, FORECAST, REUSED, Call, Evaluation
from ..models import BlockSite
from .forecast import newton_weights
from .indicator import TransformRate
from .policy import Accumulator, Rails
from .store import SnapshotStore


@dataclass
class IntervalDecision:
    """Skip by a mask over steps; needs no data."""

    computed: tuple[bool, ...]
    rails: Rails

    def decide(self, evaluation: Evaluation) -> None:
        """Set ``skip`` and ``reason`` of the evaluation."""
        evaluation.skip = not self.computed[evaluation.step]
        rail = self.rails.reason(evaluation.step, len(self.computed))
        evaluation.reason = rail or ("between computed steps" if evaluation.skip else "interval")

    def observe(self, call: Call, prediction: torch.Tensor) -> None:
        """Nothing to learn."""

    def reset(self) -> None:
        """Nothing to forget."""


@dataclass
class TransformRateDecision:
    """Skip while the estimated change stays below a threshold (EasyCache)."""

    accumulator: Accumulator
    rails: Rails
    steps: int
    indicator: TransformRate = field(default_factory=TransformRate)
    _learned: int = -1

    def decide(self, evaluation: Evaluation) -> None:
        """Set ``skip`` and ``reason`` of the evaluation."""
        change = self.indicator.change(evaluation.network_input)
        rail = self.rails.reason(evaluation.step, self.steps)
        evaluation.skip = self.accumulator.skip(change) and rail is None
        if rail or change is None:
            evaluation.reason = rail or "no estimate yet"
        else:
            sign = "<" if evaluation.skip else ">="
            evaluation.reason = f"change {self.accumulator.total:.3f} {sign} {self.accumulator.threshold:g}"

    def observe(self, call: Call, prediction: torch.Tensor) -> None:
        """Learn from the conditional branch of a computed call (the first branch if there is none)."""
        if call.evaluation.index == self._learned:
            return  # a second pass with other patches in the same evaluation
        names = [branch.name for branch in call.branches]
        if "cond" in names:
            index = names.index("cond")
            self.indicator.observe(call.part(call.network_input, index), call.part(prediction, index))
            self.accumulator.reset()
            self._learned = call.evaluation.index

    def reset(self) -> None:
        """Forget the trajectory."""
        self.indicator.reset()
        self.accumulator.reset()


@dataclass
class CacheSession:
    """Cache of one run.

    Args:
        granularity: ``"last"`` or ``"delta"`` (:class:`~.methods.Method`).
        order: forecast order, 0 for reuse.
        decision: when to skip.
        store: snapshots; its depth must be at least ``order + 1``.
        text_in_stream: kinds of block whose stream holds text tokens first.
    """

    granularity: str
    order: int
    decision: IntervalDecision | TransformRateDecision
    store: SnapshotStore
    text_in_stream: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        return self.store.bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever stored in this run."""
        return self.store.peak_bytes

    def begin(self, evaluation: Evaluation) -> None:
        """Decide about the evaluation; every branch of it follows."""
        self.decision.decide(evaluation)

    def network(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute, or arrange for the call to be skipped; see :class:`~..run.Session`."""
        skip = call.evaluation.skip and call.skippable
        # One branch without history computes the whole call: the batch cannot be split.
        if not skip or any(self.store.get(branch.key) is None for branch in call.branches):
            call.decisions = (COMPUTED,) * len(call.branches)
            return self._compute(call, compute)
        call.decisions = tuple(self._kind(branch.key) for branch in call.branches)
        if self.granularity == "last":
            return compute()  # the blocks do the skipping; embeddings and head run at the current timestep
        parts = [
            call.part(call.network_input, i).float() + self._forecast(branch.key, call.evaluation.position)
            for i, branch in enumerate(call.branches)
        ]
        return call.to_denoised(torch.cat(parts))

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run, observe or replace one block; see :class:`~..run.Session`."""
        if self.granularity != "last":
            return original(args)
        joint = site.kind in self.text_in_stream
        if not joint and "txt" in args:
            call.text_tokens = args["txt"].shape[1]
        text = call.text_tokens if joint else 0
        if call.decisions[0] == COMPUTED:
            out = original(args)
            if site.last:
                self._push_all(call, out["img"][:, text:])
            return out
        out = {"img": args["img"]}
        if "txt" in args:
            out["txt"] = args["txt"]
        if site.last:
            parts = [self._forecast(branch.key, call.evaluation.position) for branch in call.branches]
            image = torch.cat(parts)
            out["img"] = torch.cat((args["img"][:, :text], image), dim=1) if text else image
        return out

    def reset(self) -> None:
        """Forget features and estimates."""
        self.store.clear()
        self.decision.reset()

    def close(self) -> None:
        """Free everything."""
        self.reset()

    def _compute(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        denoised = compute()
        if self.granularity == "delta":
            prediction = call.to_prediction(denoised)
            self._push_all(call, prediction - call.network_input.float())
            self.decision.observe(call, prediction)
        return denoised

    def _push_all(self, call: Call, tensor: torch.Tensor) -> None:
        if not call.skippable:
            return  # such a call will never read it
        for index, branch in enumerate(call.branches):
            self.store.push(branch.key, call.evaluation.position, call.part(tensor, index))

    def _kind(self, key: object) -> str:
        return FORECAST if min(self.order, len(self.store.get(key).tensors) - 1) > 0 else REUSED

    def _forecast(self, key: object, position: float) -> torch.Tensor:
        history = self.store.get(key)
        weights = newton_weights(list(history.positions), position, self.order)
        return weighted_sum(list(history.tensors)[: len(weights)], weights)
