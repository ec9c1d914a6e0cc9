"""Planned attention as the resolver sees it: does the plan fit, and what will be kept?"""

from collections.abc import Callable
from dataclasses import dataclass

from ...facts import ACTIVE, OFF, Facts, Outcome
from ...plan import Request
from ..inside import too_short, unreachable
from ..reuse import POLICIES, Announcement, ModeTable, Shape, announce, choose_policy
from ..search import PlanFile, load_plan, structure_hash
from .schedules import SCHEDULES
from .session import PlannedSession
from .settings import AUTO, FREE_SHARE, PlannedSettings

#: Text that may stand beside the picture, in tokens, where only the run will tell.
TEXT_TOKENS = 512
#: Tokens in a block, and fewer for sequences that have only a few of those.
BLOCK, SMALL_BLOCK, FEW_BLOCKS = 64, 16, 16


@dataclass(frozen=True)
class PlannedTechnique:
    """Attention that follows a plan."""

    name: str = "attention_plan"
    exclusive_with: frozenset[str] = frozenset({"attention", "attention_plan", "attention_probe"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"Stretto Attention Plan ({PlannedSettings.from_mapping(request.settings).name})"

    def validate(self, request: Request) -> None:
        """Raise :class:`~...errors.StrettoError` for settings that cannot work."""
        PlannedSettings.from_mapping(request.settings)

    def inside_blocks(self, request: Request) -> bool:
        """Return True: modules inside blocks tell which layer's attention comes next."""
        return True

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how attention follows the plan under ``facts``.

        Raises:
            StrettoError: the plan's file cannot be read, or is for another model.
        """
        settings = PlannedSettings.from_mapping(request.settings)
        reason = facts.obstacle() or unreachable(facts)
        if not reason and not request.force:
            reason = too_short(facts, settings.min_tokens)
        if reason:
            return Outcome(self.name, OFF, reason)
        sigmas = facts.schedule.sigmas[:-1]
        make, known, words = _from_file(settings, facts) if settings.file else _from_schedule(settings, facts, sigmas)
        table = known.table(sigmas)
        if not (table.modes > 0).any() and not table.cfg.any() and not request.force:
            return Outcome(self.name, OFF, f"{words}: every head is full at every step of this run")
        kept, allowed = _memory(settings, facts, known, table)
        session = PlannedSession(
            facts.descriptor, facts.network, settings.name, make, sigmas, kept.policy, allowed, facts.branches,
            request.interval, settings.compare,
        )  # fmt: skip
        return Outcome(
            self.name,
            ACTIVE,
            f"{words}; {_kept_words(kept, allowed)}",
            session=session,
            reserve_bytes=min(kept.bytes, allowed),
            store_bytes=kept.bytes + kept.system_bytes,
            budget_bytes=allowed,
        )


def _from_file(settings: PlannedSettings, facts: Facts) -> tuple[Callable[[int], PlanFile], PlanFile, str]:
    """Return what gives the plan once the number of heads is known, the plan itself, and words about it."""
    plan, family = load_plan(settings.file), facts.descriptor.family
    layers = facts.descriptor.module_blocks(facts.network)
    caution = plan.require(family, layers, plan.heads, hash_of(facts.network))

    def make(heads: int) -> PlanFile:
        plan.require(family, layers, heads)
        return plan

    steps = "" if plan.steps == facts.schedule.steps else f", made with {plan.steps} steps and mapped by noise level"
    words = f"follows {settings.name}{steps}"
    return make, plan, f"{words} ({caution})" if caution else words


def _from_schedule(
    settings: PlannedSettings, facts: Facts, sigmas: tuple[float, ...]
) -> tuple[Callable[[int], PlanFile], PlanFile, str]:
    """Like :func:`_from_file`; the plan itself is for as many heads as the network tells."""
    row, descriptor = SCHEDULES[settings.schedule], facts.descriptor
    layers, grid = descriptor.module_blocks(facts.network), descriptor.grid(facts.network, facts.latent_shape)
    keep = settings.keep or row.keep
    full_until = row.full_until if settings.full_until < 0 else settings.full_until
    period = settings.period or row.period
    block = BLOCK if grid[0] * grid[1] * grid[2] >= FEW_BLOCKS * BLOCK else SMALL_BLOCK
    guided = settings.share_guidance and facts.branches > 1

    def make(heads: int) -> PlanFile:
        return row.plan(descriptor.family, layers, heads, sigmas, grid, block, keep, full_until, period, guided)

    when = f"full for {full_until:.0%} of the steps, then one step in {period}"
    words = f"{row.name}: {row.summary}; {keep:.3g} of the tokens, {when}"
    return make, make(descriptor.heads(facts.network)), words


def _memory(settings: PlannedSettings, facts: Facts, plan: PlanFile, table: ModeTable) -> tuple[Announcement, int]:
    """Return how features are kept and what they take, and what they may take, in bytes."""
    descriptor = facts.descriptor
    tokens = descriptor.tokens(facts.network, facts.latent_shape)
    tokens += TEXT_TOKENS if descriptor.joint_text(facts.network) else 0
    shape = Shape(
        facts.latent_shape[0],
        tokens,
        descriptor.hidden_size(facts.network) // plan.heads,
        facts.element_bytes,
        tuple(-(-tokens // size) for size in plan.block),
        facts.branches,
        plan.static(),
    )
    allowed = settings.memory << 20 if settings.memory else int(facts.free_bytes * FREE_SHARE)
    if settings.store == AUTO:
        return choose_policy(table, shape, allowed), allowed
    return announce(table, shape, POLICIES[settings.store]), allowed


def _kept_words(kept: Announcement, allowed: int) -> str:
    """Say what is kept and how."""
    if not kept.bytes and not kept.system_bytes:
        return "nothing is kept from step to step"
    words = f"keeps {(kept.bytes + kept.system_bytes) / 2**20:.3g} MiB at most, {kept.policy.name}"
    if kept.bytes >= allowed:
        words += "; memory is short, so some heads fall back to lists alone or to full attention"
    return words


def hash_of(network: object) -> str:
    """Return the hash that says whether a plan was made with a network of the same structure."""
    return structure_hash({name: tuple(tensor.shape) for name, tensor in network.named_parameters()})
