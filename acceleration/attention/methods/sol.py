"""Sol-Attn (arXiv 2607.24027): blocks that stand out by tau standard deviations exactly, all others as one key each.

Tokens follow a Z-curve. Neighbours of the query block always stay. Scores of a row are about normal, so that ``tau`` 1
keeps about 16 % of the blocks and 1.5 about 7 %; with tau 0 it is the quantile that leaves ``keep``.
"""

import math
from statistics import NormalDist

from ..builders import tau_sigma
from ..order import OrderSpec
from .method import AttentionMethod, make


def _plan(settings, geometry):
    order = OrderSpec("morton") if settings.tile == "auto" else OrderSpec("tiles", settings.tile)
    tau = settings.tau or (NormalDist().inv_cdf(1 - settings.keep) if settings.keep < 1 else -math.inf)
    parameters = {"tau": tau if math.isfinite(tau) else None}
    return make("Sol", settings, order, tau_sigma(tau), True, tail=True, parameters=parameters)


SOL = AttentionMethod(
    "Sol",
    "keeps the blocks whose score stands out from the row's others; the rest enters as one pooled key per block",
    "Sol-Attn, arXiv 2607.24027",
    _plan,
    dynamic=True,
    knob="tau",
)
