"""The specification of linear attention: every weight is formed, and the rows are normalised by their sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_sparse_attention import BlockList

__all__ = ["FEATURES", "feature_map", "linear_attention"]

#: Feature maps: softmax over the head size (SLA), elu + 1 (Katharopoulos et al., arXiv 2006.16236), and relu.
FEATURES = ("softmax", "elu", "relu")


def feature_map(x: Tensor, feature: str) -> Tensor:
    """Return the non-negative features of ``x`` [..., d].

    Raises:
        ValueError: ``feature`` is none of ``FEATURES``.
    """
    if feature == "softmax":
        return x.softmax(-1)
    if feature == "elu":
        return F.elu(x) + 1
    if feature == "relu":
        return x.relu()
    raise ValueError(f"the feature map must be one of {', '.join(FEATURES)}, not {feature!r}")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str = "softmax",
    blocks: BlockList | None = None,
    kv_length: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return ``(w @ v) / (sum w + eps)`` with w = phi(q) phi(k)^T over the kept keys; see the package for arguments.

    Computed in fp64 where the inputs are fp64, else in fp32, and not rounded.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    queries, keys = feature_map(q.to(wide), feature), feature_map(k.to(wide), feature).repeat_interleave(group, 1)
    weights = queries @ keys.mT
    if blocks is not None:
        listed = blocks.to_mask(-(-k.shape[2] // blocks.kv_block))
        listed = listed.repeat_interleave(blocks.q_block, 2)[:, :, : q.shape[2]]
        weights = weights.masked_fill(listed.repeat_interleave(blocks.kv_block, 3)[..., : k.shape[2]], 0)
    if kv_length is not None:
        inside = torch.arange(k.shape[2], device=k.device) < kv_length[:, None]
        weights = weights.masked_fill(~inside[:, None, None], 0)
    return weights @ v.to(wide).repeat_interleave(group, 1) / (weights.sum(-1, keepdim=True) + eps)
