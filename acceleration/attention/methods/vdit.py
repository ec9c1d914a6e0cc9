"""Sparse-vDiT (arXiv 2506.03065, section 3): diagonal, multi-diagonal, vertical stripes, and heads that do nothing.

*Diagonal*: a band in the model's token order. *Multi-diagonal*: the same band once tokens are ordered place by place, all
frames of a place in a row; in the model's own order these are many narrow diagonals, one per pair of frames. *Stripes*:
key blocks that everybody attends to, found from a sample of queries. In clips the first frame is kept besides, but not
with places in order, where every block has a token of it.

*Sparse-vDiT* mixes them head by head, in the model's order. ``heads`` names the modes, as an offline search finds them;
without it every head gets the pattern that holds most of a sample's attention, all patterns being of one size.
"""

from collections.abc import Callable

from ..builders import band, by_head, everything, frame_log_band, live_stripes, made
from ..geometry import Geometry
from ..order import OrderSpec
from ..plan import AttentionPlan, Builder
from .method import AttentionMethod, largest, make, sinks

SOURCE = "Sparse-vDiT, arXiv 2506.03065"


def sized_band(settings, geometry: Geometry, order: OrderSpec) -> int:
    """Return the half-width of the widest band that fits ``keep``."""
    sink = sinks(settings, _sink(geometry, order))
    return largest(range(geometry.visual), lambda half: band(-half, half), settings, geometry, order, sink)


def sized_frame_band(settings, geometry: Geometry) -> int:
    """Return the half-width of the widest equal bands between all pairs of frames that fit ``keep``."""
    sink = sinks(settings, _sink(geometry, OrderSpec()))
    return largest(range(geometry.frame), _frame_band, settings, geometry, OrderSpec(), sink)


def _frame_band(half: int) -> Builder:
    return frame_log_band(lambda distance, frame: half)


def _banded(name: str, order: OrderSpec) -> Callable:
    def plan(settings, geometry):
        half = sized_band(settings, geometry, order)
        sink = _sink(geometry, order)
        parameters = {"half_width": half}
        return make(name, settings, order, band(-half, half), False, sink_frames=sink, parameters=parameters)

    return plan


def _stripes(settings, geometry):
    order, parameters = OrderSpec(), {"keep": settings.keep}
    sink = _sink(geometry, order)
    return make("Stripes", settings, order, live_stripes(settings.keep), True, sink_frames=sink, parameters=parameters)


def _mixed(settings, geometry):
    half, frame_half = sized_band(settings, geometry, OrderSpec()), sized_frame_band(settings, geometry)
    static = {"diagonal": band(-half, half), "multi-diagonal": _frame_band(frame_half), "full": everything()}
    view = AttentionPlan("", OrderSpec(), everything(), False, settings.block, settings.block).view(geometry)
    choices = {name: made(builder, view) for name, builder in static.items()}
    choices["stripes"] = live_stripes(settings.keep)
    found = not settings.heads
    skipped = tuple(head for head, mode in enumerate(settings.heads) if mode == "skip")
    if found:
        del choices["full"]
    builder = by_head(choices, tuple("full" if mode == "skip" else mode for mode in settings.heads))
    parameters = {
        "half_width": half, "frame_half_width": frame_half, "heads": list(settings.heads) or "found at run time",
    }  # fmt: skip
    dynamic = found or "stripes" in settings.heads
    return make(
        "Sparse-vDiT", settings, OrderSpec(), builder, dynamic, sink_frames=_sink(geometry, OrderSpec()),
        skip_heads=skipped, parameters=parameters,
    )  # fmt: skip


def _sink(geometry: Geometry, order: OrderSpec) -> int:
    return int(geometry.video and order.name == "identity")


def _needs_frames(geometry: Geometry) -> str:
    return "" if geometry.video else "Multi-diagonal follows a place through the frames, and there is only one"


DIAGONAL = AttentionMethod(
    "Diagonal", "keeps a band around each token, in the model's token order", SOURCE,
    _banded("Diagonal", OrderSpec()), dynamic=False,
)  # fmt: skip
MULTI_DIAGONAL = AttentionMethod(
    "Multi-diagonal", "keeps what stands at nearly the same place, in all frames", SOURCE,
    _banded("Multi-diagonal", OrderSpec("token-major")), dynamic=False, fits=_needs_frames,
)  # fmt: skip
STRIPES = AttentionMethod(
    "Stripes", "keeps the blocks that a sample of queries attends to most, the same for all", SOURCE,
    _stripes, dynamic=True,
)  # fmt: skip
SPARSE_VDIT = AttentionMethod(
    "Sparse-vDiT", "gives every head the one of three patterns that holds most of its attention", SOURCE,
    _mixed, dynamic=True,
)  # fmt: skip
