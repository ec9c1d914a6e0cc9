"""What every head would lose at every budget, read off an ordinary run: attention of a few query blocks, block by block.

Attention over a prefix of the key blocks, the best ones first, is the sparse output for that budget. So one pass over
the keys of a few query blocks, summed up in the router's order, gives the whole curve of error against budget. The same
exponentials give rho, the mean of what is left out, and fixed patterns; and kept until the next probed step, the prefixes
tell what sharing, WA-RS and Re-ttention would have lost with lists from then.
"""

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..builders import force
from ..fitting import sampled_blocks, sampled_rows
from ..plan import View
from ..reuse import Mode
from .patterns import Pattern

#: Budgets that are read off, as shares of the visual key blocks.
LADDER = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.45, 0.65, 1.0)
#: Modes that attend to lists, every one of which is tried with every budget and every pattern.
TRIED = (Mode.LIST, Mode.BLEND, Mode.MEAN, Mode.RESIDUAL, Mode.RHO)
#: Bytes of exponentials that are held at once.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Option:
    """Something a head can do.

    Attributes:
        mode: what.
        pattern: index of the pattern its lists follow; 0, the router, where it has none.
        budget: share of the visual key blocks of routed lists; 0 otherwise.
    """

    mode: Mode
    pattern: int = 0
    budget: float = 0.0


@dataclass(frozen=True, eq=False)
class Curves:
    """What was found: every option of every head, in buckets of noise.

    Attributes:
        options: O of them; the first is full attention.
        error: fp64 [S, L, H, O], |O_option - O_full|^2 / |O_full|^2; nan where an option was not tried. Errors of modes that
            reuse something are means over the steps between two full ones.
        density: fp64 [S, L, H, O], share of all key blocks that a step of this mode attends to; its full steps not counted.
        rho: fp64 [S, L, H, lists], mean share of the softmax that lists hold: the router's at every budget of the ladder,
            then those of the other patterns; nan where one does not fit.
        alpha: fp64, likewise: best share of the lists beside the mean of what is left out, in [0, 1].
        norm: fp64 [S, L, H], mean square output of a head over that of its layer's heads.
        edges: ascending noise levels between buckets; bucket 0 has the least noise.
        ladder: budgets.
        patterns: the first is the router.
    """

    options: tuple[Option, ...]
    error: np.ndarray
    density: np.ndarray
    rho: np.ndarray
    alpha: np.ndarray
    norm: np.ndarray
    edges: tuple[float, ...]
    ladder: tuple[float, ...]
    patterns: tuple[Pattern, ...]


def curves_json(curves: Curves) -> dict[str, Any]:
    """Return curves as JSON values: tables flat, to six digits, None for what was not tried."""
    tables = {name: getattr(curves, name) for name in ("error", "density", "rho", "alpha", "norm")}
    return {
        "options": [[int(option.mode), option.pattern, option.budget] for option in curves.options],
        "shape": list(curves.norm.shape),
        "edges": list(curves.edges),
        "ladder": list(curves.ladder),
        "patterns": [pattern.to_json() for pattern in curves.patterns],
        **{name: [float(f"{x:.6g}") if np.isfinite(x) else None for x in table.ravel()] for name, table in tables.items()},
    }


def curves_from_json(document: Mapping[str, Any]) -> Curves:
    """Return the curves that :func:`curves_json` wrote."""
    shape = tuple(document["shape"])
    tables = {
        name: np.array([np.nan if x is None else x for x in document[name]], float).reshape(*shape, -1)
        for name in ("error", "density", "rho", "alpha", "norm")
    }
    tables["norm"] = tables["norm"].reshape(shape)
    return Curves(
        tuple(Option(Mode(mode), pattern, budget) for mode, pattern, budget in document["options"]),
        edges=tuple(document["edges"]),
        ladder=tuple(document["ladder"]),
        patterns=tuple(Pattern(item["kind"], item["size"]) for item in document["patterns"]),
        **tables,
    )


@dataclass
class _Sums:
    """Sums of one layer in one bucket; tensors [H] or [ladder, H], on the device."""

    values: dict[Any, Tensor] = field(default_factory=dict)
    calls: int = 0

    def add(self, name: Hashable, value: Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value


@dataclass(frozen=True, eq=False)
class _Base:
    """An earlier probed call, which modes that reuse something would build on."""

    sigma: float
    uses: int
    place: Tensor
    laid: Tensor
    out: Tensor
    sparse: Tensor
    rho: Tensor
    form: Hashable


@dataclass
class Probe:
    """Gathers curves while a run goes on; one object per run or more.

    Costs the share ``samples / query blocks`` of a dense attention per call, a little more than twice that where ``reuse`` is
    on and an earlier call is known; nothing at steps that are not probed. It waits for the device only in :meth:`curves`.

    Attributes:
        edges: ascending noise levels between buckets.
        patterns: the router first, then what is tried beside it.
        samples: query blocks of each attention.
        ladder: budgets; the last must be 1.
        reuse: whether modes that build on earlier steps are tried: keeps the outputs of the sampled rows for every budget and
            pattern, per layer and branch, fp32.
        period: calls of a layer and branch from one full step of those modes to the next.
    """

    edges: tuple[float, ...] = ()
    patterns: tuple[Pattern, ...] = (Pattern(),)
    samples: int = 2
    ladder: tuple[float, ...] = LADDER
    reuse: bool = True
    period: int = 4
    _sums: dict[tuple[int, int], _Sums] = field(default_factory=dict)
    _bases: dict[tuple[int, Hashable], _Base] = field(default_factory=dict)
    _masks: dict[Hashable, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patterns or not self.patterns[0].routed or any(pattern.routed for pattern in self.patterns[1:]):
            raise ValueError("the first pattern must be the router, and the only one")
        if list(self.edges) != sorted(self.edges) or list(self.ladder) != sorted(self.ladder) or self.ladder[-1] != 1:
            raise ValueError("edges and ladder must ascend, and the ladder must end at 1")
        if self.samples < 1 or self.period < 2:
            raise ValueError("a probe takes at least one sample, and periods of at least 2")

    def observe(self, view: View, v: Tensor, branch: Hashable, sigma: float) -> None:
        """Look at one attention that the network computes in full.

        Args:
            view: its queries and keys, in the order that a plan would use.
            v: values in the same order.
            branch: key of the guidance branch; the rows of ``view`` are its own.
            sigma: noise level.
        """
        if view.visual_key_blocks < 2 or view.geometry.visual < view.q_block:
            return
        bucket = bisect_right(self.edges, sigma)
        sums = self._sums.setdefault((bucket, view.layer), _Sums())
        whole = max(1, view.geometry.visual // view.q_block)
        chosen = tuple(sampled_blocks(whole + 1, self.samples, view.layer))
        place, laid = self._places(view, chosen), self._laid(view, chosen)
        key = view.layer, branch
        form = (*view.q.shape, view.q.dtype, view.q.device, chosen, laid.shape)
        base = self._bases.get(key)
        if base is not None and (base.form != form or sigma > base.sigma * (1 + 1e-4)):
            base = None
        repeated = base is not None and abs(sigma - base.sigma) <= 1e-6 * abs(sigma)
        made = []
        group = view.q.shape[1] // view.k.shape[1]
        for heads in self._chunks(view, len(chosen), group):
            made.append(self._look(view, v, heads, group, chosen, place, laid, None if repeated else base))
        for name in made[0][0]:
            sums.add(name, torch.cat([part[0][name] for part in made], -1))
        sums.calls += 1
        if not self.reuse or repeated:
            return
        if base is None or base.uses + 1 >= self.period - 1:
            out, sparse, rho = (
                torch.cat([part[1][index] for part in made], axis) for index, axis in ((0, 1), (1, 2), (2, 2))
            )
            self._bases[key] = _Base(sigma, 0, place, laid, out, sparse, rho, form)
        else:
            self._bases[key] = replace(base, sigma=sigma, uses=base.uses + 1)

    def curves(self, layers: int, heads: int) -> Curves:
        """Return what was found. A bucket without a look takes the nearest one's. Waits for the device.

        Raises:
            ValueError: nothing was seen of a layer.
        """
        options = [Option(Mode.FULL), Option(Mode.ZERO), Option(Mode.SHARE)]
        options += [Option(mode, 0, budget) for mode in TRIED for budget in self.ladder[:-1]]
        options += [Option(mode, index) for mode in TRIED for index in range(1, len(self.patterns))]
        shape = len(self.edges) + 1, layers, heads
        error, density = (np.full((*shape, len(options)), np.nan) for _ in range(2))
        rho, alpha = (np.full((*shape, len(self.ladder) + len(self.patterns) - 1), np.nan) for _ in range(2))
        norm = np.ones(shape)
        for bucket in range(shape[0]):
            for layer in range(layers):
                near = [found for found, seen in self._sums if seen == layer]
                if not near:
                    raise ValueError(f"the probe has seen nothing of layer {layer}")
                sums = self._sums[min(near, key=lambda found: abs(found - bucket)), layer]
                found = {name: value.double().cpu().numpy() for name, value in sums.values.items()}
                at = bucket, layer
                for index, option in enumerate(options):
                    error[at][:, index], density[at][:, index] = self._read(found, option, sums.calls)
                rho[at] = (found["rho"] / sums.calls).T
                alpha[at] = _best_alpha(found).T
                norm[at] = found["norm"] / max(found["norm"].mean(), 1e-30)
        return Curves(tuple(options), error, density, rho, alpha, norm, self.edges, self.ladder, self.patterns)

    def forget(self) -> None:
        """Compare what comes with nothing that was seen before; curves stay."""
        self._bases.clear()

    def close(self) -> None:
        """Drop everything."""
        self._sums.clear()
        self._bases.clear()
        self._masks.clear()

    def _read(self, found: Mapping[Any, np.ndarray], option: Option, calls: int) -> tuple[Any, Any]:
        """Return error and density [H] of an option."""
        norm = np.maximum(found["norm"], 1e-30)
        if option.mode in (Mode.FULL, Mode.ZERO):
            return float(option.mode == Mode.ZERO), float(option.mode == Mode.FULL)
        reused = option.mode in (Mode.SHARE, Mode.RESIDUAL, Mode.RHO)
        if reused and "norm later" not in found:
            return np.nan, np.nan
        if reused:
            norm = np.maximum(found["norm later"], 1e-30)
        if option.mode == Mode.SHARE:
            return found[Mode.SHARE] / norm, 0.0
        place = len(self.ladder) + option.pattern - 1 if option.pattern else self.ladder.index(option.budget)
        if option.mode == Mode.BLEND:
            rest = 1 - _best_alpha(found)[place]  # O = O_s - (1 - alpha) (O_s - mean)
            lost = found[Mode.LIST][place] - 2 * rest * found["across"][place] + rest**2 * found["between"][place]
            return np.maximum(lost, 0) / norm, found["density"][place] / calls
        return found[option.mode][place] / norm, found["density"][place] / calls

    def _places(self, view: View, chosen: Sequence[int]) -> Tensor:
        """Return int64 [B, H, S, nk]: the place of every visual key block in the router's order."""
        scores = self.patterns[0].score(view.kv_block)(view)[:, :, list(chosen)]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return torch.zeros_like(order).scatter_(-1, order, places)

    def _laid(self, view: View, chosen: Sequence[int]) -> Tensor:
        """Return bool [B', H', S, P, Nk]: the lists of the patterns that fit, fixed ones laid out once per geometry."""
        fitting = [mask for index in self._fitting(view) if (mask := self._mask(view, index)) is not None]
        if not fitting:
            return torch.zeros((1, 1, len(chosen), 0, view.key_blocks), dtype=torch.bool, device=view.device)
        rows = [mask[:, :, list(chosen)] for mask in fitting]
        sizes = [max(row.shape[axis] for row in rows) for axis in (0, 1)]
        return torch.stack([row.expand(*sizes, -1, -1) for row in rows], 3)

    def _fitting(self, view: View) -> list[int]:
        """Return the patterns beside the router that fit a view."""
        return [index for index, pattern in enumerate(self.patterns) if index and pattern.fits(view)]

    def _mask(self, view: View, index: int) -> Tensor:
        """Return bool [B', H', Nq, Nk], the lists of a pattern."""
        pattern = self.patterns[index]
        if pattern.dynamic:
            return force(pattern.builder()(view), view).mask
        key = view.geometry, view.order.name, view.q_block, view.kv_block, view.device, index
        if key not in self._masks:
            self._masks[key] = force(pattern.builder()(view), replace(view, kv_length=None)).mask
        return self._masks[key]

    def _chunks(self, view: View, samples: int, group: int) -> list[slice]:
        batch, heads, tokens, size = view.q.shape
        each = batch * samples * 4 * tokens * (2 * view.q_block + view.q_block * size // view.kv_block) * group
        step = max(1, CHUNK_BYTES // max(each, 1)) * group
        return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]

    def _look(
        self, view: View, v: Tensor, heads: slice, group: int, chosen: Sequence[int], place: Tensor, laid: Tensor,
        base: _Base | None,
    ) -> tuple[dict[Any, Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """Return sums by name, [H] or [lists, H] each; and output, sparse outputs and rho of the sampled rows."""
        rows = _Rows.make(view, v, heads, group, chosen)
        counts = [min(max(round(share * view.visual_key_blocks), 1), view.visual_key_blocks) for share in self.ladder]
        number, full = len(counts) + laid.shape[3], len(counts) - 1
        lists = rows.lists(place[:, heads], counts, _heads_of(laid, heads))
        tried = [lists] if base is None else [lists, rows.lists(base.place[:, heads], counts, _heads_of(base.laid, heads))]
        outs, masses = rows.attend(torch.cat(tried, 3))
        sparse, mass, other = outs[:number], masses[:number], rows.mean_left_out(lists)
        out = sparse[full]
        rho = mass / mass[full].clamp_min(1e-30)
        norm = _squares(out)
        with_mean = rho[..., None] * sparse + (1 - rho[..., None]) * other
        sums: dict[Any, Tensor] = {
            "norm": norm,
            "rho": rho.mean((1, 3, 4)),
            Mode.LIST: _squares(sparse - out),
            Mode.MEAN: _squares(with_mean - out),
            "across": _dots(sparse - out, sparse - other),
            "between": _squares(sparse - other),
            "density": lists.float().mean((0, 2, 4)).T,
        }
        if base is not None:
            then, earlier, share = base.out[:, heads], base.sparse[:, :, heads], base.rho[:, :, heads, ..., None]
            again = outs[number:]
            sums["norm later"] = norm
            sums[Mode.SHARE] = _squares(then - out)
            sums[Mode.RESIDUAL] = _squares(again + then - earlier - out)
            sums[Mode.RHO] = _squares(share * (again - earlier) + then - out)
        absent = [index for index in range(1, len(self.patterns)) if index not in self._fitting(view)]
        if absent:
            sums = {name: self._with_gaps(value, absent) for name, value in sums.items()}
        return sums, (out, sparse, rho)

    def _with_gaps(self, value: Tensor, absent: Sequence[int]) -> Tensor:
        """[lists, H] -> likewise with a row of nan for every pattern that does not fit; [H] as it is."""
        if value.ndim == 1:
            return value
        rows = list(value)
        for index in absent:
            rows.insert(len(self.ladder) + index - 1, torch.full_like(rows[0], torch.nan))
        return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Attention of the sampled rows of some heads, key block by key block, not yet divided by its mass; fp32.

    Attributes:
        top: [B, h, S, Nk, q, d]: exponentials times values, summed over each block's keys.
        mass: [B, h, S, Nk, q]: exponentials, relative to each row's largest, likewise.
        values: [B, h, Nk, d], sum of each block's values.
        sizes: [B, Nk], valid keys of each block.
        forced: bool [Nk]: blocks with a token that is not visual, which everybody keeps.
    """

    top: Tensor
    mass: Tensor
    values: Tensor
    sizes: Tensor
    forced: Tensor

    @classmethod
    def make(cls, view: View, v: Tensor, heads: slice, group: int, chosen: Sequence[int]) -> "_Rows":
        tokens, block, blocks = view.geometry.length, view.kv_block, view.key_blocks
        some = slice(heads.start // group, -(-heads.stop // group))
        keys, values = (x[:, some].float() for x in (view.k, v))
        if group > 1:
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        rows = sampled_rows(chosen, view.q_block, view.q.device)
        weights = (view.q[:, heads].index_select(2, rows).float() * view.scale) @ keys.mT
        valid = torch.ones((1, tokens), dtype=torch.bool, device=weights.device)
        if view.kv_length is not None:
            valid = torch.arange(tokens, device=weights.device) < view.kv_length[:, None]
            weights = weights.masked_fill(~valid[:, None, None], -torch.inf)
            values = values.masked_fill(~valid[:, None, :, None], 0)
        weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        padding = blocks * block - tokens
        if padding:
            weights, valid = (torch.nn.functional.pad(x, (0, padding)) for x in (weights, valid))
            values = torch.nn.functional.pad(values, (0, 0, 0, padding))
        weights = weights.unflatten(2, (len(chosen), view.q_block)).unflatten(-1, (blocks, block)).transpose(3, 4)
        values = values.unflatten(2, (blocks, block))
        sizes = valid.unflatten(-1, (blocks, block)).sum(-1).float().expand(len(weights), -1)
        first = torch.arange(blocks, device=weights.device) * block
        forced = (first + block).clamp(max=tokens) > view.geometry.visual
        return cls(weights @ values[:, :, None], weights.sum(-1), values.sum(3), sizes, forced)

    def lists(self, place: Tensor, counts: Sequence[int], laid: Tensor) -> Tensor:
        """Return bool [B, h, S, K, Nk]: the blocks of every budget, in the order of ``place``, then those of the patterns.

        Args:
            place: int64 [B, h, S, nk], of the visual key blocks.
            counts: visual blocks of each budget.
            laid: bool [B', h', S, P, Nk], of the patterns.
        """
        kept = place[:, :, :, None] < torch.tensor(list(counts), device=place.device)[:, None]
        kept = torch.nn.functional.pad(kept, (0, len(self.forced) - place.shape[-1])) | self.forced
        return torch.cat([kept, laid.expand(*kept.shape[:3], -1, -1)], 3)

    def attend(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs [K, B, h, S, q, d] and mass [K, B, h, S, q] over lists bool [B, h, S, K, Nk]."""
        lists = kept.to(self.top.dtype)
        mass = lists @ self.mass
        top = (lists @ self.top.flatten(-2)).unflatten(-1, self.top.shape[-2:])
        out = top / mass.clamp_min(1e-30)[..., None]
        return out.movedim(3, 0), mass.movedim(3, 0)

    def mean_left_out(self, kept: Tensor) -> Tensor:
        """Return [K, B, h, S, 1, d]: the mean value of the keys that lists leave out, 0 where they leave none."""
        rest = (~kept).to(self.values.dtype)
        number = (rest * self.sizes[:, None, None, None]).sum(-1, keepdim=True)
        return (rest @ self.values[:, :, None] / number.clamp_min(1)).movedim(3, 0)[..., None, :]


def _heads_of(mask: Tensor, heads: slice) -> Tensor:
    return mask[:, heads] if mask.shape[1] > 1 else mask


def _squares(x: Tensor) -> Tensor:
    """[..., B, h, S, q, d] -> [..., h]."""
    return x.square().sum((-1, -2, -3)).sum(-2)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-1, -2, -3)).sum(-2)


def _best_alpha(found: Mapping[Any, np.ndarray]) -> np.ndarray:
    """Return the least-squares share of the lists beside the mean of what is left out, [lists, H]."""
    between = found["between"]
    known = between > 1e-12 * np.maximum(found["norm"], 1e-30)
    return np.where(known, np.clip(1 - found["across"] / np.maximum(between, 1e-30), 0, 1), 1.0)
