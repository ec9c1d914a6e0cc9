"""Forecast weights fitted to one model, one mask and one list of noise levels.

Polynomial forecasts know positions alone. Which mixture of earlier predictions really stands in best for a skipped one
is a property of the model, nearly the same for every prompt: a handful of numbers per skipped step, found by least squares
from one plain run. The idea of learning a solver's coefficients from a run with more evaluations is S4S's (arXiv
2502.17423); here the steps stay the plain run's, each weight vector has a closed form, and the fit is sequential, so that
every skipped step also makes up for what the ones before it got wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import StrettoError
from .forecast import newton_weights
from .masks import Mask, parse_mask, strip

#: Snapshots a fitted forecast combines: a fourth adds nothing on the demo models.
SNAPSHOTS = 3
#: Pull towards the straight line, relative to the snapshots' mean energy.
RIDGE = 1e-6
#: Noise levels of a run this close (relative to the first) to those of the fit are the same.
SAME_LEVEL = 1e-3
#: A position this close to a step (in steps) is that step.
_AT_STEP = 1e-4
#: Keeps the equations solvable where all snapshots are zero.
_NOTHING = 1e-30
#: Digits kept in files: single precision does the sum.
_DIGITS = 7


@dataclass(frozen=True)
class FittedWeights:
    """Weights of every skipped step of one mask.

    Attributes:
        mask: True is computed.
        weights: skipped step -> weights of the computed steps before it, newest first.
        sigmas: N + 1 noise levels of the run they were fitted on.

    Raises:
        StrettoError: a skipped step without weights, or with more than there are computed steps before it.
    """

    mask: Mask
    weights: Mapping[int, tuple[float, ...]]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.mask) + 1:
            raise StrettoError(f"sigmas: {len(self.sigmas)} noise levels for {len(self.mask)} steps; expected one more")
        for step, computed in enumerate(self.mask):
            if computed:
                continue
            found, before = self.weights.get(step, ()), sum(self.mask[:step])
            if not 1 <= len(found) <= before:
                raise StrettoError(
                    f"weights: step {step} is skipped and has {len(found)} of them; expected 1 to {before}, the computed "
                    "steps before it"
                )

    @property
    def depth(self) -> int:
        """Snapshots that the widest forecast needs."""
        return max((len(weights) for weights in self.weights.values()), default=1)

    def belong_to(self, sigmas: Sequence[float]) -> bool:
        """Whether a run over ``sigmas`` is the kind of run that was fitted."""
        near = SAME_LEVEL * max(self.sigmas)
        return len(sigmas) == len(self.sigmas) and all(abs(a - b) <= near for a, b in zip(sigmas, self.sigmas))

    def __call__(self, coordinates: Sequence[float], target: float) -> list[float]:
        """Return the weights at ``target``, newest first; those of the line where history differs from the fit's.

        Args:
            coordinates: step positions of the snapshots, newest first.
            target: step position of the forecast.
        """
        step = round(target)
        fitted = self.weights.get(step) if abs(target - step) < _AT_STEP else None
        if fitted is None or not self._same_history(coordinates[: len(fitted)], step):
            return newton_weights(coordinates, target, 1)
        return list(fitted)

    def _same_history(self, coordinates: Sequence[float], step: int) -> bool:
        before = [index for index in range(step - 1, -1, -1) if self.mask[index]][: len(self.weights[step])]
        return len(coordinates) == len(before) and all(abs(a - b) < _AT_STEP for a, b in zip(coordinates, before))

    def to_settings(self) -> dict[str, str]:
        """Return mask, weights and levels as a request's settings carry them: texts."""
        rows = (f"{step}: {_join(values)}" for step, values in sorted(self.weights.items()))
        return {"mask": strip(self.mask), "weights": "; ".join(rows), "sigmas": _join(self.sigmas)}

    @classmethod
    def from_settings(cls, mask: str, weights: str, sigmas: str) -> "FittedWeights":
        """Inverse of :meth:`to_settings`; StrettoError names what cannot be read."""
        rows = {}
        for row in filter(None, (row.strip() for row in weights.split(";"))):
            step, colon, values = row.partition(":")
            if not colon or not step.strip().isdigit():
                raise StrettoError(f"weights: {row!r:.60} is not of the form 'step: weight weight'")
            rows[int(step)] = _numbers(values, "weights")
        return cls(parse_mask(mask), rows, _numbers(sigmas, "sigmas"))


@dataclass
class FittingSampler:
    """Euler's method with skipped steps, as a sampler function; it fits the weights of each skipped step when it gets there.

    Args:
        mask: True is computed.
        states: N + 1 states of the plain run [B, C, ...], from :class:`PlainSampler`.
        snapshots: predictions a forecast combines, at most.
        ridge: pull towards the line, relative to the predictions' mean energy.

    Attributes:
        weights: skipped step -> weights, complete when the run is over.
    """

    mask: Mask
    states: Sequence[torch.Tensor]
    snapshots: int = SNAPSHOTS
    ridge: float = RIDGE
    weights: dict[int, tuple[float, ...]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        """Sample; the arguments are those of a sampler function of k-diffusion."""
        known: list[tuple[int, torch.Tensor]] = []  # newest first
        for step, computed in enumerate(self.mask):
            width = sigmas[step + 1] - sigmas[step]
            if computed:
                denoised = model(x, sigmas[step] * x.new_ones(len(x)), **(extra_args or {}))
                slope = (x - denoised) / sigmas[step]
                known = [(step, slope), *known[: self.snapshots - 1]]
            else:
                # Not the plain run's slope here: the one that leads from where this run is to where the plain one goes.
                wanted = (self.states[step + 1].to(x) - x) / width
                self.weights[step] = tuple(fit_weights(known, wanted, step, self.ridge))
                slope = sum(weight * slope for weight, (_, slope) in zip(self.weights[step], known, strict=True))
                denoised = x - sigmas[step] * slope
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
            x = x + slope * width
        return x


@dataclass
class PlainSampler:
    """Euler's method as a sampler function that keeps the states it passes through: what a fit is aimed at."""

    states: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None) -> torch.Tensor:
        """Sample; the arguments are those of a sampler function of k-diffusion."""
        run = FittingSampler((True,) * (len(sigmas) - 1), ())
        self.states = []

        def keep(info: dict) -> None:
            self.states.append(info["x"])
            if callback is not None:
                callback(info)

        self.states.append(run(model, x, sigmas, extra_args, keep, disable))
        return self.states[-1]


def fit_weights(
    known: Sequence[tuple[float, torch.Tensor]], wanted: torch.Tensor, target: float, ridge: float = RIDGE
) -> list[float]:
    """Return the weights w that minimise ``|wanted - sum_i w_i F_i|^2 + ridge' |w - line|^2``.

    Args:
        known: (position, tensor) of the snapshots, newest first; all tensors have ``wanted``'s shape.
        wanted: what the forecast should have been.
        target: its position.
        ridge: relative to the mean of |F_i|^2; the pull is towards the straight line through the two newest.

    Returns:
        One weight per snapshot, newest first. fp64 on the CPU throughout: latents are small, and not every device has it.
    """
    features = torch.stack([tensor.detach().cpu().double().flatten() for _, tensor in known])
    towards = features @ wanted.detach().cpu().double().flatten()
    positions = [position for position, _ in known]
    return solve_weights((features @ features.T).numpy(), towards.numpy(), positions, target, ridge).tolist()


def solve_weights(
    inner: np.ndarray, towards: np.ndarray, positions: Sequence[float], target: float, ridge: float = RIDGE
) -> np.ndarray:
    """Return the weights of :func:`fit_weights` from inner products alone.

    Args:
        inner: [n, n] fp64, of the snapshots with each other.
        towards: [n] fp64, of the snapshots with what is wanted.
        positions: of the snapshots, newest first.
        target: of what is wanted.
        ridge: relative to the mean of ``inner``'s diagonal.
    """
    line = newton_weights(positions, target, 1)
    prior = np.array(line + [0.0] * (len(positions) - len(line)))
    pull = max(ridge * np.trace(inner) / len(positions), _NOTHING)
    return prior + np.linalg.solve(inner + pull * np.eye(len(positions)), towards - inner @ prior)


def _join(values: Sequence[float]) -> str:
    return " ".join(f"{value:.{_DIGITS}g}" for value in values)


def _numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split())
    except ValueError:
        raise StrettoError(f"{name}: {text!r:.60} is not a list of numbers") from None
    if not values or not all(math.isfinite(value) for value in values):
        raise StrettoError(f"{name}: {text!r:.60}; expected finite numbers with blanks between them")
    return values
