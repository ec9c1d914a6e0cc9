"""Region-adaptive sampling as the resolver sees it: can it run here, at which steps, and in how much memory?"""

from dataclasses import dataclass

from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from .memory import Memory, memory_for
from .schedule import RegionSchedule
from .selection import friendly_count
from .session import RegionSession
from .settings import HIDDEN, LINE, NODE, RegionSettings
from .tokens import STREAMS

_HOOK = "attention_override"


@dataclass(frozen=True)
class RegionTechnique:
    """Only the tokens that the model is working on are computed."""

    name: str = "region"
    exclusive_with: frozenset[str] = frozenset({"region", "table", "profile", "module_profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return NODE

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        RegionSettings.from_mapping(request.settings)

    def inside_blocks(self, request: Request) -> bool:
        """Return False: blocks and attention tell everything."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how tokens are left out under ``facts``."""
        settings = RegionSettings.from_mapping(request.settings)
        reason = facts.obstacle() or _obstacle(facts) or (None if request.force else _too_little(settings, facts))
        if reason:
            return Outcome(self.name, OFF, reason)
        schedule = RegionSchedule(settings, facts.schedule, request.interval)
        if not any(schedule.planned()):
            return Outcome(
                self.name, OFF, f"start, tail and refresh_every leave no step of {facts.schedule.steps} to save"
            )
        rest = facts.snapshot_bytes("blocks") if settings.stale == HIDDEN else 3 * facts.snapshot_bytes("output")
        order = int(settings.keys == LINE)
        memory = memory_for(facts, settings.memory_share, order, rest)
        if not memory.fits:
            return Outcome(self.name, OFF, memory.refusal())
        session = RegionSession(settings, schedule, facts.descriptor, facts.network, memory, facts.worked_on)
        return Outcome(
            self.name,
            REDUCED if memory.reduced or memory.order < order else ACTIVE,
            _words(settings, schedule, memory, facts),
            session=session,
            needs_blocks=STREAMS[facts.descriptor.family].patched is None,
            reserve_bytes=memory.needed,
            store_bytes=memory.needed,
            budget_bytes=memory.allowed,
        )


def _obstacle(facts: Facts) -> str | None:
    """Return why tokens cannot be left out here, or None."""
    descriptor, sampler = facts.descriptor, facts.sampler
    if descriptor.family not in STREAMS:
        if _HOOK not in descriptor.hooks:
            return f"{descriptor.family} computes its attention where it cannot be given the keys of inactive tokens"
        return f"the blocks of {descriptor.family} cannot be given fewer tokens"
    if not sampler.single_call:
        return f"{sampler.name} evaluates more than once a step: inactive tokens would spoil its corrections"
    if sampler.stochastic:
        return f"{sampler.name} adds fresh noise each step, which inactive tokens would never lose"
    return None


def _too_little(settings: RegionSettings, facts: Facts) -> str | None:
    """Return why nothing would be gained, or None."""
    tokens = facts.descriptor.tokens(facts.network, facts.latent_shape)
    if tokens < settings.min_tokens:
        return f"{tokens:,} image tokens; below min_tokens = {settings.min_tokens:,} all are computed"
    if friendly_count(tokens, settings.ratio) >= tokens:
        return f"ratio = {settings.ratio:g}: every token is active at every step"
    return None


def _words(settings: RegionSettings, schedule: RegionSchedule, memory: Memory, facts: Facts) -> str:
    tokens, planned = facts.descriptor.tokens(facts.network, facts.latent_shape), schedule.planned()
    strip = "".join("." if partial else "#" for partial in planned)
    words = (
        f"{friendly_count(tokens, settings.ratio):,} of {tokens:,} tokens active at {sum(planned)} of {len(planned)} steps, "
        f"{strip}; {schedule.work():.0%} of the tokens computed in all; {memory.words()}"
    )
    if facts.sampler.multistep:
        words += f"; {facts.sampler.name} combines steps: inactive tokens look unchanged to it"
    return words
