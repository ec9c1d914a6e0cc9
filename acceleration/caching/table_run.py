"""From a table to a run: does it fit the model, does what it stores fit the memory, and what does the work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from .budget import Budget, budget_for
from .forecast import FORECASTERS
from .masks import Table
from .module_session import ModuleSession
from .store import AS_COMPUTED, POLICIES, SnapshotStore
from .table_session import TableSession

#: Forecasters that a table of modules may name; each takes an order.
TABLE_FORECASTERS = ("reuse", "newton", "taylor")
#: Highest order of a forecast.
MOST_ORDER = 3


@dataclass(frozen=True)
class Terms:
    """How a table is run.

    Attributes:
        technique: whose outcome it is.
        share: share of the free memory that stored features may take.
        forecaster: one of :data:`TABLE_FORECASTERS`, for tables of modules; tables of blocks reuse.
        order: degree of the forecast.
        store: name of a policy in :data:`~.store.POLICIES`, None where it cannot be chosen: exactly as computed.
        force: keep the hooks in place, and what they store, even where nothing is skipped.
        notes: sentences that come before the table's own.
    """

    technique: str
    share: float
    forecaster: str = "reuse"
    order: int = 0
    store: str | None = None
    force: bool = False
    notes: tuple[str, ...] = ()


def run_table(table: Table, facts: Facts, terms: Terms) -> Outcome:
    """Return what becomes of ``table`` under ``facts``, which have no :meth:`~..facts.Facts.obstacle`."""
    try:
        misfit = _misfit_of_modules(table, facts) if table.modules else _misfit_of_blocks(table, facts)
    except StrettoError as error:
        misfit = str(error)
    if misfit:
        return Outcome(terms.technique, OFF, misfit)
    if table.computed_share == 1.0 and not terms.force:
        what = "module of every block" if table.modules else "block"
        return Outcome(terms.technique, OFF, f"the table computes every {what} at every step: nothing to skip")
    if terms.store is not None and terms.store not in POLICIES:
        return Outcome(terms.technique, OFF, f"this version of torch has no numbers for store = {terms.store}")
    return _run_modules(table, facts, terms) if table.modules else _run_blocks(table, facts, terms)


def out_of_reach(facts: Facts) -> str:
    """Return why modules inside blocks cannot be cached, "" when they can."""
    if not facts.descriptor.module_names:
        return f"module level is out of reach: no modules of {facts.descriptor.family}'s blocks are known"
    if not facts.modules_in_place:
        return (
            "module level is out of reach: another node has replaced parts of the model's blocks; put the cache behind it"
        )
    return ""


def _misfit_of_blocks(table: Table, facts: Facts) -> str:
    if not facts.descriptor.has_blocks:
        return f"{facts.descriptor.no_blocks}: a table has nothing to act on"
    table.require_shape(len(facts.descriptor.sites(facts.network)), facts.schedule.steps, "the table")
    return ""


def _misfit_of_modules(table: Table, facts: Facts) -> str:
    blocked = out_of_reach(facts)
    if blocked:
        return blocked
    known = facts.descriptor.module_names
    unknown = [name for name in table.modules if name not in known]
    if unknown:
        return f"the table names the module {unknown[0]}; blocks of {facts.descriptor.family} have {', '.join(known)}"
    table.require_shape(facts.descriptor.module_blocks(facts.network), facts.schedule.steps, "the table")
    return ""


def _run_blocks(table: Table, facts: Facts, terms: Terms) -> Outcome:
    skipped = sum(not all(column) for column in zip(*table.rows, strict=True))
    budget = _budget(facts, skipped, terms)
    if not budget.fits and not terms.force:
        return Outcome(terms.technique, OFF, budget.refusal())
    session = TableSession(
        table, SnapshotStore(1, budget.allowed, budget.policy), facts.descriptor, keep_all=terms.force
    )
    reason = f"{table.computed_share:.0%} of all blocks are computed, over {table.steps} steps"
    return Outcome(
        terms.technique,
        ACTIVE,
        "; ".join((*terms.notes, reason)),
        session=session,
        needs_blocks=True,
        reserve_bytes=budget.reserve,
        store_bytes=budget.needed,
        budget_bytes=budget.allowed,
    )


def _run_modules(table: Table, facts: Facts, terms: Terms) -> Outcome:
    notes, forecaster = [*terms.notes], FORECASTERS[terms.forecaster]
    depth, reduced = forecaster.depth(order=terms.order), False
    if facts.sampler.stochastic and depth > 1:
        forecaster, depth, reduced = FORECASTERS["reuse"], 1, True
        notes.append(f"{facts.sampler.name} adds fresh noise each step: forecasting falls back to reuse")
    budget = _budget(facts, _snapshots(table, facts, depth), terms)
    if not budget.fits and not terms.force:
        return Outcome(terms.technique, OFF, budget.refusal())
    steps = facts.schedule.steps
    session = ModuleSession(
        table,
        lambda coordinates, target: forecaster.weights(coordinates, target, steps, order=terms.order),
        SnapshotStore(depth, budget.allowed, budget.policy),
        len(facts.descriptor.sites(facts.network)),
        keep_all=terms.force,
    )
    notes.append(f"{table.computed_share:.0%} of all {_words(table.modules)} are computed, over {table.steps} steps")
    return Outcome(
        terms.technique,
        REDUCED if reduced else ACTIVE,
        "; ".join(notes),
        session=session,
        needs_modules=True,
        reserve_bytes=budget.reserve,
        store_bytes=budget.needed,
        budget_bytes=budget.allowed,
    )


def _budget(facts: Facts, snapshots: int, terms: Terms) -> Budget:
    """Return the budget of ``snapshots`` hidden states; it names no other store where none can be chosen."""
    budget = budget_for(facts, "blocks", snapshots, terms.store or AS_COMPUTED.name, terms.share)
    return budget if terms.store else replace(budget, alternatives=())


def _snapshots(table: Table, facts: Facts, depth: int) -> int:
    """Return how many hidden states are stored at most; text beside the picture, of a length not known yet, left out."""
    kept = 0
    for site in facts.descriptor.module_sites(facts.network):
        columns = [
            [table.computed(step, site.depth, name) for step in range(table.steps)]
            for name in site.names
            if name in table.modules
        ]
        computed = [any(cells) for cells in zip(*columns, strict=True)]
        if len(columns) == len(site.names) and not all(computed):
            kept += min(depth, max(sum(computed), 1))
    return kept


def _words(modules: Sequence[str]) -> str:
    return f"modules ({', '.join(modules)})"
