"""DraftAttention (arXiv 2505.14708): a low-resolution attention map decides, with one threshold per head.

Queries and keys are averaged over patches of 8 x 16 tokens of a frame (a block of 128; 8 x 8 for blocks of 64). Of a head's
whole softmaxed map the ``keep`` share of largest entries stays, so rows get unequal budgets; a row that would get nothing
keeps its best block, which the published code leaves empty.
"""

from ..builders import global_threshold
from ..scores import mean_pool
from .method import AttentionMethod, frame_tile, make, tiles


def _plan(settings, geometry):
    order = tiles(settings, frame_tile(settings.block))
    builder = global_threshold(mean_pool(), settings.keep)
    return make("DraftAttention", settings, order, builder, True, parameters={"keep": settings.keep})


DRAFT = AttentionMethod(
    "DraftAttention",
    "keeps the largest entries of each head's low-resolution attention map, wherever they are",
    "DraftAttention, arXiv 2505.14708",
    _plan,
    dynamic=True,
)
