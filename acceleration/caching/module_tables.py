"""Tables of published methods: which modules, or blocks, are computed at each step. Pure functions of a run's shape."""

from collections.abc import Mapping, Sequence

from ..models.modules import ATTN, CROSS_ATTN
from .masks import Mask, Table
from .policy import Rails, interval_mask

#: PAB: timesteps (0 to 1000) between which outputs are reused, the widest band in its public code (arXiv 2408.12588).
PAB_BAND = (100.0, 850.0)
#: PAB: how much longer cross-attention is kept than spatial attention (every 6 steps instead of every 2).
PAB_CROSS = 3
#: Delta-DiT: share of the run in which back blocks are reused, then front blocks; and the share of blocks that are.
DELTA_TURN, DELTA_SHARE = 0.5, 0.5


def uniform_table(mask: Sequence[bool], blocks: int, modules: tuple[str, ...]) -> Table:
    """Return the table that computes all modules of all blocks, or none, as ``mask`` says: FORA, TaylorSeer.

    FORA (arXiv 2407.01425) reuses, TaylorSeer (arXiv 2503.06923) forecasts; the table is the same.
    """
    return Table(tuple(((computed,) * len(modules),) * blocks for computed in mask), modules)


def interval_table(steps: int, rails: Rails, interval: int, blocks: int, modules: tuple[str, ...]) -> Table:
    """Return FORA's table: every ``interval``-th step is computed after the warm-up, and the tail.

    Args:
        steps: steps of the run.
        rails: steps that are always computed.
        interval: >= 1.
        blocks: blocks of the model.
        modules: names of their modules.
    """
    return uniform_table(interval_mask(steps, rails, interval), blocks, modules)


def pyramid_table(
    sigmas: Sequence[float],
    rails: Rails,
    intervals: Mapping[str, int],
    blocks: int,
    modules: tuple[str, ...],
    band: tuple[float, float] = PAB_BAND,
) -> Table:
    """Return Pyramid Attention Broadcast's table (PAB, arXiv 2408.12588): every kind of attention has its own interval.

    Inside the band a module is computed at the steps that are a multiple of its interval, counted from the first step of
    the run; outside it always. Published are 2 for spatial, 4 for temporal and 6 for cross-attention. The attention of
    joint models is over space and time at once, and has the shortest of these. Modules without an interval are always
    computed: published reuse of MLPs is a list of single timesteps and blocks for one model.

    Args:
        sigmas: noise levels of the run, the last one included.
        rails: steps that are always computed.
        intervals: module name -> interval, >= 1.
        blocks: blocks of the model.
        modules: names of their modules.
        band: timesteps (0 to 1000), excluding both ends.
    """
    steps, times = len(sigmas) - 1, timesteps(sigmas)

    def computed(step: int, module: str) -> bool:
        reused = band[0] < times[step] < band[1] and step % intervals.get(module, 1) != 0
        return not reused or step == 0 or rails.reason(step, steps) is not None

    return Table(
        tuple((tuple(computed(step, module) for module in modules),) * blocks for step in range(steps)), modules
    )


def pyramid_intervals(interval: int) -> dict[str, int]:
    """Return PAB's intervals for a shortest one: 1 reuses nothing, 2 is as published."""
    return {ATTN: interval, CROSS_ATTN: PAB_CROSS * interval if interval > 1 else 1}


def delta_table(
    steps: int,
    rails: Rails,
    interval: int,
    blocks: int,
    turn: float = DELTA_TURN,
    share: float = DELTA_SHARE,
) -> Table:
    """Return Delta-DiT's table of whole blocks (arXiv 2406.01125).

    Between full steps, every ``interval``-th, what a range of blocks adds is reused: the back blocks, which make details,
    in the early part of the run, the front blocks, which make the outline, in the late one.

    Args:
        steps: steps of the run.
        rails: steps that are always computed.
        interval: >= 1.
        blocks: blocks of the model.
        turn: share of the run after which the front blocks are reused instead of the back ones.
        share: share of the blocks that are reused, at least one block and never all of several.
    """
    reused = min(max(round(share * blocks), 1), max(blocks - 1, 1))
    back = tuple(block < blocks - reused for block in range(blocks))
    front = tuple(block >= reused for block in range(blocks))
    full = (True,) * blocks
    mask = interval_mask(steps, rails, interval)
    return Table(
        tuple(full if computed else back if step < turn * steps else front for step, computed in enumerate(mask))
    )


def timesteps(sigmas: Sequence[float]) -> list[float]:
    """Return each step's timestep on the scale 0 to 1000 that published bands are given in.

    Flow models have sigma * 1000. Where noise levels exceed 1 timesteps are taken as spread evenly over the run.
    """
    steps = len(sigmas) - 1
    if max(sigmas, default=0.0) <= 1.0:
        return [1000.0 * sigma for sigma in sigmas[:steps]]
    return [1000.0 * (1.0 - step / steps) for step in range(steps)]


def whole_steps(table: Table) -> Mask:
    """Return, per step, whether everything is computed."""
    return tuple(all(all(cell) if table.modules else cell for cell in row) for row in table.rows)
