"""MagCache's magnitude law (arXiv 2506.09045): how much a stored residual shrinks or grows is known beforehand.

The average norm of the stack residual (output minus input of the block stack) follows a
curve that hardly depends on prompt or seed. Published curves are ratios between
consecutive steps of one calibration run. :class:`MagnitudeCurve` integrates them over the
noise level, so that another step count, schedule or partial denoise multiplies exactly the
ratios it crosses; the index functions reproduce the publication.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import StrettoError


def flow_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Return the ``steps + 1`` noise levels of a shifted flow-matching run, 1 first and 0 last.

    ``sigma = shift * s / (1 + (shift - 1) * s)`` at ``s = 1 - i / steps``: the grid that the
    calibration runs of Wan, HunyuanVideo, FLUX and Qwen-Image used, each with its own shift.
    """
    levels = (1.0 - i / steps for i in range(steps + 1))
    return tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in levels)


@dataclass(frozen=True)
class MagnitudeCurve:
    """Log-magnitude of the stack residual over the noise level.

    Attributes:
        sigmas: calibrated noise levels, strictly falling.
        logs: natural logarithm of the residual's magnitude at each, 0 at the first.
        ratios: the ratios it was made from, first one 1 (for the index mode).

    Raises:
        ValueError: fewer than two levels, unequal lengths, or levels that do not fall.
    """

    sigmas: tuple[float, ...]
    logs: tuple[float, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2 or not len(self.sigmas) == len(self.logs) == len(self.ratios):
            raise ValueError(f"a magnitude curve needs two or more levels, got {len(self.sigmas)} for {len(self.logs)}")
        if any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError("the levels of a magnitude curve must fall strictly")

    @classmethod
    def from_ratios(cls, ratios: Sequence[float], sigmas: Sequence[float]) -> "MagnitudeCurve":
        """Integrate per-step ratios.

        Args:
            ratios: ``ratios[i]`` is the magnitude at step i over that at step i - 1, all > 0; the first is
                1 by convention and not used.
            sigmas: noise levels of those steps; a level beyond the last step (the run's end) is ignored.

        Raises:
            ValueError: a ratio is not positive, or there are fewer levels than ratios.
        """
        if any(not ratio > 0.0 for ratio in ratios):
            raise ValueError("magnitude ratios must be positive")
        if len(sigmas) not in (len(ratios), len(ratios) + 1):
            raise ValueError(f"{len(ratios)} ratios need as many noise levels, got {len(sigmas)}")
        logs = np.concatenate(([0.0], np.cumsum(np.log(np.asarray(ratios[1:], dtype=np.float64)))))
        levels = tuple(float(sigma) for sigma in sigmas[: len(ratios)])
        return cls(levels, tuple(logs.tolist()), tuple(float(ratio) for ratio in ratios))

    @classmethod
    def from_text(cls, text: str) -> "MagnitudeCurve":
        """Inverse of :meth:`to_text`; logarithms count from the first level's.

        Raises:
            StrettoError: names the field, the part that is wrong and what was expected.
        """
        points = []
        for word in text.split():
            sigma, _, log = word.partition(":")
            try:
                points.append((float(sigma), float(log)))
            except ValueError:
                points.append((math.nan, math.nan))
            if not all(map(math.isfinite, points[-1])):
                raise StrettoError(f"curve: {word!r:.60} is no level; expected sigma:logarithm, such as 0.75:-0.0123")
        sigmas, logs = [sigma for sigma, _ in points], np.asarray([log for _, log in points])
        try:
            logs = logs - logs[:1]
            return cls(tuple(sigmas), tuple(logs.tolist()), tuple(np.exp(np.diff(logs, prepend=0.0)).tolist()))
        except ValueError as error:
            raise StrettoError(f"curve: {text!r:.60}: {error}") from None

    def to_text(self) -> str:
        """Return the curve as one line of settings: ``sigma:logarithm`` per level, highest level first."""
        return " ".join(f"{sigma:.9g}:{log:.9g}" for sigma, log in zip(self.sigmas, self.logs))

    def log_magnitude(self, sigma: float) -> float:
        """Return L(sigma), piecewise linear and so monotone between calibrated levels.

        Above the highest level the curve is constant. Below the lowest it goes on with its last
        slope: the last step of a finer grid lies there, where magnitudes fall fastest.
        """
        if sigma < self.sigmas[-1]:
            slope = (self.logs[-1] - self.logs[-2]) / (self.sigmas[-1] - self.sigmas[-2])
            return self.logs[-1] + slope * (sigma - self.sigmas[-1])
        return float(np.interp(sigma, self.sigmas[::-1], self.logs[::-1]))

    def ratio(self, sigma_from: float, sigma_to: float) -> float:
        """Return the magnitude at ``sigma_to`` over that at ``sigma_from``: the product of all ratios crossed."""
        return math.exp(self.log_magnitude(sigma_to) - self.log_magnitude(sigma_from))

    def step_ratios(self, sigmas: Sequence[float]) -> list[float]:
        """Return the ratios of a run whose steps are evaluated at ``sigmas``; the first is 1."""
        return [1.0, *(self.ratio(a, b) for a, b in pairwise(sigmas))]


def stretch_ratios(ratios: Sequence[float], steps: int) -> list[float]:
    """Return ``ratios`` for another step count by the nearest index below, ``int(i (L - 1) / (steps - 1))``.

    The published code's rule, for parity. It does not multiply the ratios that a longer step
    crosses; :meth:`MagnitudeCurve.step_ratios` does.
    """
    if steps == 1:
        return [float(ratios[-1])]
    # Whole-number division: the rule must not depend on how a quotient rounds.
    return [float(ratios[i * (len(ratios) - 1) // (steps - 1)]) for i in range(steps)]


def forced_steps(index: int, calibrated: int, steps: int) -> tuple[int, ...]:
    """Return the steps of a run that stand for step ``index`` of a calibration run of ``calibrated`` steps.

    By the same nearest index below as :func:`stretch_ratios`; the published FLUX preset computes step 11 of 28.
    """
    if steps == 1:
        return (0,)
    return tuple(i for i in range(steps) if i * (calibrated - 1) // (steps - 1) == index)


def retained_steps(retention: float, steps: int) -> int:
    """Return the number of first steps that a retention ratio keeps computed, ``int(retention * steps)``."""
    return int(retention * steps + 1e-9)


def magnitude_mask(
    ratios_per_step: Sequence[float],
    threshold: float,
    max_skips: int,
    retention: float,
    steps: int,
    forced: Sequence[int] = (),
) -> tuple[bool, ...]:
    """Return MagCache's mask: it looks at no data, so it is known before sampling.

    Past the retained steps every step multiplies the running ratio and adds ``|1 - ratio|`` to
    the error; it is skipped while the error is below the threshold and at most
    ``max_skips`` steps in a row were. A computed step starts over.

    Args:
        ratios_per_step: magnitude ratios; stretched by index when their number is not ``steps``.
        threshold: accumulated error that computes; 0 computes every step.
        max_skips: longest run of skipped steps.
        retention: share of the run that is computed at its start, in [0, 1].
        steps: steps of the run.
        forced: steps that are computed besides (:func:`forced_steps`). As in the published code they leave the
            accumulated error as it is; :meth:`MagnitudePolicy.computed` starts over instead.
    """
    ratios = list(ratios_per_step) if len(ratios_per_step) == steps else stretch_ratios(ratios_per_step, steps)
    rule = _Accumulated(threshold, max_skips)
    mask = []
    for step, ratio in enumerate(ratios):
        mask.append(step < retained_steps(retention, steps) or step in forced or not rule.skip(ratio))
    return tuple(mask)


@dataclass
class _Accumulated:
    """MagCache's running ratio, error and count since the last computed step."""

    threshold: float
    max_skips: int
    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0

    def skip(self, ratio: float) -> bool:
        """Advance by one step; return whether it is skipped. A step that is not starts over."""
        self.ratio *= ratio
        self.skipped += 1
        self.error += abs(1.0 - self.ratio)
        if self.error < self.threshold and self.skipped <= self.max_skips:
            return True
        self.reset()
        return False

    def reset(self) -> None:
        """Start over after a computed step."""
        self.ratio, self.error, self.skipped = 1.0, 0.0, 0


@dataclass
class MagnitudePolicy:
    """MagCache decided step by step, from the noise levels alone.

    Attributes:
        curve: magnitudes of the model.
        threshold: accumulated error that computes, >= 0.
        max_skips: longest run of skipped steps, >= 0.
        retained: first steps that are always computed (:func:`retained_steps`).
    """

    curve: MagnitudeCurve
    threshold: float
    max_skips: int
    retained: int = 0

    def __post_init__(self) -> None:
        self._rule = _Accumulated(self.threshold, self.max_skips)

    @property
    def error(self) -> float:
        """Error accumulated since the last computed step."""
        return self._rule.error

    def skip(self, step: int, sigma_previous: float | None, sigma: float) -> bool:
        """Return whether ``step`` is skipped; a step that is not starts the accumulation over.

        Args:
            step: index of the step in the run.
            sigma_previous: noise level of the evaluation before, computed or not; None for the first.
            sigma: noise level of this one.
        """
        if step < self.retained or sigma_previous is None:
            self.computed()
            return False
        return self._rule.skip(self.curve.ratio(sigma_previous, sigma))

    def computed(self) -> None:
        """Start over: this evaluation was computed, whatever the policy said."""
        self._rule.reset()
