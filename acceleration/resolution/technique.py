"""Progressive resolution as the resolver sees it: can the latent be smaller at first, and what would it gain?"""

from dataclasses import dataclass

from ..facts import ACTIVE, OFF, Facts, Outcome
from ..plan import Request
from ..sampling import SamplerTraits
from .session import ResolutionSession
from .settings import CORRECTED, NODE, ResolutionSettings
from .stages import StagePlan, plan_stages, whole_run

#: Samplers that cannot do with fewer steps than this in a stage.
LEAST_STEPS = {"unipc": 3, "unipc_bh2": 3}


@dataclass(frozen=True)
class ResolutionTechnique:
    """The first steps at a smaller size."""

    name: str = "resolution"
    exclusive_with: frozenset[str] = frozenset({"resolution", "profile", "module_profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return NODE

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        ResolutionSettings.from_mapping(request.settings)

    def inside_blocks(self, request: Request) -> bool:
        """Return False: the network runs as ever, on a smaller latent."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and in which stages the run grows under ``facts``."""
        settings = ResolutionSettings.from_mapping(request.settings)
        reason = facts.obstacle() or facts.stage_obstacle or sampler_obstacle(facts.sampler)
        if reason:
            return Outcome(self.name, OFF, reason)
        plan = run_stages(settings, facts.sampler, facts.schedule.sigmas, facts.latent_shape)
        if isinstance(plan, str):
            if not request.force:
                return Outcome(self.name, OFF, plan)
            plan = whole_run(facts.schedule.sigmas, tuple(facts.latent_shape[-2:]))
        notes = [plan.words(), f"{1 / plan.cost:.2f}x less work for the network where its time is per token"]
        if not settings.switches and plan.stages[0].r != 1.0:
            notes.append(f"switches by the spectrum {settings.spectrum} ({settings.power_law.source}), delta {settings.delta:g}")
        if facts.sampler.multistep and not plan.refresh:
            notes.append(f"{facts.sampler.name} begins anew at every switch")
        return Outcome(self.name, ACTIVE, "; ".join(notes), session=ResolutionSession(plan))


def sampler_obstacle(sampler: SamplerTraits) -> str | None:
    """Return why a run of ``sampler`` cannot be cut into stages, or None."""
    if not sampler.known:
        return f"the sampler {sampler.name} is not known: plain sampling"
    if sampler.adaptive:
        return f"the sampler {sampler.name} picks its own noise levels: plain sampling"
    return None


def run_stages(
    settings: ResolutionSettings, sampler: SamplerTraits, sigmas: tuple[float, ...], latent_shape: tuple[int, ...]
) -> StagePlan | str:
    """Return the stages of a run, or why it has none.

    Args:
        settings: what the user asked for.
        sampler: traits of the sampler.
        sigmas: noise levels of the run.
        latent_shape: [B, C, (T,) H, W].
    """
    if len(latent_shape) not in (4, 5):
        return f"the latent has {len(latent_shape)} dimensions; pictures have 4, videos 5"
    if sigmas[0] > 1.0:
        return f"the first noise level is {sigmas[0]:g}; a flow's lie between 0 and 1"
    if settings.method == CORRECTED and "cfg_pp" in sampler.name:
        return f"the sampler {sampler.name} reads the unconditional branch, which {CORRECTED} has at other sizes only"
    plan = plan_stages(settings, sigmas, tuple(latent_shape[-2:]))
    least = LEAST_STEPS.get(sampler.name, 1)
    if (
        isinstance(plan, StagePlan)
        and not plan.refresh
        and any(stage.last - stage.first < least for stage in plan.stages)
    ):
        return f"the sampler {sampler.name} needs {least} steps in a stage: {plan.words()}"
    return plan
