"""Caching as the resolver sees it: can it run here, and what would it gain?"""

from dataclasses import dataclass, replace

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from ..sampling import coordinate_of
from .decision import AccumulatePolicy, Decision, MaskPolicy, Policy, ThresholdPolicy
from .forecast import FORECASTERS
from .indicator import TransformRate
from .lookup import effective, magnitude_curve, tea_polynomial
from .magnitude import magnitude_mask
from .masks import growing_mask, parse_mask, scm_mask, stretch, strip
from .methods import AS_SET, METHODS, CacheSettings, Method
from .policy import Accumulator, Rails, interval_mask, limit_skips
from .probe import ForecastError, Probe, RelativeChange
from .session import CacheSession, Weights
from .store import SnapshotStore
from .tap import BLOCKS, DELTA, OUTPUT

#: Share of the free device memory that stored features may take.
MEMORY_SHARE = 0.5
#: MagCache's usual limit, for a setting of "no limit": its law says nothing about direction (arXiv 2506.09045).
MOST_SKIPS = 4
#: Settings that forecasters take; each ignores what means nothing to it.
FORECAST_SETTINGS = ("order", "damping", "degree", "ridge", "snapshots", "blend")
#: Spectrum's first window: skips between computed steps start at one (arXiv 2603.01623).
FIRST_WINDOW = 2.0


class NotHere(Exception):
    """A method cannot run under these facts; the message says why and what would."""


@dataclass(frozen=True)
class CacheTechnique:
    """Feature caching."""

    name: str = "cache"
    exclusive_with: frozenset[str] = frozenset({"cache"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"Stretto Cache ({request.settings.get('method', 'Taylor')})"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        settings = CacheSettings.from_mapping(request.settings)
        if settings.method == "Schedule" and settings.preset == AS_SET:
            parse_mask(settings.mask)

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how the cache runs under ``facts``."""
        settings = CacheSettings.from_mapping(request.settings)
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        if settings.family and settings.family != facts.descriptor.family:
            raise StrettoError(
                f"Stretto Cache: the preset was calibrated for {settings.family}, this model is {facts.descriptor.family}; "
                "calibrate one for it"
            )
        notes: list[str] = []
        settings, origin = effective(settings, facts.descriptor.family, facts.variant, facts.schedule.steps)
        method = _fitting(METHODS[settings.method], facts, notes)
        reduced = bool(notes)
        forced = frozenset({settings.forced}) - {-1}
        rails = Rails(settings.warmup, settings.tail, request.interval, forced)
        try:
            plan = _plan(method, settings, rails, facts, notes)
        except NotHere as reason:
            return Outcome(self.name, OFF, str(reason))
        steps = facts.schedule.steps
        idle = _idle_reason(method, settings, plan, rails, steps)
        if idle and not request.force:
            return Outcome(self.name, OFF, idle)
        tap = method.place(settings, len(facts.descriptor.sites(facts.network)))
        if tap.kind == BLOCKS and not 0 <= tap.first < tap.last:
            count = len(facts.descriptor.sites(facts.network))
            return Outcome(self.name, OFF, f"{tap.first} + {count - tap.last} blocks always run, the model has {count}")
        damped = method.forecaster == "newton" and settings.order == 1 and settings.damping < 1.0
        forecast = FORECASTERS["line" if damped else method.forecaster]
        arguments = {name: getattr(settings, name) for name in FORECAST_SETTINGS}
        depth, weights = forecast.depth(**arguments), _bind(forecast.weights, steps, arguments)
        if facts.sampler.stochastic and depth > 1:
            depth, weights, reduced = 1, _reuse, True
            notes.append(f"{facts.sampler.name} adds fresh noise each step: forecasting falls back to reuse")
        needed = facts.snapshot_bytes(tap.kind) * min(depth, steps)
        budget = int(facts.free_bytes * MEMORY_SHARE)
        if needed > budget and not request.force:
            reason = f"stored features would take {needed / 2**20:.0f} MiB, {budget / 2**20:.0f} MiB may be used"
            return Outcome(self.name, OFF, reason)
        if not facts.sampler.single_call:
            notes.append(
                f"{facts.sampler.name} evaluates more than once a step: evaluations of a step share a decision"
            )
        session = CacheSession(
            tap,
            weights,
            Decision(rails, steps, plan.policy, plan.rate, plan.probe, settings.max_skips),
            SnapshotStore(depth, budget),
            facts.network,
            facts.descriptor,
            coordinate_of(settings.coordinate),
        )
        if origin:
            notes.insert(0, origin)
        notes.insert(0, _headline(settings.method, plan.mask, rails, steps))
        return Outcome(
            self.name,
            REDUCED if reduced else ACTIVE,
            "; ".join(notes),
            session=session,
            needs_blocks=tap.kind == BLOCKS,
            reserve_bytes=needed,
        )


@dataclass
class _Plan:
    """The deciding parts of one run; ``mask`` is None when the schedule depends on data."""

    policy: Policy
    mask: tuple[bool, ...] | None = None
    rate: TransformRate | None = None
    probe: Probe | None = None


def _fitting(method: Method, facts: Facts, notes: list[str]) -> Method:
    """Return the form of ``method`` that this network's hooks allow."""
    if method.tap != BLOCKS or facts.descriptor.has_blocks:
        return method
    if method.indicator in ("input", "residual", "forecast"):
        return method  # _plan refuses it: there is nothing to look at
    kind = DELTA if method.residual or method.forecaster == "reuse" else OUTPUT
    what = "the change between input and output" if kind == DELTA else "the network's output"
    notes.append(f"{facts.descriptor.no_blocks}: {what} is cached instead of the blocks'")
    return replace(method, tap=kind, residual=False)


def _plan(method: Method, settings: CacheSettings, rails: Rails, facts: Facts, notes: list[str]) -> _Plan:
    """Put policy and indicator together."""
    steps = facts.schedule.steps
    mask = _mask(method, settings, rails, facts, notes)
    if mask is not None:
        free = tuple(computed or rails.reason(step, steps) is not None for step, computed in enumerate(mask))
        return _Plan(MaskPolicy(free), limit_skips(free, settings.max_skips) if settings.max_skips else free)
    if method.indicator == "rate":
        return _Plan(AccumulatePolicy(Accumulator(settings.threshold)), rate=TransformRate())
    if not facts.descriptor.has_blocks:
        raise NotHere(
            f"{facts.descriptor.no_blocks}: {method.name} cannot look inside; EasyCache and Taylor can run here"
        )
    if method.indicator == "input":
        if facts.descriptor.tea_input is None:
            raise NotHere(
                f"the modulated input of {facts.descriptor.family} is out of reach; FBCache decides similarly"
            )
        polynomial = tea_polynomial(facts.descriptor.family, facts.variant)
        if polynomial is None:
            notes.append("no polynomial is published for this model: the change itself is added up")
        policy = AccumulatePolicy(Accumulator(settings.threshold), polynomial)
        return _Plan(policy, probe=RelativeChange(0, previous=True))
    front = settings.first_blocks if method.before is None else method.before
    if method.indicator == "residual":
        return _Plan(ThresholdPolicy(settings.threshold), probe=RelativeChange(front))
    gate = FORECASTERS[method.forecaster]
    order = 0 if facts.sampler.stochastic else settings.order
    probe = ForecastError(front, gate.depth(order=order), _bind(gate.weights, steps, {"order": order}))
    return _Plan(ThresholdPolicy(settings.threshold), probe=probe)


def _mask(method: Method, settings: CacheSettings, rails: Rails, facts: Facts, notes: list[str]):
    """Return the compute mask of a method whose schedule is known beforehand, else None."""
    steps = facts.schedule.steps
    if method.policy == "interval":
        return interval_mask(steps, rails, settings.interval)
    if method.policy == "growing":
        return growing_mask(steps, rails, FIRST_WINDOW, settings.growth)
    if method.policy == "magnitude":
        curve = magnitude_curve(facts.descriptor.family, facts.variant, steps)
        if curve is None:
            raise NotHere(
                "no magnitude curve is known for this model: choose another method, or let Stretto Calibrate find a schedule"
            )
        ratios = curve.step_ratios(facts.schedule.sigmas[:steps])
        free = [step for step in range(steps) if rails.reason(step, steps) is None]
        # The first step has nothing to reuse, so it never counts as the first of a row of skips.
        first = max(free[0], 1) if free else steps
        mask = magnitude_mask(ratios[first:], settings.threshold, settings.max_skips or MOST_SKIPS, 0.0, steps - first)
        return (True,) * first + mask
    if method.policy == "mask" and method.name == "SCM":
        return scm_mask(settings.level, steps)
    if method.policy == "mask":
        given = parse_mask(settings.mask)
        if len(given) != steps:
            notes.append(f"the mask has {len(given)} steps, the run {steps}: it is stretched")
        return stretch(given, steps)
    return None


def _bind(function, steps: int, arguments: dict) -> Weights:
    return lambda coordinates, target: function(coordinates, target, steps, **arguments)


def _reuse(coordinates, target) -> list[float]:
    return [1.0]


def _headline(name: str, mask: tuple[bool, ...] | None, rails: Rails, steps: int) -> str:
    if mask is None:
        return f"{name}: up to {_free_steps(steps, rails)} of {steps} steps may be skipped"
    return f"{name}: {sum(mask)} of {steps} steps are computed, {strip(mask)}"


def _free_steps(steps: int, rails: Rails) -> int:
    return sum(rails.reason(step, steps) is None for step in range(steps))


def _idle_reason(method: Method, settings: CacheSettings, plan: _Plan, rails: Rails, steps: int) -> str | None:
    """Return why these settings would skip nothing, or None."""
    if method.policy == "interval" and settings.interval == 1:
        return "computing every step: nothing to skip"
    if method.policy in ("accumulate", "threshold") and settings.threshold == 0:
        return "threshold 0: nothing to skip"
    free = _free_steps(steps, rails)
    if free == 0 or (plan.mask is not None and all(plan.mask)):
        advice = ". So short a run gains from attention, quantization or the VAE nodes instead" if steps <= 10 else ""
        cover = f"warm-up ({settings.warmup}) and tail ({settings.tail}) already cover them, " if free == 0 else ""
        return f"{steps} steps: {cover}nothing to skip{advice}"
    return None
