"""Tables of blocks per step, as the resolver sees them."""

from dataclasses import dataclass
from typing import Any

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..plan import Request
from .masks import Table
from .store import SnapshotStore
from .table_session import TableSession
from .technique import MEMORY_SHARE

#: Stands between the steps of a table written as text.
BETWEEN = "/"


@dataclass(frozen=True)
class TableTechnique:
    """Reuse single blocks at the steps that a table names."""

    name: str = "table"
    exclusive_with: frozenset[str] = frozenset({"cache", "table", "profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Cache Schedule (table)"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` unless the settings hold a table of whole blocks."""
        if set(request.settings) != {"rows"} or not isinstance(request.settings["rows"], str):
            found = dict(request.settings)
            raise StrettoError(f"Stretto Cache Schedule: settings are {found!r:.80}; expected rows alone, as text")
        _table(request, "Stretto Cache Schedule")

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether the table fits under ``facts``."""
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        if not facts.descriptor.has_blocks:
            return Outcome(self.name, OFF, f"{facts.descriptor.no_blocks}: a table has nothing to act on")
        table = _table(request, "table")
        try:
            table.require_shape(len(facts.descriptor.sites(facts.network)), facts.schedule.steps, "the table")
        except StrettoError as error:
            return Outcome(self.name, OFF, str(error))
        if table.computed_share == 1.0 and not request.force:
            return Outcome(self.name, OFF, "the table computes every block at every step: nothing to skip")
        ever_skipped = sum(not all(column) for column in zip(*table.rows, strict=True))
        needed = facts.snapshot_bytes("blocks") * ever_skipped
        budget = int(facts.free_bytes * MEMORY_SHARE)
        if needed > budget and not request.force:
            reason = f"stored residuals would take {needed / 2**20:.0f} MiB, {budget / 2**20:.0f} MiB may be used"
            return Outcome(self.name, OFF, reason)
        session = TableSession(table, SnapshotStore(1, budget), facts.descriptor)
        reason = f"{table.computed_share:.0%} of all blocks are computed, over {table.steps} steps"
        return Outcome(self.name, ACTIVE, reason, session=session, needs_blocks=True, reserve_bytes=needed)


def _table(request: Request, source: str) -> Table:
    return Table.from_json({"computed": request.settings["rows"].split(BETWEEN)}, source)


def block_rows(table: Table, source: str = "table") -> str:
    """Return a table as a request's settings carry it: one mask a step, with :data:`BETWEEN` between them.

    Raises:
        StrettoError: the modules of a block disagree at some step.
    """
    rows: Any = table.to_json()["computed"]
    if not table.modules:
        return BETWEEN.join(rows)
    for step, row in enumerate(table.rows):
        for block, cell in enumerate(row):
            if any(cell) != all(cell):
                raise StrettoError(
                    f"{source}: at step {step} block {block} computes some of its modules ({', '.join(table.modules)}) and "
                    "skips others; module level is not supported yet, only whole blocks"
                )
    return BETWEEN.join("".join(cell[0] for cell in row) for row in rows)
