"""GRAT (arXiv 2505.14687): tokens regrouped into patches, and attention between groups alone.

Groups have 16 x 16 tokens in a picture and 4 x 8 x 8 in a clip, and stand in one piece. GRAT-B attends to the groups
around a query's own, one on either side of every axis; windows lose what lies outside the grid. GRAT-X attends to the
groups that share an index with it on at least one axis: a cross in a picture, three planes in a clip. Where ``keep``
allows more than that, B reaches further and X counts neighbouring indices as shared.
"""

from ..builders import box_tiles, cross_tiles
from .method import AttentionMethod, largest, make, tile_counts, tiles

SOURCE = "GRAT, arXiv 2505.14687"


def groups(geometry):
    """Return (t, y, x) tokens of a group."""
    return (4, 8, 8) if geometry.video else (1, 16, 16)


def _box(settings, geometry):
    order = tiles(settings, groups(geometry))
    furthest = max(tile_counts(order.tile, geometry)) - 1

    def builder(reach):
        return box_tiles(order.tile, (reach,) * 3)

    reach = largest(range(1, max(furthest, 1) + 1), builder, settings, geometry, order)
    return make("GRAT-B", settings, order, builder(reach), False, parameters={"reach": reach})


def _cross(settings, geometry):
    order = tiles(settings, groups(geometry))
    furthest = max(tile_counts(order.tile, geometry)) - 1

    def builder(reach):
        return cross_tiles(order.tile, reach)

    reach = largest(range(furthest + 1), builder, settings, geometry, order)
    return make("GRAT-X", settings, order, builder(reach), False, parameters={"reach": reach})


GRAT_B = AttentionMethod(
    "GRAT-B", "keeps the groups of tokens around a query's own, as many on every side as fit", SOURCE, _box, dynamic=False
)
GRAT_X = AttentionMethod(
    "GRAT-X", "keeps the groups of tokens in the same row, column or frame of groups", SOURCE, _cross, dynamic=False
)
