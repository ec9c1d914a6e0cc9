"""From curves to a plan: least error within a cost, or least cost within an error, over all heads, layers and noise levels.

Every head of every layer in every bucket of noise gets one of the options that the probe has tried
(:mod:`.curves`: hulls, then steps along them by gain per cost).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ..reuse import Mode
from .curves import Allocation, Steps, steps_along, within_cost, within_error
from .heads import SKIPPED_AT_MOST
from .latency import LatencyTable, ideal
from .plan_file import ModelTag, PlanFile
from .probe import TRIED, Curves, Option

#: Modes that need a full step now and then.
_REUSING = (Mode.SHARE, Mode.RESIDUAL, Mode.RHO, Mode.MEAN)
#: A head may be skipped where its mean square output is less than this share of its layer's.
NEARLY_ZERO = 1e-3


@dataclass(frozen=True)
class Limits:
    """What a plan may do.

    Attributes:
        modes: that heads may have; full attention always may.
        period: steps from one full step to the next of heads that reuse something; that of the probe.
        skipped_at_most: share of the heads that may be skipped.
        nearly_zero: a head may be skipped where its mean square output is less than this share of its layer's.
    """

    modes: tuple[Mode, ...] = tuple(Mode)
    period: int = 4
    skipped_at_most: float = SKIPPED_AT_MOST
    nearly_zero: float = NEARLY_ZERO


@dataclass(frozen=True, eq=False)
class Problem:
    """All options of all heads, each with its cost and its error, ready to be chosen from.

    Attributes:
        curves: what was probed.
        cost: fp64 [S L H, O]: share of a full attention's time, full steps of reusing modes included, times the share of
            the run that the bucket takes, over the number of heads; all heads full add up to 1.
        error: fp64, likewise: squared relative error times weight, likewise; inf for what may not be chosen.
        limits: what a plan may do.
    """

    curves: Curves
    cost: np.ndarray
    error: np.ndarray
    limits: Limits

    @cached_property
    def _steps(self) -> Steps:
        return steps_along(self.cost, self.error)

    def cheapest(self, error: float) -> Allocation:
        """Return the cheapest choice whose root mean square relative error is at most ``error``."""
        return within_error(self.cost, self.error, error**2, self._steps)

    def best(self, cost: float) -> Allocation:
        """Return the best choice that costs at most the share ``cost`` of full attention."""
        return within_cost(self.cost, self.error, cost, self._steps)

    def curve(self, costs: Sequence[float] = tuple(x / 20 for x in range(1, 21))) -> tuple[tuple[float, float], ...]:
        """Return (cost, root mean square error) at several costs, ascending."""
        found = [self.best(cost) for cost in costs]
        return tuple(dict.fromkeys((round(a.cost, 6), round(max(a.error, 0.0) ** 0.5, 6)) for a in found))


def pose(
    curves: Curves,
    latency: LatencyTable | None = None,
    limits: Limits | None = None,
    share: Sequence[float] = (),
    weights: np.ndarray | None = None,
    parts: int = 3,
) -> Problem:
    """Return what is to be chosen from.

    Args:
        curves: of a probe.
        latency: of this shape; None: an ideal kernel.
        limits: what a plan may do.
        share: of the run's steps that each bucket takes; equal where left out.
        weights: [L], or what broadcasts to [S, L, H]: what an error of each head counts; 1 where left out. They are normalised
            to mean 1.
        parts: steps from each budget that was probed to the next (:func:`refined`).
    """
    curves = refined(curves, parts)
    latency, limits = latency or ideal(), limits or Limits()
    shape = curves.error.shape[:3]
    groups = shape[0] * shape[1] * shape[2]
    part = np.asarray(share or [1 / shape[0]] * shape[0], float)
    if len(part) != shape[0] or part.min() < 0 or part.sum() <= 0:
        raise ValueError(f"{shape[0]} buckets need as many shares, got {list(share)}")
    part = (part / part.sum())[:, None, None, None] / (shape[1] * shape[2])
    weight = np.ones(shape) if weights is None else np.asarray(weights, float)
    weight = np.broadcast_to(weight[None, :, None] if weight.ndim == 1 else weight, shape)
    cost, error = latency.relative(np.nan_to_num(curves.density)), curves.error.copy()
    for index, option in enumerate(curves.options):
        if option.mode == Mode.FULL:
            cost[..., index] = 1.0
        elif option.mode in (Mode.ZERO, Mode.SHARE):
            cost[..., index] = 0.0
        if option.mode in _REUSING:
            full = 1 / limits.period
            cost[..., index] = full + (1 - full) * cost[..., index]
            error[..., index] *= 1 - full
        if option.mode not in (Mode.FULL, *limits.modes):
            error[..., index] = np.inf
    error = np.where(np.isfinite(curves.density) & np.isfinite(error), error, np.inf)
    _limit_skips(error, curves, limits)
    error = error * part * (weight / weight.mean())[..., None]
    return Problem(curves, (cost * part).reshape(groups, -1), error.reshape(groups, -1), limits)


def refined(curves: Curves, parts: int = 3) -> Curves:
    """Return curves with ``parts`` steps from each budget to the next, so that a total is met closely.

    Errors in between follow a power of the density, or a line where one of them is 0; both are convex. Densities follow a line.

    Args:
        curves: of a probe.
        parts: 1 leaves them as they are.
    """
    ladder = curves.ladder
    places = {(option.mode, option.pattern, option.budget): index for index, option in enumerate(curves.options)}
    options, errors, densities = list(curves.options), [curves.error], [curves.density]
    for mode in TRIED:
        for low, high in pairwise(ladder):
            one = places.get((mode, 0, low))
            two = places.get((mode, 0, high), 0)  # everything kept is full attention, which comes first
            for part in range(1, parts if one is not None else 1):
                share = part / parts
                error, density = _between(curves, one, two, share)
                options.append(Option(mode, 0, low + share * (high - low)))
                errors.append(error[..., None])
                densities.append(density[..., None])
    return replace(
        curves, options=tuple(options), error=np.concatenate(errors, -1), density=np.concatenate(densities, -1)
    )


def as_plan(
    problem: Problem,
    chosen: Allocation,
    model: ModelTag,
    *,
    steps: int,
    grid: tuple[int, int, int],
    tokens: int,
    **fields: Any,
) -> PlanFile:
    """Return a choice as a plan.

    Args:
        problem: what was chosen from.
        chosen: for every head.
        model: that was probed.
        steps: of the run that was probed.
        grid: of its tokens.
        tokens: of its sequence.
        fields: others of :class:`~.plan_file.PlanFile`: block, order, cfg, rho_step, provenance.
    """
    curves = problem.curves
    shape = curves.error.shape[:3]
    options = [curves.options[index] for index in chosen.chosen]
    mode, pattern, budget = (
        np.array([getattr(option, name) for option in options], dtype).reshape(shape)
        for name, dtype in (("mode", np.uint8), ("pattern", np.uint8), ("budget", np.float32))
    )
    rung = np.abs(np.array(curves.ladder) - budget[..., None]).argmin(-1)
    rung = np.where(pattern > 0, len(curves.ladder) + pattern.astype(int) - 1, rung)
    alpha = np.take_along_axis(curves.alpha, rung[..., None], -1)[..., 0]
    predicted = {"predicted_cost": round(chosen.cost, 6), "predicted_error": round(max(chosen.error, 0.0) ** 0.5, 6)}
    return PlanFile(
        model=model,
        mode=mode,
        cfg=fields.pop("cfg", np.zeros(shape, bool)),
        pattern=pattern,
        budget=budget,
        patterns=curves.patterns,
        sigma_edges=curves.edges,
        refresh=(problem.limits.period,) * shape[0],
        steps=steps,
        grid=grid,
        tokens=tokens,
        alpha=np.where((mode == int(Mode.BLEND)) & np.isfinite(alpha), alpha, 1.0).astype(np.float32),
        curve=problem.curve(),
        achieved={**predicted, **fields.pop("achieved", {})},
        **fields,
    )


@dataclass(frozen=True)
class Tried:
    """One plan that was measured.

    Attributes:
        knob: it was chosen with.
        cost: predicted share of full attention's time.
        quality: measured.
    """

    knob: float
    cost: float
    quality: float


def cheapest_that_passes(
    choose: Callable[[float], Allocation], make: Callable[[Allocation], PlanFile], quality: Callable[[PlanFile], float],
    target: float, tries: int = 5,
) -> tuple[PlanFile | None, list[Tried]]:  # fmt: skip
    """Return the cheapest plan of a few tries whose measured quality reaches ``target``, and all that were tried.

    Bisects over the knob; what is predicted of single attentions orders plans, what is measured of pictures decides. None
    where no plan passes.

    Args:
        choose: knob in [0, 1], from fast to full -> choice.
        make: choice -> plan.
        quality: plan -> what a run with it is worth, for example PSNR in dB; more is better.
        target: least quality.
        tries: runs.
    """
    found: list[Tried] = []
    passed, low, high = None, 0.0, 1.0
    for _ in range(tries):
        knob = (low + high) / 2
        chosen = choose(knob)
        plan = make(chosen)
        found.append(Tried(knob, chosen.cost, quality(plan)))
        if found[-1].quality >= target:
            passed, high = plan, knob
        else:
            low = knob
    return passed, found


def _between(curves: Curves, one: int, two: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return error and density [S, L, H] the ``share`` of the way from an option to a denser one."""
    (e1, e2), (d1, d2) = ((x[..., one], x[..., two]) for x in (curves.error, curves.density))
    density = d1 + share * (d2 - d1)
    with np.errstate(divide="ignore", invalid="ignore"):
        way = np.log(density / d1) / np.log(d2 / d1)
        curved = np.exp(np.log(e1) + way * (np.log(e2) - np.log(e1)))
    fine = (e1 > 0) & (e2 > 0) & (d2 > d1) & (d1 > 0)
    return np.where(fine, curved, e1 + share * (e2 - e1)), density


def _limit_skips(error: np.ndarray, curves: Curves, limits: Limits) -> None:
    """Let only those heads be skipped, in each bucket, whose output is least; in place.

    Relative to itself every skipped head is off by 1; what counts is how little it is of its layer's output.
    """
    zero = next((index for index, option in enumerate(curves.options) if option.mode == Mode.ZERO), None)
    if zero is None:
        return
    wanted = Mode.ZERO in limits.modes
    for bucket in range(error.shape[0]):
        lost = curves.norm[bucket].ravel()
        most = int(limits.skipped_at_most * lost.size + 1e-9) if wanted else 0
        allowed = np.zeros(lost.shape, bool)
        order = np.argsort(lost, kind="stable")[:most]
        allowed[order] = lost[order] <= limits.nearly_zero
        error[bucket, :, :, zero] = np.where(allowed, lost, np.inf).reshape(error.shape[1:3])
