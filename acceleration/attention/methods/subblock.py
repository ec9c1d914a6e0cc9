"""SubBlock (SGLang, 2026): top-k by the log-sum-exp of sub-block scores, in the model's own token order, no tail.

score(i, j) = log sum over parts a of block i and b of block j of exp(q_a . k_b * scale); 4 x 4 parts of a block of 64.
"""

from ..builders import top_k
from ..scores import sub_block_lse
from .method import AttentionMethod, make, model_order


def _plan(settings, geometry):
    builder = top_k(sub_block_lse(settings.parts, settings.parts), settings.keep)
    parameters = {"keep": settings.keep, "parts": settings.parts}
    return make("SubBlock", settings, model_order(settings), builder, True, parameters=parameters)


SUBBLOCK = AttentionMethod(
    "SubBlock",
    "keeps the blocks that hold most of the attention, estimated from parts of blocks, in the model's token order",
    "SubBlock routing (SGLang, 2026)",
    _plan,
    dynamic=True,
)
