"""Caching as the resolver sees it: can it run here, and what would it gain?"""

from dataclasses import dataclass

from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from .methods import METHODS, CacheSettings
from .policy import Accumulator, Rails, interval_mask
from .session import CacheSession, IntervalDecision, TransformRateDecision
from .store import SnapshotStore

#: Share of the free device memory that stored features may take.
MEMORY_SHARE = 0.5


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
        CacheSettings.from_mapping(request.settings)

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how the cache runs under ``facts``."""
        settings = CacheSettings.from_mapping(request.settings)
        method = METHODS[settings.method]
        rails = Rails(settings.warmup, settings.tail, request.interval)
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        mask = interval_mask(facts.schedule.steps, rails, settings.interval)
        free = _free_steps(facts.schedule.steps, rails)
        idle = _idle_reason(settings, method.policy, mask, free, facts.schedule.steps)
        if idle and not request.force:
            return Outcome(self.name, OFF, idle)
        depth = 1 + (settings.order if method.granularity == "last" and not facts.sampler.stochastic else 0)
        needed, budget = facts.snapshot_bytes(method.granularity) * depth, int(facts.free_bytes * MEMORY_SHARE)
        if needed > budget and not request.force:
            reason = f"stored features would take {needed / 2**20:.0f} MiB, {budget / 2**20:.0f} MiB may be used"
            return Outcome(self.name, OFF, reason)
        order = settings.order if method.granularity == "last" else 0
        status, notes = ACTIVE, []
        if order and facts.sampler.stochastic:
            order, status = 0, REDUCED
            notes.append(f"{facts.sampler.name} adds fresh noise each step: forecasting falls back to reuse")
        if not facts.sampler.single_call:
            notes.append(f"{facts.sampler.name} evaluates more than once a step: evaluations of a step share a decision")
        if method.policy == "interval":
            decision = IntervalDecision(mask, rails)
            notes.insert(0, f"{settings.method}: {sum(mask)} of {len(mask)} steps are computed")
        else:
            decision = TransformRateDecision(Accumulator(settings.threshold), rails, facts.schedule.steps)
            notes.insert(0, f"{settings.method}: up to {free} of {len(mask)} steps may be skipped")
        store = SnapshotStore(depth, budget)
        session = CacheSession(method.granularity, order, decision, store, facts.descriptor.text_in_stream)
        return Outcome(
            self.name,
            status,
            "; ".join(notes),
            session=session,
            needs_blocks=method.granularity == "last",
            reserve_bytes=needed,
        )


def _free_steps(steps: int, rails: Rails) -> int:
    return sum(rails.reason(step, steps) is None for step in range(steps))


def _idle_reason(settings: CacheSettings, policy: str, mask: tuple[bool, ...], free: int, steps: int) -> str | None:
    """Return why these settings would skip nothing, or None."""
    if policy == "interval" and settings.interval == 1:
        return "computing every step: nothing to skip"
    if policy == "accumulate" and settings.threshold == 0:
        return "threshold 0: nothing to skip"
    if free == 0 or (policy == "interval" and all(mask)):
        return f"{steps} steps: warm-up ({settings.warmup}) and tail ({settings.tail}) already cover them, nothing to skip"
    return None
