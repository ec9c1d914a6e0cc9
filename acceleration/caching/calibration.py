"""From a profile to a compute mask: the best masks of every size, and targets for speed or quality.

Everything here is arithmetic on one recorded run (:class:`~.profile.Profile`) and takes
milliseconds; :mod:`.prediction` says what a mask costs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .masks import SCM_BINS, Mask, growing_mask, scm_mask
from .policy import Rails, interval_mask, limit_skips
from .prediction import (
    amplification_prior,
    fit_damping,
    fit_rescaling,
    interpolate_amplification,
    mask_error,
    measured_amplification,
    pair_errors,
    step_weights,
)
from .profile import Profile

__all__ = [
    "Candidate",
    "Profile",
    "accumulate_masks",
    "amplification_prior",
    "bisect_quality",
    "candidates_for",
    "choose_for_speed",
    "computed_for_speed",
    "distinct_masks",
    "fit_damping",
    "fit_rescaling",
    "frontier",
    "gate_masks",
    "interpolate_amplification",
    "mask_error",
    "measured_amplification",
    "optimal_masks",
    "pair_errors",
    "speed",
    "step_weights",
]


@dataclass(frozen=True)
class Candidate:
    """A mask with what the profile predicts for it.

    Attributes:
        mask: True is computed.
        error: predicted error of the final latent; comparable within one profile and forecaster.
        source: how it came about, in words (``"optimal"``, ``"every 3rd"``, ``"threshold 0.12"``).
        threshold: the threshold that makes a policy draw this mask; None for static masks.
    """

    mask: Mask
    error: float
    source: str
    threshold: float | None = None

    @property
    def computed(self) -> int:
        """Number of computed steps."""
        return sum(self.mask)


def optimal_masks(
    errors: np.ndarray,
    weights: Sequence[float],
    rails: Rails,
    counts: Iterable[int] | None = None,
    max_skips: int | None = None,
) -> dict[int, Candidate]:
    """Return the best mask for every number of computed steps, by dynamic programming.

    With reuse a state is the last computed step (O(N^2) per count), with the line the last two
    (O(N^3)). LeMiCa (arXiv 2511.00090) searches the same graph with the error of the final image
    on every edge; here one profiled run pays for all edges.

    Args:
        errors: from :func:`pair_errors`; two axes for reuse, three for the line.
        weights: per step, from :func:`step_weights`.
        rails: steps that are computed in every mask; the first step always is.
        counts: numbers of computed steps to return; None for all that the rails allow.
        max_skips: longest run of skipped steps; None for any.

    Returns:
        Number of computed steps -> candidate; counts that no mask has are left out.
    """
    steps = len(weights)
    lines = errors if errors.ndim == 3 else np.broadcast_to(errors, (steps, steps, steps))
    forced = {step for step in range(steps) if step == 0 or rails.reason(step, steps) is not None}
    # jump[h, i, j]: cost of skipping all between i and j, with h computed before i. Node N is the run's end.
    jump = np.full((steps, steps, steps + 1), np.inf)
    for i in range(steps):
        farthest = min(steps, i + 1 + (steps if max_skips is None else max_skips))
        cost = np.zeros(steps)
        for j in range(i + 1, farthest + 1):
            jump[:, i, j] = cost
            if j in forced:
                break
            if j < steps:
                cost = cost + np.where(np.isfinite(lines[:, i, j]), weights[j] * lines[:, i, j], np.inf)
    best = np.full((steps, steps), np.inf)  # best[h, i]: last computed i, before it h; h = i when there is none
    best[0, 0] = 0.0
    origins, wanted, found = [], None if counts is None else set(counts), {}
    for count in range(1, steps + 1):
        ends = best + jump[:, :, steps]
        h, i = np.unravel_index(np.argmin(ends), ends.shape)
        if np.isfinite(ends[h, i]) and (wanted is None or count in wanted):
            found[count] = Candidate(_trace(origins, h, i, steps), float(ends[h, i]), "optimal")
        through = best[:, :, None] + jump[:, :, :steps]
        origins.append(np.argmin(through, axis=0))
        best = np.min(through, axis=0)
    return found


def _trace(origins: Sequence[np.ndarray], h: int, i: int, steps: int) -> Mask:
    """Walk back from the last two computed steps through the recorded choices."""
    chosen = {int(i)}
    for origin in reversed(origins):
        h, i = origin[h, i], h
        chosen.add(int(i))
    return tuple(step in chosen for step in range(steps))


def candidates_for(
    profile: Profile, masks: Mapping[str, Sequence[bool]], rails: Rails, forecaster: str = "reuse", **settings: float
) -> list[Candidate]:
    """Return masks by description as scored candidates, with the first step and the rails computed."""
    steps = profile.steps
    result = []
    for source, mask in masks.items():
        held = tuple(bool(c) or s == 0 or rails.reason(s, steps) is not None for s, c in enumerate(mask))
        result.append(Candidate(held, mask_error(profile, held, forecaster, **settings), source))
    return result


def distinct_masks(
    profile: Profile,
    rails: Rails,
    forecaster: str = "reuse",
    max_skips: int | None = None,
    extra: Iterable[Candidate] = (),
    **settings: float,
) -> list[Candidate]:
    """Return the finite set of masks worth trying, each once, sorted by predicted error.

    Holds the optimal masks of every count (for the line under any forecaster that
    extrapolates), every n-th step, growing gaps, the static compute masks and ``extra``, all scored
    by the same cost, with ``max_skips`` and the rails imposed.
    """
    steps = profile.steps
    damping = settings.get("damping", 1.0) if forecaster == "line" else 1.0
    errors = pair_errors(profile) if forecaster == "reuse" else pair_errors(profile, "line", damping)
    optimal = optimal_masks(errors, step_weights(profile), rails, max_skips=max_skips)
    masks = {f"optimal, {count} computed": candidate.mask for count, candidate in optimal.items()}
    masks |= {f"every {n}": interval_mask(steps, rails, n) for n in range(1, min(9, steps) + 1)}
    for growth in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0):
        masks[f"gaps growing by {growth:g}"] = growing_mask(steps, rails, 2.0, growth)
    masks |= {f"SCM {level}": scm_mask(level, steps) for level in SCM_BINS[28]}
    if max_skips is not None:
        masks = {source: limit_skips(mask, max_skips) for source, mask in masks.items()}
    scored = [*candidates_for(profile, masks, rails, forecaster, **settings), *extra]
    unique: dict[Mask, Candidate] = {}
    for candidate in scored:
        unique.setdefault(candidate.mask, candidate)
    return sorted(unique.values(), key=lambda candidate: (candidate.error, candidate.computed))


def accumulate_masks(
    profile: Profile,
    signal: str,
    rails: Rails,
    max_skips: int | None = None,
    shape: Callable[[float], float] | None = None,
    forecaster: str = "reuse",
    **settings: float,
) -> list[Candidate]:
    """Return every mask that a policy summing up ``signal`` can draw, each with a threshold that draws it.

    From a threshold's mask follows the largest threshold that draws it too, so walking upwards
    meets every mask once, and between two changes one threshold stands for all. Boldest last.
    The replay is open-loop: it ignores that skips change the signals after them.

    Args:
        profile: the run.
        signal: name in ``profile.signals`` (relative change since the previous evaluation).
        rails: steps that are always computed.
        max_skips: longest run of skipped steps; None for any.
        shape: applied to each value first, such as TeaCache's polynomial.
        forecaster, settings: what masks are scored with.
    """
    values = [None if value is None else (shape(value) if shape else value) for value in profile.signals[signal]]

    def sums(start: int) -> list[float]:
        # The same additions in the same order as at run time, so that ties fall the same way.
        total, result = 0.0, []
        for value in values[start:]:
            total += math.inf if value is None else value
            result.append(total)
        return result

    distances = np.full((profile.steps, profile.steps), np.inf)
    for last in range(profile.steps):
        distances[last, last + 1 :] = sums(last + 1)
    return gate_masks(profile, distances, rails, max_skips, forecaster, **settings)


def gate_masks(
    profile: Profile,
    distances: np.ndarray,
    rails: Rails,
    max_skips: int | None = None,
    forecaster: str = "reuse",
    **settings: float,
) -> list[Candidate]:
    """Return every mask that a threshold on a distance to the last computed step can draw.

    Args:
        profile: the run.
        distances: [N, N]; entry [i, j] is the indicator at step j when step i < j was computed last
            (First-Block-Cache, DBCache), >= 0, infinite where unknown.
        rails, max_skips, forecaster, settings: as for :func:`accumulate_masks`.
    """
    unique: dict[Mask, float] = {}
    lower, threshold = 0.0, 0.0
    while True:
        mask, upper = _gate(distances, threshold, rails, max_skips)
        if mask not in unique:
            between = (lower + upper) / 2 if math.isfinite(upper) else lower * 1.01 + 1e-12
            between = max(between, math.nextafter(lower, math.inf))  # between denormal numbers the middle rounds down
            unique[mask] = between if threshold else 0.0
        if not math.isfinite(upper):
            break
        lower, threshold = upper, math.nextafter(upper, math.inf)
    return [
        Candidate(mask, mask_error(profile, mask, forecaster, **settings), f"threshold {value:.4g}", value)
        for mask, value in unique.items()
    ]


def _gate(distances: np.ndarray, threshold: float, rails: Rails, max_skips: int | None) -> tuple[Mask, float]:
    """Return a threshold's mask, and the largest threshold up to which it stays the same."""
    steps, last, mask, upper = len(distances), 0, [True], math.inf
    for step in range(1, steps):
        limited = max_skips is not None and step - last > max_skips
        free = not limited and rails.reason(step, steps) is None
        distance = float(distances[last, step])
        skip = free and distance < threshold
        if free and not skip:
            upper = min(upper, distance)
        last = last if skip else step
        mask.append(not skip)
    return tuple(mask), upper


def speed(computed: int, steps: int, skipped_cost: float = 0.0) -> float:
    """Return the predicted speed-up ``N / (c + rho (N - c))``; rho is the relative cost of a skipped step."""
    return steps / (computed + skipped_cost * (steps - computed))


def computed_for_speed(target: float, steps: int, skipped_cost: float = 0.0) -> int | None:
    """Return the most computed steps that still reach a speed-up of ``target``; None when even one is too many."""
    for computed in range(steps, 0, -1):
        if speed(computed, steps, skipped_cost) >= target * (1.0 - 1e-12):
            return computed
    return None


def choose_for_speed(candidates: Iterable[Candidate], target: float, skipped_cost: float = 0.0) -> Candidate | None:
    """Return the candidate with the least predicted error among those that reach ``target``, or None."""
    fast = [c for c in candidates if speed(c.computed, len(c.mask), skipped_cost) >= target * (1.0 - 1e-12)]
    return min(fast, key=lambda candidate: (candidate.error, candidate.computed), default=None)


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that no other beats in both error and computed steps; most computed first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.computed, candidate.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return kept[::-1]


def bisect_quality(
    candidates: Iterable[Candidate], measure: Callable[[Mask], float], at_least: float
) -> Candidate | None:
    """Return the boldest candidate whose measured quality meets the target, or None.

    Bisects the :func:`frontier` in at most ``ceil(log2 n) + 1`` real runs. What is returned was itself
    measured and meets the target, also where quality is not monotone in the prediction.

    Args:
        candidates: masks with predicted errors.
        measure: runs a mask and returns its quality, higher is better (PSNR to the plain run, ...).
        at_least: the target.
    """
    ordered = frontier(candidates)
    good, bad = -1, len(ordered)
    while bad - good > 1:
        middle = (good + bad) // 2
        if measure(ordered[middle].mask) >= at_least:
            good = middle
        else:
            bad = middle
    return ordered[good] if good >= 0 else None
