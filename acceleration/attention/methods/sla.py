"""SLA (arXiv 2509.24006): the best blocks of each row exactly, the others through a trained linear branch.

Routing is top-k of block means in the model's token order, with the mean key subtracted; the count is rounded down as in
the published code, but never to zero. The linear branch works with its weights alone (:mod:`..linear`): a plain sum
without them is far worse than none. Without weights the pooled tail stands in for it.
"""

from ..builders import top_k
from ..scores import mean_pool
from .method import AttentionMethod, make, model_order


def _plan(settings, geometry):
    builder = top_k(mean_pool(), settings.keep, whole=True)
    parameters = {"keep": settings.keep}
    return make(
        "SLA", settings, model_order(settings), builder, True, tail=not settings.weights, parameters=parameters
    )


SLA = AttentionMethod(
    "SLA",
    "keeps the blocks whose mean key fits best, in the model's token order; a trained linear branch does the rest",
    "SLA, arXiv 2509.24006",
    _plan,
    dynamic=True,
)
