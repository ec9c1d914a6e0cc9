"""What attention remembers from step to step of a run: one object per run, which a session owns.

At every evaluation :meth:`AttentionMemory.begin`; at every attention :meth:`~AttentionMemory.decide`, which needs no
tensors, and :meth:`~AttentionMemory.compute`, unless the decision is plain: then the network's own attention will do.

What is remembered belongs to a layer and a guidance branch and fits one shape. Where something is missing, the heads that
need it are computed in full, whatever the table says, and leave what later steps need. Branches are computed one by
one, so that it makes no difference whether a batch holds one or all of them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...evaluation import Branch
from ..builders import Selection
from .entry import Entry, Held, Output, weight_of
from .modes import CORRECTED, Mode, heads_where, is_any
from .part import Asked, Left, Part
from .refresh import Refreshed
from .schedule import ModeTable
from .storage import AS_COMPUTED, Policy, pack, pack_bits

#: Evaluations in a row that a guidance branch may be absent from before what is kept of it is dropped.
ABSENT = 4
COND, UNCOND = "cond", "uncond"


@dataclass(frozen=True, eq=False)
class Decision:
    """What the heads of one attention do, by guidance branch.

    Attributes:
        layer: which attention.
        step: of the run.
        branches: keys, in row order.
        names: of the branches, likewise.
        rows: batch rows of each.
        modes: uint8 [H] for each branch: what really happens.
        donated: for each branch bool [H]: heads that take what the other guidance branch computed in this evaluation.
        missed: heads, over all branches, that are full because something was missing.
        donor: whether what is computed must be kept for the other branch until the evaluation ends.
        plain: everything is full and nothing need be kept: the network's own attention will do.
    """

    layer: int
    step: int
    branches: tuple[Hashable, ...]
    names: tuple[str, ...]
    rows: int
    modes: tuple[np.ndarray, ...]
    donated: tuple[np.ndarray, ...]
    missed: int
    donor: bool
    plain: bool


@dataclass(frozen=True, eq=False)
class _Donation:
    """Outputs of the heads that guidance branches share, for as long as an evaluation lasts."""

    name: str
    key: Hashable
    shape: Hashable
    heads: tuple[int, ...]
    out: Tensor


@dataclass
class AttentionMemory:
    """State across steps.

    Attributes:
        table: modes of the run.
        rho_step: lambda of Re-ttention, added to rho at every sparse step since the last full one. The paper's is .04.
        policy: how outputs and residuals are kept.
        budget_bytes: on the device, never exceeded; None for no limit. Where it does not suffice, residuals are given up
            (Held.fall_back), those first whose lists leave out least; outputs are not kept, and computed in full instead.
        branches: guidance branches that an evaluation may have. With one, nothing is kept for a second.
        static: whether the lists never change, so that no copy of them is kept.
        complement: whether a full step that later ones build on is computed as lists and their complement; else as a
            dense pass beside the lists (:func:`~.refresh.complement_is_cheaper`).
        watch: told the layer and the share [H] of the key blocks of each branch's attention.
        bytes: that are kept on the device.
        system_bytes: that are kept in system memory.
    """

    table: ModeTable
    rho_step: float = 0.0
    policy: Policy = AS_COMPUTED
    budget_bytes: int | None = None
    branches: int = 2
    static: bool = False
    complement: bool = True
    watch: Callable[[int, Tensor], None] | None = None
    bytes: int = 0
    peak_bytes: int = 0
    system_bytes: int = 0
    peak_system_bytes: int = 0
    counts: Counter = field(default_factory=Counter)
    _done: np.ndarray | None = None
    _entries: dict[tuple[int, Hashable], Entry] = field(default_factory=dict)
    _donations: dict[int, _Donation] = field(default_factory=dict)
    _ambiguous: set[int] = field(default_factory=set)
    _step: int = 0
    _sigma: float = float("inf")
    _lowest: float = float("inf")
    _evaluation: int = -1
    _attended: bool = False

    def begin(self, sigma: float, step: int) -> None:
        """Open an evaluation.

        A rise of the noise level drops everything. What no later step can use is dropped, and so is what belongs to a
        branch that has been absent. Evaluations in which no attention comes by (a cache above skipped them) count as
        none.

        Args:
            sigma: noise level.
            step: of the run, by its noise level; several evaluations of one step all count as that step.
        """
        if sigma > self._lowest * (1 + 1e-4):
            self.reset()
        self._lowest = min(self._lowest, sigma)
        if self._attended or self._evaluation < 0:
            self._evaluation += 1
        self._attended = False
        self._sigma, self._step = sigma, self.table.clamp(step)
        self._donations.clear()
        self._ambiguous.clear()
        shares, corrects = self.table.shares(self._step), self.table.correction(self._step) > 0
        for key in list(self._entries):
            entry = self._entries[key]
            if self._evaluation - entry.evaluation > ABSENT:
                del self._entries[key]
                continue
            entry.prune(self._step, shares[key[0]], corrects[key[0]])
        self._count()

    def decide(self, layer: int, branches: Sequence[Branch], shape: Sequence[int], like: Tensor) -> Decision:
        """Return what the heads do at the attention that comes next.

        Args:
            layer: which attention of the network.
            branches: guidance branches in row order.
            shape: [B, H, N, d] of the queries; rows split evenly among the branches.
            like: any tensor of their dtype and device.

        Raises:
            ValueError: a layer or a number of heads that the table does not have.
        """
        heads, rows = shape[1], shape[0] // len(branches)
        if not 0 <= layer < self.table.layers or heads != self.table.heads:
            raise ValueError(
                f"the table has {self.table.layers} layers of {self.table.heads} heads, not layer {layer} with {heads}"
            )
        self._attended = True
        form = (rows, *shape[1:], like.dtype, like.device)
        planned, cfg = self.table.modes[self._step, layer], self._cfg(layer, branches, form)
        modes, donated, missed = [], [], 0
        donors = _donors([branch.name for branch in branches]) if cfg.any() else {}
        for index, branch in enumerate(branches):
            given = cfg if self._given(layer, branch, form) or index in donors else np.zeros_like(cfg)
            effective = self._effective((layer, branch.key), form, planned)
            missed += int(((effective != planned) & (effective == int(Mode.FULL)) & ~given).sum())
            modes.append(effective)
            donated.append(given)
        donor = bool(cfg.any()) and self.branches > 1 and len(branches) == 1 and not donated[0].any()
        later = self.table.shares(self._step + 1)[layer].any() or self.table.correction(self._step + 1)[layer].any()
        self._note(layer, modes[0])
        full = all((effective == int(Mode.FULL)).all() and not given.any() for effective, given in zip(modes, donated))
        return Decision(
            layer, self._step, tuple(branch.key for branch in branches), tuple(branch.name for branch in branches), rows,
            tuple(modes), tuple(donated), missed, donor, full and not later and not donor,
        )  # fmt: skip

    def compute(
        self,
        decision: Decision,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select: Callable[[], Selection],
        blocks: tuple[int, int] = (64, 64),
        *,
        scale: float | None = None,
        kv_length: Tensor | None = None,
    ) -> Tensor:
        """Return the attention [B, H, N, d] as decided, and keep what later steps need of it.

        Args:
            decision: of :meth:`decide`, in the same evaluation.
            q: [B, H, N, d], in any order of tokens that stays the same through the run.
            k: [B, Hk, N, d].
            v: like ``k``.
            select: returns the lists of all rows and heads; asked only where they are needed.
            blocks: (queries, keys) in a block.
            scale: factor of the logits; None: 1 / sqrt(d).
            kv_length: int32 [B], valid keys.
        """
        asked = Asked(select)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        order = sorted(range(len(decision.branches)), key=lambda index: bool(decision.donated[index].any()))
        first: Tensor | None = None
        for index in order:
            rows = slice(index * decision.rows, (index + 1) * decision.rows)
            part = Part(
                q[rows], k[rows], v[rows], blocks,
                {"scale": scale, "kv_length": None if kv_length is None else kv_length[rows]},
                asked, rows,
            )  # fmt: skip
            given = heads_where(decision.donated[index])
            source = None
            if given:
                source = first if first is not None else self._donations[decision.layer].out
            made = self._attend(decision, index, part, given, source)
            out[rows] = made
            if first is None and _is_guidance(decision.names[index]):
                shared = heads_where(self.table.lent(decision.step)[decision.layer])
                first = made[:, list(shared)] if shared else None
                if decision.donor and first is not None:
                    self._donate(decision, index, shared, first, part)
        return out

    def store(self, decision: Decision, index: int, out: Tensor, modes: np.ndarray, left: Left | None = None) -> None:
        """Keep what later steps need of one branch's attention; :meth:`compute` does.

        Args:
            decision: of this attention.
            index: of the branch.
            out: [rows, H, N, d], the attention.
            modes: uint8 [H]: what the heads did; those that were full leave what corrections need.
            left: the full step in its parts; needed where a later step corrects a head that was full.
        """
        key, layer, after = (decision.layer, decision.branches[index]), decision.layer, decision.step + 1
        form = (decision.rows, *out.shape[1:], out.dtype, out.device)
        entry = self._entries.setdefault(key, Entry(form))
        entry.evaluation = self._evaluation
        heads = len(modes)
        full = modes == int(Mode.FULL)
        shares = self.table.shares(after)[layer]
        stays = (modes == int(Mode.SHARE)) & entry.has_output(heads) & ~decision.donated[index]
        entry.keep_outputs(stays)  # a second evaluation of this step shares them again
        entry.keep_held(~full)
        self._count()
        fresh = heads_where(shares & ~stays)
        if fresh:
            self._keep_output(entry, out, fresh, decision.step)
        kinds = np.where(full, self.table.correction(after)[layer], 0)
        for kind in CORRECTED if left is not None else ():
            group = tuple(head for head in left.heads if kinds[head] == int(kind))
            if group:
                self._hold(entry, kind, group, left, decision.step, out.dtype)
        if not entry.outputs and not entry.held:
            del self._entries[key]

    def reset(self) -> None:
        """Forget everything: a new trajectory has begun."""
        self._entries.clear()
        self._donations.clear()
        self._ambiguous.clear()
        self._lowest = float("inf")
        self._count()

    def close(self) -> None:
        """Free everything."""
        self.reset()
        self._evaluation, self._attended = -1, False

    def snapshot(self) -> Any:
        """Return all that is remembered, for :meth:`restore`: so that a network call may be tried in several ways."""
        return {key: entry.copy() for key, entry in self._entries.items()}, dict(self._donations), set(self._ambiguous)

    def restore(self, snapshot: Any) -> None:
        """Remember what :meth:`snapshot` returned, any number of times."""
        entries, donations, ambiguous = snapshot
        self._entries = {key: entry.copy() for key, entry in entries.items()}
        self._donations, self._ambiguous = dict(donations), set(ambiguous)
        self._count()

    def grid(self) -> np.ndarray:
        """Return uint8 [steps, layers, heads]: what the first branch's heads did; 255 where no attention came by."""
        return np.full(self.table.modes.shape, 255, np.uint8) if self._done is None else self._done.copy()

    def report(self) -> dict[str, Any]:
        """Return plain numbers: heads by what they did, over all attentions, and bytes."""
        return {
            "heads": dict(self.counts),
            "policy": self.policy.name,
            "peak_bytes": self.peak_bytes,
            "peak_system_bytes": self.peak_system_bytes,
            "budget_bytes": self.budget_bytes,
        }

    # Deciding

    def _note(self, layer: int, modes: np.ndarray) -> None:
        self._done = self.grid() if self._done is None else self._done
        self._done[self._step, layer] = modes

    def _effective(self, key: tuple[int, Hashable], form: Hashable, planned: np.ndarray) -> np.ndarray:
        """Return the planned modes, full where what they need is missing; drops what has another shape."""
        entry = self._entries.get(key)
        if entry is not None and entry.shape != form:
            del self._entries[key]
            self._count()
            entry = None
        entry = entry or Entry(form)
        heads = len(planned)
        effective = planned.copy()
        shares, corrected, kept = planned == int(Mode.SHARE), is_any(planned, CORRECTED), entry.correction(heads)
        effective[shares & ~entry.has_output(heads)] = int(Mode.FULL)
        fallen = corrected & (
            ((planned == int(Mode.RHO)) & (kept == int(Mode.MEAN)))
            | ((planned == int(Mode.RESIDUAL)) & (kept == int(Mode.LIST)))
        )
        effective[corrected & (kept != planned)] = int(Mode.FULL)
        effective[fallen] = kept[fallen]
        return effective

    def _cfg(self, layer: int, branches: Sequence[Branch], form: Hashable) -> np.ndarray:
        """Return bool [H]: heads that guidance branches share here, if they can."""
        cfg = self.table.lent(self._step)[layer]
        names = [branch.name for branch in branches]
        if not all(names.count(name) <= 1 for name in (COND, UNCOND)):
            self._ambiguous.add(layer)
        known = self._donations.get(layer)
        if known is not None and any(b.name == known.name and b.key != known.key for b in branches):
            self._ambiguous.add(layer)  # two prompts of one kind: nobody knows which one the other takes after
        if layer in self._ambiguous:
            if self._donations.pop(layer, None) is not None:
                self._count()
            return np.zeros_like(cfg)
        return cfg if any(_is_guidance(name) for name in names) else np.zeros_like(cfg)

    def _given(self, layer: int, branch: Branch, form: Hashable) -> bool:
        """Whether the other branch's outputs of this evaluation are here for ``branch``."""
        known = self._donations.get(layer)
        return known is not None and _is_guidance(branch.name) and known.name != branch.name and known.shape == form

    # Computing

    def _attend(
        self, decision: Decision, index: int, part: Part, given: tuple[int, ...], source: Tensor | None
    ) -> Tensor:
        """Return one branch's attention [rows, H, N, d]."""
        modes = decision.modes[index].copy()
        modes[list(given)] = int(Mode.ZERO)  # copied below, not computed
        key = decision.layer, decision.branches[index]
        entry = self._entries.get(key) or Entry(())
        kinds = self.table.correction(decision.step + 1)[decision.layer]
        leaving = (decision.modes[index] == int(Mode.FULL)) & is_any(kinds, CORRECTED)
        for name, number in zip(*np.unique(modes, return_counts=True)):
            self.counts[Mode(name).name.lower()] += int(number)
        self.counts["donated"] += len(given)
        left = None
        leaving[list(given)] = False
        listed = part.listed(entry, modes, leaving)
        if leaving.any():
            out, left = part.refresh(modes, leaving, listed, self.complement)
        else:
            out = part.launch(modes, listed)
        out = part.corrected(entry, modes, listed, out, self._sigma, self.rho_step)
        out = part.blended(modes, self.table.alpha[decision.step, decision.layer], listed, out)
        if self.watch is not None:
            self.watch(decision.layer, part.kept)
        for group in entry.outputs:
            heads = tuple(head for head in group.heads if modes[head] == int(Mode.SHARE))
            if heads:
                out[:, list(heads)] = group.only(heads).packed.read()
        if given:
            out[:, list(given)] = source
        kept = decision.modes[index].copy()
        kept[list(given)] = int(Mode.LIST)  # computed, but leaves nothing to correct
        self.store(decision, index, out, kept, left)
        return out

    # Keeping

    def _donate(self, decision: Decision, index: int, heads: tuple[int, ...], out: Tensor, part: Part) -> None:
        size = out.numel() * out.element_size()
        if self.budget_bytes is not None and self.bytes + size > self.budget_bytes:
            return  # the other branch computes for itself
        form = (decision.rows, *part.q.shape[1:], part.q.dtype, part.q.device)
        name, key = decision.names[index], decision.branches[index]
        self._donations[decision.layer] = _Donation(name, key, form, heads, out)
        self._count()

    def _keep_output(self, entry: Entry, out: Tensor, heads: tuple[int, ...], step: int) -> None:
        rows, _, tokens, size = out.shape
        needed = self.policy.value_bytes(rows, len(heads), tokens, size, out.element_size())
        if not self.policy.in_system_memory and not self._room(needed, None):
            return
        entry.outputs.append(Output(pack(out[:, list(heads)], heads, out.dtype, self.policy), step))
        self._count()

    def _hold(
        self, entry: Entry, kind: Mode, heads: tuple[int, ...], left: Left, step: int, dtype: torch.dtype
    ) -> None:
        """Keep what a full step leaves to ``kind``, as far as memory suffices."""
        place = [left.heads.index(head) for head in heads]
        some = Refreshed(*(x[:, place] for x in (left.parts.out, left.parts.sparse, left.parts.rho)))
        lists = None
        if (
            not self.static and left.lists.full is None
        ):  # lists with partial blocks are never by score: they stay the same
            lists = pack_bits(left.lists.mask[:, place if left.lists.mask.shape[1] > 1 else [0] * len(place)])
        rho = None if kind == Mode.RESIDUAL else some.rho.contiguous()
        group = Held(heads, kind, step, self._sigma, 0, None, rho, lists, weight_of(some.rho))
        if not self._room(group.bytes, None):
            return  # the next step is full as well
        entry.held.append(group)
        self._count()
        if kind == Mode.MEAN:
            return
        rows, _, tokens, size = some.out.shape
        needed = self.policy.value_bytes(rows, len(heads), tokens, size, dtype.itemsize)
        if not self.policy.in_system_memory and not self._room(needed, group.weight):
            group.fall_back()
            return
        group.values = pack(some.residual(kind), heads, dtype, self.policy)
        self._count()

    def _room(self, needed: int, weight: Tensor | None) -> bool:
        """Make room for bytes on the device: drop absent branches, then residuals that are worth less than ``weight``.

        None: drop any residual. Reads weights, and so waits for the device, only where room is short.
        """
        if self.budget_bytes is None or self.bytes + needed <= self.budget_bytes:
            return True
        for key in [key for key, entry in self._entries.items() if self._evaluation - entry.evaluation > 1]:
            del self._entries[key]
        self._count()
        held = [group for entry in self._entries.values() for group in entry.held if group.values is not None]
        held = sorted(
            (float(group.weight), index, group) for index, group in enumerate(held) if not group.values.system
        )
        limit = float("inf") if weight is None else float(weight)
        for worth, _, group in held:
            if self.bytes + needed <= self.budget_bytes:
                return True
            if worth >= limit:
                break
            group.fall_back()
            self._count()
        return self.bytes + needed <= self.budget_bytes

    def _count(self) -> None:
        donated = sum(item.out.nbytes for item in self._donations.values())
        self.bytes = sum(entry.bytes for entry in self._entries.values()) + donated
        self.system_bytes = sum(entry.system_bytes for entry in self._entries.values())
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self.peak_system_bytes = max(self.peak_system_bytes, self.system_bytes)


def _is_guidance(name: str) -> bool:
    return name in (COND, UNCOND)


def _donors(names: list[str]) -> set[int]:
    """Return the places of branches that take after another one of the same batch: uncond after cond."""
    return {names.index(UNCOND)} if COND in names and UNCOND in names else set()
