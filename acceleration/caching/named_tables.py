"""Methods of Stretto Cache that are tables: which table each makes of its settings."""

from collections.abc import Callable, Mapping

from ..facts import OFF, Facts, Outcome
from .masks import Table, strip
from .methods import CacheSettings, Method
from .module_tables import delta_table, interval_table, pyramid_intervals, pyramid_table, whole_steps
from .policy import Rails
from .table_run import Terms, out_of_reach, run_table

Builder = Callable[[CacheSettings, Rails, Facts], Table]


def _every(settings: CacheSettings, rails: Rails, facts: Facts) -> Table:
    family, steps = facts.descriptor, facts.schedule.steps
    return interval_table(steps, rails, settings.interval, family.module_blocks(facts.network), family.module_names)


def _pyramid(settings: CacheSettings, rails: Rails, facts: Facts) -> Table:
    family, intervals = facts.descriptor, pyramid_intervals(settings.interval)
    blocks = family.module_blocks(facts.network)
    return pyramid_table(facts.schedule.sigmas, rails, intervals, blocks, family.module_names)


def _delta(settings: CacheSettings, rails: Rails, facts: Facts) -> Table:
    blocks = len(facts.descriptor.sites(facts.network))
    return delta_table(facts.schedule.steps, rails, settings.interval, blocks)


#: Method -> its table, of modules inside blocks.
OF_MODULES: Mapping[str, Builder] = {"PAB": _pyramid, "FORA modules": _every, "TaylorSeer modules": _every}
#: Method -> its table, of whole blocks.
OF_BLOCKS: Mapping[str, Builder] = {"DeltaDiT": _delta}


def run_named(
    method: Method, settings: CacheSettings, rails: Rails, facts: Facts, force: bool, origin: str, share: float
) -> Outcome:
    """Return what becomes of a method that is a table.

    Args:
        method: its row.
        settings: its numbers.
        rails: steps that are always computed.
        facts: of the run; without an obstacle.
        force: see :class:`~..plan.Request`.
        origin: where the numbers come from, "" where they were set by hand.
        share: share of the free memory that stored features may take.
    """
    blocked = out_of_reach(facts) if method.name in OF_MODULES else facts.descriptor.no_blocks
    if blocked:
        return Outcome("cache", OFF, f"{blocked}: {method.name} cannot run here; EasyCache and Taylor can")
    table = {**OF_MODULES, **OF_BLOCKS}[method.name](settings, rails, facts)
    whole = whole_steps(table)
    headline = f"{method.name}: {sum(whole)} of {len(whole)} steps are computed in full, {strip(whole)}"
    notes = tuple(filter(None, (headline, origin)))
    order = settings.order if method.forecaster != "reuse" else 0
    return run_table(table, facts, Terms("cache", share, method.forecaster, order, settings.store, force, notes))
