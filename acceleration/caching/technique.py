"""Caching as the resolver sees it: can it run here, and what would it gain?"""

from dataclasses import dataclass, replace

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from ..sampling import coordinate_of
from .budget import budget_for
from .decision import AccumulatePolicy, CodebookPolicy, Decision, MaskPolicy, Policy, ThresholdPolicy
from .fitting import FittedWeights
from .forecast import FORECASTERS
from .indicator import FeatureDrift, TransformRate
from .lookup import effective, look_alike, magnitude_curve, tea_polynomial
from .magnitude import MagnitudeCurve, magnitude_mask
from .masks import growing_mask, parse_mask, scm_mask, stretch, strip
from .methods import AS_SET, METHODS, CacheSettings, Method
from .named_tables import OF_MODULES, run_named
from .policy import Accumulator, Codebook, Rails, interval_mask, limit_skips
from .probe import ForecastError, Probe, RelativeChange, Trajectory, elementwise_l1, relative_l1
from .session import CacheSession, Weights
from .store import POLICIES, SnapshotStore
from .tap import BLOCKS, DELTA, OUTPUT, TABLE
from .text_features import text_features

#: Share of the free device memory that stored features may take.
MEMORY_SHARE = 0.5
#: MagCache's usual limit, for a setting of "no limit": its law says nothing about direction (arXiv 2506.09045).
MOST_SKIPS = 4
#: Settings that forecasters take; each ignores what means nothing to it.
FORECAST_SETTINGS = ("order", "damping", "degree", "ridge", "snapshots", "blend")
#: The sampler whose steps the weights of "Fitted" make up for.
FITTED_SAMPLER = "euler"


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
        if settings.method == "Fitted" and settings.preset == AS_SET:
            _fitted_weights(settings)
        if settings.codebook:
            Codebook.parse(settings.codebook)
        if settings.curve:
            MagnitudeCurve.from_text(settings.curve)

    def inside_blocks(self, request: Request) -> bool:
        """Return whether the request acts on anything inside blocks."""
        return self.whole_modules(request) or keeps_text(request)

    def whole_modules(self, request: Request) -> bool:
        """Return whether the method acts on attentions and MLPs inside blocks."""
        return request.settings.get("method") in OF_MODULES

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how the cache runs under ``facts``."""
        settings = CacheSettings.from_mapping(request.settings)
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        _check_model(settings, facts)
        notes: list[str] = []
        settings, origin = effective(settings, facts.descriptor.family, facts.variant, facts.schedule.steps)
        forced = frozenset({settings.forced}) - {-1}
        rails = Rails(settings.warmup, settings.tail, request.interval, forced)
        if METHODS[settings.method].tap == TABLE:
            return run_named(METHODS[settings.method], settings, rails, facts, request.force, origin, MEMORY_SHARE)
        method = _fitting(METHODS[settings.method], facts, notes)
        reduced = bool(notes)
        try:
            plan = _plan(method, settings, rails, facts, notes)
        except NotHere as reason:
            return Outcome(self.name, OFF, str(reason))
        steps = facts.schedule.steps
        idle = _idle_reason(method, settings, plan, rails, steps)
        if idle and not request.force:
            return Outcome(self.name, OFF, idle)
        tap = method.place(settings, len(facts.descriptor.sites(facts.network)))
        front = max(tap.first, plan.probe.blocks if plan.probe else 0)
        if tap.kind == BLOCKS and not 0 <= front < tap.last:
            count = len(facts.descriptor.sites(facts.network))
            return Outcome(self.name, OFF, f"{front} + {count - tap.last} blocks always run, the model has {count}")
        depth, weights, fallback = _forecaster(method, settings, facts)
        if fallback:
            reduced = True
            notes.append(fallback)
        if facts.sampler.stochastic and depth > 1:
            depth, weights, reduced = 1, _reuse, True
            notes.append(f"{facts.sampler.name} adds fresh noise each step: forecasting falls back to reuse")
        if settings.store not in POLICIES:
            return Outcome(self.name, OFF, f"this version of torch has no numbers for store = {settings.store}")
        budget = budget_for(facts, tap.kind, min(depth, steps), settings.store, MEMORY_SHARE)
        memory = {"store_bytes": budget.needed, "budget_bytes": budget.allowed}
        if not budget.fits and not request.force:
            return Outcome(self.name, OFF, budget.refusal(), **memory)
        if not facts.sampler.single_call:
            notes.append(
                f"{facts.sampler.name} evaluates more than once a step: evaluations of a step share a decision"
            )
        text, text_bytes = None, 0
        if keeps_text(request):
            on_device = 0 if budget.policy.in_system_memory else budget.needed
            text, text_bytes = text_features(
                facts, int(facts.free_bytes * MEMORY_SHARE) - on_device, request.force, notes
            )
        session = CacheSession(
            tap,
            weights,
            Decision(rails, steps, plan.policy, plan.rate, plan.probe, settings.max_skips, plan.drift),
            SnapshotStore(depth, budget.allowed, budget.policy),
            facts.network,
            facts.descriptor,
            coordinate_of(settings.coordinate),
            text,
        )
        notes = [*filter(None, (origin, look_alike(settings, facts.descriptor.family, facts.variant))), *notes]
        notes.insert(0, _headline(settings.method, plan.mask, rails, steps))
        return Outcome(
            self.name,
            REDUCED if reduced else ACTIVE,
            "; ".join(notes),
            session=session,
            needs_blocks=tap.kind == BLOCKS,
            reserve_bytes=budget.reserve + text_bytes,
            store_bytes=budget.needed + text_bytes,
            budget_bytes=budget.allowed,
        )


def keeps_text(request: Request) -> bool:
    """Return whether a request asks for keys and values of the text to be kept."""
    return request.technique == "cache" and bool(request.settings.get("text_features"))


@dataclass
class _Plan:
    """The deciding parts of one run; ``mask`` is None when the schedule depends on data."""

    policy: Policy
    mask: tuple[bool, ...] | None = None
    rate: TransformRate | None = None
    probe: Probe | None = None
    drift: FeatureDrift | None = None


def _check_model(settings: CacheSettings, facts: Facts) -> None:
    """Raise StrettoError unless settings that belong to a model belong to this one."""
    if settings.family and settings.family != facts.descriptor.family:
        raise StrettoError(
            f"Stretto Cache: {settings.origin or 'family'}: the preset was calibrated for {settings.family}, this model is "
            f"{facts.descriptor.family}; calibrate one for it"
        )
    if settings.variant and settings.variant != facts.variant:
        this = facts.variant or "a model with sizes of its own"
        raise StrettoError(
            f"Stretto Cache: {settings.origin or 'settings'}: variant is {settings.variant!r}; expected a preset of {this} "
            f"({facts.descriptor.family}), which this model is"
        )


def _fitting(method: Method, facts: Facts, notes: list[str]) -> Method:
    """Return the form of ``method`` that this network's hooks allow."""
    if method.tap != BLOCKS or facts.descriptor.has_blocks:
        return method
    if method.inside:
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
    if method.indicator == "drift":
        even = Codebook.even(settings.threshold, settings.interval)
        codebook = Codebook.parse(settings.codebook) if settings.codebook else even
        return _Plan(CodebookPolicy(codebook), drift=FeatureDrift())
    return _inside(method, settings, facts, notes)


def _inside(method: Method, settings: CacheSettings, facts: Facts, notes: list[str]) -> _Plan:
    """Put policy and probe together, for a method that looks inside the network."""
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
    if method.indicator == "trajectory":
        return _Plan(AccumulatePolicy(Accumulator(settings.threshold)), probe=Trajectory(settings.first_blocks))
    front = settings.first_blocks if method.before is None else method.before
    if method.indicator == "residual":
        return _Plan(ThresholdPolicy(settings.threshold), probe=RelativeChange(front))
    decay, floor = (settings.decay, settings.floor) if method.policy == "decaying" else (1.0, 0.0)
    policy = ThresholdPolicy(settings.threshold, decay, floor, facts.schedule.steps)
    return _Plan(policy, probe=_gate(method, settings, facts, front))


def _gate(method: Method, settings: CacheSettings, facts: Facts, front: int) -> ForecastError:
    """Return the probe that compares what the first blocks yield with a forecast of it."""
    forecaster = FORECASTERS[method.forecaster]
    order = settings.order if settings.probe_order < 0 else settings.probe_order
    arguments = {"order": 0 if facts.sampler.stochastic else order}
    forecast = _bind(forecaster.weights, facts.schedule.steps, arguments)
    error = elementwise_l1 if method.indicator == "draft" else relative_l1
    return ForecastError(front, forecaster.depth(**arguments), forecast, error)


def _mask(method: Method, settings: CacheSettings, rails: Rails, facts: Facts, notes: list[str]):
    """Return the compute mask of a method whose schedule is known beforehand, else None."""
    steps = facts.schedule.steps
    if method.policy == "interval":
        return interval_mask(steps, rails, settings.interval)
    if method.policy == "growing":
        return growing_mask(steps, rails, settings.window, settings.growth)
    if method.policy == "magnitude":
        published = None if settings.curve else magnitude_curve(facts.descriptor.family, facts.variant, steps)
        curve = MagnitudeCurve.from_text(settings.curve) if settings.curve else published
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
    if method.name == "Fitted" and not settings.weights:
        raise NotHere("no weights are known for this model at this number of steps: Stretto Calibrate finds them")
    if method.policy == "mask" and not settings.mask:
        raise NotHere("no mask is known for this model: draw one, or let Stretto Calibrate find it")
    if method.policy == "mask":
        given = parse_mask(settings.mask)
        if len(given) != steps:
            notes.append(f"the mask has {len(given)} steps, the run {steps}: it is stretched")
        return stretch(given, steps)
    return None


def _forecaster(method: Method, settings: CacheSettings, facts: Facts) -> tuple[int, Weights, str]:
    """Return how many snapshots the forecast takes, its weights, and why it is not the method's own ("" where it is)."""
    steps, name, why = facts.schedule.steps, method.forecaster, ""
    if name == "fitted":
        fitted = _fitted_weights(settings)
        same_run = fitted.belong_to(facts.schedule.sigmas)
        if same_run and facts.sampler.name == FITTED_SAMPLER:
            return fitted.depth, fitted, ""
        what = f"with {FITTED_SAMPLER}" if same_run else "on other noise levels"
        name, why = "newton", f"the weights were fitted {what}: straight lines stand in"
    if name == "newton" and settings.order == 1 and settings.damping < 1.0:
        name = "line"
    arguments = {setting: getattr(settings, setting) for setting in FORECAST_SETTINGS}
    return FORECASTERS[name].depth(**arguments), _bind(FORECASTERS[name].weights, steps, arguments), why


def _fitted_weights(settings: CacheSettings) -> FittedWeights:
    if not settings.weights:
        raise StrettoError(
            "Stretto Cache: method Fitted has no weights of its own; connect Stretto Calibrate, or choose a preset that has them"
        )
    return FittedWeights.from_settings(settings.mask, settings.weights, settings.sigmas)


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
    own_codebook = method.policy == "codebook" and bool(settings.codebook)
    if method.policy in ("interval", "codebook") and settings.interval == 1 and not own_codebook:
        return "computing every step: nothing to skip"
    gated = method.policy in ("accumulate", "threshold", "decaying", "codebook") and not own_codebook
    if gated and settings.threshold == 0:
        return "threshold 0: nothing to skip"
    free = _free_steps(steps, rails)
    if free == 0 or (plan.mask is not None and all(plan.mask)):
        advice = ". So short a run gains from attention, quantization or the VAE nodes instead" if steps <= 10 else ""
        cover = f"warm-up ({settings.warmup}) and tail ({settings.tail}) already cover them, " if free == 0 else ""
        return f"{steps} steps: {cover}nothing to skip{advice}"
    return None
