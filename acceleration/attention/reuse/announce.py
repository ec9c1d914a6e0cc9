"""How many bytes a table of modes keeps at most: said before the run, and held during it."""

from collections.abc import Sequence
from dataclasses import dataclass

from .modes import CORRECTED, Mode, is_any
from .schedule import ModeTable
from .storage import AS_COMPUTED, POLICIES, Policy


@dataclass(frozen=True)
class Shape:
    """What a run's attentions look like.

    Attributes:
        rows: batch rows of one guidance branch.
        tokens: N.
        size: d.
        item: bytes of a number.
        blocks: (Nq, Nk).
        branches: guidance branches of an evaluation.
        static: whether the lists never change and are not kept.
    """

    rows: int
    tokens: int
    size: int
    item: int
    blocks: tuple[int, int]
    branches: int = 2
    static: bool = False


@dataclass(frozen=True)
class Announcement:
    """Bytes that are kept at most at any time.

    Attributes:
        policy: how.
        bytes: on the device.
        system_bytes: in system memory.
    """

    policy: Policy
    bytes: int
    system_bytes: int


def announce(table: ModeTable, shape: Shape, policy: Policy = AS_COMPUTED) -> Announcement:
    """Return what following ``table`` keeps at most; a run that skips steps or starts in the middle keeps no more.

    During a step, what it uses and what it leaves may both be there.
    """
    device, system = 0, 0
    value = policy.value_bytes(shape.rows, 1, shape.tokens, shape.size, shape.item)
    rho = shape.rows * shape.tokens * 4
    lists = 0 if shape.static else shape.rows * shape.blocks[0] * -(-shape.blocks[1] // 8)
    for step in range(table.steps):
        kinds = [table.correction(at) for at in (step, step + 1)]
        outputs = table.shares(step) | table.shares(step + 1)
        held, residuals, rhos = (
            is_any(kinds[0], modes) | is_any(kinds[1], modes)
            for modes in (CORRECTED, (Mode.RESIDUAL, Mode.RHO), (Mode.RHO, Mode.MEAN))
        )
        donors = int(table.lent(step).sum()) if shape.branches > 1 else 0
        donated = donors * shape.rows * shape.tokens * shape.size * shape.item
        kept = int(outputs.sum() + residuals.sum()) * value * shape.branches
        rest = (int(rhos.sum()) * rho + int(held.sum()) * lists) * shape.branches + donated
        device = max(device, rest + (0 if policy.in_system_memory else kept))
        system = max(system, kept if policy.in_system_memory else 0)
    return Announcement(policy, device, system)


def choose_policy(
    table: ModeTable, shape: Shape, budget: int, allowed: Sequence[Policy] = tuple(POLICIES.values())
) -> Announcement:
    """Return the first of ``allowed`` policies that keeps within ``budget`` bytes of the device, else the smallest, capped.

    Capped means that residuals are given up while the run goes on, those first whose lists leave out least.
    """
    found = [announce(table, shape, policy) for policy in allowed]
    for announcement in found:
        if announcement.bytes <= budget:
            return announcement
    least = min(found, key=lambda announcement: announcement.bytes)
    return Announcement(least.policy, budget, least.system_bytes)
