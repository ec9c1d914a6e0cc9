"""Top-k: the key blocks with the best pooled score, and one pooled key for each of the others.

The plain form that most routers share: block means, ``round(keep * nk)`` blocks a row, tiles of one block each so that
a block's mean means something, and Sol-Attn's pooled tail (arXiv 2607.24027), which cannot hurt and often helps.
"""

from ..builders import top_k
from ..scores import mean_pool
from .method import AttentionMethod, block_tile, make, tiles


def _plan(settings, geometry):
    order = tiles(settings, block_tile(settings.block, geometry))
    builder = top_k(mean_pool(), settings.keep)
    return make("Top-k", settings, order, builder, True, tail=True, parameters={"keep": settings.keep})


TOP_K = AttentionMethod(
    "Top-k",
    "keeps the blocks whose mean key fits the mean query best; the rest enters as one pooled key per block",
    "block-mean routing with the pooled tail of Sol-Attn, arXiv 2607.24027",
    _plan,
    dynamic=True,
)
