"""Tables of blocks, or of modules inside them, per step, as the resolver sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StrettoError
from ..facts import OFF, Facts, Outcome
from ..models import MODULE_NAMES
from ..plan import Request
from .masks import Table
from .table_run import MOST_ORDER, TABLE_FORECASTERS, Terms, run_table
from .technique import MEMORY_SHARE

#: Stand between the steps, and between the blocks of a step, of a table written as text.
BETWEEN, BETWEEN_BLOCKS = "/", ","
_NODE = "Stretto Cache Schedule"


@dataclass(frozen=True)
class TableTechnique:
    """Reuse single blocks, or reuse or forecast single modules, at the steps that a table names.

    Settings: ``rows``, the table as text (:func:`table_settings`); and for a table of modules also ``modules``, their
    names, ``forecaster``, one of :data:`~.table_run.TABLE_FORECASTERS`, and ``order``, its degree.
    """

    name: str = "table"
    exclusive_with: frozenset[str] = frozenset({"cache", "table", "profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"{_NODE} (table)"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` unless the settings hold a table."""
        settings = request.settings
        allowed = {"rows", "modules", "forecaster", "order"} if settings.get("modules") else {"rows"}
        unknown = sorted(set(settings) - allowed)
        if unknown or not isinstance(settings.get("rows"), str):
            raise StrettoError(
                f"{_NODE}: settings are {dict(settings)!r:.80}; expected rows as text, and for a table of modules "
                "modules, forecaster and order"
            )
        table_of(settings)
        forecaster, order = settings.get("forecaster", "reuse"), settings.get("order", 0)
        if forecaster not in TABLE_FORECASTERS:
            raise StrettoError(
                f"{_NODE}: forecaster is {forecaster!r}; known forecasters: {', '.join(TABLE_FORECASTERS)}"
            )
        if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= MOST_ORDER:
            raise StrettoError(f"{_NODE}: order is {order!r}; it must be a whole number in [0, {MOST_ORDER}]")

    def inside_blocks(self, request: Request) -> bool:
        """Return whether the table names modules."""
        return bool(request.settings.get("modules"))

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether the table fits under ``facts``."""
        blocked = facts.obstacle()
        if blocked:
            return Outcome(self.name, OFF, blocked)
        settings = request.settings
        terms = Terms(
            self.name,
            MEMORY_SHARE,
            settings.get("forecaster", "reuse"),
            settings.get("order", 0),
            force=request.force,
        )
        return run_table(table_of(settings), facts, terms)


def table_settings(table: Table, source: str = "table") -> dict[str, Any]:
    """Return a table as a request's settings carry it.

    ``rows`` is one mask a step with :data:`BETWEEN` between them. For a table of modules it is one mask a block, with
    :data:`BETWEEN_BLOCKS` between them, and ``modules`` lists their names.

    Raises:
        StrettoError: the table names modules that no family has.
    """
    rows: Any = table.to_json()["computed"]
    if not table.modules:
        return {"rows": BETWEEN.join(rows)}
    unknown = [name for name in table.modules if name not in MODULE_NAMES]
    if unknown:
        raise StrettoError(
            f'{source}: modules has {unknown[0]!r}; known modules: {", ".join(MODULE_NAMES)}. Name them as '
            '{"modules": ["attn", "mlp"], "computed": [...]}'
        )
    text = BETWEEN.join(BETWEEN_BLOCKS.join(row) for row in rows)
    return {"rows": text, "modules": BETWEEN_BLOCKS.join(table.modules)}


def table_of(settings: Mapping[str, Any], source: str = _NODE) -> Table:
    """Inverse of :func:`table_settings`; raises :class:`~..errors.StrettoError` for anything else."""
    steps: Any = settings["rows"].split(BETWEEN)
    names = settings.get("modules", "")
    if not isinstance(names, str):
        raise StrettoError(f"{source}: modules is {names!r}; expected names with {BETWEEN_BLOCKS!r} between them")
    if not names:
        return Table.from_json({"computed": steps}, source)
    rows = [step.split(BETWEEN_BLOCKS) for step in steps]
    table = Table.from_json({"modules": names.split(BETWEEN_BLOCKS), "computed": rows}, source)
    table_settings(table, source)
    return table
