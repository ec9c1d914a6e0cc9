"""Linear attention over all keys, or over those that a block-sparse attention leaves out (SLA, arXiv 2509.24006).

The two forms are different functions, and weights trained for one do not serve the other.
"""

import torch
from torch import Tensor

from ..block_sparse_attention import BlockList
from .reference import FEATURES, feature_map

__all__ = ["FEATURES", "feature_map", "linear_attention"]

#: Tokens whose features are formed at a time.
_TOKENS = 4096
#: Elements of the block states that are gathered and summed at a time.
_STATES = 1 << 24


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
    """Return ``phi(q) S / (phi(q) z + eps)``, with S the sum of ``phi(k)^T v`` and z that of ``phi(k)`` over the kept keys.

    Args:
        q: [B, H, N, d], any strides.
        k: [B, Hk, M, d]; H is a multiple of Hk.
        v: [B, Hk, M, d].
        feature: "softmax" over d, "elu" (+ 1) or "relu".
        blocks: keep only the keys that a row does not list, partial blocks counting as listed; None: keep all keys.
        kv_length: int [B]: keys from there on are ignored.
        eps: added to the denominator.

    Returns:
        [B, H, N, d] in the dtype of ``q``, accumulated in fp32 (fp64 for fp64 inputs). 0 in rows without any key.
        :mod:`.reference` is the specification. Differentiable.

    Raises:
        ValueError: shapes do not fit, or there is no such feature map.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not fit each other: {[list(x.shape) for x in (q, k, v)]}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if kv_length is not None and kv_length.shape != q.shape[:1]:
        raise ValueError(f"kv_length must have shape [{q.shape[0]}], got {list(kv_length.shape)}")
    if blocks is None:
        out = _all(q, k, v, feature, kv_length, eps)
    else:
        error = blocks.shape_error(q.shape[2])
        if error is not None:
            raise ValueError(error)
        out = _complement(q, k, v, feature, blocks, kv_length, eps)
    return out.to(q.dtype)


def _all(q: Tensor, k: Tensor, v: Tensor, feature: str, kv_length: Tensor | None, eps: float) -> Tensor:
    """All keys: one state per key head, then one small product per query."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = total = 0
    for start in range(0, max(k.shape[2], 1), _TOKENS):
        keys, values = _features(k, v, start, min(start + _TOKENS, k.shape[2]), feature, kv_length, wide)
        state, total = state + keys.mT @ values, total + keys.sum(2)
    grouped = q.unflatten(1, (k.shape[1], -1))
    parts = []
    for start in range(0, max(q.shape[2], 1), _TOKENS):
        queries = feature_map(grouped[..., start : start + _TOKENS, :].to(wide), feature)
        weight = (queries @ total[:, :, None, :, None]) + eps
        parts.append(queries @ state[:, :, None] / weight)
    return torch.cat(parts, 3).flatten(1, 2)


def _complement(
    q: Tensor, k: Tensor, v: Tensor, feature: str, blocks: BlockList, kv_length: Tensor | None, eps: float
) -> Tensor:
    """Keys that a row does not list: the states of the key blocks, multiplied by the complement of the block mask.

    Adding up what is kept, instead of taking what is listed off the total, loses nothing where almost all is listed. The
    sum over key blocks is one product of the mask [rows, Nk] with the states [Nk, d * d], the denominator's column beside.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, size = q.shape
    group, q_block, kv_block = heads // k.shape[1], blocks.q_block, blocks.kv_block
    query_blocks, key_blocks = blocks.index.shape[2], -(-k.shape[2] // kv_block)
    kept = (~blocks.to_mask(key_blocks)).to(wide).expand(batch, heads, -1, -1)
    step = max(1, _STATES // max(1, size * (size + 1)))
    heads_out = []
    for head in range(k.shape[1]):
        some = slice(head * group, (head + 1) * group)
        keys, values = _features(
            k[:, head : head + 1], v[:, head : head + 1], 0, k.shape[2], feature, kv_length, wide, kv_block
        )
        values = torch.cat((values, torch.ones_like(values[..., :1])), -1)  # its column sums the features
        states = (keys.unflatten(2, (key_blocks, kv_block)).mT @ values.unflatten(2, (key_blocks, kv_block))).flatten(
            -2
        )
        parts = []
        for first in range(0, query_blocks, step):
            last = min(first + step, query_blocks)
            sums = (kept[:, some, first:last] @ states).unflatten(-1, (size, size + 1))
            rows = q[:, some, first * q_block : last * q_block].to(wide)
            count = rows.shape[2]
            rows = torch.nn.functional.pad(feature_map(rows, feature), (0, 0, 0, (last - first) * q_block - count))
            mixed = (rows.unflatten(2, (-1, q_block)) @ sums).flatten(2, 3)[:, :, :count]
            parts.append(mixed[..., :-1] / (mixed[..., -1:] + eps))
        heads_out.append(torch.cat(parts, 2))
    return torch.cat(heads_out, 1)


def _features(
    k: Tensor,
    v: Tensor,
    start: int,
    stop: int,
    feature: str,
    kv_length: Tensor | None,
    dtype: torch.dtype,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return phi(k) and v of the tokens ``start`` to ``stop``, widened, invalid and padding tokens 0 in the features."""
    keys, values = feature_map(k[:, :, start:stop].to(dtype), feature), v[:, :, start:stop].to(dtype)
    if kv_length is not None:
        outside = torch.arange(start, stop, device=k.device) >= kv_length[:, None]
        # The values too: whatever stands there may be no number, and 0 times that is none.
        keys, values = (x.masked_fill(outside[:, None, :, None], 0) for x in (keys, values))
    missing = -(stop - start) % block
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values)) if missing else (keys, values)
