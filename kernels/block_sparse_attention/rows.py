"""Block-sparse attention on the CPU: panels of query rows, each against exactly its keys.

Neighbouring query blocks with equal lists (static plans, dense rows) form one panel; runs of blocks are not copied, other
lists are gathered into a workspace that stays in cache, which costs 2 to 5 % of the products. Of the two forms,

- *alone* computes a panel by oneDNN's fp32 product, on one thread, while other threads compute other panels. oneDNN runs
  these shapes at 1.3 to 2 times the rate of MKL, which leaves AVX-512 unused on AMD, and without parallel regions no core
  ever waits for another, which counts where other programs keep them busy. Half-precision keys are widened once per head
  (fp32 holds them exactly); scores and weights stay in fp32. Pooled keys and token tests are computed in this form only.
- *together* gathers several panels and has SDPA's CPU kernel compute them in one parallel region. It serves where oneDNN is
  missing, and where panels are so short that Python, which admits one thread at a time, would be what the others wait for.

Measured at 4096 tokens with a quarter of the blocks: alone, on one core, 4.2 to 5.5 times as fast as dense SDPA on that
core, and 2.6 to 4.5 times on two, where Python's lock is felt; together 2.2 to 3.3 times.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lists import BlockList, Predicate, Tail

__all__ = ["attend"]

#: Bytes of keys (and of values as many) gathered at a time: more falls out of the caches, less leaves cores idle.
_GATHERED = 1 << 22
#: Panels are gathered together if the shortest has at least this share of the longest one's keys.
_ALIKE = 0.9
#: Seconds that Python needs to issue a panel's operations, and multiplications and additions a core makes in one second.
_ISSUE, _RATE = 20e-6, 1.5e11
#: Scores of one panel, 2 MiB in fp32: they are written and read three times and should stay near the core.
_SCORES = 1 << 19


@dataclass(frozen=True)
class _Panel:
    """Neighbouring query blocks with one list. ``full`` and ``part`` count whole key blocks, in the list's order."""

    row: int
    start: int
    stop: int
    full: int
    offset: int
    part: int
    first: int
    run: bool
    ragged: int  # 0: the last, shorter block is not listed; 1: it is, in full; 2: it is, and needs the predicate

    @property
    def tested(self) -> bool:
        """Whether the predicate has something to test."""
        return self.part > 0 or self.ragged == 2


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    tail: Tail | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return output [B, H, N, d] and log-sum-exp [B, H, N] or None, in the dtype of ``q`` or wider."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    tested = predicate is not None and blocks.full is not None
    out = torch.empty((batch, heads, queries, v.shape[3]), dtype=wide if tested or tail is not None else q.dtype)
    lse = torch.empty((batch, heads, queries), dtype=wide) if return_lse else None
    lengths = [k.shape[2]] * batch if kv_length is None else kv_length.clamp(0, k.shape[2]).tolist()
    plans: dict[tuple[int, int, int], list[_Panel]] = {}
    listed = None if tail is None else blocks.to_mask(-(-k.shape[2] // blocks.kv_block))
    with _Team(torch.get_num_threads()) as team:
        for b in range(batch):
            for h in range(heads):
                row, head = min(b, blocks.index.shape[0] - 1), min(h, blocks.index.shape[1] - 1)
                if h % group == 0:
                    exact, keys = None, team.do(_Keys, k[b, h // group], v[b, h // group], lengths[b], blocks.kv_block)
                if (row, head, lengths[b]) not in plans:
                    plans[row, head, lengths[b]] = _panels(blocks, row, head, queries, lengths[b], tested)
                panels, ids = plans[row, head, lengths[b]], blocks.index[row, head]
                totals = None if lse is None else lse[b, h]
                short = _is_short(keys, panels, q.dtype)
                together, alone = [], []
                for panel in panels:
                    (together if short and tail is None and not panel.tested else alone).append(panel)
                if together:
                    _together(q[b, h], keys, ids, together, blocks.q_block, scale, out[b, h], totals)
                if alone:
                    pooled = None if tail is None else _pooled(tail, b, h // group, wide)
                    exact = exact or team.do(_Exact, keys, pooled, wide)
                    job = _Job(
                        q[b, h], ids, None if listed is None else listed[row, head], predicate, scale, out[b, h], totals
                    )
                    team.work(exact, job, alone)
    return out, lse


@dataclass(frozen=True, eq=False)
class _Job:
    """What the panels of one head share: queries [N, d], lists, tests, and where results go."""

    q: Tensor
    ids: Tensor
    listed: Tensor | None
    predicate: Predicate | None
    scale: float
    out: Tensor
    lse: Tensor | None

    def run(self, keys: "_Exact", panels: list[_Panel]) -> None:
        """Compute panels, one after the other."""
        for panel in panels:
            rows = slice(panel.start, panel.stop)
            left_out = None if self.listed is None else ~self.listed[panel.row]
            q = self.q[rows].to(keys.k.dtype) * self.scale
            result, total = keys.attend(q, self.ids[panel.row], panel, self.predicate, left_out, self.lse is not None)
            self.out[rows] = result
            if self.lse is not None:
                self.lse[rows] = total


class _Team:
    """Threads that use one core each, for as long as one call lasts.

    PyTorch keeps the number of threads of an operation per thread, and the one that later threads begin with for all; hence
    the second call at the end, which puts the latter back.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.inference = torch.is_inference_mode_enabled()
        self.pool = ThreadPoolExecutor(threads, "block-sparse", self._begin) if threads > 1 else None

    def __enter__(self) -> "_Team":
        return self

    def __exit__(self, *failure: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)

    def do(self, function: Callable, *arguments: object) -> Any:
        """Return what ``function`` does, computed by one thread: quick on little data, for it waits for no other."""
        return (
            function(*arguments) if self.pool is None else self.pool.submit(self._call, function, *arguments).result()
        )

    def work(self, keys: "_Exact", job: _Job, panels: list[_Panel]) -> None:
        """Compute panels, all threads together."""
        if self.pool is None:
            job.run(keys, panels)
            return
        parts = min(4 * self.threads, len(panels))
        # Every n-th panel: neighbours have lists of like lengths, so the parts take alike long.
        futures = [self.pool.submit(self._call, self._part, keys, job, panels[i::parts]) for i in range(parts)]
        for future in futures:
            future.result()

    @staticmethod
    def _part(keys: "_Exact", job: _Job, panels: list[_Panel]) -> None:
        job.run(keys.apart(), panels)

    @staticmethod
    def _begin() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    def _call(self, function: Callable, *arguments: object) -> Any:
        with torch.inference_mode(self.inference):  # a mode of the thread; tensors made in it are writable in it alone
            return function(*arguments)


def _is_short(keys: "_Keys", panels: list[_Panel], dtype: torch.dtype) -> bool:
    """Return whether panels had better be computed together, by the mean of their products."""
    if dtype == torch.float64 or _onednn() is not None:
        return True
    products = 4 * keys.k.shape[1] * sum((panel.stop - panel.start) * keys.tokens(panel) for panel in panels)
    return products / max(1, len(panels)) / _RATE < _ISSUE * torch.get_num_threads()


def _together(
    q: Tensor,
    keys: "_Keys",
    ids: Tensor,
    panels: list[_Panel],
    q_block: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Compute panels without pooled keys and token tests into ``out`` [N, d] and ``lse`` [N], of one head."""
    several = []
    for panel in panels:
        rows, size = slice(panel.start, panel.stop), keys.tokens(panel)
        if not size:
            out[rows] = 0
            if lse is not None:
                lse[rows] = -torch.inf
        elif panel.stop - panel.start == q_block:
            several.append((size, panel.row))
        else:
            some_k, some_v = keys.view(panel) if panel.run else keys.gather(ids[panel.row : panel.row + 1], size)
            some_k, some_v = (x.view(1, 1, size, x.shape[-1]) for x in (some_k, some_v))
            result, total = _sdpa(q[None, None, rows], some_k, some_v, None, scale)
            out[rows] = result[0, 0]
            if lse is not None:
                lse[rows] = total[0, 0]
    several.sort(key=lambda pair: -pair[0])  # stable: equal ones keep their order
    whole = q.shape[0] // q_block * q_block
    q_blocks, out_blocks = q[:whole].unflatten(0, (-1, q_block)), out[:whole].unflatten(0, (-1, q_block))
    lse_blocks = None if lse is None else lse[:whole].unflatten(0, (-1, q_block))
    place = 0
    while place < len(several):
        size = several[place][0]
        # Every core gets something to do: the kernel halves a panel, so half as many panels as cores suffice.
        room = max(_GATHERED // (size * keys.k.shape[1] * keys.k.element_size()), torch.get_num_threads() // 2, 1)
        chunk = [pair for pair in several[place : place + room] if pair[0] >= _ALIKE * size]
        place += len(chunk)
        rows = torch.tensor([row for _, row in chunk])
        some_k, some_v = keys.gather(ids[rows], size)
        mask = None
        if chunk[-1][0] < size:
            sizes = torch.tensor([pair[0] for pair in chunk])
            mask = torch.zeros((1, len(chunk), 1, size), dtype=q.dtype)
            mask.masked_fill_(torch.arange(size) >= sizes[:, None, None], -torch.inf)
            mask = mask.expand(1, len(chunk), q_block, size)
        result, total = _sdpa(q_blocks[rows][None], some_k[None], some_v[None], mask, scale)
        out_blocks[rows] = result[0].to(out.dtype)
        if lse_blocks is not None:
            lse_blocks[rows] = total[0].to(lse.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [1, W, Q, d] and log-sum-exp [1, W, Q] of W panels; only the CPU's own kernel gives the latter."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _pooled(tail: Tail, batch: int, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled keys [Nk, d] and values [Nk, d] of one head, and the logarithms of their sizes [Nk]."""
    sizes = tail.sizes if tail.sizes.ndim == 1 else tail.sizes[batch]
    return tail.keys[batch, head].to(dtype), tail.values[batch, head].to(dtype), sizes.to(dtype).log()


class _Keys:
    """Keys and values of one head, and the workspace that whole blocks are gathered into."""

    def __init__(self, k: Tensor, v: Tensor, length: int, block: int) -> None:
        self.block, self.length = block, length
        self.k, self.v = (x[:length].contiguous() for x in (k, v))
        self._blocks: list[Tensor] | None = None
        self._space = [k.new_empty(0), v.new_empty(0)]

    def tokens(self, panel: _Panel) -> int:
        """Return how many keys a panel attends to."""
        return (panel.full + panel.part) * self.block + (self.length % self.block if panel.ragged else 0)

    def view(self, panel: _Panel) -> tuple[Tensor, Tensor]:
        """Return keys and values of a panel whose blocks are a run."""
        start = panel.first * self.block
        return self.k[start : start + self.tokens(panel)], self.v[start : start + self.tokens(panel)]

    def gather(self, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return ``size`` keys and values of each list of ``ids`` [W, K]: [W, size, d], valid until the next call.

        The lists ascend, so that the shorter last block, which is padded here, is the last of its row and cut off.
        """
        if self._blocks is None:
            missing = -self.length % self.block
            padded = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in (self.k, self.v))
            self._blocks = [x.view(-1, self.block * x.shape[1]) for x in padded]
        width = -(-size // self.block)
        flat = ids[:, :width].reshape(-1).clamp(max=self._blocks[0].shape[0] - 1)
        found = []
        for place, source in enumerate(self._blocks):
            if self._space[place].numel() < flat.numel() * source.shape[1]:
                self._space[place] = source.new_empty(flat.numel() * source.shape[1])
            space = self._space[place][: flat.numel() * source.shape[1]].view(flat.numel(), source.shape[1])
            torch.index_select(source, 0, flat, out=space)
            found.append(space.view(ids.shape[0], width * self.block, -1)[:, :size])
        return found[0], found[1]


class _Exact:
    """Keys and values of one head in fp32 or wider, for panels with pooled keys or token tests, one at a time."""

    def __init__(self, keys: _Keys, pooled: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        self.block, self.length, self.whole = keys.block, keys.length, keys.length // keys.block
        self.k, self.v = keys.k.to(dtype), keys.v.to(dtype)
        self.k_blocks, self.v_blocks = (
            x[: self.whole * self.block].view(self.whole, self.block * x.shape[1]) for x in (self.k, self.v)
        )
        self.k_tail, self.v_tail, self.weight = pooled or (None, None, None)
        room = self.length + (0 if pooled is None else pooled[2].numel())
        self.k_space, self.v_space = (x.new_empty((room, x.shape[1])) for x in (self.k, self.v))

    def apart(self) -> "_Exact":
        """Return the same keys with a workspace of its own, for another thread."""
        other = copy.copy(self)
        other.k_space, other.v_space = torch.empty_like(self.k_space), torch.empty_like(self.v_space)
        return other

    def attend(
        self,
        q: Tensor,
        ids: Tensor,
        panel: _Panel,
        predicate: Predicate | None,
        left_out: Tensor | None,
        wants_lse: bool,
    ) -> tuple[Tensor | float, Tensor | float]:
        """Return the output [rows, d] and log-sum-exp [rows] of one panel; numbers where there is nothing to attend."""
        k, v, weight = self._take(ids, panel, left_out)
        if not k.shape[0]:
            return 0.0, -torch.inf
        scores = _product(q, k.t())
        if weight is not None:
            scores[:, k.shape[0] - weight.numel() :] += weight
        partial = predicate is not None and panel.tested
        if partial:
            self._mask(scores, ids, panel, predicate)
        if not partial and not wants_lse:
            return _product(torch.softmax(scores, -1, out=scores), v), -torch.inf
        total = scores.logsumexp(-1)
        scores.sub_(total.masked_fill(total == -torch.inf, 0)[:, None]).exp_()
        return _product(scores, v), total

    def _take(self, ids: Tensor, panel: _Panel, left_out: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values of a panel: full blocks, partial ones, the ragged one, pooled ones; and weights."""
        block, whole = self.block, panel.full + panel.part
        ragged = self.length - self.whole * block if panel.ragged else 0
        end = whole * block + ragged
        if panel.run and left_out is None:
            start = panel.first * block
            return self.k[start : start + end], self.v[start : start + end], None
        if panel.offset == panel.full:
            parts = [(0, ids[:whole])]
        else:
            parts = [(0, ids[: panel.full]), (panel.full, ids[panel.offset : panel.offset + panel.part])]
        for place, part in parts:
            for source, space in ((self.k_blocks, self.k_space), (self.v_blocks, self.v_space)):
                rows = space[place * block : (place + part.numel()) * block]
                torch.index_select(source, 0, part, out=rows.view(part.numel(), block * space.shape[1]))
        if ragged:
            self.k_space[end - ragged : end] = self.k[self.whole * block :]
            self.v_space[end - ragged : end] = self.v[self.whole * block :]
        weight = None
        if left_out is not None:
            chosen = (left_out & (self.weight > -torch.inf)).nonzero()[:, 0]
            weight, last = self.weight[chosen], end + chosen.numel()
            self.k_space[end:last], self.v_space[end:last] = self.k_tail[chosen], self.v_tail[chosen]
            end = last
        return self.k_space[:end], self.v_space[:end], weight

    def _mask(self, scores: Tensor, ids: Tensor, panel: _Panel, predicate: Predicate) -> None:
        """Take out the pairs of partial blocks that the predicate does not keep, in place."""
        part = ids[panel.offset : panel.offset + panel.part].long()
        tokens = (part[:, None] * self.block + torch.arange(self.block)).flatten()
        if panel.ragged == 2:
            tokens = torch.cat((tokens, torch.arange(self.whole * self.block, self.length)))
        kept = predicate.keeps(torch.arange(panel.start, panel.stop), tokens)
        start = panel.full * self.block
        scores[:, start : start + tokens.numel()].masked_fill_(~kept, -torch.inf)


def _panels(blocks: BlockList, b: int, h: int, queries: int, length: int, tested: bool) -> list[_Panel]:
    """Cut the queries of one head into panels of blocks with equal lists."""
    index, count = blocks.index[b, h], blocks.count[b, h]
    full = count if blocks.full is None or not tested else blocks.full[b, h]
    whole, ragged = length // blocks.kv_block, length % blocks.kv_block > 0
    columns = torch.arange(index.shape[1])
    in_full, listed = columns < full[:, None], columns < count[:, None]
    inside, last = index < whole, (index == whole) & ragged
    rises = ((index[:, 1:] == index[:, :-1] + 1) | ~(listed & (inside | last))[:, 1:]).all(-1)
    same = ((index[1:] == index[:-1]) | ~listed[1:]).all(-1) & (count[1:] == count[:-1]) & (full[1:] == full[:-1])
    table = zip(
        (in_full & inside).sum(-1).tolist(),
        full.tolist(),
        (listed & ~in_full & inside).sum(-1).tolist(),
        index[:, 0].tolist(),
        rises.tolist(),
        ((last & listed).any(-1).int() + (last & listed & ~in_full).any(-1).int()).tolist(),
        [False, *same.tolist()],
        strict=True,
    )
    panels: list[_Panel] = []
    for row, (number, offset, part, first, rise, kind, joins) in enumerate(table):
        start, stop = row * blocks.q_block, min((row + 1) * blocks.q_block, queries)
        width = (number + part + (kind > 0)) * blocks.kv_block
        if joins and (stop - panels[-1].start) * width <= _SCORES:
            start = panels.pop().start
        panels.append(_Panel(row, start, stop, number, offset, part, first, rise, kind))
    return panels


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product, by oneDNN where it serves."""
    if left.dtype == torch.float32 and right.shape[1] > 1 and _onednn() is None:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return left @ right


@cache
def _onednn() -> str | None:
    """Try oneDNN's fp32 product once, on either layout, and return why it cannot be used, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch comes without oneDNN"
    left, right = torch.arange(12.0).view(3, 4) / 8, torch.arange(20.0).view(4, 5) / 8
    try:
        for other in (right, right.t().contiguous().t()):
            ours = torch.ops.mkldnn._linear_pointwise(left, other.t(), None, "none", [], "")
            if not torch.equal(ours, left @ other):
                return "oneDNN's product differs from PyTorch's"
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"oneDNN does not run here ({type(error).__name__})"
    return None
