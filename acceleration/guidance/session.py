"""A guidance saver at work: both branches where it must be, the conditional one and a stand-in elsewhere."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import COMPUTED, Call, Evaluation
from ..models import BlockSite
from .frequency import band_weights, reweighted
from .policy import ALONE, ASK, SAVE, GuidancePolicy
from .settings import SPLIT

#: Differences at positions this close belong to the same point of the run.
_SAME = 1e-6


@dataclass(frozen=True)
class Guided:
    """One request for both branches of guidance, as the host sees it.

    Attributes:
        key: what a difference of the branches belongs to: conditioning, context window, foreign patches, device.
        both: asks both branches; returns the denoised latents [cond, uncond], each [B, C, ...].
        alone: asks the conditional branch; returns its denoised latent.
        gain: what the network's output is multiplied with in a denoised latent, broadcastable to [B, C, ...].
        to_prediction: denoised latent -> network output.
    """

    key: Hashable
    both: Callable[[], list[torch.Tensor]]
    alone: Callable[[], torch.Tensor]
    gain: torch.Tensor
    to_prediction: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class GuidanceSession:
    """Implements :class:`~..run.Session`; the host brings every request for both branches to :meth:`guide`.

    What is kept is the difference of the network's outputs, uncond - cond, not of denoised latents: it changes less over
    the run, because denoised latents of a flow are the input less sigma times the output.

    A cache beside this one must never answer for a branch from features that are older than it believes. The branches'
    features are on a level while the last evaluation that the cache computed asked both. Where they are not, an evaluation
    that the cache skips takes the stand-in, and the unconditional branch is asked at a computed one: the last that comes
    before the branch would be due, going by the cache's last stride.

    Args:
        policy: verdicts.
        snapshots: differences kept per key.
        budget_bytes: bytes of all of them; the least recently used key goes first.
    """

    policy: GuidancePolicy
    snapshots: int = 1
    budget_bytes: int = 1 << 62
    section: str = "guidance"
    bytes: int = 0
    peak_bytes: int = 0
    saved: int = 0
    asked: int = 0
    left: Counter = field(default_factory=Counter)
    agreements: list[tuple[int, float]] = field(default_factory=list)
    _store: OrderedDict[Hashable, list[tuple[float, torch.Tensor]]] = field(default_factory=OrderedDict)
    _evaluation: Evaluation | None = None
    _verdict: str | None = None
    _call_skipped: bool = False
    _skipped: bool = False
    _both: bool = True
    _level: bool = True
    _computed_step: int | None = None
    _stride: int = 1

    def begin(self, evaluation: Evaluation) -> None:
        """Take note of how the last evaluation ended; what this one does is decided when its branches are asked for."""
        self._close_evaluation()
        self._evaluation, self._verdict, self._skipped, self._both = evaluation, None, False, True

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the call, and note whether a cache skipped it as a whole."""
        denoised = compute()
        whole = call.evaluation.computed_share is None
        self._call_skipped = whole and bool(call.decisions) and call.decisions[0] != COMPUTED
        return denoised

    def guide(self, wanted: Guided) -> list[torch.Tensor]:
        """Return the denoised latents [cond, uncond] of a request for both, having asked one or both of them."""
        evaluation = self._evaluation
        verdict = self._decide(evaluation)
        kept = self._store.get(wanted.key)
        if verdict == ALONE:
            cond = self._alone(wanted)
            return [cond, cond.clone()]
        if verdict == SAVE and kept:
            return self._saved(wanted, self._alone(wanted), kept)
        cond, uncond = wanted.both()
        self._skipped |= self._call_skipped
        if self._skipped and not self._level and kept:
            # A probe found that the step can be skipped: uncond's features are older than cond's. The call is still due.
            self._both = False
            return self._saved(wanted, cond, kept)
        if not self._skipped:
            self.policy.asked(evaluation.step)
        if self.policy.settings.when == "adaptive":
            self._compare(wanted, cond, uncond)
        self._keep(wanted.key, evaluation.position, (uncond - cond).float() / wanted.gain)
        return [cond, uncond]

    def leave(self, reason: str) -> None:
        """Note a request that is left as it is."""
        self.left[reason] += 1

    def depths(self, call: Call) -> frozenset[int]:
        """No block hooks are needed."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block."""
        return original(args)

    def reset(self) -> None:
        """Forget differences and agreement."""
        self._close_evaluation()
        self._store.clear()
        self.bytes, self._level, self._computed_step, self._stride = 0, True, None, 1
        self.policy.reset()

    def close(self) -> None:
        """Free everything."""
        self.reset()

    def report(self) -> dict[str, Any]:
        """Return how often the unconditional branch was asked and saved, what was left alone, and how far branches agreed."""
        self._close_evaluation()
        return {
            "method": self.policy.settings.method,
            "asked": self.asked,
            "saved": self.saved,
            "left": dict(self.left),
            "agreement": [list(pair) for pair in self.agreements],
        }

    def words(self) -> str:
        """Return what was saved and what was left alone, as a sentence for the trace, once the run is over."""
        told = self.report()
        words = (
            f"guidance: the unconditional branch was asked at {told['asked']} evaluations and saved at {told['saved']}"
        )
        left = "; ".join(f"{reason} ({count} times)" for reason, count in told["left"].items())
        return f"{words}; left as they are: {left}" if left else words

    def _decide(self, evaluation: Evaluation) -> str:
        """Return the evaluation's verdict; all requests of an evaluation (context windows) share it."""
        if self._verdict is None:
            stride = 0 if self._computed_step is None else evaluation.step - self._computed_step
            self._stride = stride or self._stride
            verdict = self.policy.verdict(evaluation.step, evaluation.position, evaluation.sigma, self._stride)
            whole = evaluation.computed_share is None
            if verdict == ASK and evaluation.skip and not evaluation.pending and whole and not self._level:
                verdict = SAVE
            self._verdict = verdict
        return self._verdict

    def _alone(self, wanted: Guided) -> torch.Tensor:
        cond = wanted.alone()
        self._both = False
        self._skipped |= self._call_skipped
        return cond

    def _saved(self, wanted: Guided, cond: torch.Tensor, kept: list[tuple[float, torch.Tensor]]) -> list[torch.Tensor]:
        difference = self._forecast(kept)
        if self.policy.settings.stands_in == SPLIT:
            settings = self.policy.settings
            weights = band_weights(self._evaluation.sigma, settings.low_weight, settings.high_weight)
            difference = reweighted(difference, *weights)
        self._store.move_to_end(wanted.key)
        return [cond, cond + (difference * wanted.gain).to(cond.dtype)]

    def _forecast(self, kept: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
        """Return the difference at the evaluation: the last one, or the line through the last two."""
        (newest, difference), *older = kept
        if not older:
            return difference
        before, previous = older[0]
        ahead = (self._evaluation.position - newest) / (newest - before)
        return difference + ahead * (difference - previous)

    def _keep(self, key: Hashable, position: float, difference: torch.Tensor) -> None:
        kept = self._store.pop(key, [])
        if kept and kept[0][1].shape != difference.shape:
            self.bytes -= sum(tensor.nbytes for _, tensor in kept)
            kept = []
        if kept and abs(kept[0][0] - position) < _SAME:
            self.bytes -= kept.pop(0)[1].nbytes
        kept.insert(0, (position, difference))
        self.bytes += difference.nbytes
        for _, tensor in kept[self.snapshots :]:
            self.bytes -= tensor.nbytes
        self._store[key] = kept[: self.snapshots]
        while self.bytes > self.budget_bytes and self._store:
            _, dropped = self._store.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for _, tensor in dropped)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _compare(self, wanted: Guided, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        """Tell the policy the least cosine of any item of the batch."""
        first, second = (wanted.to_prediction(branch).float().flatten(1) for branch in (cond, uncond))
        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=1).min())
        self.policy.agreement(self._evaluation.step, cosine)
        self.agreements.append((self._evaluation.index, cosine))

    def _close_evaluation(self) -> None:
        """Count the evaluation in progress, and learn whether the branches' features are on a level after it."""
        if self._evaluation is None:
            return
        if self._verdict is not None:
            self.asked += self._both
            self.saved += not self._both
            if not self._skipped:
                self._level, self._computed_step = self._both, self._evaluation.step
        self._evaluation = None
