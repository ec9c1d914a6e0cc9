"""Block mass: what a query block would attend to, estimated from a few keys at a time. What to take without knowing any
method.

SubBlock's score (SGLang, 2026) with the parts spent where they count: a key block is split into cells of four tokens, and
the query block not at all. Per pair of blocks these are as many numbers as SubBlock's own 4 x 4 parts, but cells of
four do not hide a few strong keys: on heads with such a sink the error falls from .42 to .02 at ``keep`` .25, elsewhere
it hardly differs (tests/engine/test_attention_fixture.py). Tiles of one block keep neighbours together, and left-out blocks
enter the softmax as one pooled key each (Sol-Attn, arXiv 2607.24027). Nothing to train or calibrate.
"""

from ..builders import top_k
from ..scores import sub_block_lse
from .method import AttentionMethod, block_tile, make, tiles

CELL = 4


def _plan(settings, geometry):
    order = tiles(settings, block_tile(settings.block, geometry))
    builder = top_k(sub_block_lse(1, settings.block // CELL), settings.keep)
    parameters = {"keep": settings.keep, "cell": CELL}
    return make("Block mass", settings, order, builder, True, tail=True, parameters=parameters)


BLOCK_MASS = AttentionMethod(
    "Block mass",
    "keeps the blocks that hold most of the attention, estimated four keys at a time; the rest enters pooled",
    "after SubBlock routing (SGLang, 2026), with the pooled tail of Sol-Attn, arXiv 2607.24027",
    _plan,
    dynamic=True,
)
