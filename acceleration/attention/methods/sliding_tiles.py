"""Sliding tile attention (STA, arXiv 2502.04507): a window of tiles that moves inwards at the borders.

Tiles have 6 x 8 x 8 tokens (8 x 8 in a picture). Every tile attends to equally many: windows do not shrink at borders. The
window is as large as ``keep`` allows, in proportion to the grid.
"""

from ..builders import CLAMP, box_tiles
from .method import AttentionMethod, largest, make, reaches, tile_counts, tiles


def _plan(settings, geometry):
    order = tiles(settings, (6, 8, 8) if geometry.video else (1, 8, 8))

    def window(reach):
        return box_tiles(order.tile, reach, CLAMP)

    reach = largest(reaches(tile_counts(order.tile, geometry), clamp=True), window, settings, geometry, order)
    return make("Sliding tiles", settings, order, window(reach), False, parameters={"reach": list(reach)})


SLIDING_TILES = AttentionMethod(
    "Sliding tiles",
    "keeps a window of tiles around a query's own, of one size everywhere",
    "Sliding Tile Attention, arXiv 2502.04507",
    _plan,
    dynamic=False,
)
