"""Corrections fitted while a run still computes attention densely: how much of a cheap branch to trust, per head.

During dense steps the true output O_f is known. On sampled query blocks the sparse output O_s and a candidate "other" output
are computed beside it: O_l of a linear branch (:mod:`.linear`), or O_t with the pooled tail. Per layer and head one
number is fitted by least squares,

    O = alpha O_s + (1 - alpha) O_other,     alpha = <O_f - O_other, O_s - O_other> / |O_s - O_other|^2,   clamped to [0, 1]

which is SLA2's blend (arXiv 2602.12675) with a share per head. A map of O_other alone, fitted from so few samples, diverges under
drift, so none is offered; one of both outputs together is (:mod:`.ridge`), for those who ask for it.

Nothing is trusted that was not tried: the latest dense steps are held out, alpha is fitted on the steps before them, and
a head uses its branch only where that lowers the relative L2 error on the held-out steps, in every guidance branch, by a
given share. The number in use is then fitted anew on all steps, the held-out ones included, because later steps resemble
the sparse ones most.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels.block_sparse_attention import BlockList

#: A head's branch must lower the held-out error by this share, or stays off.
MIN_GAIN = 0.1
#: Guidance branches that are checked apart; further ones count as one.
MAX_BRANCHES = 8
_OTHERS = "others"
# Rows of the sums of a head: with D = O_s - O_other and F = O_f - O_other.
_FF, _FD, _DD, _PLAIN, _NORM = range(5)


def best_alpha(sums: torch.Tensor) -> torch.Tensor:
    """Return the least-squares share of the sparse branch [H], clamped to [0, 1]; 1 where both branches agree.

    Args:
        sums: fp32 [5, H] as :func:`pair_sums` makes them.
    """
    known = sums[_DD] > 1e-12 * sums[_NORM]
    return torch.where(known, sums[_FD] / sums[_DD].clamp_min(1e-30), 1.0).clamp(0.0, 1.0)


def pair_sums(full: torch.Tensor, sparse: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return fp32 [5, H]: |F|^2, <F, D>, |D|^2, |O_f - O_s|^2 and |O_f|^2 of every head.

    Args:
        full: O_f [B, H, rows, d], any floating dtype.
        sparse: O_s, of the same shape.
        other: O_other, of the same shape.

    Raises:
        ValueError: shapes differ.
    """
    require_one_shape(full, sparse, other)
    full, sparse, other = full.float(), sparse.float(), other.float()
    d, f = sparse - other, full - other
    pairs = ((f, f), (f, d), (d, d), (full - sparse, full - sparse), (full, full))
    return torch.stack([(a * b).sum(dim=(0, 2, 3)) for a, b in pairs])


def require_one_shape(full: torch.Tensor, sparse: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError unless all three have one shape [B, H, rows, d]."""
    if not full.shape == sparse.shape == other.shape or full.ndim != 4:
        shapes = [list(x.shape) for x in (full, sparse, other)]
        raise ValueError(f"full, sparse and other must have one shape [B, H, rows, d], got {shapes}")


def blend(
    sparse: torch.Tensor, other: torch.Tensor, alpha: torch.Tensor | None, complete: torch.Tensor | None = None
) -> torch.Tensor:
    """Return alpha O_s + (1 - alpha) O_other, computed in fp32; heads with alpha 1 and complete rows stay bit for bit.

    Args:
        sparse: O_s [B, H, N, d]; returned itself where ``alpha`` is None.
        other: O_other, of the same shape.
        alpha: fp32 [H], as :meth:`Fitting.alpha` returns it.
        complete: bool [B', H', N], rows that are plain attention already (:func:`.linear.complete_rows`).
    """
    if alpha is None:
        return sparse
    share = alpha.to(sparse.device).view(1, -1, 1, 1)
    mixed = torch.lerp(other.float(), sparse.float(), share).to(sparse.dtype)
    keep = share == 1
    if complete is not None:
        keep = keep | complete[..., None]
    return torch.where(keep, sparse, mixed)


def sampled_blocks(query_blocks: int, amount: int, step: int = 0) -> list[int]:
    """Return up to ``amount`` block numbers, ascending, spread evenly over the sequence and shifted from step to step.

    The last block may be ragged and is left out where others are there.
    """
    whole = max(1, query_blocks - 1)
    amount = max(1, min(amount, whole))
    # The golden ratio never repeats a shift.
    shift = (step * 0.618033988749895) % 1.0
    return sorted({min(whole - 1, int((i + shift) * whole / amount)) for i in range(amount)})


def sampled_rows(chosen: Sequence[int], q_block: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return int64 positions of all queries of the blocks ``chosen``, to index q and the dense output with.

    Every chosen block must be whole.
    """
    starts = torch.tensor(list(chosen), device=device, dtype=torch.int64)[:, None] * q_block
    return (starts + torch.arange(q_block, device=device)).reshape(-1)


def take_blocks(blocks: BlockList, chosen: Sequence[int]) -> BlockList:
    """Return the lists of the query blocks ``chosen`` alone, for attention over the rows of :func:`sampled_rows`."""
    rows = torch.tensor(list(chosen), device=blocks.index.device, dtype=torch.int64)
    full = None if blocks.full is None else blocks.full[:, :, rows]
    return replace(blocks, index=blocks.index[:, :, rows], count=blocks.count[:, :, rows], full=full)


@dataclass
class _Evidence:
    """Sums of one layer and noise bucket."""

    train: torch.Tensor | None
    #: (step, branch -> sums), oldest first; the steps held out.
    held: list[tuple[int, dict[Hashable, torch.Tensor]]]
    steps: int = 0


class Fitting:
    """Fits and certifies the share of the sparse branch online; one object per run.

    Memory: per layer and bucket 5 x H floats for the fit, and as many per held-out step and guidance branch (at most
    :data:`MAX_BRANCHES`); no activation is kept.

    Args:
        held_out: latest steps that only test.
        min_gain: least improvement of the held-out relative L2 error, in [0, 1).
        edges: ascending noise levels that divide buckets fitted apart; none: one fit for all levels.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(self, held_out: int = 1, min_gain: float = MIN_GAIN, edges: Sequence[float] = ()) -> None:
        if held_out < 1 or not 0 <= min_gain < 1 or list(edges) != sorted(edges):
            raise ValueError("held_out must be at least 1, min_gain in [0, 1), and edges must ascend")
        self.held_out, self.min_gain, self.edges = held_out, min_gain, tuple(edges)
        self._evidence: dict[tuple[int, int], _Evidence] = {}
        self._solved: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, bool]] = {}

    def observe(
        self,
        layer: int,
        branch_key: Hashable,
        step: int,
        full: torch.Tensor,
        sparse: torch.Tensor,
        other: torch.Tensor,
        level: float = 0.0,
    ) -> None:
        """Learn from one dense call. No host synchronisation.

        Args:
            layer: attention layer.
            branch_key: which guidance branch the rows belong to.
            step: number of the step; several calls of a step add up. An earlier step than the last one begins a new
                trajectory: what the layer and bucket knew is dropped.
            full: O_f on sampled rows, [B, H, rows, d].
            sparse: O_s on the same rows.
            other: the candidate on the same rows.
            level: noise level, for the bucket.

        Raises:
            ValueError: shapes differ.
        """
        sums = self.sums(full, sparse, other)
        key = (layer, bisect_right(self.edges, level))
        evidence = self._evidence.get(key)
        if evidence is None or step < evidence.held[-1][0]:
            evidence = self._evidence[key] = _Evidence(None, [])
        held = evidence.held
        if not held or held[-1][0] != step:
            held.append((step, {}))
            evidence.steps += 1
            if len(held) > self.held_out:
                past = sum(held.pop(0)[1].values())
                evidence.train = past if evidence.train is None else evidence.train + past
        branches = held[-1][1]
        if branch_key not in branches and len(branches) >= MAX_BRANCHES - 1:
            branch_key = _OTHERS
        branches[branch_key] = branches[branch_key] + sums if branch_key in branches else sums
        self._solved.clear()

    def sums(self, full: torch.Tensor, sparse: torch.Tensor, other: torch.Tensor) -> Any:
        """Return what is added up over calls; see :meth:`observe`."""
        return pair_sums(full, sparse, other)

    def fit(self, sums: Any) -> torch.Tensor:
        """Return what sums of calls tell of every head: the share of the sparse branch [H]."""
        return best_alpha(sums)

    def lost(self, sums: Any, fit: torch.Tensor) -> torch.Tensor:
        """Return the squared error [H] that calls with ``sums`` have with ``fit``."""
        return _error(sums, fit)

    def plain(self, sums: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared error [H] of the sparse branch alone, and |O_f|^2 [H]."""
        return sums[_PLAIN], sums[_NORM]

    def on(self, fit: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is used of a fit, and in which heads: 1 where the branch is off."""
        share = torch.where(used, fit, 1.0)
        return share, used & (share < 1)

    def blend(self, layer: int, level: float = 0.0) -> "Callable[..., torch.Tensor] | None":
        """Return (O_s, O_other, complete rows, heads) -> output, see :func:`blend`; None where no head's branch is on."""
        share = self.alpha(layer, level)
        return None if share is None else lambda sparse, other, complete, heads: blend(sparse, other, share[heads], complete)

    def alpha(self, layer: int, level: float = 0.0) -> torch.Tensor | None:
        """Return the share of the sparse branch [H], fp32; 1 where a head's branch is off. None: off in every head.

        A noise bucket without evidence of its own takes the nearest one that has some. Off means that nothing was
        observed, that there was one step only, or that the held-out steps did not improve enough. Solved, and waited
        for, once after every observation.
        """
        found = self.fitted(layer, level)
        return None if found is None else found[0]

    def fitted(self, layer: int, level: float = 0.0) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what is fitted, and in which heads [H] it is used; None where in none. See :meth:`alpha`."""
        key = self._nearest(layer, bisect_right(self.edges, level))
        if key is None:
            return None
        fit, used, some = self._solve(key)
        return (fit, used) if some else None

    def report(self) -> dict[str, Any]:
        """Return plain numbers: per layer and bucket the heads with a branch, and what the held-out steps said.

        ``gain`` is 1 - error with branch / error without, over all heads, with the shares fitted before the held-out
        steps; negative means worse. ``error`` is the relative L2 error of the layer without a branch.
        """
        layers = []
        for layer, bucket in sorted(self._evidence):
            evidence = self._evidence[layer, bucket]
            if evidence.train is None:
                layers.append({"layer": layer, "bucket": bucket, "steps": evidence.steps, "enabled": 0, "gain": None})
                continue
            alpha, used, _ = self._solve((layer, bucket))
            tested = sum(sum(branches.values()) for _, branches in evidence.held)
            (alone, norms), lost = self.plain(tested), self.lost(tested, self.fit(evidence.train))
            without, with_branch, certified = alone.sum(), lost.sum(), torch.where(used, lost, alone).sum()
            norm = norms.sum().clamp_min(1e-30)
            layers.append(
                {
                    "layer": layer,
                    "bucket": bucket,
                    "steps": evidence.steps,
                    "heads": len(used),
                    "enabled": int(used.sum()),
                    "error": round(float((without / norm).sqrt()), 6),
                    "gain": round(_gain(with_branch, without), 6),
                    "gain_used": round(_gain(certified, without), 6),
                    **self.told(alpha),
                }
            )
        heads = sum(entry.get("heads", 0) for entry in layers)
        return {
            "held_out": self.held_out,
            "min_gain": self.min_gain,
            "enabled": sum(entry["enabled"] for entry in layers),
            "heads": heads,
            "layers": layers,
        }

    def told(self, fit: torch.Tensor) -> dict[str, Any]:
        """Return what a report says of a fit."""
        return {"alpha": [round(float(a), 4) for a in fit]}

    def _nearest(self, layer: int, bucket: int) -> tuple[int, int] | None:
        known = [key for key, evidence in self._evidence.items() if key[0] == layer and evidence.train is not None]
        return min(known, key=lambda key: abs(key[1] - bucket), default=None)

    def _solve(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return (what is fitted, whether a head's branch is on [H], whether any is)."""
        if key not in self._solved:
            evidence = self._evidence[key]
            tried = self.fit(evidence.train)
            used = torch.ones_like(self.plain(evidence.train)[0], dtype=torch.bool)
            everything = evidence.train
            for branch in {name: None for _, branches in evidence.held for name in branches}:
                sums = sum(branches[branch] for _, branches in evidence.held if branch in branches)
                everything = everything + sums
                alone, norm = self.plain(sums)
                # The rule is about errors; these are their squares.
                used &= self.lost(sums, tried) <= (1 - self.min_gain) ** 2 * alone
                used &= alone > 1e-12 * norm
            fit, used = self.on(self.fit(everything), used)
            self._solved[key] = fit, used, bool(used.any())
        return self._solved[key]


def _error(sums: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return |O_f - alpha O_s - (1 - alpha) O_other|^2 of every head."""
    squared = sums[_FF] - 2 * alpha * sums[_FD] + alpha**2 * sums[_DD]
    return torch.where(alpha == 1, sums[_PLAIN], squared.clamp_min(0))


def _gain(with_branch: torch.Tensor, without: torch.Tensor) -> float:
    return float(1 - (with_branch / without.clamp_min(1e-30)).sqrt()) if float(without) > 0 else 0.0
