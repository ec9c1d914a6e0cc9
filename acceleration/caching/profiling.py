"""Profiling as the resolver sees it: a run that skips nothing and is written down."""

from dataclasses import dataclass

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..plan import Request
from .profile import MAX_STEPS
from .recorder import ProfileSession


@dataclass(frozen=True)
class ProfileTechnique:
    """Record a plain run (:class:`~.recorder.ProfileSession`); the picture is unchanged to the bit."""

    name: str = "profile"
    exclusive_with: frozenset[str] = frozenset({"cache", "table", "profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Profile"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` unless the request carries the token its record is found by."""
        token = request.settings.get("token")
        if not isinstance(token, str) or not token or set(request.settings) != {"token"}:
            raise StrettoError(f"Stretto Profile: settings are {dict(request.settings)}; expected a token alone")

    def inside_blocks(self, request: Request) -> bool:
        """Return False: modules inside blocks are of no interest here."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether the run can be recorded under ``facts``."""
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        if facts.schedule.steps > MAX_STEPS:
            reason = f"the run has {facts.schedule.steps} steps; a profile holds at most {MAX_STEPS}"
            return Outcome(self.name, OFF, reason)
        blocks = facts.descriptor.has_blocks
        feature = "the last block's output" if blocks else "the network's output"
        why = "" if blocks else f" ({facts.descriptor.no_blocks})"
        about = {"variant": facts.variant, "feature": feature, "stochastic": facts.sampler.stochastic}
        session = ProfileSession(request.settings["token"], facts.schedule, facts.network, facts.descriptor, about)
        # The first block's input and output and what they are compared with, of one branch.
        reserve = 2 * facts.snapshot_bytes("blocks" if blocks else "output")
        return Outcome(
            self.name,
            ACTIVE,
            f"every step is computed and recorded: {feature}{why}",
            session=session,
            needs_blocks=blocks,
            reserve_bytes=reserve,
        )
