"""Plan + model + sampler facts -> what really runs, each with a reason a person understands."""

from collections.abc import Sequence
from dataclasses import dataclass

from .compatibility import TECHNIQUES
from .errors import StrettoError
from .facts import OFF, Facts, Outcome
from .plan import Plan
from .run import Session


@dataclass(frozen=True)
class Execution:
    """What really runs."""

    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Sessions of the active techniques, outermost first."""
        return tuple(outcome.session for outcome in self.outcomes if outcome.session is not None)

    @property
    def needs_blocks(self) -> bool:
        """Whether block hooks must be installed."""
        return any(outcome.needs_blocks for outcome in self.outcomes)

    @property
    def needs_modules(self) -> bool:
        """Whether a session acts on modules inside blocks."""
        return any(outcome.needs_modules for outcome in self.outcomes)

    @property
    def reserve_bytes(self) -> int:
        """Memory to reserve on the device."""
        return sum(outcome.reserve_bytes for outcome in self.outcomes)


def resolve(plan: Plan, facts: Facts, notes: Sequence[str] = ()) -> Execution:
    """Return the :class:`Execution` of ``plan`` under ``facts``.

    Raises:
        StrettoError: a request marked as required cannot run.
    """
    outcomes = []
    for name, technique in TECHNIQUES.items():
        for request in plan.of(name):
            outcome = technique.resolve(request, facts)
            if outcome.status == OFF and request.required:
                raise StrettoError(f"{technique.label(request)} is marked as required but cannot run: {outcome.reason}.")
            outcomes.append(outcome)
    return Execution(tuple(outcomes), tuple(notes))
