"""One guidance branch's share of an attention: its heads launched together, refreshed and corrected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....kernels.block_sparse_attention import BlockList, block_sparse_attention
from ..builders import Selection
from .entry import Entry
from .modes import CORRECTED, LISTED, Mode, heads_where, is_any, merge_heads, replace_heads
from .refresh import Refreshed, advanced_rho, beside_full, by_complement, left_out_mean
from .storage import unpack_bits


@dataclass(frozen=True, eq=False)
class Left:
    """What the full step of some heads leaves.

    Attributes:
        heads: which heads, ascending.
        parts: their full attention in its parts.
        lists: bool [B', h or 1, Nq, Nk] that it was divided by.
    """

    heads: tuple[int, ...]
    parts: Refreshed
    lists: Selection


@dataclass
class Asked:
    """The selection of an attention, asked for once at most."""

    select: Callable[[], Selection]
    found: Selection | None = None

    def __call__(self) -> Selection:
        if self.found is None:
            self.found = self.select()
        return self.found


@dataclass(eq=False)
class Part:
    """One branch's share of a batched attention.

    Attributes:
        q: [rows, H, N, d].
        k: [rows, Hk, N, d].
        v: like ``k``.
        blocks: (queries, keys) in a block.
        options: scale and kv_length of the kernel.
        select: returns the lists of the whole batch.
        rows: of the batch that these are.
        kept: share [H] of the key blocks that its heads attended to, once it has been launched.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: tuple[int, int]
    options: dict[str, Any]
    select: Callable[[], Selection]
    rows: slice
    kept: Tensor | None = None

    @property
    def query_blocks(self) -> int:
        """Nq."""
        return -(-self.q.shape[2] // self.blocks[0])

    @property
    def key_blocks(self) -> int:
        """Nk."""
        return -(-self.k.shape[2] // self.blocks[1])

    def selection(self) -> Selection:
        """Return the lists of these rows."""
        found = self.select()
        if found.mask.shape[0] == 1:
            return found
        full = found.full if found.full is None or found.full.shape[0] == 1 else found.full[self.rows]
        return Selection(found.mask[self.rows], full, found.predicate)

    def listed(self, entry: Entry, modes: np.ndarray, leaving: np.ndarray) -> Selection | None:
        """Return the lists: those of the last full step where they are kept, else what is selected now."""
        needs = is_any(modes, LISTED) | leaving
        frozen = [
            (group, heads)
            for group in entry.held
            if group.lists is not None
            and (heads := tuple(head for head in group.heads if needs[head] and not leaving[head]))
        ]
        fixed = {head for _, heads in frozen for head in heads}
        selection = self.selection() if any(head not in fixed for head in heads_where(needs)) else None
        for group, heads in frozen:
            bits = group.lists[:, [group.heads.index(head) for head in heads]]
            selection = replace_heads(selection, heads, unpack_bits(bits, self.key_blocks), len(modes))
        return selection

    def launch(self, modes: np.ndarray, listed: Selection | None) -> Tensor:
        """Return attention with every head at its lists, all blocks or none."""
        if not is_any(modes, (Mode.FULL, *LISTED)).any():
            self.kept = self.q.new_zeros(len(modes), dtype=torch.float32)
            return torch.zeros_like(self.q, memory_format=torch.contiguous_format)
        chosen = merge_heads(modes, listed, (self.query_blocks, self.key_blocks), self.q.device)
        lists = BlockList.from_mask(chosen.mask, *self.blocks, chosen.full)
        self.kept = (lists.count.float().mean((0, 2)) / self.key_blocks).expand(len(modes))
        return block_sparse_attention(self.q, self.k, self.v, lists, predicate=chosen.predicate, **self.options)[0]

    def refresh(
        self, modes: np.ndarray, leaving: np.ndarray, listed: Selection, complement: bool
    ) -> tuple[Tensor, "Left"]:
        """Return the attention, and what the heads that later steps build on leave.

        Args:
            modes: uint8 [H]; ZERO for heads that are not computed here.
            leaving: bool [H], the full heads that leave something.
            listed: lists of all heads.
            complement: as in :class:`~.memory.AttentionMemory`.
        """
        heads, count = heads_where(leaving), len(modes)
        how = by_complement if complement else beside_full
        if leaving.all():
            parts = how(self.q, self.k, self.v, listed, self.blocks, **self.options)
            self.kept = self.q.new_ones(count, dtype=torch.float32)
            return parts.out.to(self.q.dtype), Left(heads, parts, listed)
        picked, group = list(heads), count // self.k.shape[1]
        keys, values = (x[:, [head // group for head in picked]] for x in (self.k, self.v))
        some = _of_heads(listed, picked, count)
        parts = how(self.q[:, picked], keys, values, some, self.blocks, **self.options)
        others = modes.copy()
        others[picked] = int(Mode.ZERO)
        out = self.launch(others, listed)
        out[:, picked] = parts.out.to(out.dtype)
        self.kept = self.kept.index_fill(0, torch.tensor(picked, device=self.kept.device), 1.0)
        return out, Left(heads, parts, some)

    def corrected(
        self, entry: Entry, modes: np.ndarray, listed: Selection | None, out: Tensor, sigma: float, rho_step: float
    ) -> Tensor:
        """Return ``out`` with what is held added to the heads that are corrected; in place.

        Args:
            entry: what is kept of this branch.
            modes: uint8 [H].
            listed: lists that the heads attended to.
            out: [rows, H, N, d], attention over lists.
            sigma: noise level; a new one makes what is held a step older.
            rho_step: lambda.
        """
        for group in entry.held:
            heads = [head for head in group.heads if modes[head] in (int(mode) for mode in CORRECTED)]
            if not heads:
                continue
            age = group.advance(sigma)
            place = [group.heads.index(head) for head in heads]
            sparse = out[:, heads].float()
            if group.mode != Mode.RESIDUAL:
                rho = advanced_rho(group.rho[:, place], rho_step, age)[..., None]
                sparse = rho * sparse
            if group.mode == Mode.MEAN:
                sparse = sparse + (1 - rho) * self._left_out(listed, heads, len(modes))
            else:
                sparse = sparse + group.values.only(tuple(heads)).read().float()
            out[:, heads] = sparse.to(out.dtype)
        return out

    def blended(self, modes: np.ndarray, alpha: np.ndarray, listed: Selection | None, out: Tensor) -> Tensor:
        """Return ``out`` with the heads that blend mixed with the mean of what their lists leave out; in place.

        Rows whose lists leave out nothing are full attention and stay.

        Args:
            modes: uint8 [H].
            alpha: [H], share of the lists.
            listed: lists that the heads attended to.
            out: [rows, H, N, d], attention over lists.
        """
        heads = [int(head) for head in np.flatnonzero((modes == int(Mode.BLEND)) & (alpha < 1))]
        if not heads:
            return out
        share = torch.tensor(alpha[heads], dtype=torch.float32, device=out.device)[:, None, None]
        mean, sparse = self._left_out(listed, heads, len(modes)), out[:, heads]
        mask = listed.mask[:, heads] if listed.mask.shape[1] > 1 else listed.mask
        complete = self._by_token(mask.all(-1)[..., None])
        out[:, heads] = torch.where(complete, sparse, torch.lerp(mean, sparse.float(), share).to(out.dtype))
        return out

    def _left_out(self, listed: Selection, heads: list[int], count: int) -> Tensor:
        """Return fp32 [rows, len(heads), N, d]: the mean value of what each query's lists leave out."""
        means = left_out_mean(self.v, listed.mask, self.blocks[1], count, self.options["kv_length"])
        return self._by_token(means[:, heads])

    def _by_token(self, rows: Tensor) -> Tensor:
        """[B, h, Nq, d] -> [B, h, N, d]."""
        return rows.repeat_interleave(self.blocks[0], 2)[:, :, : self.q.shape[2]]


def _of_heads(selection: Selection, heads: list[int], count: int) -> Selection:
    mask, full = (
        None if x is None else x.expand(x.shape[0], count, -1, -1)[:, heads] for x in (selection.mask, selection.full)
    )
    return Selection(mask, full, selection.predicate)
