"""Which techniques may share a run. Each declares it once; the relation is symmetric."""

from typing import Protocol

from .attention.planned.technique import PlannedTechnique
from .attention.probing.greedy import GreedyTechnique
from .attention.probing.technique import ProbeTechnique
from .attention.technique import AttentionTechnique
from .caching.module_recorder import ModuleProfileTechnique
from .caching.profiling import ProfileTechnique
from .caching.table import TableTechnique
from .caching.technique import CacheTechnique
from .errors import ConflictError, StrettoError
from .facts import Facts, Outcome
from .frame_rate.technique import FrameRateTechnique
from .guidance.technique import GuidanceTechnique
from .measure import MeasureTechnique
from .plan import Plan, Request
from .region.technique import RegionTechnique
from .resolution.technique import ResolutionTechnique
from .temporal_features.technique import TemporalTechnique
from .weights.block_probe import BlockProbeTechnique


class Technique(Protocol):
    """What the engine asks of a technique."""

    name: str
    exclusive_with: frozenset[str]

    def label(self, request: Request) -> str: ...
    def validate(self, request: Request) -> None: ...
    def inside_blocks(self, request: Request) -> bool: ...
    def resolve(self, request: Request, facts: Facts) -> Outcome: ...


#: Every technique, in execution order inside a step (outermost first).
TECHNIQUES: dict[str, Technique] = {
    technique.name: technique
    for technique in (
        MeasureTechnique(),
        GuidanceTechnique(),
        ResolutionTechnique(),
        FrameRateTechnique(),
        CacheTechnique(),
        TableTechnique(),
        ProfileTechnique(),
        ModuleProfileTechnique(),
        RegionTechnique(),
        AttentionTechnique(),
        PlannedTechnique(),
        ProbeTechnique(),
        GreedyTechnique(),
        TemporalTechnique(),
        BlockProbeTechnique(),
    )
}


def inside_blocks(plan: Plan) -> bool:
    """Return whether a request of ``plan`` acts on modules inside blocks."""
    return any(TECHNIQUES[request.technique].inside_blocks(request) for request in plan.requests)


def compatible(first: str, second: str) -> bool:
    """Return whether two techniques may share a run."""
    return second not in TECHNIQUES[first].exclusive_with and first not in TECHNIQUES[second].exclusive_with


def add_request(plan: Plan, request: Request) -> Plan:
    """Return ``plan`` with ``request``.

    A second measuring request replaces the first: one run is timed once.

    Raises:
        StrettoError: unknown technique or bad settings.
        ConflictError: a request in the plan cannot share a run with it; the message names both.
    """
    if request.technique not in TECHNIQUES:
        raise StrettoError(f"unknown technique {request.technique!r}; known: {', '.join(TECHNIQUES)}")
    technique = TECHNIQUES[request.technique]
    technique.validate(request)
    if request.technique == "measure":
        kept = tuple(other for other in plan.requests if other.technique != "measure")
        return Plan(kept).with_request(request)
    for other in plan.requests:
        if not compatible(request.technique, other.technique):
            raise ConflictError(
                f"{technique.label(request)} cannot share a model with {TECHNIQUES[other.technique].label(other)}, "
                "which an earlier node added. Remove or bypass one of the two nodes."
            )
    return plan.with_request(request)
