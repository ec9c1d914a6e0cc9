"""What every method must hold: everything at keep 1, text wherever it stands, one batch row like many."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.acceleration.attention.geometry import Geometry, clip, image
from stretto.acceleration.attention.methods import DEFAULT, METHODS
from stretto.acceleration.attention.methods.clear import PooledKeys, merge
from stretto.acceleration.attention.methods.method import reaches
from stretto.acceleration.attention.settings import AttentionSettings
from stretto.acceleration.errors import StrettoError
from stretto.kernels.block_sparse_attention import BlockList, Tail, pool_blocks
from stretto.kernels.block_sparse_attention.reference import attend

CLIP, PICTURE = clip(5, 9, 11), image(17, 24)
SIZE = 8


def plan_of(method, geometry, **asked):
    settings_ = AttentionSettings(method=method, **{"block": 16, **asked})
    return METHODS[method].plan(settings_, geometry)


def tensors(geometry, batch=1, heads=2, key_heads=None, seed=0, size=SIZE):
    """Smooth queries and keys [B, H, N, d] in the sequence's order; visual ones depend on their place alone."""
    random = torch.Generator().manual_seed(seed)
    visual = [torch.randn(batch, n, geometry.visual, size, generator=random) for n in (heads, key_heads or heads)]
    other = [torch.randn(batch, n, geometry.other, size, generator=random) for n in (heads, key_heads or heads)]
    return [
        torch.cat([o[:, :, : geometry.start], x, o[:, :, geometry.start :]], 2) for x, o in zip(visual, other)
    ]


def view_of(plan, geometry, q, k, **rest):
    view = plan.view(geometry)
    moved = (x.index_select(2, view.order.permutation) for x in (q, k))
    return plan.view(geometry, **dict(zip("qk", moved)), scale=SIZE**-0.5, heads=q.shape[1], **rest)


def fitting(geometry):
    return [name for name, method in METHODS.items() if not method.fits(geometry)]


EVERY = [(name, geometry) for geometry in (CLIP, PICTURE) for name in fitting(geometry)]
with_every_method = pytest.mark.parametrize(("name", "geometry"), EVERY, ids=lambda value: str(getattr(value, "grid", value)))


def beside(geometry, before=0, behind=0):
    """The same picture or clip with other tokens before and behind it."""
    return Geometry(geometry.grid, before, before + geometry.visual + behind)


@with_every_method
@pytest.mark.parametrize("block", [16, 64])
def test_keep_everything_is_plain_attention(name, geometry, block):
    """Every pattern grows to everything, and comes out of the kernel as dense attention does."""
    geometry = beside(geometry, before=7)
    plan = plan_of(name, geometry, keep=1.0, block=block)
    q, k = tensors(geometry)
    view = view_of(plan, geometry, q, k)
    selection = plan.selection(view)
    assert bool(selection.mask.all()), selection.density
    v = torch.randn(*view.k.shape, generator=torch.Generator().manual_seed(1))
    tail = None
    if plan.correction.tail:
        means, sizes = pool_blocks(view.k, block)
        tail = Tail(means, pool_blocks(v, block)[0], sizes)
    blocks = BlockList.from_mask(selection.mask, block, block, selection.full)
    blocks.validate(geometry.length, geometry.length)
    out, _ = attend(view.q, view.k, v, blocks, scale=view.scale, predicate=selection.predicate, tail=tail)
    dense = torch.nn.functional.scaled_dot_product_attention(view.q, view.k, v)
    assert float((out - dense).abs().max()) < 2e-6


@with_every_method
def test_a_larger_budget_keeps_all_that_a_smaller_one_kept(name, geometry):
    q, k = tensors(geometry)
    last = None
    for keep in (0.05, 0.15, 0.3, 0.5, 0.8, 1.0):
        plan = plan_of(name, geometry, keep=keep)
        if name == "Sparse-vDiT":  # its heads may change their pattern; at one pattern each they grow as well
            plan = plan_of(name, geometry, keep=keep, heads=("diagonal", "multi-diagonal"))
        mask = plan.selection(view_of(plan, geometry, q, k)).mask
        assert last is None or bool((mask | ~last).all()), keep
        last = mask


@with_every_method
def test_budgets_are_kept_where_a_pattern_can(name, geometry):
    """By score: exactly. By pattern: at most, unless even the smallest is larger."""
    plan = plan_of(name, geometry, keep=0.3, sink_frames=0)
    view = view_of(plan, geometry, *tensors(geometry))
    density = plan.selection(view).density
    blocks = view.key_blocks
    if name in ("Block mass", "Top-k", "SubBlock", "Stripes"):
        assert density == pytest.approx(round(0.3 * blocks) / blocks)
    elif name == "SLA":
        assert density == pytest.approx(int(0.3 * blocks) / blocks)
    elif name == "DraftAttention":
        assert 0.3 - 1 / blocks <= density <= 0.3 + 1 / blocks
    elif name in ("Diagonal", "Multi-diagonal", "SALAD"):
        assert 0.1 < density <= 0.3 + 1e-6
    elif name == "Sparse-vDiT":  # heads of bands, and of stripes, which round
        assert 0.1 < density <= round(0.3 * blocks) / blocks + 1e-6
    elif name in ("GRAT-B", "GRAT-X", "Sliding tiles", "Radial"):
        smallest = plan_of(name, geometry, keep=0.001, sink_frames=0)
        assert density <= max(0.3, smallest.selection(smallest.view(geometry)).density) + 1e-6
    elif name == "Arrow":  # counted over tokens; blocks are touched beyond
        everyone = torch.arange(geometry.visual)
        pairs = plan.selection(view).predicate.keeps(everyone, everyone).float().mean()
        assert float(pairs) == pytest.approx(0.3, abs=0.005)
    else:
        assert name in ("Sol", "CLEAR")


@with_every_method
@pytest.mark.parametrize("keep", [0.02, 0.3])
def test_no_query_goes_without_and_others_see_and_are_seen(name, geometry, keep):
    geometry = beside(geometry, before=5, behind=20)
    plan = plan_of(name, geometry, keep=keep)
    view = view_of(plan, geometry, *tensors(geometry))
    selection = plan.selection(view)
    assert bool(selection.mask.any(-1).all())
    first = geometry.visual // 16  # the block from which on there are other tokens
    assert bool(selection.mask[..., first:, :].all()) and bool(selection.mask[..., first:].all())
    plan.blocks(view).validate(geometry.length, geometry.length)


@with_every_method
def test_text_in_front_behind_or_references_appended_make_no_difference_among_visual_tokens(name, geometry):
    masks = []
    for before, behind in ((0, 0), (13, 0), (0, 13), (13, 40)):
        placed = beside(geometry, before, behind)
        plan = plan_of(name, placed, keep=0.3)
        selection = plan.selection(view_of(plan, placed, *tensors(placed)))
        whole = geometry.visual // 16  # blocks of visual tokens alone
        masks.append(selection.mask[..., :whole, :whole])
    for mask in masks[1:]:
        assert torch.equal(mask, masks[0])


@with_every_method
def test_a_batch_row_is_kept_what_it_is_kept_alone(name, geometry):
    plan = plan_of(name, geometry, keep=0.3)
    q, k = tensors(geometry, batch=2)
    together = plan.selection(view_of(plan, geometry, q, k)).mask
    for row in range(2):
        alone = plan.selection(view_of(plan, geometry, q[row : row + 1], k[row : row + 1])).mask
        assert torch.equal(alone[0], together[row if len(together) > 1 else 0])


@with_every_method
def test_grouped_query_heads_are_kept_what_repeated_keys_would_be(name, geometry):
    plan = plan_of(name, geometry, keep=0.3)
    q, k = tensors(geometry, heads=4, key_heads=2)
    grouped = plan.selection(view_of(plan, geometry, q, k)).mask
    repeated = plan.selection(view_of(plan, geometry, q, k.repeat_interleave(2, 1))).mask
    assert torch.equal(grouped, repeated)


@with_every_method
def test_a_constant_on_all_keys_changes_no_list(name, geometry):
    """As it changes no output: softmax does not notice. Values are multiples of 1/4, so sums are exact."""
    plan = plan_of(name, geometry, keep=0.3)
    q, k = ((x * 4).round() / 4 for x in tensors(geometry))
    plain = plan.selection(view_of(plan, geometry, q, k)).mask
    moved = plan.selection(view_of(plan, geometry, q, k + 2.0 * torch.arange(-4, 4))).mask
    differing = float((plain != moved).float().mean())
    assert differing <= 0.002, differing  # ties at the edge of a budget may fall either way


@with_every_method
def test_masked_text_is_dropped_and_changes_nothing_else(name, geometry):
    placed = beside(geometry, behind=40)
    plan = plan_of(name, placed, keep=0.3)
    q, k = tensors(placed, batch=2)
    length = torch.tensor([placed.length - 30, placed.length], dtype=torch.int32)
    mask = plan.selection(view_of(plan, placed, q, k, kv_length=length)).mask
    plain = plan.selection(view_of(plan, placed, q, k)).mask
    if not plan.dynamic:  # one list for all calls; the kernel masks keys by itself
        assert torch.equal(mask, plain)
        return
    beyond = torch.arange(mask.shape[-1]) * 16 >= placed.length - 30
    assert bool(beyond.any()) and not bool(mask[0][..., beyond].any())
    assert torch.equal(mask[0][..., ~beyond], plain[0][..., ~beyond]) and torch.equal(mask[1], plain[1])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].dynamic])
def test_overflown_queries_and_keys_do_not_break_lists(name):
    plan = plan_of(name, CLIP, keep=0.3)
    q, k = tensors(CLIP)
    k[:, :, 40:44], q[:, :, 90] = torch.nan, torch.inf
    mask = plan.selection(view_of(plan, CLIP, q, k)).mask
    assert bool(mask.any(-1).all())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(METHODS)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    text=st.integers(0, 20),
    keep=st.floats(0.01, 1.0),
    block=st.sampled_from([16, 32]),
)
def test_any_grid_gives_valid_lists(name, grid, text, keep, block):
    geometry = clip(*grid, text=text, text_first=True)
    plan = plan_of(name, geometry, keep=keep, block=block)
    view = view_of(plan, geometry, *tensors(geometry))
    selection = plan.selection(view)
    assert selection.mask.shape[-2:] == (view.query_blocks, view.key_blocks)
    assert bool(selection.mask.any(-1).all())
    plan.blocks(view).validate(geometry.length, geometry.length)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].dynamic])
@pytest.mark.parametrize("masked", [False, True])
def test_choosing_never_waits_for_the_device_nor_mixes_two(name, masked):
    """On tensors without values, reading one raises; and those of a GPU do not meet those of the CPU."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    geometry = beside(CLIP, behind=20)
    plan = plan_of(name, geometry, keep=0.3)
    plain = plan.view(geometry)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        moved = {
            field: torch.empty_like(getattr(plain.order, field), device="cuda")
            for field in ("permutation", "inverse", "coordinates")
        }
        q, k = (torch.empty(2, heads, geometry.length, SIZE, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        length = torch.empty(2, dtype=torch.int32, device="cuda") if masked else None
        order = dataclasses.replace(plain.order, **moved)
        view = dataclasses.replace(plain, order=order, q=q, k=k, kv_length=length, heads=4)
        blocks = plan.blocks(view)
        assert blocks.index.device.type == "cuda" and blocks.index.shape[:2] == (2, 4)


# What the table says


@with_every_method
def test_static_methods_know_their_density_and_look_at_nothing(name, geometry):
    method, asked = METHODS[name], AttentionSettings(method=name, block=16)
    density = method.density(asked, geometry)
    assert (density is None) == method.dynamic == method.plan(asked, geometry).dynamic
    assert density is None or 0 < density <= 1


@with_every_method
def test_plans_are_json(name, geometry):
    document = plan_of(name, geometry).to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["method"] == name and document["parameters"]


def test_every_row_names_its_source_and_default_is_one():
    assert DEFAULT in METHODS and AttentionSettings().method == DEFAULT
    for name, method in METHODS.items():
        assert method.name == name and method.source and method.summary[0].islower()
        assert method.knob in ("keep", "radius", "tau", "decay")


@pytest.mark.parametrize(("name", "geometry", "words"), [
    ("CLEAR", CLIP, "for pictures"), ("Radial", PICTURE, "only one frame"), ("Multi-diagonal", PICTURE, "only one"),
])  # fmt: skip
def test_methods_say_what_they_are_not_for(name, geometry, words):
    assert words in METHODS[name].fits(geometry)


def test_trained_parts_stand_in_for_the_tail():
    assert plan_of("SLA", CLIP).correction.tail and not plan_of("SLA", CLIP, weights="sla.safetensors").correction.tail
    assert plan_of("SALAD", CLIP).correction.fitted
    assert not plan_of("SALAD", CLIP, weights="salad.safetensors").correction.fitted
    assert plan_of("SubBlock", CLIP, tail="on").correction.tail
    assert not plan_of("Top-k", CLIP, tail="off").correction.tail


def test_settings_override_a_methods_own_tile_sinks_and_numbers():
    assert plan_of("SLA", CLIP, tile=(1, 4, 4)).order.tile == (1, 4, 4)
    assert plan_of("Radial", CLIP).sink_frames == 1 and plan_of("Radial", CLIP, sink_frames=0).sink_frames == 0
    assert plan_of("Radial", CLIP, decay=0.5).parameters == {"decay": 0.5}
    assert plan_of("Sol", CLIP, tau=1.5).parameters == {"tau": 1.5}
    assert plan_of("Sol", CLIP, keep=0.16).parameters["tau"] == pytest.approx(1.0, abs=0.01)
    assert plan_of("CLEAR", PICTURE, radius=8).parameters["radius"] == 8
    assert plan_of("CLEAR", PICTURE, exact="off").selection(plan_of("CLEAR", PICTURE).view(PICTURE)).full is None
    sized = plan_of("CLEAR", PICTURE, radius=0, keep=0.3)
    assert sized.selection(sized.view(PICTURE)).density <= 0.3 < sized.parameters["radius"]


@pytest.mark.parametrize("clamp", [False, True])
def test_windows_grow_by_one_step_to_everything(clamp):
    path = reaches((4, 6, 10), clamp)
    assert path[0] == (0, 0, 0) and path[-1] == ((2, 3, 5) if clamp else (3, 5, 9))
    assert all(sum(b) - sum(a) == 1 and all(y >= x for x, y in zip(a, b)) for a, b in pairwise(path))


# Sparse-vDiT's heads


def test_heads_as_a_search_names_them():
    modes = ("diagonal", "skip", "full", "multi-diagonal", "stripes")
    plan = plan_of("Sparse-vDiT", CLIP, heads=modes, keep=0.4)
    mask = plan.selection(view_of(plan, CLIP, *tensors(CLIP, heads=5))).mask[0]
    assert not bool(mask[1].any()) and bool(mask[2].all())
    assert len({tuple(mask[head].flatten().tolist()) for head in range(5)}) == 5
    static = plan_of("Sparse-vDiT", CLIP, heads=modes[:4])
    asked = AttentionSettings(method="Sparse-vDiT", block=16, heads=modes[:4])
    assert 0 < METHODS["Sparse-vDiT"].density(asked, CLIP) < 1
    assert not static.dynamic
    assert static.selection(static.view(CLIP, heads=4)).mask.shape[1] == 4
    with pytest.raises(StrettoError, match="5 modes are given, but this attention has 2 heads"):
        plan.selection(view_of(plan, CLIP, *tensors(CLIP)))


# CLEAR's pooled keys


def test_pooled_keys_are_means_of_patches_and_ragged_ones_of_fewer():
    geometry, pooled = image(5, 6, text=3, text_first=True), PooledKeys(4)
    plan = plan_of("CLEAR", geometry, pool=4)
    order = plan.view(geometry).order
    x = torch.randn(1, 2, geometry.length, SIZE)
    means = pooled.pool(x.index_select(2, order.permutation), geometry, order)
    grid = x[:, :, 3:].unflatten(2, (5, 6))
    assert means.shape[2] == pooled.count(geometry) == 4
    for index, (rows, columns) in enumerate([((0, 4), (0, 4)), ((0, 4), (4, 6)), ((4, 5), (0, 4)), ((4, 5), (4, 6))]):
        patch = grid[:, :, slice(*rows), slice(*columns)]
        torch.testing.assert_close(means[:, :, index], patch.mean((2, 3)))
    learned = PooledKeys(4, torch.full((4, 4), 1 / 16)).pool(x.index_select(2, order.permutation), geometry, order)
    torch.testing.assert_close(learned[:, :, 0], means[:, :, 0])


def test_pooled_keys_join_the_softmax_of_visual_queries_alone():
    geometry = image(8, 8, text=5)
    plan = plan_of("CLEAR", geometry, pool=4, radius=3)
    q, k = tensors(geometry)
    view = view_of(plan, geometry, q, k)
    v = torch.randn(*view.k.shape)
    selection, extra = plan.selection(view), plan.extra_keys
    out, lse = attend(view.q, view.k, v, plan.blocks(view), scale=view.scale, predicate=selection.predicate)
    keys, values = (extra.pool(x, geometry, view.order) for x in (view.k, v))
    more, more_lse = attend(view.q, keys, values, extra.blocks(view), scale=view.scale)
    merged = merge(out, lse, more, more_lse, geometry.visual)
    everyone = torch.arange(geometry.length)
    kept = selection.predicate.keeps(everyone, everyone)
    seen = (everyone < geometry.visual)[:, None].expand(-1, keys.shape[2])
    expected = torch.nn.functional.scaled_dot_product_attention(
        view.q, torch.cat([view.k, keys], 2), torch.cat([v, values], 2), attn_mask=torch.cat([kept, seen], 1)
    )
    torch.testing.assert_close(merged, expected, atol=2e-6, rtol=1e-5)
    assert plan.to_json()["extra_keys"] == 4


def test_frozen_plans_are_equal_in_what_they_say():
    assert plan_of("Radial", CLIP).to_json() == plan_of("Radial", CLIP).to_json()
    assert dataclasses.replace(plan_of("Radial", CLIP), diagonal=1).to_json()["diagonal"] == 1
