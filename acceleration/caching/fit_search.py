"""Which steps to compute when the skipped ones get fitted forecasts: predicted from the states of one plain run."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .fitting import SNAPSHOTS, solve_weights
from .masks import Mask

#: Steps at either end that every mask computes: a line needs two points, and the last step strides furthest in noise.
FIRST, LAST = 2, 1
#: What :meth:`FitPrediction.suited` tries.
LATENESS = (0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True, eq=False)
class FitPrediction:
    """Errors of masks with fitted weights, from inner products alone.

    Attributes:
        gram: [P, N, N] fp64, inner products of the solver's slopes at any two steps, for each of P samples.
        sigmas: N + 1 noise levels.
        lateness: what is missed at the last step counts ``exp(lateness)`` times as much as at the first. Later fits make up
            for early misses, and how well they can differs between models: :meth:`suited` finds out.
    """

    gram: np.ndarray
    sigmas: tuple[float, ...]
    lateness: float = 1.0
    _seen: dict[tuple[tuple[int, ...], int], np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, states: Sequence[torch.Tensor], sigmas: Sequence[float]) -> "FitPrediction":
        """Return the prediction for the run that passed through ``states`` (N + 1 tensors [P, ...]) with Euler's method."""
        path = torch.stack([state.detach().cpu().double().flatten(1) for state in states])
        widths = torch.tensor(sigmas, dtype=torch.float64).diff()
        slopes = path.diff(dim=0) / widths[:, None, None]
        return cls(torch.einsum("ipd,jpd->pij", slopes, slopes).numpy(), tuple(float(level) for level in sigmas))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.gram.shape[1]

    def errors(self, mask: Sequence[bool], snapshots: int = SNAPSHOTS) -> np.ndarray:
        """Return the predicted squared error of every sample's result, [P], up to a factor common to all masks.

        Each skipped step adds what its fitted forecast misses on the plain path, times its width, weighted by lateness.
        """
        total, known = np.zeros(len(self.gram)), ()
        for step, computed in enumerate(mask):
            if computed:
                known = (step, *known[: snapshots - 1])
            else:
                total = total + self._missed(known, step)
        return total

    def _missed(self, known: tuple[int, ...], step: int) -> np.ndarray:
        """Return what the forecast of ``step`` from the steps ``known`` adds to the errors; masks share most of them."""
        if (known, step) not in self._seen:
            every, at = self.gram.sum(0), [*known, step]
            weights = np.append(solve_weights(every[np.ix_(known, known)], every[list(known), step], known, step), -1.0)
            missed = np.einsum("i,pij,j->p", weights, self.gram[:, at][:, :, at], weights)
            factor = math.exp(self.lateness * step / self.steps) * (self.sigmas[step + 1] - self.sigmas[step])
            self._seen[known, step] = factor**2 * np.maximum(missed, 0.0)
        return self._seen[known, step]

    def score(self, mask: Sequence[bool]) -> float:
        """Return the mean and the worst of the samples' errors, half each, in dB; more is better."""
        return balanced_decibels(self.errors(mask))

    def suited(self, quality: Callable[[Mask], float]) -> "FitPrediction":
        """Return this prediction with the lateness whose mask of half the steps is best in real runs.

        Args:
            quality: runs a mask with fitted weights; higher is better.
        """
        half = max(self.steps // 2, FIRST + LAST)
        tried: dict[Mask, FitPrediction] = {}
        for lateness in LATENESS:
            prediction = replace(self, lateness=lateness, _seen={})
            tried.setdefault(prediction.best_mask(half), prediction)  # a mask is run once, whoever likes it
        return tried[max(tried, key=quality)]

    def best_mask(self, computed: int) -> Mask:
        """Return a mask of ``computed`` computed steps that moving any one of them does not better.

        Raises:
            ValueError: fewer than FIRST + LAST computed steps, or more than there are.
        """
        return climb(even_mask(self.steps, computed), self.score)

    def best_masks(self, sizes: Iterable[int]) -> list[Mask]:
        """Return a good mask for every number of computed steps in ``sizes`` (falling).

        Each starts from the one before, without the steps that are missed least; computed steps then move to their
        neighbours' places while that helps.
        """
        mask, found = (True,) * self.steps, []
        for size in sizes:
            while sum(mask) > size:
                mask = max(_without_one(mask), key=self.score)
            mask = climb(mask, self.score, reach=1)
            found.append(mask)
        return found


def balanced_decibels(errors: Sequence[float]) -> float:
    """Return ``-10 log10`` of errors, half their mean and half the worst: the hard prompts decide as much as all together."""
    decibels = [-10.0 * math.log10(max(float(error), 1e-300)) for error in errors]
    return 0.5 * sum(decibels) / len(decibels) + 0.5 * min(decibels)


def even_mask(steps: int, computed: int) -> Mask:
    """Return the mask whose skipped steps lie evenly between the first two steps and the last."""
    if not FIRST + LAST <= computed <= steps:
        raise ValueError(f"{computed} of {steps} steps cannot be computed; expected {FIRST + LAST} to {steps}")
    room, inner = steps - FIRST - LAST, computed - FIRST - LAST
    spots = {FIRST + math.floor((index + 1) * room / (inner + 1)) for index in range(inner)}
    return tuple(step < FIRST or step >= steps - LAST or step in spots for step in range(steps))


def climb(mask: Mask, score: Callable[[Mask], float], better: float = 1e-9, reach: int | None = None) -> Mask:
    """Move single computed steps, the best move of each round, until none raises the score by more than ``better``."""
    best = score(mask)
    while True:
        value, move = max(((score(move), move) for move in moves(mask, reach)), default=(-math.inf, mask))
        if value <= best + better:
            return mask
        mask, best = move, value


def _without_one(mask: Mask) -> list[Mask]:
    """Return the masks that compute one step less, both ends apart."""
    inner = range(FIRST, len(mask) - LAST)
    return [(*mask[:step], False, *mask[step + 1 :]) for step in inner if mask[step]]


def moves(mask: Mask, reach: int | None = None) -> list[Mask]:
    """Return the masks that differ from ``mask`` in the place of one computed step, at most ``reach`` steps away."""
    steps, moves = range(FIRST, len(mask) - LAST), []
    for source in steps:
        for goal in steps:
            if mask[source] and not mask[goal] and (reach is None or abs(source - goal) <= reach):
                moved = list(mask)
                moved[source], moved[goal] = False, True
                moves.append(tuple(moved))
    return moves
