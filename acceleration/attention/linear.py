"""Linear branch beside block-sparse attention: what SLA, SLA2 and SALAD add for the key blocks that were left out.

With phi a feature map, and sums over a set of keys S,

    O_l(i) = phi(q_i) . sum_{j in S} phi(k_j) v_j^T  /  (phi(q_i) . sum_{j in S} phi(k_j) + eps)

and O_s the block-sparse softmax attention, the variants are

=============  ==================  =======================================  ==================================
variant        keys S              output                                   source
=============  ==================  =======================================  ==================================
``complement`` not listed          O_s + W O_l + b                          SLA, arXiv 2509.24006, eq. 5-6, with
                                                                            no skipped blocks; its SLA-1 code
``all``        all                 O_s + W O_l + b                          SLA's later code, SageSLA,
                                                                            TurboDiffusion (arXiv 2512.16093)
``sla2``       not listed          alpha O_s + (1 - alpha) O_l              SLA2, arXiv 2602.12675
``salad``      all                 O_s + g (W [O_l of all heads] + b)       SALAD, arXiv 2601.16515
=============  ==================  =======================================  ==================================

W is d x d and shared by the heads for SLA, C x C (C = heads x d) on the concatenated heads for SALAD. These are
different functions of the same weights: a file says which one it was trained for.

**SALAD's gate.** Its paper names a scalar gate per sample and layer, a linear layer and a sigmoid on the hidden states,
and in a later version a static factor beside it; code and weights are not public. An attention hook sees queries, keys
and values alone, so this module defines a gate that can be computed from them, and reads no other:

    g = scale_h * sigmoid(w . mean over the valid tokens of v + b)

``scale`` (one number, or one per head) is static; the sigmoid is left out where the file has no ``gate.weight``. The
mean is over v with its heads concatenated [C_v]. Features are taken of the q and k that attention gets, so of rotated ones
where the model rotates; ReLU comes last, which keeps every weight non-negative.

**Complete rows.** A query block that lists every valid key block is plain attention already and stays bit for bit what it
was, in every variant. (SLA-1's own code sets O_l to zero there and would still add b.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...kernels.block_sparse_attention import BlockList
from ...kernels.linear_attention import FEATURES, linear_attention

COMPLEMENT, ALL, SLA2, SALAD = "complement", "all", "sla2", "salad"
VARIANTS = (COMPLEMENT, ALL, SLA2, SALAD)
#: Added to the denominator, as published.
EPS = 1e-5
_TENSORS = ("weight", "bias", "alpha", "scale", "gate_weight", "gate_bias")
#: Rows are corrected in pieces, so that fp32 copies stay small.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class LayerBranch:
    """Weights of the branch in one layer; absent ones are None.

    Attributes:
        weight: [d, d] (SLA) or [C, C] (SALAD), applied as ``x @ weight.T``.
        bias: [d] or [C].
        alpha: SLA2's share of the sparse branch, [H] or [H, query blocks], in [0, 1].
        scale: SALAD's static gate, [1] or [H]; None counts as 1.
        gate_weight: SALAD's input-dependent gate, [C_v] (C_v = key-value heads x d).
        gate_bias: its bias, [1]; None counts as 0.
        idle: whether the layer's output is the sparse one whatever its input; found from the weights where not given.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    idle: bool | None = None

    def __post_init__(self) -> None:
        if self.idle is not None:
            return
        if self.alpha is not None:
            idle = not bool((self.alpha != 1).any())
        else:
            projects = any(part is not None and bool(part.any()) for part in (self.weight, self.bias))
            idle = not projects or (self.scale is not None and not bool(self.scale.any()))
        object.__setattr__(self, "idle", idle)

    def to(self, device: torch.device | str) -> "LayerBranch":
        """Return the weights on ``device``; itself where they are there. Waits for nothing but the copies."""
        parts = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        moved = {name: part.to(device) for name, part in parts.items()}
        return self if all(moved[name] is part for name, part in parts.items()) else replace(self, **moved)


@dataclass(frozen=True, eq=False)
class LinearBranch:
    """The linear branch of a model, layer by layer.

    Attributes:
        variant: one of :data:`VARIANTS`.
        feature: feature map phi, one of :data:`FEATURES`: softmax over the head's channels, elu + 1, or ReLU.
        layers: weights by attention layer in execution order; None where a layer has no branch. Empty for a branch
            without weights, whose share is fitted (:mod:`.fitting`).
        head_size: channels of a head, d; 0 where unknown.
    """

    variant: str
    feature: str = "softmax"
    layers: Sequence[LayerBranch | None] = ()
    head_size: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        if self.feature not in FEATURES:
            raise ValueError(f"feature is {self.feature!r}; expected one of {', '.join(FEATURES)}")

    def to(self, device: torch.device | str) -> "LinearBranch":
        """Return the branch with its weights on ``device``; done once before a run, :meth:`apply` copies nothing."""
        return replace(self, layers=tuple(part and part.to(device) for part in self.layers))

    def active(self, layer: int) -> bool:
        """Whether ``layer`` has a branch that changes anything."""
        part = self.layers[layer] if 0 <= layer < len(self.layers) else None
        return part is not None and not part.idle

    def mismatch(self, layers: int, heads: int, head_size: int, query_blocks: int | None = None) -> str | None:
        """Return why the weights do not fit a model's attention, in a user's words, or None if they do.

        Args:
            layers: attention layers of the model.
            heads: query heads.
            head_size: channels of a head.
            query_blocks: blocks of queries of the run, where known.
        """
        if len(self.layers) != layers:
            return f"the weights are for {len(self.layers)} layers, the model has {layers}"
        if self.head_size != head_size:
            return f"the weights are for heads of {self.head_size} channels, the model's have {head_size}"
        for index, part in enumerate(self.layers):
            if part is None:
                continue
            if self.variant == SALAD and part.weight is not None and len(part.weight) != heads * head_size:
                return f"layer {index} projects {len(part.weight)} channels, the model has {heads * head_size}"
            if part.scale is not None and len(part.scale) not in (1, heads):
                return f"layer {index} has gates for {len(part.scale)} heads, the model has {heads}"
            if part.alpha is None:
                continue
            if len(part.alpha) != heads:
                return f"layer {index} has shares for {len(part.alpha)} heads, the model has {heads}"
            if query_blocks is not None and part.alpha.ndim == 2 and part.alpha.shape[1] != query_blocks:
                return f"layer {index} has shares for {part.alpha.shape[1]} query blocks, the run has {query_blocks}"
        return None

    def linear(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockList,
        kv_length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return O_l [B, H, N, d] before any projection; accumulated in fp32. Arguments as for :meth:`apply`."""
        left_out = blocks if self.variant in (COMPLEMENT, SLA2) else None
        return linear_attention(q, k, v, feature=self.feature, blocks=left_out, kv_length=kv_length, eps=EPS)

    def apply(
        self,
        layer: int,
        sparse_out: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockList,
        kv_length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return block-sparse attention with the branch added; ``sparse_out`` itself where the layer is idle.

        Args:
            layer: attention layer, in execution order.
            sparse_out: O_s [B, H, N, d]; not written to.
            lse: log-sum-exp of the sparse softmax [B, H, N]; no variant needs it so far.
            q: queries [B, H, N, d].
            k: keys [B, Hk, M, d], H a multiple of Hk.
            v: values [B, Hk, M, d].
            blocks: what ``sparse_out`` attended to.
            kv_length: int32 [B], keys from there on are padding; None: none are.

        Returns:
            [B, H, N, d] of ``sparse_out``'s dtype, computed in fp32 (SALAD's C x C product in half precision where
            ``sparse_out`` is, which accumulates in fp32).

        Raises:
            ValueError: weights that do not fit; :meth:`mismatch` says so beforehand.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer is {layer}; the branch has layers 0 to {len(self.layers) - 1}")
        part = self.layers[layer]
        if part is None or part.idle:
            return sparse_out
        part = part.to(sparse_out.device)
        batch, heads, tokens, size = sparse_out.shape
        other = self.linear(q, k, v, blocks, kv_length)
        complete = complete_rows(blocks, tokens, k.shape[2], kv_length)
        alpha = _alpha(part.alpha, blocks.q_block, heads, tokens) if self.variant == SLA2 else None
        gate = _gate(part, v, kv_length) if self.variant == SALAD else None
        out = torch.empty_like(sparse_out, memory_format=torch.contiguous_format)
        piece = max(1, _PIECE_BYTES // (4 * batch * heads * size))
        for start in range(0, tokens, piece):
            rows = slice(start, start + piece)
            sparse, linear = sparse_out[:, :, rows].float(), other[:, :, rows].float()
            if alpha is not None:
                share = alpha[:, rows, None] if alpha.ndim == 2 else alpha[:, None, None]
                mixed = share * sparse + (1 - share) * linear
            elif gate is not None:
                mixed = sparse + gate[:, :, None, None] * _project_heads(part, linear, sparse_out.dtype)
            else:
                mixed = sparse + _project(part, linear)
            out[:, :, rows] = torch.where(complete[..., rows, None], sparse, mixed)
        return out


def complete_rows(blocks: BlockList, queries: int, keys: int, kv_length: torch.Tensor | None = None) -> torch.Tensor:
    """Return which queries attend to every valid key: bool [B', H', queries], B' = B where lengths differ.

    Rows whose list holds blocks that need a token predicate do not count: the predicate may drop keys.

    Args:
        blocks: block list.
        queries: number of queries.
        keys: number of keys, padding included.
        kv_length: int32 [B] valid keys; None: all.
    """
    listed = torch.arange(blocks.index.shape[-1], device=blocks.index.device) < blocks.count[..., None]
    if kv_length is None:
        whole = blocks.count >= -(-keys // blocks.kv_block)
    else:
        valid = (-(-kv_length.to(blocks.index.device).long() // blocks.kv_block)).view(-1, 1, 1)
        whole = (listed & (blocks.index < valid[..., None])).sum(-1) >= valid
    if blocks.full is not None:
        whole = whole & (blocks.full >= blocks.count)
    return whole.repeat_interleave(blocks.q_block, dim=-1)[..., :queries]


def _alpha(alpha: torch.Tensor | None, q_block: int, heads: int, tokens: int) -> torch.Tensor:
    """Return SLA2's share of the sparse branch, fp32 [H] or [H, tokens]."""
    rows = -(-tokens // q_block)
    if alpha is None or alpha.shape not in ((heads,), (heads, rows)):
        found = None if alpha is None else tuple(alpha.shape)
        raise ValueError(f"alpha has shape {found}; expected ({heads},) or ({heads}, {rows})")
    return alpha.float() if alpha.ndim == 1 else alpha.float().repeat_interleave(q_block, dim=1)[:, :tokens]


def _project(part: LayerBranch, linear: torch.Tensor) -> torch.Tensor:
    """Return W O_l + b of every head, fp32."""
    if part.weight is None:
        return part.bias.float().expand_as(linear)
    return torch.nn.functional.linear(linear, part.weight.float(), None if part.bias is None else part.bias.float())


def _project_heads(part: LayerBranch, linear: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return W [O_l of all heads] + b as heads again, fp32 [B, H, n, d]."""
    batch, heads, rows, size = linear.shape
    if part.weight is None:
        return part.bias.float().view(heads, 1, size).expand(batch, -1, rows, -1)
    joined = linear.transpose(1, 2).reshape(batch, rows, heads * size).to(dtype)
    out = torch.nn.functional.linear(joined, part.weight.to(dtype)).float()
    if part.bias is not None:
        out = out + part.bias.float()
    return out.view(batch, rows, heads, size).transpose(1, 2)


def _gate(part: LayerBranch, v: torch.Tensor, kv_length: torch.Tensor | None) -> torch.Tensor:
    """Return SALAD's gate, fp32 [B or 1, H or 1]."""
    scale = torch.ones(1, device=v.device) if part.scale is None else part.scale.float()
    if part.gate_weight is None:
        return scale[None]
    batch, heads, tokens, size = v.shape
    if part.gate_weight.numel() != heads * size:
        raise ValueError(f"gate.weight has {part.gate_weight.numel()} numbers; expected {heads * size}")
    if kv_length is None:
        mean = v.mean(dim=2, dtype=torch.float32)
    else:
        length = kv_length.to(v.device).clamp(min=1).view(-1, 1, 1)
        inside = torch.arange(tokens, device=v.device) < length[..., 0]
        # where, and not a product: padding may hold anything.
        mean = torch.where(inside[:, None, :, None], v, 0).sum(dim=2, dtype=torch.float32) / length
    logit = mean.reshape(batch, -1) @ part.gate_weight.float().reshape(-1, 1)
    if part.gate_bias is not None:
        logit = logit + part.gate_bias.float()
    return torch.sigmoid(logit) * scale
