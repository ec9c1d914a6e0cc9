"""What a method's name means: where what it keeps parts from what its nearest neighbour keeps.

Plans are made from the table as a user's request makes them; queries and keys are scripted where they matter.
"""

import dataclasses

import pytest
import torch

from stretto.acceleration.attention.geometry import clip, image
from stretto.acceleration.attention.methods import METHODS
from stretto.acceleration.attention.settings import AttentionSettings

SIZE = 8


def plan_of(method, geometry, **asked):
    return METHODS[method].plan(AttentionSettings(method=method, **{"block": 16, **asked}), geometry)


def mask_of(method, geometry, q=None, k=None, count=1, **asked):
    """What a method keeps [H, Nq, Nk], and the view. ``q`` and ``k`` [H, N, d] are in the method's own order."""
    plan = plan_of(method, geometry, **asked)
    q, k = (None if x is None else x[None] for x in (q, k))
    view = plan.view(geometry, q=q, k=k, scale=1.0, heads=count)
    return plan.selection(view).mask[0], view


def tokens_kept(method, geometry, query, **asked):
    """Coordinates of all keys in kept blocks that one visual query (t, y, x) attends to, by predicate or block."""
    plan = plan_of(method, geometry, **asked)
    view = plan.view(geometry)
    selection = plan.selection(view)
    place = view.order.coordinates.long()
    row = int((place == torch.tensor(query)).all(-1).nonzero())
    kept = selection.mask[0, 0, row // 16].repeat_interleave(16)[: geometry.length]
    if selection.predicate is not None:
        kept = kept & selection.predicate.keeps(torch.tensor([row]), torch.arange(geometry.length))[0]
    return {tuple(key) for key in place[kept].tolist()}


def keys_of(means):
    """Blocks of 16 equal keys with the given first component; the other components are zero."""
    k = torch.zeros(1, 16 * len(means), SIZE)
    k[0, :, 0] = torch.tensor(means).repeat_interleave(16)
    return k


def towards_first(blocks):
    q = torch.zeros(1, 16 * blocks, SIZE)
    q[..., 0] = 1.0
    return q


# By score


def test_block_mass_sees_four_strong_keys_that_the_mean_of_a_block_hides_from_top_k():
    """Block 0 is liked a little throughout; block 3 is disliked but for four keys, which all queries love."""
    k = keys_of([1.0, 0.0, 0.0, -4.0])
    k[0, 48:52, 0] = 12.0
    mean = float(k[0, 48:64, 0].mean())
    assert mean == 0.0
    q = towards_first(4)
    assert mask_of("Top-k", image(8, 8), q, k)[0][0, 0].tolist() == [True, False, False, False]
    assert mask_of("Block mass", image(8, 8), q, k)[0][0, 0].tolist() == [False, False, False, True]


def test_block_mass_looks_at_four_keys_where_subblock_looks_at_a_sixteenth_of_a_pair():
    """In blocks of 64, four strong keys among twelve disliked ones cancel in a part of 16, not in a cell of 4."""
    k = torch.zeros(1, 256, SIZE)
    k[0, :64, 0] = 1.0
    k[0, 192:208, 0] = -4.0
    k[0, 192:196, 0] = 12.0
    q = towards_first(16)
    assert mask_of("SubBlock", image(16, 16), q, k, block=64)[0][0, 0].tolist() == [True, False, False, False]
    assert mask_of("Block mass", image(16, 16), q, k, block=64)[0][0, 0].tolist() == [False, False, False, True]


def test_subblock_keeps_the_models_order_and_adds_nothing_back():
    own, block_mass = plan_of("SubBlock", clip(2, 8, 8)), plan_of("Block mass", clip(2, 8, 8))
    assert (own.order.name, own.correction.tail) == ("identity", False)
    assert (block_mass.order.name, block_mass.correction.tail) == ("tiles", True)


def test_sla_rounds_down_and_keeps_the_models_order_where_top_k_rounds_and_cuts_tiles():
    """11 blocks at 25 %: 2.75 of them."""
    geometry = image(11, 16)
    q, k = towards_first(11), keys_of([float(i) for i in range(11)])
    assert int(mask_of("Top-k", geometry, q, k)[0][0, 0].sum()) == 3
    assert int(mask_of("SLA", geometry, q, k)[0][0, 0].sum()) == 2
    assert plan_of("SLA", geometry).order.name == "identity" and plan_of("Top-k", geometry).order.name == "tiles"


def test_sla_ranks_means_where_subblock_sums_exponentials():
    """Half of block 1 is liked, half disliked: its mean is nothing, its mass is not."""
    k = keys_of([1.0, 0.0, 0.0, 0.0])
    k[0, 16:24, 0], k[0, 24:32, 0] = 6.0, -6.0
    q = towards_first(4)
    assert mask_of("SLA", image(4, 16), q, k)[0][0, 0].tolist() == [True, False, False, False]
    assert mask_of("SubBlock", image(4, 16), q, k)[0][0, 0].tolist() == [False, True, False, False]


def test_draft_gives_rows_what_their_map_deserves_where_top_k_gives_all_alike():
    """Half of the queries like nothing in particular: their map is flat, and all of the budget goes to the others."""
    k = keys_of([3.0, 3.0, 0.0, 0.0])
    q = towards_first(4)
    q[:, 32:] = 0.0
    top = mask_of("Top-k", image(8, 8), q, k, keep=0.25)[0][0].sum(-1).tolist()
    draft = mask_of("DraftAttention", image(8, 8), q, k, keep=0.25)[0][0]
    assert top == [1, 1, 1, 1]
    assert draft.sum(-1).tolist() == [2, 2, 1, 1]  # the last two are the guard's: the map left them empty
    assert plan_of("Top-k", image(8, 8)).correction.tail and not plan_of("DraftAttention", image(8, 8)).correction.tail


def test_sol_keeps_as_many_as_stand_out_and_all_neighbours():
    """One block in 16 stands out, or four do: Top-k keeps four either way."""
    geometry, q = image(16, 16), towards_first(16)
    counts = {}
    for standing_out in (1, 4):
        k = keys_of([9.0 if 16 - i <= standing_out else 0.0 for i in range(16)])
        for method, asked in (("Sol", {"tau": 1.0}), ("Top-k", {"keep": 0.25})):
            counts[method, standing_out] = int(mask_of(method, geometry, q, k, **asked)[0][0, 5].sum())
    assert counts == {("Sol", 1): 1 + 3, ("Sol", 4): 4 + 3, ("Top-k", 1): 4, ("Top-k", 4): 4}


def test_stripes_are_one_choice_for_all_queries_where_sla_has_one_a_row():
    """Every block of queries likes its own block of keys; only block 2 is liked by two."""
    blocks = torch.eye(4)
    blocks[3] = blocks[2]
    q = 8 * torch.nn.functional.pad(blocks.repeat_interleave(16, 0), (0, SIZE - 4))[None]
    k = torch.nn.functional.pad(torch.eye(4).repeat_interleave(16, 0), (0, SIZE - 4))[None]
    stripes = mask_of("Stripes", image(4, 16), q, k, keep=0.25)[0][0]
    sla = mask_of("SLA", image(4, 16), q, k, keep=0.25)[0][0]
    assert stripes.nonzero()[:, 1].tolist() == [2, 2, 2, 2]
    assert sla.nonzero()[:, 1].tolist() == [0, 1, 2, 2]


def test_sparse_vdit_gives_each_head_its_own_pattern():
    """A head that looks around itself, one that looks at its place in all frames, one that looks at one block."""
    geometry = clip(8, 4, 16)  # four blocks a frame
    place = plan_of("Sparse-vDiT", geometry).view(geometry).order.coordinates.float()
    t, y, x = place.T
    index = (t * 4 + y) * 16 + x
    # On an arc, so that logits fall with the distance along it.
    near = torch.stack([torch.cos(index / 170), torch.sin(index / 170)], -1) * 30
    spot = torch.stack([torch.cos((y * 16 + x) / 25), torch.sin((y * 16 + x) / 25)], -1) * 30
    liked = torch.zeros(geometry.length, 2)
    liked[:, 0] = (torch.arange(geometry.length) // 16 == 21) * 30.0
    ones = torch.tensor([1.0, 0.0]).expand(geometry.length, 2)
    q, k = torch.stack([near, spot, ones]), torch.stack([near, spot, liked])
    mask, _ = mask_of("Sparse-vDiT", geometry, q, k, 3, keep=0.25, sink_frames=0)
    for head, mode in enumerate(("diagonal", "multi-diagonal", "stripes")):
        alone, _ = mask_of("Sparse-vDiT", geometry, q, k, 3, keep=0.25, sink_frames=0, heads=(mode,) * 3)
        assert torch.equal(mask[head], alone[head]), mode


# By pattern


def test_clear_is_round_where_grat_is_made_of_groups():
    geometry = image(48, 48)
    round_ = tokens_kept("CLEAR", geometry, (0, 24, 24), radius=6)
    assert round_ == {(0, y, x) for y in range(48) for x in range(48) if (y - 24) ** 2 + (x - 24) ** 2 < 36}
    groups = tokens_kept("GRAT-B", geometry, (0, 24, 24))
    assert groups == {(0, y, x) for y in range(48) for x in range(48)}  # 3 x 3 groups of 16 x 16
    corner = tokens_kept("GRAT-B", geometry, (0, 0, 0))
    assert corner == {(0, y, x) for y in range(32) for x in range(32)}


def test_grat_x_follows_axes_where_grat_b_stays_near():
    geometry = image(80, 80)  # 5 x 5 groups
    near = tokens_kept("GRAT-B", geometry, (0, 40, 40), keep=0.1)
    cross = tokens_kept("GRAT-X", geometry, (0, 40, 40), keep=0.1)
    assert (0, 20, 20) in near and (0, 20, 20) not in cross  # the group across the corner
    assert (0, 40, 2) in cross and (0, 40, 2) not in near  # the far end of the row
    assert len(near) == 9 * 256 and len(cross) == 9 * 256


def test_sliding_tiles_move_inwards_at_borders_where_salads_window_loses_what_lies_outside():
    geometry = image(40, 40)
    for query, sliding, salad in (((0, 0, 0), 9, 4), ((0, 20, 20), 9, 9)):
        kept = tokens_kept("Sliding tiles", geometry, query, keep=0.4)
        assert len(kept) == sliding * 64
        window = tokens_kept("SALAD", geometry, query, keep=0.3, tile=(1, 8, 8))
        assert len(window) == salad * 64


def test_sliding_tiles_and_salad_differ_in_tiles_and_in_what_is_added_back():
    geometry = clip(12, 16, 16)
    sliding, salad = plan_of("Sliding tiles", geometry, block=64), plan_of("SALAD", geometry, block=64)
    assert (sliding.order.tile, salad.order.tile) == ((6, 8, 8), (4, 4, 4))
    assert salad.correction.fitted and not sliding.correction.fitted
    assert plan_of("SALAD", geometry, pattern="top-k").dynamic and not salad.dynamic


def test_arrow_holds_for_tokens_where_diagonal_is_made_of_blocks():
    geometry = image(16, 16)
    position = {(0, y, x): y * 16 + x for y in range(16) for x in range(16)}
    arrow = sorted(position[key] for key in tokens_kept("Arrow", geometry, (0, 8, 3), keep=0.3))
    half = plan_of("Arrow", geometry, keep=0.3).parameters["window"] // 2
    assert arrow == list(range(131 - half, 131 + half + 1))
    diagonal = sorted(position[key] for key in tokens_kept("Diagonal", geometry, (0, 8, 3), keep=0.3))
    assert diagonal[0] % 16 == 0 and (diagonal[-1] + 1) % 16 == 0 and diagonal == list(range(diagonal[0], diagonal[-1] + 1))


def test_diagonal_keeps_the_first_frame_where_arrow_does_not():
    geometry = clip(8, 8, 8)
    first = {(0, y, x) for y in range(8) for x in range(8)}
    assert first <= tokens_kept("Diagonal", geometry, (7, 4, 4), keep=0.3)
    assert not first & tokens_kept("Arrow", geometry, (7, 4, 4), keep=0.3)


def test_multi_diagonal_follows_a_place_through_the_frames_where_diagonal_follows_the_frame():
    geometry = clip(8, 8, 8)
    diagonal = tokens_kept("Diagonal", geometry, (4, 4, 4), keep=0.3, sink_frames=0)
    through = tokens_kept("Multi-diagonal", geometry, (4, 4, 4), keep=0.3)
    assert {(t, 4, 4) for t in range(8)} <= through and not {(t, 4, 4) for t in range(8)} <= diagonal
    assert {(4, y, x) for y in range(8) for x in range(8)} <= diagonal
    assert not {(4, y, x) for y in range(8) for x in range(8)} <= through


def test_radial_keeps_neighbouring_frames_whole_and_thins_out_far_ones_where_diagonal_ends():
    geometry = clip(9, 24, 24)
    radial = tokens_kept("Radial", geometry, (1, 12, 12), decay=1.0, sink_frames=0)
    shares = [sum(key[0] == t for key in radial) / 576 for t in range(9)]
    assert shares[:3] == [1.0, 1.0, 1.0]
    assert 1.0 > shares[3] >= shares[5] >= shares[8] > 0.0 and shares[3] > shares[8]
    density = METHODS["Radial"].density(AttentionSettings(method="Radial", block=16, decay=1.0, sink_frames=0), geometry)
    diagonal = tokens_kept("Diagonal", geometry, (1, 12, 12), keep=density, sink_frames=0)
    assert max(key[0] for key in diagonal) < 8


def test_radial_shows_everybody_the_first_frame():
    geometry = clip(9, 24, 24)
    first = {(0, y, x) for y in range(24) for x in range(24)}
    assert first <= tokens_kept("Radial", geometry, (8, 12, 12), decay=0.25)
    assert not first <= tokens_kept("Radial", geometry, (8, 12, 12), decay=0.25, sink_frames=0)


# No two rows are one method


@pytest.mark.parametrize("geometry", [clip(5, 12, 12), image(32, 40)], ids=["clip", "picture"])
def test_no_two_methods_are_the_same(geometry):
    """At 30 %, on one local head and one of noise, no two plans keep the same tokens and add the same back."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, geometry.length, SIZE, generator=random) for _ in range(2))
    angle = torch.linspace(0, 3, geometry.length)
    q[0, 0], k[0, 0] = 0.0, 0.0
    q[0, 0, :, :2] = k[0, 0, :, :2] = 40 * torch.stack([angle.cos(), angle.sin()], -1)
    seen = {}
    for name, method in METHODS.items():
        if method.fits(geometry):
            continue
        plan = plan_of(name, geometry, keep=0.3)
        view = plan.view(geometry)
        view = dataclasses.replace(
            view, q=q[:, :, view.order.permutation], k=k[:, :, view.order.permutation], scale=SIZE**-0.5, heads=2
        )
        selection = plan.selection(view)
        pairs = selection.mask.repeat_interleave(16, -1).repeat_interleave(16, -2)
        pairs = pairs[..., : geometry.length, : geometry.length]
        if selection.predicate is not None:
            everyone = torch.arange(geometry.length)
            pairs = pairs & selection.predicate.keeps(everyone, everyone)
        pairs = pairs[..., view.order.inverse, :][..., view.order.inverse].expand(1, 2, -1, -1)
        for other, (theirs, correction) in seen.items():
            assert not torch.equal(pairs, theirs) or correction != plan.correction, (name, other)
        seen[name] = pairs, plan.correction
