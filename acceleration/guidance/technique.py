"""Guidance reduction as the resolver sees it: is there a branch to save, and how often?"""

from dataclasses import dataclass, replace

from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from .policy import GuidancePolicy, asked_steps
from .session import GuidanceSession
from .settings import DEFAULT, NODE, NOTHING, SPLIT, GuidanceSettings

#: Share of the free device memory that differences may take; one is as large as a latent.
MEMORY_SHARE = 0.1


@dataclass(frozen=True)
class GuidanceTechnique:
    """Guidance without the unconditional branch at every step."""

    name: str = "guidance"
    exclusive_with: frozenset[str] = frozenset({"guidance", "profile", "module_profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"{NODE} ({request.settings.get('method', DEFAULT)})"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        GuidanceSettings.from_mapping(request.settings)

    def inside_blocks(self, request: Request) -> bool:
        """Return False: everything happens around the network."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how guidance is saved under ``facts``."""
        settings = GuidanceSettings.from_mapping(request.settings)
        if facts.obstacle():
            return Outcome(self.name, OFF, facts.obstacle())
        if facts.branches < 2:
            reason = (
                "there is no unconditional branch to save: the guidance scale is 1, "
                "or the guider keeps several scales of its own"
            )
            return Outcome(self.name, OFF, reason)
        steps, asked = facts.schedule.steps, asked_steps(settings, facts.schedule)
        if all(asked) and settings.when != "adaptive" and not request.force:
            return Outcome(self.name, OFF, _nothing_saved(settings, steps))
        notes, reduced = [], False
        if settings.order and facts.sampler.stochastic and settings.stands_in != NOTHING:
            settings, reduced = replace(settings, forecast="repeat"), True
            notes.append(
                f"{facts.sampler.name} adds fresh noise each step: the difference is repeated instead of continued"
            )
        if not facts.sampler.single_call:
            notes.append(
                f"{facts.sampler.name} evaluates more than once a step: evaluations of a step share a decision"
            )
        one = facts.snapshot_bytes("output") // facts.branches
        keeps = 0 if settings.stands_in == NOTHING else settings.order + 1
        session = GuidanceSession(
            GuidancePolicy(settings, facts.schedule), max(keeps, 1), max(int(MEMORY_SHARE * facts.free_bytes), one)
        )
        return Outcome(
            self.name,
            REDUCED if reduced else ACTIVE,
            "; ".join([_headline(settings, asked), *notes]),
            session=session,
            reserve_bytes=keeps * one,
        )


def _headline(settings: GuidanceSettings, asked: tuple[bool, ...]) -> str:
    """Say at which steps the unconditional branch is asked, what stands in for it, and what that saves at most."""
    steps, count = len(asked), sum(asked)
    if settings.when == "adaptive":
        again = f", asked again every {settings.recheck} steps" if settings.recheck else ""
        return (
            f"{settings.method}: asks the unconditional branch until both agree (cosine {settings.agreement:g} at "
            f"{settings.patience} steps in a row){again}; {_stands_in(settings)}"
        )
    strip = "".join("#" if ask else "." for ask in asked)
    return (
        f"{settings.method}: asks the unconditional branch at {count} of {steps} steps, {strip}; {_stands_in(settings)}; "
        f"{2 * steps / (steps + count):.2f}x fewer rows for the network"
    )


def _stands_in(settings: GuidanceSettings) -> str:
    if settings.stands_in == NOTHING:
        return "elsewhere the conditional branch alone, without guidance"
    what = "its last difference from the conditional one stands in"
    if settings.order:
        what = "its difference from the conditional one is continued from the last two"
    return f"{what}, low and high frequencies weighted apart" if settings.stands_in == SPLIT else what


def _nothing_saved(settings: GuidanceSettings, steps: int) -> str:
    if settings.when == "always":
        return (
            "guidance covers the whole run (guide_from, guide_until and the noise levels set no limit): nothing to save"
        )
    if settings.interval == 1:
        return "interval is 1: the unconditional branch is asked at every step"
    return f"warmup = {settings.warmup} and tail = {settings.tail} leave no step of {steps} to save"
