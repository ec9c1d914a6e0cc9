"""A plan at work on one geometry and device: tokens put in order, blocks chosen, attention and its correction computed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...kernels.block_sparse_attention import BlockList, Tail, block_sparse_attention, choose_backend, pool_blocks
from ..evaluation import Attention
from .builders import Selection, top_k
from .geometry import Geometry
from .linear import LinearBranch, complete_rows
from .methods.clear import PooledKeys, merge
from .order import TokenOrder
from .plan import AttentionPlan, View
from .scores import projected
from .weights import AttentionWeights

#: Bytes of queries, keys, values and outputs in the plan's order at a time. On a GPU fewer heads would not fill it.
COPIES, COPIES_CPU = 64 << 20, 8 << 20

#: A branch without weights, and (sparse output, the branch's, complete rows, heads) -> both blended.
Fitted = tuple[LinearBranch, Callable[..., torch.Tensor]]
ALL_HEADS = slice(None)


@dataclass
class Attended:
    """One sparse attention, tensors in the plan's order of tokens.

    Attributes:
        view: queries, keys and what else builders looked at.
        v: values [B, Hk, N, d].
        selection: what was kept, by block.
        blocks: the same as lists.
        out: [B, H, N, d].
        backend: name of the kernel.
    """

    view: View
    v: torch.Tensor
    selection: Selection
    blocks: BlockList
    out: torch.Tensor
    backend: str


@dataclass
class PlanRun:
    """One plan for the attentions of one geometry.

    Attributes:
        plan: what is kept and what is added back.
        order: of the tokens, on the device.
        layers: attentions of the network.
        branch: linear branch with its weights on the device, None without.
        pooled: CLEAR's pooled keys by layer; of all layers under None.
        static: selection and list of a plan that does not look at the data, once made.
        backend: name of the kernel that its attentions take, once known.
    """

    plan: AttentionPlan
    order: TokenOrder
    layers: int
    branch: LinearBranch | None = None
    pooled: dict[int | None, PooledKeys] = field(default_factory=dict)
    static: tuple[Selection, BlockList] | None = None
    backend: str | None = None

    def attention(
        self,
        geometry: Geometry,
        asked: Attention,
        layer: int,
        kv_length: torch.Tensor | None,
        fitted: Fitted | None,
        watch: Callable[[Attended], None],
    ) -> torch.Tensor:
        """Return one sparse attention [B, H, N, d] in the network's own order of tokens.

        Heads are computed in groups whose copies, in the plan's order, stay small.

        Args:
            geometry: where the picture's tokens stand.
            asked: the attention.
            layer: which one of the network.
            kv_length: int32 [B], valid keys once the picture's tokens stand first; None: all.
            fitted: see :meth:`attend`.
            watch: is shown every group while its tensors are there.
        """
        heads = self._heads_at_once(asked)
        batch, total, tokens, size = asked.q.shape
        if heads >= total:
            made = self.attend(self.view(geometry, asked, layer, kv_length), asked.v, fitted)
            watch(made)
            return self.order.as_given(made.out)
        # Most networks go on with all heads of a token side by side.
        given = asked.q.new_empty(batch, tokens, total, size)
        group = total // asked.k.shape[1]
        for first in range(0, total, heads):
            part, keys = slice(first, first + heads), slice(first // group, -(-(first + heads) // group))
            some = replace(asked, q=asked.q[:, part], k=asked.k[:, keys], v=asked.v[:, keys])
            made = self.attend(self.view(geometry, some, layer, kv_length), some.v, fitted, part)
            watch(made)
            given[:, :, part].index_copy_(1, self.order.permutation, made.out.transpose(1, 2))
        return given.transpose(1, 2)

    def view(self, geometry: Geometry, asked: Attention, layer: int, kv_length: torch.Tensor | None) -> View:
        """Return an attention as the plan's builders look at it; tensors are gathered only where the order asks for it."""
        q, k = self.order.ordered(asked.q), self.order.ordered(asked.k)
        return View(
            geometry, self.order, self.plan.q_block, self.plan.kv_block, q, k, kv_length, asked.scale, layer, self.layers,
            q.shape[1],
        )  # fmt: skip

    def select(self, view: View) -> tuple[Selection, BlockList]:
        """Return what is kept. Plans that do not look at queries and keys choose once."""
        if self.static is not None:
            return self.static
        selection = self.plan.selection(view)
        chosen = selection, BlockList.from_mask(selection.mask, view.q_block, view.kv_block, selection.full)
        if not self.plan.dynamic:
            self.static = chosen
        return chosen

    def attend(
        self, view: View, v: torch.Tensor, fitted: Fitted | None = None, heads: slice = ALL_HEADS
    ) -> Attended:
        """Return sparse attention with the plan's correction.

        Args:
            view: see :meth:`view`.
            v: values as the network gives them.
            fitted: a branch without weights, and what blends it with the sparse output; None for no such.
            heads: which of the network's heads these are.
        """
        v = self.order.ordered(v)
        selection, blocks = self.select(view)
        extra: dict[str, Any] = {"scale": view.scale, "kv_length": view.kv_length, "predicate": selection.predicate}
        if self.plan.correction.tail:
            extra["tail"] = pooled_tail(view.k, v, view.kv_block, view.kv_length)
        pooled = self.pooled.get(view.layer) or self.pooled.get(None)
        if self.backend is None:  # looking it up may wait for the device, and all attentions of a plan are alike
            self.backend = choose_backend(view.q, view.k, v, blocks, **extra)[0]
        wants_lse = pooled is not None or self.branch is not None
        out, lse = block_sparse_attention(view.q, view.k, v, blocks, **extra, return_lse=wants_lse)
        if pooled is not None:
            out = self._with_pooled(view, v, out, lse, pooled)
        if self.branch is not None:
            out = self.branch.apply(view.layer, out, lse, view.q, view.k, v, blocks, view.kv_length)
        elif fitted is not None:
            branch, blend = fitted
            other = branch.linear(view.q, view.k, v, blocks, view.kv_length)
            complete = complete_rows(blocks, view.q.shape[2], view.k.shape[2], view.kv_length)
            out = blend(out, other, complete, heads)
        return Attended(view, v, selection, blocks, out, self.backend)

    def _heads_at_once(self, asked: Attention) -> int:
        """Return how many heads to compute together."""
        batch, total, tokens, size = asked.q.shape
        together = self.branch is not None or self.pooled or self.plan.skip_heads or "heads" in self.plan.parameters
        if self.order.identity or together:
            return total  # nothing is copied, or heads are not alike
        copies = 4 * batch * tokens * size * asked.q.element_size()
        group = total // asked.k.shape[1]
        most = COPIES_CPU if asked.q.device.type == "cpu" else COPIES
        return max(1, most // copies // group) * group

    def _with_pooled(
        self, view: View, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, pooled: PooledKeys
    ) -> torch.Tensor:
        """Let visual queries see CLEAR's pooled keys besides."""
        keys, values = (pooled.pool(tensor, view.geometry, self.order) for tensor in (view.k, v))
        more = block_sparse_attention(view.q, keys, values, pooled.blocks(view), scale=view.scale, return_lse=True)
        return merge(out, lse, *more, self.order.visual)


def with_weights(plan: AttentionPlan, weights: AttentionWeights | None, keep: float) -> AttentionPlan:
    """Return a plan as trained weights want it: their blocks, their routing, no stand-ins for their branch."""
    if weights is None or weights.branch is None:
        return plan
    plan = replace(
        plan,
        q_block=weights.block_q,
        kv_block=weights.block_k,
        correction=replace(plan.correction, tail=False, linear=weights.branch, fitted=False),
    )
    return replace(plan, builder=_routed(weights, keep)) if weights.routers else plan


def pooled_by_layer(plan: AttentionPlan, weights: AttentionWeights | None) -> dict[int | None, PooledKeys]:
    """Return CLEAR's pooled keys: with learned shares by layer, else one for all layers, or none."""
    if plan.extra_keys is None:
        return {}
    if weights is None or not weights.spatial:
        return {None: plan.extra_keys}
    return {layer: PooledKeys(weights.down_factor, shares) for layer, shares in weights.spatial.items()}


def pooled_tail(k: torch.Tensor, v: torch.Tensor, block: int, kv_length: torch.Tensor | None) -> Tail:
    """Return every key block as one key and value, for the rows that do not list it (Sol-Attn, arXiv 2607.24027)."""
    keys, sizes = pool_blocks(k, block, kv_length)
    return Tail(keys, pool_blocks(v, block, kv_length)[0], sizes)


def _routed(weights: AttentionWeights, keep: float) -> Callable[[View], Selection]:
    """Return SLA2's builder: top-k by its learned router of each layer."""

    def builder(view: View) -> Selection:
        query, key = weights.routers[view.layer]
        return top_k(projected(query.T, key.T), keep)(view)

    return builder
