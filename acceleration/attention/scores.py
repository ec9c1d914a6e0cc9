"""How much attention a key block may be worth to a query block: cheap estimates from pooled queries and keys.

A score looks at the visual tokens alone, so that text, its length and its place never change which visual blocks are
kept. All scores are fp32 [B, H, nq, nk] over the nq query and nk key blocks that hold visual tokens; blocks without a
valid key are -inf. The mean key is subtracted from all keys first: softmax does not notice, and neither should a score.
Batch rows are computed one by one: what a row gets does not depend on what it shares a batch with.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.block_sparse_attention import pool_blocks

if TYPE_CHECKING:
    from .plan import View

Score = Callable[["View"], Tensor]

#: Bytes of intermediate scores made at once.
CHUNK_BYTES = 128 << 20


def mean_pool() -> Score:
    """Return the score of block means, ``mean(q) . mean(k) * scale`` (Sol-Attn, DraftAttention, SLA)."""

    def score(view: "View") -> Tensor:
        return torch.stack([_product(queries, keys, sizes, view) for queries, keys, sizes in pooled(view)])

    return score


def projected(query_weight: Tensor, key_weight: Tensor) -> Score:
    """Return the score of a learned router: block means, each projected before their product (SLA2, arXiv 2602.12675).

    Args:
        query_weight: [d, r] for all heads, or [H, d, r].
        key_weight: the same shape; with grouped queries still one per query head.
    """

    def score(view: "View") -> Tensor:
        rows = []
        for queries, keys, sizes in pooled(view):
            weights = (weight.to(queries) for weight in (query_weight, key_weight))
            query, key = (means @ weight for means, weight in zip((queries, keys), weights))
            rows.append(_product(query, key, sizes, view))
        return torch.stack(rows)

    return score


def sub_block_lse(q_parts: int = 4, k_parts: int = 4) -> Score:
    """Return the score of SubBlock routing: log of the summed exponentials over pairs of sub-block means.

    It estimates a block's share of the softmax before normalisation, and so sees a few strong keys that a mean over
    the block would hide. A part counts as often as it has valid tokens: empty ones not at all.

    Args:
        q_parts: parts of a query block; divides its size.
        k_parts: parts of a key block; divides its size.
    """

    def score(view: "View") -> Tensor:
        q_cell, k_cell = view.q_block // q_parts, view.kv_block // k_parts
        if q_cell * q_parts != view.q_block or k_cell * k_parts != view.kv_block:
            raise ValueError(
                f"blocks of {view.q_block} and {view.kv_block} tokens do not split into {q_parts} and {k_parts} equal parts"
            )
        rows = []
        for queries, keys, q_sizes, k_sizes in _cells(view, q_cell, k_cell):
            queries, q_weight = _fill(queries, q_sizes, view.visual_query_blocks * q_parts, q_cell)
            keys, k_weight = _fill(keys, k_sizes, view.visual_key_blocks * k_parts, k_cell)
            parts = []
            for first, last in _chunks(view.visual_query_blocks, q_parts * len(k_weight) * len(queries)):
                cells = slice(first * q_parts, last * q_parts)
                logits = queries[:, cells] @ keys.mT * view.scale + k_weight
                logits = logits.unflatten(-1, (-1, k_parts)).logsumexp(-1) + q_weight[cells, None]
                parts.append(logits.unflatten(1, (-1, q_parts)).logsumexp(2))
            rows.append(torch.cat(parts, 1))
        return torch.stack(rows)

    return score


def antidiagonal(stride: int = 8) -> Score:
    """Return XAttention's score (arXiv 2503.16428): patches of ``stride`` x ``stride`` logits by their antidiagonals.

    A patch is worth the mean logit of its antidiagonal, which meets every row and column of it once. Softmax over a
    row of patches, then the sum over a block; the score is its log. Costs 1/stride of all logits.

    Args:
        stride: divides both block sizes.
    """

    def score(view: "View") -> Tensor:
        if view.q_block % stride or view.kv_block % stride:
            raise ValueError(f"blocks of {view.q_block} and {view.kv_block} tokens are no multiples of stride {stride}")
        rows = []
        for query, key, length in _rows(view):
            rows.append(_antidiagonal_row(query, key, length, stride, view))
        return torch.stack(rows)

    return score


def pooled(view: "View") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each batch row the block means of queries [H, nq, d] and centred keys [H, nk, d], and key sizes [nk]."""
    for queries, keys, _, sizes in _cells(view, view.q_block, view.kv_block):
        yield queries, keys, sizes


def sampled_mass(view: "View", samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each batch row how a sample of visual queries spread their attention over the visual key blocks.

    Shares fp32 [H, S, nk] that add up to 1, over all visual keys; and the samples' places, int64 [S], evenly spread.
    """
    for query, key, length in _rows(view):
        tokens = query.shape[1]
        count = min(samples, tokens)
        places = (torch.arange(count, device=query.device) * 2 + 1) * tokens // (2 * count)
        logits = query[:, places].float() @ _per_head(key, len(query)).float().mT * view.scale
        if length is not None:
            logits = logits.masked_fill(torch.arange(tokens, device=query.device) >= length, -torch.inf)
        shares = torch.nn.functional.pad(logits.softmax(-1), (0, -tokens % view.kv_block))
        yield shares.unflatten(-1, (-1, view.kv_block)).sum(-1), places


def _cells(view: "View", q_cell: int, k_cell: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield per batch row: means of queries and of centred keys over cells of tokens, one head each; both sizes."""
    for query, key, length in _rows(view):
        queries, q_sizes = pool_blocks(query[None], q_cell)
        keys, k_sizes = pool_blocks(key[None], k_cell, length)
        queries, keys, k_sizes = queries[0].float(), keys[0].float(), k_sizes.reshape(-1)
        share = k_sizes / k_sizes.sum().clamp_min(1)
        keys = keys - (keys * share[:, None]).sum(1, keepdim=True)
        yield queries, _per_head(keys, len(queries)), q_sizes.reshape(-1), k_sizes


def _rows(view: "View") -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the visual queries [H, n, d] and keys [Hk, n, d] of each batch row, and its valid keys [1] or None."""
    if view.q is None or view.k is None:
        raise ValueError("this builder looks at queries and keys, and the view has none")
    visual = view.geometry.visual
    for row in range(view.q.shape[0]):
        length = None if view.kv_length is None else view.kv_length[row : row + 1].clamp(max=visual)
        yield view.q[row, :, :visual], view.k[row, :, :visual], length


def _per_head(keys: Tensor, heads: int) -> Tensor:
    return keys.repeat_interleave(heads // len(keys), 0) if len(keys) != heads else keys


def _product(queries: Tensor, keys: Tensor, sizes: Tensor, view: "View") -> Tensor:
    return (queries @ keys.mT * view.scale).masked_fill(sizes == 0, -torch.inf)


def _fill(means: Tensor, sizes: Tensor, cells: int, cell: int) -> tuple[Tensor, Tensor]:
    """Return means [H, cells, d] with zeros behind, and log of how full each cell is: 0 for full, -inf for empty."""
    missing = cells - means.shape[1]
    means = torch.nn.functional.pad(means, (0, 0, 0, missing))
    return means, torch.log(torch.nn.functional.pad(sizes, (0, missing)) / cell)


def _chunks(rows: int, numbers_per_row: int) -> Iterator[tuple[int, int]]:
    step = max(CHUNK_BYTES // (4 * max(numbers_per_row, 1)), 1)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _antidiagonal_row(query: Tensor, key: Tensor, length: Tensor | None, stride: int, view: "View") -> Tensor:
    tokens = query.shape[1]
    valid = torch.tensor([tokens], device=query.device) if length is None else length
    inside = torch.arange(tokens, device=query.device) < valid
    key = key.float()
    key = (key - (key * inside[:, None]).sum(1, keepdim=True) / valid.clamp_min(1)) * inside[:, None]
    padding = (0, 0, 0, -tokens % stride)
    queries = torch.nn.functional.pad(query.float(), padding).unflatten(1, (-1, stride))
    keys = torch.nn.functional.pad(_per_head(key, len(query)), padding).unflatten(1, (-1, stride)).flip(2)
    queries, keys = queries.flatten(2), keys.flatten(2)
    starts = torch.arange(queries.shape[1], device=query.device) * stride
    q_valid, k_valid = ((number - starts).clamp(0, stride) for number in (tokens, valid))
    q_patches, k_patches = view.q_block // stride, view.kv_block // stride
    parts = []
    for first, last in _chunks(view.visual_query_blocks, q_patches * keys.shape[1] * len(queries)):
        cells = slice(first * q_patches, last * q_patches)
        # Of two short patches only the pairs count in which both tokens exist; log 0 drops patches without any.
        pairs = (q_valid[cells, None] + k_valid - stride).clamp_min(0)
        logits = (queries[:, cells] @ keys.mT) * (view.scale / pairs.clamp_min(1)) + torch.log(pairs / stride)
        nothing = (pairs == 0).all(-1, keepdim=True)
        logits = logits.log_softmax(-1).masked_fill(nothing, -torch.inf)
        missing = view.visual_key_blocks * k_patches - logits.shape[-1], (last - first) * q_patches - logits.shape[1]
        logits = torch.nn.functional.pad(logits, (0, missing[0], 0, missing[1]), value=-torch.inf)
        logits = logits.unflatten(-1, (-1, k_patches)).logsumexp(-1)
        parts.append(logits.unflatten(1, (-1, q_patches)).logsumexp(2))
    return torch.cat(parts, 1)
