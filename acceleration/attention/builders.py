"""Which key blocks each query block attends to: twelve builders, and what is kept in any case.

A builder takes a :class:`~.plan.View` and returns a :class:`Selection` over all blocks of the sequence, in which it
decides about visual tokens alone; :func:`force` adds the rest. Static builders are exact: a block is kept if any pair of
its visual tokens is, and full if all are. They return [1, 1, Nq, Nk]; builders by score return [B, H, Nq, Nk].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.block_sparse_attention import Predicate
from ..errors import StrettoError
from .cuts import by_groups, by_pieces, by_runs, flat_index, pieces, spans, tile_of
from .scores import Score, mean_pool, pooled, sampled_mass

if TYPE_CHECKING:
    from .plan import View

    Builder = Callable[[View], "Selection"]

CLAMP, TRUNCATE = "clamp", "truncate"


@dataclass(frozen=True, eq=False)
class Selection:
    """What is kept.

    Attributes:
        mask: bool [B', H', Nq, Nk]; B' and H' may be 1 to serve all.
        full: bool, as ``mask``: blocks all of whose token pairs are kept. None: every kept block is, nothing finer than
            blocks is asked.
        predicate: decides about the token pairs of blocks that are kept but not full.
    """

    mask: Tensor
    full: Tensor | None = None
    predicate: Predicate | None = None

    @property
    def density(self) -> float:
        """Share of blocks that are kept. Waits for the device."""
        return float(self.mask.float().mean())


# Static: bands of the token order


def everything() -> "Builder":
    """Keep every block."""
    return lambda view: _static(torch.ones(1, 1, dtype=torch.bool), view)


def band(low: int, high: int, exact: bool = False) -> "Builder":
    """Keep key j for query i where low <= j - i <= high, both counted along the view's order.

    Args:
        low: least difference.
        high: greatest difference.
        exact: whether the rule also holds inside blocks, by predicate.
    """

    def build(view: "View") -> Selection:
        (query_first, query_last), (key_first, key_last) = spans(view, view.q_block), spans(view, view.kv_block)
        least = key_first - query_last[:, None]
        most = key_last - query_first[:, None]
        predicate = None
        if exact:
            coordinates = torch.full((view.geometry.length, 3), -1, dtype=torch.int32)
            coordinates[: view.geometry.visual] = 0
            coordinates[: view.geometry.visual, 2] = torch.arange(view.geometry.visual)
            predicate = Predicate("band", coordinates.to(view.device), (low, high))
        return _static((most >= low) & (least <= high), view, (least >= low) & (most <= high), predicate)

    return build


def arrow(half: int, exact: bool = False) -> "Builder":
    """Keep |j - i| <= half among visual tokens, and every pair with another token (DiTFastAttnV2, arXiv 2503.22796)."""
    build = band(-half, half, exact)
    return lambda view: force(build(view), view)


def stripes(columns: Sequence[tuple[int, int]]) -> "Builder":
    """Keep the key blocks that touch one of the ranges [first, last) of visual tokens in the view's order.

    Vertical stripes of Sparse-vDiT (arXiv 2506.03065).
    """

    def build(view: "View") -> Selection:
        first, last = spans(view, view.kv_block)
        kept = torch.zeros_like(first, dtype=torch.bool)
        for start, stop in columns:
            kept |= (first < stop) & (last >= start)
        return _static(kept.expand(view.visual_query_blocks, -1), view)

    return build


# Static: windows on the grid


def box_tiles(
    tile: tuple[int, int, int], reach: tuple[int, int, int], border: str = TRUNCATE, exact: bool = False
) -> "Builder":
    """Keep the tiles around a query's own (GRAT-B, arXiv 2505.14687; sliding tiles, arXiv 2502.04507).

    Args:
        tile: (t, y, x) tokens of a tile; need not be that of the order.
        reach: tiles on either side, by axis.
        border: ``"truncate"``: a window at the border loses what lies outside; ``"clamp"``: it moves inwards whole.
        exact: whether blocks that straddle tiles keep only pairs within the window; for ``"truncate"``.
    """

    def build(view: "View") -> Selection:
        tiles, counts = tile_of(view, tile)
        axes = []
        for count, size in zip(counts, reach):
            index = torch.arange(count)
            if border == CLAMP:
                width = min(2 * size + 1, count)
                first = (index - size).clamp(0, count - width)
                axes.append((index >= first[:, None]) & (index < first[:, None] + width))
            else:
                axes.append((index - index[:, None]).abs() <= size)
        kept = torch.einsum("ad,be,cf->abcdef", *(axis.to(torch.uint8) for axis in axes)).bool()
        mask, full = by_groups(view, flat_index(tiles, counts), kept.reshape(counts.prod(), -1))
        if not exact:
            return _static(mask, view)
        if border == CLAMP:
            raise ValueError("a clamped window has no token predicate; truncate it, or do without exact")
        coordinates = torch.full((view.geometry.length, 3), -1, dtype=torch.int16)
        coordinates[: view.geometry.visual] = tiles.to(torch.int16)
        return _static(mask, view, full, Predicate("box", coordinates.to(view.device), reach))

    return build


def cross_tiles(tile: tuple[int, int, int], reach: int = 0) -> "Builder":
    """Keep the tiles that share an index with a query's own on at least one axis (GRAT-X, arXiv 2505.14687).

    An axis of a single tile is none: it would be shared by all.

    Args:
        tile: (t, y, x) tokens of a tile.
        reach: how far the index may be off and still count as shared.
    """

    def build(view: "View") -> Selection:
        tiles, counts = tile_of(view, tile)
        grid = torch.stack(torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij"), -1).reshape(-1, 3)
        kept = torch.zeros(len(grid), len(grid), dtype=torch.bool)
        for axis in range(3):
            if counts[axis] > 1:
                kept |= (grid[:, axis] - grid[:, axis, None]).abs() <= reach
        if int(counts.max()) == 1:
            kept[:] = True
        return _static(by_groups(view, flat_index(tiles, counts), kept)[0], view)

    return build


def radius(limit: int, exact: bool = True) -> "Builder":
    """Keep tokens of the same frame with dy^2 + dx^2 < limit^2 (CLEAR, arXiv 2412.16112).

    Args:
        limit: in tokens.
        exact: whether the rule also holds inside blocks, by predicate; fine-tuned weights need it.
    """

    def near(dt: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        return (dt == 0) & (dy * dy + dx * dx < limit * limit)

    def build(view: "View") -> Selection:
        mask, full = by_runs(view, near, (0, limit - 1))
        return _exact(view, mask, full, "radius", (limit * limit,)) if exact else _static(mask, view)

    return build


def box(reach: tuple[int, int, int], exact: bool = True) -> "Builder":
    """Keep tokens with |dt|, |dy| and |dx| within ``reach``.

    Args:
        reach: (t, y, x) in tokens.
        exact: whether the rule also holds inside blocks, by predicate.
    """

    def near(dt: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        return (dt <= reach[0]) & (dy <= reach[1]) & (dx <= reach[2])

    def build(view: "View") -> Selection:
        mask, full = by_runs(view, near, (reach[0], reach[1]))
        return _exact(view, mask, full, "box", reach) if exact else _static(mask, view)

    return build


def frame_log_band(width: Callable[[int, int], int]) -> "Builder":
    """Keep a band of each pair of frames, as wide as their distance says (Radial, arXiv 2506.19852, section 4).

    Args:
        width: (distance between two frames, tokens of a frame) -> half-width w of the band |i - j| <= w between
            positions i and j inside the frames; -1 for no token at all.

    The view's order must be the identity, so that a frame's tokens stand in one piece.
    """

    def build(view: "View") -> Selection:
        if view.order.name != "identity":
            raise ValueError(f"bands between frames need tokens in raster order, not {view.order.name!r}")
        frame, frames = view.geometry.frame, view.geometry.grid[0]
        widths = torch.tensor([width(distance, frame) for distance in range(frames)])
        queries, keys = (pieces(view, block) for block in (view.q_block, view.kv_block))
        distance = (queries[0][:, None] - keys[0]).abs()
        gap = torch.maximum(keys[1] - queries[2][:, None], queries[1][:, None] - keys[2]).clamp_min(0)
        kept = gap <= widths[distance]
        return _static(by_pieces(kept, queries[3], keys[3], view), view)

    return build


# By score


def top_k(score: Score, keep: float, whole: bool = False) -> "Builder":
    """Keep in every row the ``round(keep * nk)`` best of the nk visual key blocks, at least one.

    Of equal scores the lower block wins, and NaN counts as lowest, so that counts are exact.

    Args:
        score: of :mod:`.scores`.
        keep: share of the key blocks.
        whole: round down instead, as SLA's code does.
    """

    def build(view: "View") -> Selection:
        scores = score(view)
        blocks = scores.shape[-1]
        count = keep * blocks
        return _dynamic(best(scores, min(max(int(count) if whole else round(count), 1), blocks)), view)

    return build


def top_p(score: Score, mass: float, least: int = 1) -> "Builder":
    """Keep in every row the fewest blocks whose softmaxed scores add up to ``mass`` (SpargeAttn, arXiv 2502.18137).

    Args:
        score: of :mod:`.scores`.
        mass: in (0, 1]; 1 keeps all.
        least: blocks that are kept in any case.
    """

    def build(view: "View") -> Selection:
        shares = _finite(score(view)).softmax(-1)
        if mass >= 1:
            return _dynamic(torch.ones_like(shares, dtype=torch.bool), view)
        ordered, ids = shares.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < mass
        kept[..., :least] = True
        return _dynamic(torch.zeros_like(kept).scatter_(-1, ids, kept), view)

    return build


def global_threshold(score: Score, keep: float, guard: bool = True) -> "Builder":
    """Keep of each head the ``round(keep * nq * nk)`` largest entries of its softmaxed map (DraftAttention).

    Rows get what they deserve, so diffuse ones may get nothing; ``guard`` adds every row's best block.
    """

    def build(view: "View") -> Selection:
        scores = _finite(score(view))
        shares = scores.softmax(-1).flatten(-2)
        kept = best(shares, min(max(round(keep * shares.shape[-1]), 1), shares.shape[-1])).view(scores.shape)
        return _dynamic(kept | best(scores, 1) if guard else kept, view)

    return build


def tau_sigma(tau: float, near: int = 1) -> "Builder":
    """Keep blocks whose pooled score lies ``tau`` standard deviations above a row's mean (Sol-Attn, arXiv 2607.24027).

    The deviation is estimated from the variance of the block means of the keys, channel by channel:
    ``q . (k_j - mean) * scale > tau * scale * sqrt(sum_d q_d^2 var_d)``.

    Args:
        tau: about 16 % of the blocks pass at 1, 7 % at 1.5. -inf keeps all.
        near: blocks on either side of a query's own that are always kept.
    """

    def build(view: "View") -> Selection:
        scores, rows = mean_pool()(view), []
        for queries, keys, sizes in pooled(view):
            share = (sizes > 0) / (sizes > 0).sum().clamp_min(1)
            mean = (keys * share[:, None]).sum(1, keepdim=True)
            variance = ((keys - mean).square() * share[:, None]).sum(1)
            rows.append((queries.square() * variance[:, None]).sum(-1).sqrt() * view.scale)
        kept = scores > tau * torch.stack(rows)[..., None] if tau > -torch.inf else torch.ones_like(scores).bool()
        chosen = _dynamic(kept | best(scores, 1), view)
        return Selection(chosen.mask | _diagonal(view, near)) if near >= 0 else chosen

    return build


# By a sample of queries


def live_stripes(keep: float, samples: int = 64) -> "Builder":
    """Keep the ``round(keep * nk)`` key blocks that a head's queries attend to most, the same for all its rows.

    Vertical stripes of Sparse-vDiT (arXiv 2506.03065), their columns chosen by the attention of a sample of queries.

    Args:
        keep: share of the key blocks, at least one is kept.
        samples: queries, evenly spread.
    """

    def build(view: "View") -> Selection:
        columns = torch.stack([mass.sum(1) for mass, _ in sampled_mass(view, samples)])
        kept = best(columns, min(max(round(keep * columns.shape[-1]), 1), columns.shape[-1]))
        return _dynamic(kept[:, :, None].expand(-1, -1, view.visual_query_blocks, -1), view)

    return build


def by_head(choices: Mapping[str, "Builder"], modes: Sequence[str] = (), samples: int = 64) -> "Builder":
    """Give every head one of several patterns (Sparse-vDiT, arXiv 2506.03065).

    Args:
        choices: patterns by name.
        modes: one name per head; empty: each head gets the pattern that holds most of the attention of a sample of its
            queries, the first of equals.
        samples: queries, evenly spread.

    Raises:
        StrettoError: (from the builder) not as many modes as heads.
    """

    def build(view: "View") -> Selection:
        masks = {name: choices[name](view).mask for name in (dict.fromkeys(modes) if modes else choices)}
        if modes:
            if len(modes) != view.heads:
                raise StrettoError(f"heads: {len(modes)} modes are given, but this attention has {view.heads} heads")
            parts = [masks[mode][:, head if masks[mode].shape[1] > 1 else 0] for head, mode in enumerate(modes)]
            batch = max(len(part) for part in parts)
            return Selection(torch.stack([part.expand(batch, -1, -1) for part in parts], 1))
        rows = []
        for row, (mass, query) in enumerate(sampled_mass(view, samples)):
            found = []
            for mask in masks.values():
                mask = mask[row if len(mask) > 1 else 0][:, query // view.q_block, : mass.shape[-1]]
                found.append((mass * mask).sum((1, 2)))
            winner = torch.stack(found).argmax(0)
            chosen = torch.zeros((len(mass), view.query_blocks, view.key_blocks), dtype=torch.bool, device=view.device)
            for index, mask in enumerate(masks.values()):
                chosen |= mask[row if len(mask) > 1 else 0] & (winner == index)[:, None, None]
            rows.append(chosen)
        return Selection(torch.stack(rows))

    return build


# Of builders


def union(*builders: "Builder") -> "Builder":
    """Keep what any of the builders keeps, block by block; token predicates are given up, so blocks count as full."""
    return lambda view: _combine([build(view) for build in builders], torch.logical_or)


def intersect(*builders: "Builder") -> "Builder":
    """Keep what all of the builders keep, block by block; token predicates are given up."""
    return lambda view: _combine([build(view) for build in builders], torch.logical_and)


def made(builder: "Builder", view: "View") -> "Builder":
    """Return a builder that gives what a static ``builder`` keeps of ``view``, worked out now and not at every call."""
    mask = builder(view).mask
    return lambda later: Selection(mask.to(later.device))


def force(selection: Selection, view: "View", diagonal: int = -1, sink_frames: int = 0) -> Selection:
    """Add what must be kept in any case.

    Query blocks with a token that is not visual are dense, and key blocks with one are kept by all: text, references
    and sound see and are seen by everything. A row without any block gets the one at its own place. Key blocks past a
    batch row's ``kv_length`` are dropped, where the view has one: nobody could attend to them.

    Args:
        selection: of a builder.
        view: the same.
        diagonal: blocks on either side of a query block's own place that are kept; -1: none.
        sink_frames: first frames whose key blocks are kept (Wan attends to its first frame from everywhere).
    """
    visual, device = view.geometry.visual, view.device
    query_first, key_first = (
        torch.arange(blocks, device=device) * size
        for blocks, size in ((view.query_blocks, view.q_block), (view.key_blocks, view.kv_block))
    )
    has_other = ((query_first + view.q_block).clamp(max=view.geometry.length) > visual)[:, None] | (
        (key_first + view.kv_block).clamp(max=view.geometry.length) > visual
    )
    mask = selection.mask | has_other
    empty = ~selection.mask.any(-1, keepdim=True)
    mask = mask | (empty & _diagonal(view, 0)) | (_diagonal(view, diagonal) if diagonal >= 0 else False)
    full = selection.full
    if full is not None:  # a block of visual and other tokens stays partial: its visual pairs are as they were
        full = full | (query_first >= visual)[:, None] | (key_first >= visual)
    if sink_frames:
        frames = torch.nn.functional.pad(view.order.coordinates[:, 0], (0, -view.geometry.length % view.kv_block), value=-1)
        sink = ((frames >= 0) & (frames < sink_frames)).view(-1, view.kv_block).any(-1)
        mask = mask | sink
    if view.kv_length is not None:
        mask = mask & (key_first < view.kv_length[:, None].to(device))[:, None, None]
    return Selection(mask, full, selection.predicate)


def best(scores: Tensor, count: int) -> Tensor:
    """Return bool, as ``scores`` [..., n], True for the ``count`` best of the last axis.

    NaN counts as lowest. Equal scores go to lower indices, on every device: what topk itself does with them is not
    specified. Entries of -inf are no blocks at all and never count.
    """
    exists = scores != -torch.inf
    scores = _finite(scores)
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & exists


# What they are made of


def _finite(scores: Tensor) -> Tensor:
    """Return scores without NaN and infinities: products of overflown queries must not decide about everything."""
    lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    return scores.nan_to_num(nan=lowest / 2, posinf=highest / 2, neginf=lowest)


def _static(mask: Tensor, view: "View", full: Tensor | None = None, predicate: Predicate | None = None) -> Selection:
    """Place masks [nq, nk] over the visual blocks into the blocks of the sequence."""
    placed = mask.new_zeros((1, 1, view.query_blocks, view.key_blocks))
    placed[..., : view.visual_query_blocks, : view.visual_key_blocks] = mask
    if predicate is None:
        return Selection(placed.to(view.device))
    return Selection(placed.to(view.device), _static(full, view).mask, predicate)


def _dynamic(mask: Tensor, view: "View") -> Selection:
    missing = view.key_blocks - mask.shape[-1], view.query_blocks - mask.shape[-2]
    return Selection(torch.nn.functional.pad(mask, (0, missing[0], 0, missing[1])))


def _exact(view: "View", mask: Tensor, full: Tensor, kind: str, limits: tuple[int, ...]) -> Selection:
    return _static(mask, view, full, Predicate(kind, view.order.coordinates, limits))


def _combine(selections: list[Selection], rule: Callable[[Tensor, Tensor], Tensor]) -> Selection:
    mask = selections[0].mask
    for other in selections[1:]:
        mask = rule(mask, other.mask)
    return Selection(mask)


def _diagonal(view: "View", reach: int) -> Tensor:
    """Return bool [Nq, Nk]: key blocks at most ``reach`` blocks off those that hold a query block's own tokens."""
    query = torch.arange(view.query_blocks, device=view.device)[:, None] * view.q_block
    key = torch.arange(view.key_blocks, device=view.device)
    first, last = query // view.kv_block, (query + view.q_block - 1) // view.kv_block
    return (key >= first - reach) & (key <= last + reach)
