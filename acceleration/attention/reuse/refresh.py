"""Full attention, and what later steps need of it, from two sparse attentions over complementary lists.

Notation as in the kernels: O_s and L_s are output and log-sum-exp over the kept keys, O_c and L_c over all others, O_f and
L_f over all. With rho = exp(L_s - L_f), the share of the softmax that the kept keys hold,

    L_f = log(e^L_s + e^L_c)              rho = sigmoid(L_s - L_c)
    O_f = rho O_s + (1 - rho) O_c
    R  = O_f - rho O_s = (1 - rho) O_c          Re-ttention, arXiv 2505.22918
    R' = O_f - O_s     = (1 - rho) (O_c - O_s)  WA-RS of DiTFastAttn, arXiv 2406.08552

so that one dense pass in two parts gives all five, where the papers pay for a dense and a sparse one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.block_sparse_attention import BlockList, block_sparse_attention, pool_blocks
from ..builders import Selection
from .modes import Mode

#: Speed of the sparse kernel over a dense list against the best dense one, and per block over a short list: as expected of
#: a Triton kernel beside cuDNN's attention on Hopper. Measure where it matters.
RATIO, EFFICIENCY = 0.7, 0.85


@dataclass(frozen=True, eq=False)
class Refreshed:
    """A full step and what it leaves.

    Attributes:
        out: O_f [B, H, N, d], fp32.
        sparse: O_s, of the same shape.
        rho: fp32 [B, H, N], in [0, 1]; 1 in rows whose keys are all kept, and in rows without any key.
    """

    out: Tensor
    sparse: Tensor
    rho: Tensor

    def residual(self, mode: Mode) -> Tensor:
        """Return what ``mode`` adds at later steps [B, H, N, d], fp32: R' for RESIDUAL, R for RHO.

        Raises:
            ValueError: the mode keeps no residual.
        """
        if mode == Mode.RESIDUAL:
            return self.out - self.sparse
        if mode == Mode.RHO:
            return self.out - self.rho[..., None] * self.sparse
        raise ValueError(f"{Mode(mode).name} keeps no residual")


def merge(out_s: Tensor, lse_s: Tensor, out_c: Tensor, lse_c: Tensor) -> Refreshed:
    """Return full attention from attention over two disjoint sets of keys that are all keys together.

    Args:
        out_s: O_s [B, H, N, d].
        lse_s: L_s fp32 [B, H, N]; -inf in rows without kept keys.
        out_c: O_c.
        lse_c: L_c.
    """
    rho = torch.sigmoid(lse_s - lse_c)
    rho = torch.where(torch.isnan(rho), torch.ones_like(rho), rho)  # a row without any key
    sparse, rest = out_s.float(), out_c.float()
    return Refreshed(rho[..., None] * sparse + (1 - rho[..., None]) * rest, sparse, rho)


def by_complement(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, blocks: tuple[int, int], **options: Any
) -> Refreshed:
    """Return full attention from the lists and their complement: as many blocks as one dense pass.

    Args:
        q: [B, H, N, d].
        k: [B, Hk, M, d].
        v: like ``k``.
        selection: kept blocks. With partial blocks their complement is no list: full attention is computed beside.
        blocks: (queries, keys) in a block.
        options: ``scale`` and ``kv_length`` of the kernel.
    """
    if selection.full is not None:
        return beside_full(q, k, v, selection, blocks, **options)
    kept = block_sparse_attention(q, k, v, BlockList.from_mask(selection.mask, *blocks), return_lse=True, **options)
    rest = block_sparse_attention(q, k, v, BlockList.from_mask(~selection.mask, *blocks), return_lse=True, **options)
    return merge(*kept, *rest)


def beside_full(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, blocks: tuple[int, int], **options: Any
) -> Refreshed:
    """Return full attention and, from a second pass over the kept blocks, what it leaves. For any selection.

    Arguments as :func:`by_complement`.
    """
    lists = BlockList.from_mask(selection.mask, *blocks, selection.full)
    every = BlockList.from_mask(torch.ones_like(selection.mask[:1, :1]), *blocks)
    sparse, lse_s = block_sparse_attention(q, k, v, lists, predicate=selection.predicate, return_lse=True, **options)
    full, lse_f = block_sparse_attention(q, k, v, every, return_lse=True, **options)
    rho = (lse_s - lse_f).exp().clamp(max=1.0)
    return Refreshed(full.float(), sparse.float(), torch.where(torch.isnan(rho), torch.ones_like(rho), rho))


def complement_is_cheaper(density: float, ratio: float = RATIO, efficiency: float = EFFICIENCY) -> bool:
    """Return whether two lists cost less than the best dense attention with one list beside it.

    In units of the best dense attention: two lists 1 / ratio, the other 1 + density / (ratio * efficiency).

    Args:
        density: share of the blocks that are kept.
        ratio: speed of the sparse kernel over all blocks, against the best dense attention.
        efficiency: speed of the sparse kernel over few blocks, against itself over all, per block.
    """
    return 1 / ratio < 1 + density / (ratio * efficiency)


def advanced_rho(rho: Tensor, step: float, age: int) -> Tensor:
    """Return min(rho + step * age, 1): the kept share drifts up while noise falls (Re-ttention's lambda; the clamp is ours).

    Args:
        rho: of the last full step.
        step: lambda, per sparse step.
        age: sparse steps since, the present one included.
    """
    return (rho + step * age).clamp(max=1.0) if step else rho


def left_out_mean(v: Tensor, mask: Tensor, kv_block: int, heads: int, kv_length: Tensor | None = None) -> Tensor:
    """Return fp32 [B, H, Nq, d]: for every query block the mean value of the keys in the blocks it leaves out.

    0 where none is left out.

    Args:
        v: [B, Hk, M, d].
        mask: bool [B', H', Nq, Nk], kept blocks.
        kv_block: keys in a block.
        heads: H.
        kv_length: int32 [B], valid keys.
    """
    mean, sizes = pool_blocks(v, kv_block, kv_length)
    sizes = sizes.to(mean.dtype).reshape(-1, 1, sizes.shape[-1])
    total = (mean * sizes[..., None]).repeat_interleave(heads // v.shape[1], 1)
    rest = (~mask).to(mean.dtype)
    number = (rest * sizes[:, :, None]).sum(-1, keepdim=True)
    return (rest @ total) / number.clamp_min(1)
