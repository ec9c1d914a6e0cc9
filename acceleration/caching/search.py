"""From a profile and a target to one mask, by real runs: what is predicted is measured before it is believed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..errors import StrettoError
from ..quality import psnr, ssim
from .calibration import Candidate, bisect_quality, choose_for_speed, distinct_masks, frontier, speed
from .fit_search import FIRST, LAST, LATENESS, FitPrediction
from .fitting import FittedWeights
from .masks import Mask, strip
from .policy import Rails
from .prediction import interpolate_amplification, measured_amplification, pair_errors
from .profile import Profile

PSNR, SSIM, SPEED = "psnr", "ssim", "speed"
UNITS = {PSNR: "dB", SSIM: "SSIM", SPEED: "x"}
#: The first two steps give a line its two points; the last one takes the largest stride in noise.
RAILS = Rails(2, 1)
#: Longest run of skipped steps: the profile knows nothing of how far a run drifts meanwhile.
MOST_SKIPS = 6
#: Real runs that a speed target may take before the nearest miss is reported.
SPEED_TRIES = 6
#: Longest run whose amplification is worth probing.
PROBE_STEPS = 60
FITTED = "fitted"
#: What may stand in for a skipped step, and the order of its polynomial where it is one.
ORDERS = {FITTED: None, "line": 1, "reuse": 0}
#: A forecast of the network's output runs nothing at all: the engine and the sampler remain.
FITTED_COST = 0.02


@dataclass(frozen=True)
class Run:
    """One real run: its picture [B, H, W, C] in 0..1, or its latent; and its seconds in the sampler."""

    picture: torch.Tensor
    seconds: float


class Fitter(Protocol):
    """Fits forecast weights to the model by real runs with the profile's seed; ``runs`` counts them."""

    runs: int

    def prediction(self) -> FitPrediction:
        """Return what one plain run and :data:`~.fit_search.LATENESS` fitted ones predict of every mask."""

    def fit(self, mask: Mask) -> FittedWeights:
        """Return the weights of a mask's skipped steps, from one run."""


@dataclass(frozen=True)
class Measured:
    """What real runs of one mask gave, per seed; fewer seeds where the first ones failed a target.

    Attributes:
        mask: True is computed.
        psnr: dB to the plain run of the same seed.
        ssim: None without pictures.
        speed: seconds of the plain run over those of this one.
    """

    mask: Mask
    psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None
    speed: tuple[float, ...]

    def judged(self, kind: str) -> float:
        """Return what a target is held against: the worst seed's ``"psnr"`` or ``"ssim"``, the median ``"speed"``.

        Quality differs between seeds, and the one that weights were fitted to flatters: a median of few promises too much.
        """
        values = getattr(self, kind)
        return statistics.median_low(values) if kind == SPEED else min(values)


@dataclass(frozen=True)
class Choice:
    """The mask that meets the target, and everything that was learned on the way.

    Attributes:
        measured: the chosen mask's figures.
        candidate: the same mask with its predicted error.
        profile: the profile with what the probes said.
        frontier: candidates that no other beats, most computed first.
        tried: every mask that was run.
        runs: number of real runs, plain ones and probes included.
        settings: of the cache that does what was measured.
        cost: of a skipped evaluation relative to a computed one.
    """

    measured: Measured
    candidate: Candidate
    profile: Profile
    frontier: tuple[Candidate, ...]
    tried: tuple[Measured, ...]
    runs: int
    settings: Mapping[str, Any]
    cost: float


@dataclass
class Search:
    """Finds the boldest mask that keeps a quality, or the closest one that reaches a speed.

    Args:
        profile: the recorded run.
        run: (settings of the cache, None for plain; index of the seed, 0 for the profile's) -> :class:`Run`.
        forecaster: a key of :data:`ORDERS`.
        seeds: how many seeds every mask is run with.
        pictures: whether runs give pictures in 0..1, or latents.
        probes: single-step runs that measure how much an error at one step changes the result; 0 for the prior. Fitted
            forecasts need none.
        fitter: what fits the weights of ``"fitted"``.
    """

    profile: Profile
    run: Callable[[Mapping[str, Any] | None, int], Run]
    forecaster: str = "line"
    seeds: int = 1
    pictures: bool = False
    probes: int = 5
    fitter: Fitter | None = None
    runs: int = 0
    tried: dict[Mask, Measured] = field(default_factory=dict)
    _settings: dict[Mask, dict[str, Any]] = field(default_factory=dict)
    _plain: list[Run] = field(default_factory=list)

    def expected_runs(self) -> int:
        """Return about how many real runs :meth:`choose` takes."""
        tries = math.ceil(math.log2(max(self.profile.steps, 2))) + 1
        fits = tries + 1 + len(LATENESS) if self.forecaster == FITTED else 0
        return self.seeds + len(self._probed()) + self.seeds * tries + fits

    def choose(self, kind: str, target: float) -> Choice:
        """Return the choice for ``"psnr"``, ``"ssim"`` or ``"speed"`` of at least ``target``.

        Raises:
            StrettoError: no mask meets it; the message names the best that was measured.
        """
        if kind == SSIM and not self.pictures:
            raise StrettoError("a target in SSIM is measured on pictures: connect a VAE, or choose PSNR")
        if self.profile.steps < 5:
            raise StrettoError(
                f"a run of {self.profile.steps} steps has nothing to skip: the first two and the last are always computed, "
                "and 5 steps are the least"
            )
        self._plain = [self._go(None, seed) for seed in range(self.seeds)]
        if kind == SSIM and not self._has_ssim():
            raise StrettoError("SSIM needs pictures of at least 11 pixels a side: choose PSNR")
        ordered = [candidate for candidate in frontier(self._candidates()) if not all(candidate.mask)]
        if not ordered:
            raise StrettoError(f"no mask of {self.profile.steps} steps skips anything")
        found = self._fast(ordered, target) if kind == SPEED else self._close(ordered, kind, target)
        tried, settings = tuple(self.tried.values()), self._settings[found.mask]
        runs = self.runs + (self.fitter.runs if self.forecaster == FITTED else 0)
        return Choice(self.tried[found.mask], found, self.profile, tuple(ordered), tried, runs, settings, self._cost())

    def measure(self, mask: Mask, kind: str = SPEED, target: float = 0.0) -> Measured:
        """Run a mask with every seed, once; later calls answer from memory.

        Args:
            mask: True is computed.
            kind: ``"psnr"`` or ``"ssim"`` stops at the first seed that stays below ``target``.
            target: see ``kind``.
        """
        if mask not in self.tried:
            settings = self._settings[mask] = self._settings_of(mask)
            results: list[tuple[float, float | None, float]] = []
            for seed, plain in enumerate(self._plain):
                run = self._go(settings, seed)
                similarity = ssim(run.picture, plain.picture) if self._has_ssim() else None
                peak = 1.0 if self.pictures else None
                results.append((psnr(run.picture, plain.picture, peak), similarity, plain.seconds / run.seconds))
                if kind != SPEED and results[-1][0 if kind == PSNR else 1] < target:
                    break
            decibels, similarities, speeds = zip(*results, strict=True)
            self.tried[mask] = Measured(mask, decibels, similarities if self._has_ssim() else None, speeds)
        return self.tried[mask]

    def _candidates(self) -> list[Candidate]:
        """Return masks with their predicted errors, of every number of computed steps."""
        if self.forecaster != FITTED:
            self._probe()
            return distinct_masks(self.profile, RAILS, self.forecaster, MOST_SKIPS)
        prediction, least = self.fitter.prediction(), FIRST + LAST
        sizes = range(self.profile.steps - 1, max(least, self.profile.steps // (MOST_SKIPS + 1)) - 1, -1)
        masks = prediction.best_masks(sizes)
        return [Candidate(mask, math.sqrt(float(prediction.errors(mask).mean())), "fitted") for mask in masks]

    def _settings_of(self, mask: Mask) -> dict[str, Any]:
        """Return the settings of a cache that runs a mask; fitting its weights takes a run."""
        rails = {"warmup": 0, "tail": 0}
        if self.forecaster != FITTED:
            return {"method": "Schedule", "mask": strip(mask), "order": ORDERS[self.forecaster], **rails}
        return {"method": "Fitted", **self.fitter.fit(mask).to_settings(), **rails}

    def _cost(self) -> float:
        return FITTED_COST if self.forecaster == FITTED else self.profile.skipped_cost

    def _close(self, ordered: Sequence[Candidate], kind: str, target: float) -> Candidate:
        found = bisect_quality(ordered, lambda mask: self.measure(mask, kind, target).judged(kind), target)
        if found is not None:
            return found
        self.measure(ordered[0].mask, kind, target)
        best = max(self.tried.values(), key=lambda measured: measured.judged(kind))
        raise StrettoError(
            f"no mask keeps {target:g} {UNITS[kind]}: the best is {best.judged(kind):.4g} {UNITS[kind]} with "
            f"{sum(best.mask)} of {len(best.mask)} steps computed ({strip(best.mask)}). Lower the target or use more steps"
        )

    def _fast(self, ordered: Sequence[Candidate], target: float) -> Candidate:
        steps, cost = self.profile.steps, self._cost()
        chosen = choose_for_speed(ordered, target, cost) or ordered[-1]
        for candidate in ordered[ordered.index(chosen) :][:SPEED_TRIES]:
            if self.measure(candidate.mask).judged(SPEED) >= target:
                return candidate
        # The boldest mask is the last word on what is possible.
        if self.measure(ordered[-1].mask).judged(SPEED) >= target:
            return ordered[-1]
        best = max(self.tried.values(), key=lambda measured: measured.judged(SPEED))
        raise StrettoError(
            f"no mask reaches {target:g}x: the fastest measured is {best.judged(SPEED):.2f}x with {sum(best.mask)} of {steps} "
            f"steps computed ({strip(best.mask)}), predicted {speed(sum(best.mask), steps, cost):.2f}x. Lower the target"
        )

    def _has_ssim(self) -> bool:
        return self.pictures and min(self._plain[0].picture.shape[1:3]) >= 11

    def _go(self, settings: Mapping[str, Any] | None, seed: int) -> Run:
        self.runs += 1
        return self.run(settings, seed)

    def _probed(self) -> tuple[int, ...]:
        """Return the steps to probe: more of them early, where the amplification falls fastest."""
        steps = self.profile.steps
        if steps > PROBE_STEPS or not self.probes or self.forecaster == FITTED:
            return ()
        at = (((i + 0.5) / self.probes) ** 1.5 for i in range(self.probes))
        return tuple(sorted({min(max(round(share * steps), 1), steps - 1) for share in at}))

    def _probe(self) -> None:
        """Measure how much the result changes when one step alone reuses the step before.

        Changes are related to the distance of the stored features, so that predicted errors come out in the units of
        the result. The built-in decay is no law: on other models errors of late steps count more.
        """
        probed = self._probed()
        if not probed:
            return
        steps, plain = self.profile.steps, self._plain[0].picture.double()
        final = {}
        for step in probed:
            alone = {"method": "Schedule", "mask": strip(index != step for index in range(steps)), "order": 0}
            run = self._go({**alone, "warmup": 0, "tail": 0}, 0)
            final[step] = float((run.picture.double() - plain).norm())
        errors = pair_errors(self.profile)
        changes = [0.0, *(float(errors[step - 1, step]) for step in range(1, steps))]
        factors = measured_amplification(final, self.profile.sigmas, changes)
        self.profile = replace(self.profile, amplification=interpolate_amplification(factors, steps))


def predicted_quality(choice: Choice, kind: str) -> list[tuple[float, float]]:
    """Return (speed-up, quality) of every candidate of the frontier as the profile predicts them, for drawing.

    PSNR falls by 20 dB when the error grows tenfold, and 1 - SSIM grows with its square; the level is the median of what
    the measured masks say.
    """
    steps, errors = choice.profile.steps, {candidate.mask: candidate.error for candidate in choice.frontier}

    def level(error: float) -> float:
        return 20.0 * math.log10(max(error, 1e-30))

    offsets = []
    for measured in choice.tried:
        error, value = errors[measured.mask], measured.judged(kind)
        quality = value if kind == PSNR else -10.0 * math.log10(max(1.0 - value, 1e-12))
        if math.isfinite(quality) and error > 0:
            offsets.append(quality + level(error))
    if not offsets:
        return []
    offset, points = statistics.median(offsets), []
    for candidate in choice.frontier:
        if candidate.error > 0:
            decibels = offset - level(candidate.error)
            quality = decibels if kind == PSNR else 1.0 - 10.0 ** (-decibels / 10.0)
            points.append((speed(candidate.computed, steps, choice.cost), quality))
    return points
