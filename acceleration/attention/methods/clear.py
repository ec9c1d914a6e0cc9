"""CLEAR (arXiv 2412.16112): a picture's tokens attend to those within a radius, dy^2 + dx^2 < r^2, and to all text.

The radius holds for tokens, as its fine-tuned weights need it; ``exact`` off rounds it up to blocks. With a ``pool``
factor, means of factor x factor patches of keys and values (or learned sums, at first 1/factor^2 everywhere) are seen by
all visual queries besides. Tiles of one block keep neighbours together; the paper's r are 8, 16 and 32. Without weights
it degrades pictures clearly (GenEval .52 instead of .66). The radius is the knob; 0 takes the largest that fits ``keep``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.block_sparse_attention import BlockList
from ..builders import everything, radius
from ..geometry import Geometry
from ..order import TokenOrder
from ..plan import View
from .method import AttentionMethod, frame_tile, largest, make, tiles, wants_exact


@dataclass(frozen=True, eq=False)
class PooledKeys:
    """Pooled keys and values that visual queries attend to besides the plan's blocks.

    They are a second call of the kernel, over :meth:`blocks`, whose result :func:`merge` puts together with the first.

    Attributes:
        factor: side of a patch in tokens; patches at the border of the grid may be smaller.
        weights: [factor, factor], or [H, factor, factor], learned share of every place in a patch; None: equal shares.
    """

    factor: int
    weights: Tensor | None = None

    def count(self, geometry: Geometry) -> int:
        """Return the number of pooled keys."""
        frames, rows, columns = geometry.grid
        return frames * -(-rows // self.factor) * -(-columns // self.factor)

    def pool(self, x: Tensor, geometry: Geometry, order: TokenOrder) -> Tensor:
        """Return [B, H, P, d]: keys or values ``x`` [B, H, N, d] in the new order, pooled frame by frame.

        Sums are made in fp32. Equal shares are those of the tokens a patch really has; learned ones are taken as they are.
        """
        place = order.coordinates[: geometry.visual].long()
        _, rows, columns = geometry.grid
        across, down = -(-columns // self.factor), -(-rows // self.factor)
        patch = (place[:, 0] * down + place[:, 1] // self.factor) * across + place[:, 2] // self.factor
        visual = x[:, :, : geometry.visual].float()
        total = visual.new_zeros((*x.shape[:2], self.count(geometry), x.shape[3]))
        if self.weights is None:
            tokens = torch.bincount(patch, minlength=total.shape[2])
            return (total.index_add_(2, patch, visual) / tokens[:, None]).to(x.dtype)
        share = self.weights.to(visual)[..., place[:, 1] % self.factor, place[:, 2] % self.factor]
        return total.index_add_(2, patch, visual * share[..., None]).to(x.dtype)

    def blocks(self, view: View) -> BlockList:
        """Return the lists of the second call: every query block with a visual token sees all pooled keys."""
        count = -(-self.count(view.geometry) // view.kv_block)
        sees = torch.arange(view.query_blocks, device=view.device) < view.visual_query_blocks
        return BlockList.from_mask(sees[None, None, :, None].expand(1, 1, -1, count), view.q_block, view.kv_block)


def merge(out: Tensor, lse: Tensor, extra: Tensor, extra_lse: Tensor, visual: int) -> Tensor:
    """Return the softmax over both sets of keys, from the outputs and log-sum-exps over each.

    Args:
        out: [B, H, N, d] over the plan's blocks.
        lse: fp32 [B, H, N].
        extra: [B, H, N, d] over the pooled keys.
        extra_lse: fp32 [B, H, N].
        visual: number of visual tokens, first in the order; the others do not see pooled keys.
    """
    seen = torch.arange(out.shape[2], device=out.device) < visual
    share = torch.sigmoid(extra_lse - lse).masked_fill(~seen, 0.0)[..., None]
    return (out.float() * (1 - share) + extra.float() * share).to(out.dtype)


def _plan(settings, geometry):
    order = tiles(settings, frame_tile(settings.block))
    exact = wants_exact(settings, True)
    furthest = int((geometry.grid[1] ** 2 + geometry.grid[2] ** 2) ** 0.5) + 1

    def builder(limit):
        return radius(limit, exact)

    limit = settings.radius or largest(range(1, furthest + 1), builder, settings, geometry, order)
    limit = furthest if settings.keep >= 1 else limit
    chosen = everything() if settings.keep >= 1 and geometry.video else builder(limit)
    extra = PooledKeys(settings.pool) if settings.pool else None
    parameters = {"radius": limit, "exact": exact}
    return make("CLEAR", settings, order, chosen, False, extra_keys=extra, parameters=parameters)


def _fits(geometry):
    return "CLEAR is for pictures: within a radius there is no other frame" if geometry.video else ""


CLEAR = AttentionMethod(
    "CLEAR",
    "keeps the tokens of a picture within a radius; needs its fine-tuned weights to look right",
    "CLEAR, arXiv 2412.16112",
    _plan,
    dynamic=False,
    knob="radius",
    fits=_fits,
)
