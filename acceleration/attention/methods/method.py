"""What a method is, and how its settings become the size of its pattern."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..builders import everything, force
from ..geometry import Geometry
from ..order import OrderSpec
from ..plan import AttentionPlan, Builder, Correction

if TYPE_CHECKING:
    from ..settings import AttentionSettings

Size = TypeVar("Size")
Tile = tuple[int, int, int]


@dataclass(frozen=True)
class AttentionMethod:
    """A row of :data:`~.METHODS`.

    Attributes:
        name: as its authors call it.
        summary: what it keeps, in a user's words.
        source: paper.
        plan: (settings, geometry) -> plan. Never refuses; see ``fits``.
        dynamic: whether what is kept depends on queries and keys, unless settings change that; the plan says.
        knob: the setting that says how much: ``"keep"``, ``"radius"`` (CLEAR), ``"tau"`` (Sol) or ``"decay"`` (Radial);
            all but the first can be left to ``keep``.
        fits: why a geometry is none of the method's, "" where it is.
    """

    name: str
    summary: str
    source: str
    plan: Callable[["AttentionSettings", Geometry], AttentionPlan]
    dynamic: bool
    knob: str = "keep"
    fits: Callable[[Geometry], str] = lambda geometry: ""

    def density(self, settings: "AttentionSettings", geometry: Geometry) -> float | None:
        """Return the share of all blocks that is kept, other tokens included; None where it depends on the input."""
        plan = self.plan(settings, geometry)
        heads = max(len(settings.heads), 1)
        return None if plan.dynamic else plan.selection(plan.view(geometry, heads=heads)).density


def make(
    name: str,
    settings: "AttentionSettings",
    order: OrderSpec,
    builder: Builder,
    dynamic: bool,
    *,
    tail: bool = False,
    fitted: bool = False,
    sink_frames: int = 0,
    **rest: Any,
) -> AttentionPlan:
    """Return a plan. ``tail``, ``fitted`` and ``sink_frames`` are the method's own wishes, which settings override."""
    wants_tail = tail if settings.tail == "auto" else settings.tail == "on"
    correction = Correction(tail=wants_tail, fitted=fitted)
    sink = sinks(settings, sink_frames)
    return AttentionPlan(
        name, order, builder, dynamic, settings.block, settings.block, correction, sink_frames=sink, **rest
    )


def sinks(settings: "AttentionSettings", default: int) -> int:
    """Return how many first frames are always kept."""
    return default if settings.sink_frames < 0 else settings.sink_frames


def block_tile(block: int, geometry: Geometry) -> Tile:
    """Return a tile of ``block`` tokens: as cubic as powers of two allow in a clip, flat in a picture."""
    if geometry.video:
        return {16: (1, 4, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}[block]
    return frame_tile(block)


def frame_tile(block: int) -> Tile:
    """Return a tile of ``block`` tokens within one frame."""
    return {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}[block]


def tiles(settings: "AttentionSettings", tile: Tile) -> OrderSpec:
    """Return the order by tiles: the user's, else the method's."""
    return OrderSpec("tiles", tile if settings.tile == "auto" else settings.tile)


def model_order(settings: "AttentionSettings") -> OrderSpec:
    """Return the order of tokens as the model has it, unless the user asks for tiles."""
    return OrderSpec() if settings.tile == "auto" else OrderSpec("tiles", settings.tile)


def wants_exact(settings: "AttentionSettings", default: bool) -> bool:
    """Return whether windows hold for single tokens."""
    return default if settings.exact == "auto" else settings.exact == "on"


def largest(
    sizes: Sequence[Size],
    builder: Callable[[Size], Builder],
    settings: "AttentionSettings",
    geometry: Geometry,
    order: OrderSpec,
    sink_frames: int = 0,
) -> Size:
    """Return the largest of ascending sizes whose pattern keeps at most ``settings.keep`` of the visual blocks.

    Where even the smallest keeps more, it is the smallest. Text and references are left out of the reckoning, so that
    they do not change the pattern among visual tokens; first frames that are kept in any case count.
    """
    alone = Geometry(geometry.grid, 0, geometry.visual)
    view = AttentionPlan("", order, everything(), False, settings.block, settings.block).view(alone)
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        if force(builder(sizes[middle])(view), view, sink_frames=sink_frames).density <= settings.keep + 1e-9:
            low = middle
        else:
            high = middle
    return sizes[low]


def reaches(counts: Sequence[int], clamp: bool = False) -> list[Tile]:
    """Return windows (reach in tiles by axis) from none to everything, each a step on one axis larger than the last.

    The step is taken on the axis that falls behind most, in proportion to its tiles; of equals on the last.

    Args:
        counts: tiles by axis.
        clamp: whether windows move inwards at borders, so that half the axis on either side is all of it.
    """
    full = [count // 2 if clamp else count - 1 for count in counts]
    reach, path = [0, 0, 0], [(0, 0, 0)]
    while reach != full:
        behind = min((axis for axis in (2, 1, 0) if reach[axis] < full[axis]), key=lambda axis: (reach[axis] + 1) / full[axis])
        reach[behind] += 1
        path.append(tuple(reach))
    return path


def tile_counts(tile: Tile, geometry: Geometry) -> tuple[int, int, int]:
    """Return how many tiles each axis has."""
    frames, rows, columns = (-(-axis // size) for axis, size in zip(geometry.grid, tile))
    return frames, rows, columns
