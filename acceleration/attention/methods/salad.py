"""SALAD (arXiv 2601.16515): a sliding window or top-k, and a gated linear branch beside it.

The window is a box of tiles around a query's own in space and time, cut off at the borders, as large as ``keep`` allows;
``pattern`` "top-k" keeps the best blocks instead. Gate and projection come with weights (:mod:`..linear`); without them a
gate may be fitted per head, and stays off where it does not prove itself.
"""

from ..builders import box_tiles, top_k
from ..scores import mean_pool
from .method import AttentionMethod, block_tile, largest, make, reaches, tile_counts, tiles


def _plan(settings, geometry):
    order = tiles(settings, block_tile(settings.block, geometry))
    fitted = not settings.weights
    if settings.pattern == "top-k":
        builder = top_k(mean_pool(), settings.keep)
        parameters = {"pattern": "top-k", "keep": settings.keep}
        return make("SALAD", settings, order, builder, True, fitted=fitted, parameters=parameters)

    def window(reach):
        return box_tiles(order.tile, reach)

    reach = largest(reaches(tile_counts(order.tile, geometry)), window, settings, geometry, order)
    parameters = {"pattern": "window", "reach": list(reach)}
    return make("SALAD", settings, order, window(reach), False, fitted=fitted, parameters=parameters)


SALAD = AttentionMethod(
    "SALAD",
    "keeps a window in space and time, and adds a gated linear branch where weights or a fit support it",
    "SALAD, arXiv 2601.16515",
    _plan,
    dynamic=False,
)
