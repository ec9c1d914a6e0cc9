"""What stored features take, what they may take, and which policy would fit."""

from dataclasses import dataclass

from ..facts import Facts
from .store import AS_COMPUTED, POLICIES, StorePolicy


@dataclass(frozen=True)
class Budget:
    """The memory of one technique's stored features.

    Attributes:
        policy: how they are kept.
        needed: bytes they take at most, as stored.
        allowed: bytes they may take, in the memory where they are stored.
        reserve: bytes to reserve on the device: what is stored there, and what is read back at a time.
        alternatives: names of the other policies that would fit.
    """

    policy: StorePolicy
    needed: int
    allowed: int
    reserve: int
    alternatives: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the features may be stored."""
        return self.needed <= self.allowed

    def refusal(self) -> str:
        """Return why they may not, with the way out where there is one."""
        way_out = f"; store = {self.alternatives[0]} would fit" if self.alternatives else ""
        where = " of system memory" if self.policy.in_system_memory else ""
        return (
            f"stored features would take {self.needed / 2**20:.0f} MiB, "
            f"{self.allowed / 2**20:.0f} MiB{where} may be used{way_out}"
        )


def budget_for(facts: Facts, granularity: str, snapshots: int, store: str, share: float) -> Budget:
    """Return the :class:`Budget` of ``snapshots`` snapshots of all branches.

    Args:
        facts: of the run.
        granularity: where features are taken (:meth:`~..facts.Facts.snapshot_bytes`).
        snapshots: how many are kept.
        store: name of a policy in :data:`~.store.POLICIES`.
        share: share of the free memory that stored features may take.
    """
    chosen = _budget(facts, granularity, snapshots, POLICIES[store], share)
    others = (_budget(facts, granularity, snapshots, policy, share) for policy in POLICIES.values())
    fitting = tuple(other.policy.name for other in others if other.fits and other.policy is not chosen.policy)
    return Budget(chosen.policy, chosen.needed, chosen.allowed, chosen.reserve, fitting)


def _budget(facts: Facts, granularity: str, snapshots: int, policy: StorePolicy, share: float) -> Budget:
    needed = facts.snapshot_bytes(granularity, policy.at_most) * snapshots
    free = facts.free_bytes
    if policy.in_system_memory and facts.free_system_bytes is not None:
        free = facts.free_system_bytes
    read_back = 0 if policy is AS_COMPUTED else facts.snapshot_bytes(granularity) * snapshots // facts.branches
    on_device = 0 if policy.in_system_memory else needed
    return Budget(policy, needed, int(free * share), on_device + read_back)
