"""Arrow attention (DiTFastAttnV2, arXiv 2503.22796): a band among visual tokens, and everything with text.

keep(i, j) = |i - j| <= w / 2 in raster order, or i is text, or j is text. The band holds for tokens, as published, unless
``exact`` is off. ``keep`` is the share of visual pairs: a half-width of n (1 - sqrt(1 - keep)) leaves that share of n^2.
(The paper's windows n/8, n/16 and n/32 are keep .121, .062 and .031.)
"""

import math

from ..builders import arrow
from .method import AttentionMethod, make, model_order, wants_exact


def _plan(settings, geometry):
    half = round(geometry.visual * (1 - math.sqrt(1 - settings.keep)))
    exact = wants_exact(settings, True)
    parameters = {"window": 2 * half, "exact": exact}
    return make("Arrow", settings, model_order(settings), arrow(half, exact), False, parameters=parameters)


ARROW = AttentionMethod(
    "Arrow",
    "keeps a band of tokens around each token, in the model's token order",
    "DiTFastAttnV2's arrow mask, arXiv 2503.22796",
    _plan,
    dynamic=False,
)
