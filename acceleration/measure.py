"""Timing alone: a request that changes nothing and stands in every arm of a comparison."""

from dataclasses import dataclass

from .facts import ACTIVE, Facts, Outcome
from .plan import Request


@dataclass(frozen=True)
class MeasureTechnique:
    """Ask for a timed trace; bit-exact by construction, for it has no session."""

    name: str = "measure"
    exclusive_with: frozenset[str] = frozenset()

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Measure"

    def validate(self, request: Request) -> None:
        """Any nonce will do."""

    def inside_blocks(self, request: Request) -> bool:
        """Return False: modules inside blocks are of no interest here."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Always active, on every model and sampler."""
        return Outcome(self.name, ACTIVE, "timing only; the picture is unchanged")
