"""Builders against token-by-token masks, published densities and closed forms; and what is always kept."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.acceleration.attention.builders import (
    CLAMP,
    Selection,
    arrow,
    band,
    best,
    box,
    box_tiles,
    cross_tiles,
    everything,
    force,
    frame_log_band,
    global_threshold,
    intersect,
    live_stripes,
    radius,
    stripes,
    tau_sigma,
    top_k,
    top_p,
    union,
)
from stretto.acceleration.attention.geometry import Geometry, clip, image
from stretto.acceleration.attention.methods.radial import band_width
from stretto.acceleration.attention.order import OrderSpec, token_order
from stretto.acceleration.attention.plan import View

ORDERS = [
    OrderSpec(), OrderSpec("tiles", (1, 4, 4)), OrderSpec("tiles", (2, 3, 5)), OrderSpec("morton"), OrderSpec("token-major"),
]  # fmt: skip
GEOMETRIES = [clip(3, 7, 9), Geometry((1, 12, 20), 5, 251), Geometry((2, 5, 7), 0, 90), image(5, 7), clip(1, 1, 1)]


def look(geometry, order=ORDERS[0], block=16, **rest):
    return View(geometry, token_order(order, geometry), block, block, **rest)


def tokens_of(view):
    """Coordinates (t, y, x) of queries [n, 1] and keys [n] in the view's order, for visual tokens."""
    place = view.order.coordinates[: view.geometry.visual].long()
    return [(place[:, None, axis], place[None, :, axis]) for axis in range(3)]


def blocks_of(view, pairs):
    """Which blocks hold any pair of a token mask [n, n], and which only such pairs."""
    rows, columns = view.visual_query_blocks, view.visual_key_blocks
    missing = (0, columns * view.kv_block - len(pairs), 0, rows * view.q_block - len(pairs))

    def reduced(fill):
        padded = torch.nn.functional.pad(pairs, missing, value=fill)
        return padded.view(rows, view.q_block, columns, view.kv_block)

    any_pair, all_pairs = torch.zeros(2, view.query_blocks, view.key_blocks, dtype=torch.bool)
    any_pair[:rows, :columns] = reduced(False).any(3).any(1)
    all_pairs[:rows, :columns] = reduced(True).all(3).all(1)
    return any_pair, all_pairs


def band_pairs(view):
    position = torch.arange(view.geometry.visual)
    gap = position - position[:, None]
    return (gap >= -20) & (gap <= 7)


def radius_pairs(view):
    (t, tk), (y, yk), (x, xk) = tokens_of(view)
    return (t == tk) & ((y - yk) ** 2 + (x - xk) ** 2 < 16)


def box_pairs(view):
    (t, tk), (y, yk), (x, xk) = tokens_of(view)
    return ((t - tk).abs() <= 1) & ((y - yk).abs() <= 2) & ((x - xk).abs() <= 3)


def tile_pairs(view):
    return ((torch.stack([(a // s - b // s).abs() for (a, b), s in zip(tokens_of(view), (1, 3, 4))])) <= 1).all(0)


def clamp_pairs(view):
    kept = torch.ones(1, dtype=torch.bool)
    for (a, b), s, size in zip(tokens_of(view), (1, 3, 4), view.geometry.grid):
        count = -(-size // s)
        first = (a // s - 1).clamp(0, max(count - 3, 0))
        kept = kept & (b // s >= first) & (b // s < first + 3)
    return kept


def cross_pairs(view):
    counts = [-(-size // s) for size, s in zip(view.geometry.grid, (1, 3, 4))]
    shared = [a // s == b // s for (a, b), s, count in zip(tokens_of(view), (1, 3, 4), counts) if count > 1]
    return torch.stack(shared).any(0) if shared else torch.ones(1, 1, dtype=torch.bool)


EXACT = {
    "band": (band(-20, 7, exact=True), band_pairs, True),
    "radius": (radius(4), radius_pairs, True),
    "box": (box((1, 2, 3)), box_pairs, True),
    "tiles": (box_tiles((1, 3, 4), (1, 1, 1), exact=True), tile_pairs, True),
    "rounded radius": (radius(4, exact=False), radius_pairs, False),
    "clamped tiles": (box_tiles((1, 3, 4), (1, 1, 1), CLAMP), clamp_pairs, False),
    "cross": (cross_tiles((1, 3, 4)), cross_pairs, False),
}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_static_builders_are_exact(name, order, geometry):
    """Kept: any token pair is. Full: all are. And the predicate says the same about tokens."""
    builder, pairs, exact = EXACT[name]
    view = look(geometry, order)
    expected = pairs(view).expand(geometry.visual, geometry.visual)
    selection = builder(view)
    any_pair, all_pairs = blocks_of(view, expected)
    assert torch.equal(selection.mask[0, 0], any_pair)
    assert (selection.full is None) is not exact and (selection.predicate is None) is not exact
    if exact:
        assert torch.equal(selection.full[0, 0], all_pairs)
        everyone = torch.arange(geometry.length)
        kept = selection.predicate.keeps(everyone, everyone)
        assert torch.equal(kept[: geometry.visual, : geometry.visual], expected)
        assert bool(kept[geometry.visual :].all()) and bool(kept[:, geometry.visual :].all())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bands_between_frames_are_exact(geometry):
    view = look(geometry)
    widths = [9, 4, -1]
    position = torch.arange(geometry.visual)
    frame, inside = position // geometry.frame, position % geometry.frame
    wide = torch.tensor(widths)[(frame - frame[:, None]).abs()]
    expected = (inside - inside[:, None]).abs() <= wide
    selection = frame_log_band(lambda distance, frame: widths[distance])(view)
    assert torch.equal(selection.mask[0, 0], blocks_of(view, expected)[0])


def test_bands_between_frames_need_raster_order():
    with pytest.raises(ValueError, match="raster order, not 'morton'"):
        frame_log_band(lambda distance, frame: 1)(look(clip(2, 4, 4), OrderSpec("morton")))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11)),
    order=st.sampled_from(ORDERS),
    name=st.sampled_from(sorted(EXACT)),
    block=st.sampled_from([4, 16]),
)
def test_static_builders_are_exact_on_any_grid(grid, order, name, block):
    builder, pairs, _ = EXACT[name]
    view = look(clip(*grid), order, block)
    expected = pairs(view).expand(view.geometry.visual, view.geometry.visual)
    assert torch.equal(builder(view).mask[0, 0], blocks_of(view, expected)[0])


# Published densities


@pytest.mark.parametrize(("side", "share", "density"), [
    (64, 8, 0.306), (64, 16, 0.259), (64, 32, 0.235), (128, 8, 0.174), (128, 16, 0.118), (128, 32, 0.089),
])  # fmt: skip
def test_arrow_densities(side, share, density):
    """DiTFastAttnV2's windows n/8, n/16 and n/32 beside 512 text tokens, counted over tokens."""
    geometry = image(side, side, text=512, text_first=True)
    half = geometry.visual // (2 * share)
    view = look(geometry, block=64)
    selection = arrow(half, exact=True)(view)
    rows = torch.arange(8, geometry.length, 16)  # the density hardly changes from row to row
    kept = selection.predicate.keeps(rows, torch.arange(geometry.length)).float().mean()
    assert float(kept) == pytest.approx(density, abs=0.0006)
    visual = side * side // 64
    assert bool(selection.mask[..., visual:, :].all()) and bool(selection.mask[..., visual:].all())
    assert torch.equal(selection.mask, selection.mask.mT)
    assert int(selection.mask[0, 0, visual // 2, :visual].sum()) == 2 * math.ceil(half / 64) + 1


@pytest.mark.parametrize(("geometry", "tile", "near", "cross"), [
    (image(64, 64), (1, 16, 16), 0.3906, 0.4375), (image(128, 128), (1, 16, 16), 0.1182, 0.2344),
    (image(512, 512), (1, 16, 16), 0.00843, 0.0615), (clip(32, 48, 80), (4, 8, 8), 0.0428, 0.3438),
], ids=str)  # fmt: skip
def test_grat_densities(geometry, tile, near, cross):
    """Groups around, and groups that share an index: 4 x 4, 8 x 8, 32 x 32 and 8 x 6 x 10 of them."""
    view = look(geometry, OrderSpec("tiles", tile), 256)
    around = box_tiles(tile, (1, 1, 1))(view).density
    shared = cross_tiles(tile)(view).density
    assert around == pytest.approx(near, abs=0.0001 if near > 0.01 else 0.00001)
    assert shared == pytest.approx(cross, abs=0.0001)
    counts = [-(-size // side) for size, side in zip(geometry.grid, tile)]
    assert around == pytest.approx(math.prod((m * 3 - 2) / m**2 for m in counts), rel=1e-5)
    assert shared == pytest.approx(1 - math.prod(1 - 1 / m for m in counts if m > 1), rel=1e-5)


@pytest.mark.parametrize(("limit", "element", "raster", "tiled", "wide", "whole"), [
    (8, 0.0112, 0.114, 0.0323, 0.0618, 0.0), (16, 0.0434, 0.228, 0.0836, 0.0994, 0.05),
    (32, 0.156, 0.432, 0.226, 0.257, 0.37),
])  # fmt: skip
def test_clear_densities(limit, element, raster, tiled, wide, whole):
    """128 x 128 tokens: pairs, blocks of 64 in raster order and in tiles, blocks of 128, blocks that are full."""
    geometry = image(128, 128)
    axis = torch.arange(128)
    by_gap = 128 - axis  # ordered pairs of rows with a gap, one way
    gaps = torch.where(axis == 0, by_gap, 2 * by_gap).double()
    inside = (axis[:, None] ** 2 + axis**2 < limit**2).double()
    assert float(gaps @ inside @ gaps) / 128**4 == pytest.approx(element, rel=0.006)
    densities = {}
    for name, spec, block in (
        ("raster", OrderSpec(), 64), ("tiles", OrderSpec("tiles", (1, 8, 8)), 64),
        ("wide", OrderSpec("tiles", (1, 8, 16)), 128),
    ):  # fmt: skip
        densities[name] = radius(limit)(look(geometry, spec, block))
    assert densities["raster"].density == pytest.approx(raster, rel=0.006)
    assert densities["tiles"].density == pytest.approx(tiled, rel=0.006)
    assert densities["wide"].density == pytest.approx(wide, rel=0.006)
    full = densities["tiles"].full.sum() / densities["tiles"].mask.sum()
    assert float(full) == pytest.approx(whole, abs=0.006)


def test_a_z_curve_cuts_the_same_squares_as_tiles_where_sides_are_powers_of_two():
    tiles, morton = (radius(7)(look(image(32, 32), spec, 64)) for spec in (OrderSpec("tiles"), OrderSpec("morton")))
    assert (tiles.density, int(tiles.full.sum())) == (morton.density, int(morton.full.sum()))


@pytest.mark.parametrize(("frames", "frame", "decay", "density"), [
    (18, 3840, 0.2, 0.26), (21, 3600, 0.2, 0.23), (21, 3600, 1.0, 0.38), (30, 3840, 0.95, 0.29), (21, 1560, 1.0, 0.41),
])  # fmt: skip
def test_radial_densities(frames, frame, decay, density):
    """Pairs of tokens; the first frame, which is always seen, included."""
    width, kept = band_width(decay), 0
    for distance in range(frames):
        half = min(width(distance, frame), frame - 1)
        pairs = frame * (2 * half + 1) - half * (half + 1) if half >= 0 else 0
        times = frames if distance == 0 else 2 * (frames - distance) - 1  # one of them is the first frame's
        kept += times * pairs + (frame**2 if distance else 0)
    assert kept / (frames * frame) ** 2 == pytest.approx(density, abs=0.005)


@pytest.mark.parametrize(("blocks", "reach"), [(12, 0), (12, 3), (40, 11)])
def test_a_band_of_whole_blocks_has_the_closed_form(blocks, reach):
    mask = band(-16 * reach, 16 * reach)(look(image(blocks, 16))).mask
    assert int(mask.sum()) == blocks * (2 * reach + 1) - reach * (reach + 1)


def test_stripes_are_columns():
    mask = stripes([(0, 3), (40, 49)])(look(image(8, 10))).mask[0, 0]
    assert torch.equal(mask, torch.tensor([True, False, True, True, False]).expand(5, 5))


def test_union_and_intersection():
    view = look(image(12, 16))
    first, second = band(0, 20), stripes([(0, 1)])
    either, both = union(first, second)(view).mask, intersect(first, second)(view).mask
    assert torch.equal(either, first(view).mask | second(view).mask)
    assert torch.equal(both, first(view).mask & second(view).mask)


# By score


def scored(values):
    """A view of as many blocks as ``values`` [H, nq, nk] has, and the score that gives them."""
    scores = torch.as_tensor(values, dtype=torch.float32)[None]
    return look(image(scores.shape[-1], 16)), lambda view: scores


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, math.nan, math.inf]), min_size=1, max_size=12),
    count=st.integers(1, 12),
)
def test_best_is_exact_in_number_and_gives_ties_to_lower_blocks(values, count):
    count = min(count, len(values))
    rank = sorted(range(len(values)), key=lambda i: (-(values[i] if values[i] == values[i] else -math.inf), i))
    kept = best(torch.tensor([values]), count)[0].nonzero().flatten().tolist()
    assert kept == sorted(rank[:count])


def test_best_never_counts_what_does_not_exist():
    assert best(torch.tensor([[-math.inf, 1.0, -math.inf]]), 2).tolist() == [[False, True, False]]


@pytest.mark.parametrize(("keep", "count"), [(0.01, 1), (0.25, 2), (0.3, 2), (0.35, 3), (1.0, 8)])
def test_top_k_keeps_the_rounded_share(keep, count):
    view, score = scored(torch.randn(3, 8, 8))
    assert top_k(score, keep)(view).mask.sum(-1).unique().tolist() == [count]


def test_top_p_keeps_the_fewest_that_reach_the_mass():
    view, score = scored(torch.tensor([[[0.5, 0.3, 0.15, 0.05]] * 4]).log())
    counts = {mass: int(top_p(score, mass)(view).mask[0, 0, 0].sum()) for mass in (0.4, 0.6, 0.9, 0.99, 1.0)}
    assert counts == {0.4: 1, 0.6: 2, 0.9: 3, 0.99: 4, 1.0: 4}


def test_a_global_threshold_counts_over_the_whole_map_and_its_guard_fills_empty_rows():
    peaked, flat = torch.tensor([9.0, 8.9, 0, 0]), torch.zeros(4)
    view, score = scored(torch.stack([torch.stack([peaked, flat, peaked, flat])]))
    bare = global_threshold(score, 0.25, guard=False)(view).mask[0, 0]
    assert int(bare.sum()) == 4 and bare.any(-1).tolist() == [True, False, True, False]
    guarded = global_threshold(score, 0.25)(view).mask[0, 0]
    assert guarded.sum(-1).tolist() == [2, 1, 2, 1]


def test_tau_sigma_counts_deviations_of_the_block_means():
    view = _random_view(image(16, 16), seed=3)
    q, k = view.q.unflatten(2, (16, 16)).mean(3)[0, 0], view.k.unflatten(2, (16, 16)).mean(3)[0, 0]
    k = k - k.mean(0)
    deviation = (q.square() @ k.square().mean(0)).sqrt()
    above = (q @ k.T) > 0.7 * deviation[:, None]
    mask = tau_sigma(0.7, near=-1)(view).mask[0, 0]
    rows = above.any(-1)
    assert torch.equal(mask[rows], above[rows]) and bool(mask.any(-1).all())
    near = tau_sigma(0.7, near=1)(view).mask[0, 0]
    distance = (torch.arange(16) - torch.arange(16)[:, None]).abs()
    assert torch.equal(near, mask | (distance <= 1))


@pytest.mark.parametrize(("tau", "share"), [(1.0, 0.16), (1.5, 0.07), (2.0, 0.025)])
def test_tau_sigma_keeps_about_what_a_normal_distribution_says(tau, share):
    view = _random_view(image(64, 64), seed=1, size=32)
    assert tau_sigma(tau, near=-1)(view).density == pytest.approx(share, abs=0.012)


def test_live_stripes_find_the_keys_that_everybody_likes():
    view = _random_view(image(16, 16))
    liked = torch.ones(8)
    k = view.k.clone()
    k[:, :, [37, 200]] += 20 * liked
    view = dataclasses.replace(view, q=view.q + liked, k=k)
    mask = live_stripes(2 / 16)(view).mask
    assert bool((mask == mask[:, :, :1]).all())
    assert mask[0, 0, 0].nonzero().flatten().tolist() == [37 // 16, 200 // 16]


# What is always kept


def _random_view(geometry, seed=0, size=8, **rest):
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, geometry.length, size, generator=random) for _ in range(2))
    return look(geometry, q=q, k=k, scale=size**-0.5, **rest)


def nothing(view):
    return Selection(torch.zeros(1, 1, view.query_blocks, view.key_blocks, dtype=torch.bool))


def test_other_tokens_are_dense_rows_and_kept_keys_and_nobody_goes_without():
    view = look(image(7, 8, text=20))  # 56 visual tokens: the fourth block is mixed, the fifth text alone
    mask = force(nothing(view), view).mask[0, 0]
    expected = torch.eye(5, dtype=torch.bool)
    expected[3:] = True
    expected[:, 3:] = True
    assert torch.equal(mask, expected)


def test_force_is_idempotent_and_only_adds():
    view = look(image(9, 9, text=5), OrderSpec("tiles", (1, 4, 4)))
    once = force(radius(3)(view), view, diagonal=1)
    twice = force(once, view, diagonal=1)
    assert torch.equal(once.mask, twice.mask) and torch.equal(once.full, twice.full)
    assert bool((once.mask | ~radius(3)(view).mask).all())


def test_blocks_of_text_need_no_predicate_and_mixed_ones_do():
    """A mixed block sees all visual tokens' blocks, but its visual tokens only what the rule says."""
    view = look(image(7, 8, text=20))
    selection = force(band(-4, 4, exact=True)(view), view)
    full = selection.full[0, 0]
    assert bool(full[4].all()) and bool(full[:, 4].all())
    assert full[3, :4].tolist() == [False] * 4
    kept = selection.predicate.keeps(torch.arange(48, 56), torch.arange(48))
    assert not bool(kept[:, :44].any())


def test_sink_frames_and_diagonal():
    view = look(clip(3, 4, 8))  # two blocks a frame
    mask = force(nothing(view), view, diagonal=1, sink_frames=1).mask[0, 0]
    distance = (torch.arange(6) - torch.arange(6)[:, None]).abs()
    assert torch.equal(mask, (distance <= 1) | (torch.arange(6) < 2))


def test_the_diagonal_follows_places_where_blocks_differ_in_size():
    geometry = image(8, 16)
    view = View(geometry, token_order(OrderSpec(), geometry), 32, 16)
    mask = force(nothing(view), view).mask[0, 0]
    assert mask.nonzero().tolist() == [[i, j] for i in range(4) for j in (2 * i, 2 * i + 1)]


def test_keys_past_the_length_are_dropped_row_by_row():
    view = look(image(4, 8, text=32), kv_length=torch.tensor([40, 64], dtype=torch.int32))
    mask = force(everything()(view), view).mask
    assert mask.shape == (2, 1, 4, 4)
    assert mask[:, 0, 0].tolist() == [[True, True, True, False], [True] * 4]
