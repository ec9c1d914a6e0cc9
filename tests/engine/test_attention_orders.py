"""Token orders: a permutation of everything, neighbours together, nothing padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.acceleration.attention.geometry import Geometry, clip, image
from stretto.acceleration.attention.order import ORDERS, OrderSpec, token_order

GRIDS = [(21, 45, 80), (7, 5, 3), (5, 4, 4), (1, 1, 1), (1, 64, 64), (21, 30, 52)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_a_permutation_and_its_inverse_undoes_it(grid, name):
    geometry = clip(*grid, text=3, text_first=True)
    order = token_order(OrderSpec(name, (4, 8, 8)), geometry)
    everyone = torch.arange(geometry.length)
    assert torch.equal(order.permutation[order.inverse], everyone)
    assert torch.equal(order.inverse[order.permutation], everyone)
    assert order.visual == geometry.visual
    t, y, x = order.coordinates[: order.visual].long().T
    raster = (t * grid[1] + y) * grid[2] + x
    assert torch.equal(raster + geometry.start, order.permutation[: order.visual])
    assert bool((order.coordinates[order.visual :] == -1).all())
    assert torch.equal(order.permutation[order.visual :], torch.arange(3))


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    tile=st.tuples(*[st.integers(1, 10)] * 3),
    before=st.integers(0, 5),
    behind=st.integers(0, 5),
    name=st.sampled_from(ORDERS),
)
def test_any_grid_any_tile_any_text(grid, tile, before, behind, name):
    visual = grid[0] * grid[1] * grid[2]
    order = token_order(OrderSpec(name, tile), Geometry(grid, before, before + visual + behind))
    assert sorted(order.permutation.tolist()) == list(range(before + visual + behind))
    assert bool((order.coordinates[:visual] >= 0).all())
    others = [*range(before), *range(before + visual, before + visual + behind)]
    assert order.permutation[visual:].tolist() == others
    assert order.identity == (order.permutation.tolist() == list(range(before + visual + behind)))


def test_identity_is_known_as_such_and_text_in_front_is_not():
    assert token_order(OrderSpec(), image(5, 7, text=4)).identity
    assert not token_order(OrderSpec(), image(5, 7, text=4, text_first=True)).identity


def test_tiles_come_one_by_one_and_ragged_ones_are_smaller():
    order = token_order(OrderSpec("tiles", (1, 2, 2)), image(3, 3))
    assert order.permutation.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


def test_morton_interleaves_x_lowest():
    order = token_order(OrderSpec("morton"), image(4, 4))
    assert order.permutation.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    deep = token_order(OrderSpec("morton"), clip(2, 2, 2))
    assert deep.permutation.tolist() == list(range(8))  # x, y, t from the lowest bit up is raster order here


def test_morton_fills_blocks_of_eight_by_eight():
    place = token_order(OrderSpec("morton"), image(16, 24)).coordinates.long()
    for block in place.split(64):
        assert (block.amax(0) - block.amin(0)).tolist() == [0, 7, 7]


def test_token_major_puts_all_frames_of_a_place_in_a_row():
    order = token_order(OrderSpec("token-major"), clip(3, 2, 2))
    assert order.permutation.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(("grid", "tokens", "blocks"), [
    ((21, 30, 52), 32_760, 512), ((21, 45, 80), 75_600, 1182), ((33, 45, 80), 118_800, 1857), ((33, 48, 80), 126_720, 1980),
])  # fmt: skip
def test_tile_counts_of_well_known_clips(grid, tokens, blocks):
    geometry = clip(*grid)
    assert (geometry.visual, -(-geometry.visual // 64)) == (tokens, blocks)


@pytest.mark.parametrize(("tile", "grid", "waste"), [
    ((4, 4, 4), (21, 30, 52), 0.219), ((4, 4, 4), (21, 45, 80), 0.219), ((4, 4, 4), (33, 45, 80), 0.164),
    ((1, 8, 8), (21, 30, 52), 0.149), ((1, 8, 8), (21, 45, 80), 0.067), ((1, 8, 16), (21, 30, 52), 0.31),
    ((6, 8, 8), (21, 45, 80), 0.22),
])  # fmt: skip
def test_what_padding_would_have_cost(tile, grid, waste):
    """Tiles filled up with zeros would hold this many more tokens; consecutive cuts hold none."""
    padded = visual = 1
    for axis, size in zip(grid, tile):
        padded, visual = padded * -(-axis // size) * size, visual * axis
    assert padded / visual - 1 == pytest.approx(waste, abs=0.006)
    assert len(token_order(OrderSpec("tiles", tile), clip(*grid)).permutation) == visual


@pytest.mark.parametrize(("make", "words"), [
    (lambda: OrderSpec("hilbert"), "one of identity, tiles, morton, token-major"),
    (lambda: OrderSpec("tiles", (0, 8, 8)), "at least one token"),
    (lambda: Geometry((1, 0, 4), 0, 4), "at least one token"),
    (lambda: Geometry((1, 2, 4), 3, 10), "8 visual tokens from 3 on do not fit into a sequence of 10"),
])  # fmt: skip
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
