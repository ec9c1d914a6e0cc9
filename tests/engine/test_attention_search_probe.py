"""The probe reads off what attention over lists really loses, and what is found from it holds on inputs it never saw."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.geometry import Geometry
from stretto.acceleration.attention.order import OrderSpec, token_order
from stretto.acceleration.attention.plan import View
from stretto.acceleration.attention.reuse import AttentionMemory, Mode, ModeTable, uniform
from stretto.acceleration.attention.search import (
    LADDER,
    Limits,
    ModelTag,
    Pattern,
    Probe,
    as_plan,
    head_selection,
    pose,
)
from stretto.acceleration.evaluation import Branch
from stretto.kernels.block_sparse_attention import BlockList, block_sparse_attention

from . import attention_fixture as fixture

TILES, RASTER = OrderSpec("tiles", (1, 4, 4)), OrderSpec()
SMALL = Geometry((3, 12, 12), 0, 432 + 21)  # the last visual block holds text besides


def random(seed):
    return torch.Generator().manual_seed(seed)


def view_of(q, k, geometry, order, block=16, layer=0, kv_length=None):
    made = token_order(order, geometry)
    return View(geometry, made, block, block, q, k, kv_length, q.shape[-1] ** -0.5, layer, 1, q.shape[1])


def small(seed=0, rows=2, heads=4, key_heads=2, size=16):
    shapes = (heads, key_heads, key_heads)
    return [torch.randn(rows, h, SMALL.length, size, generator=random(seed + i)) * 1.5 for i, h in enumerate(shapes)]


def full_rows(view, v, mask=None):
    """Return attention over a block mask, or all, fp32, by the kernel."""
    mask = torch.ones(1, 1, view.query_blocks, view.key_blocks, dtype=torch.bool) if mask is None else mask
    lists = BlockList.from_mask(mask, view.q_block, view.kv_block)
    return block_sparse_attention(view.q, view.k, v, lists, scale=view.scale, kv_length=view.kv_length)[0]


@pytest.mark.parametrize("order", [RASTER, TILES])
@pytest.mark.parametrize("length", [None, (453, 440)])
def test_the_curve_is_the_error_of_attention_over_those_lists(order, length):
    q, k, v = small()
    kv_length = None if length is None else torch.tensor(length, dtype=torch.int32)
    view = view_of(q, k, SMALL, order, kv_length=kv_length)
    probe = Probe(
        samples=30,
        ladder=(0.1, 0.3, 1.0),
        reuse=False,
        patterns=(Pattern(), Pattern("arrow", 0.1), Pattern("stripes", 0.2)),
    )
    probe.observe(view, v, "cond", 1.0)
    curves = probe.curves(1, 4)
    full, rows = full_rows(view, v), slice(0, 27 * 16)  # every visual block has been looked at
    for budget in (0.1, 0.3):
        option = next(i for i, o in enumerate(curves.options) if o.mode == Mode.LIST and o.budget == budget)
        mask = head_selection(view, probe.patterns, np.zeros(4, int), np.full(4, budget)).mask
        # The block of picture and text is in every list, so a list by rank may hold one block less.
        lost = [full_rows(view, v, mask)[:, :, rows] - full[:, :, rows], full[:, :, rows]]
        expected = (lost[0].square().sum((0, 2, 3)) / lost[1].square().sum((0, 2, 3))).numpy()
        assert np.allclose(curves.error[0, 0, :, option], expected, rtol=0.03)
        assert curves.density[0, 0, 0, option] == pytest.approx(float(mask[:, :, :27].float().mean()), abs=0.02)
    for pattern in (1, 2):
        option = next(i for i, o in enumerate(curves.options) if o.pattern == pattern and o.mode == Mode.LIST)
        mask = head_selection(view, probe.patterns, np.full(4, pattern), np.zeros(4)).mask
        expected = relative(full_rows(view, v, mask)[:, :, rows], full[:, :, rows]) ** 2
        assert np.allclose(curves.error[0, 0, :, option], expected, rtol=1e-3)
    held = curves.rho[0, 0, :, : len(probe.ladder)]
    assert np.allclose(held[:, -1], 1) and (np.diff(held, axis=-1) >= 0).all()


def test_text_may_stand_anywhere_and_heads_may_be_looked_at_in_parts(monkeypatch):
    q, k, v = small()
    found = []
    for chunk in (1 << 28, 1):
        monkeypatch.setattr("stretto.acceleration.attention.search.probe.CHUNK_BYTES", chunk)
        probe = Probe(samples=3)
        for sigma in (1.0, 0.9):
            probe.observe(view_of(q, k, SMALL, TILES), v, "cond", sigma)
        found.append(probe.curves(1, 4))
    assert np.allclose(found[0].error, found[1].error, rtol=1e-4, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("pattern", [0, 2])
@pytest.mark.parametrize("mode", [Mode.SHARE, Mode.RESIDUAL, Mode.RHO, Mode.MEAN, Mode.BLEND])
def test_what_a_mode_loses_is_what_the_memory_then_does(mode, pattern):
    first, second = small(), [0.95 * a + 0.3 * b for a, b in zip(small(), small(50))]
    patterns = (Pattern(), Pattern("frame band", 0.3), Pattern("arrow", 0.1))  # the second does not fit tiles
    probe = Probe(samples=30, ladder=(0.3, 1.0), patterns=patterns)
    for step, (q, k, v) in enumerate((first, second)):
        probe.observe(view_of(q, k, SMALL, TILES), v, "cond", 1.0 - step / 10)
    curves = probe.curves(1, 4)
    assert all(np.isnan(curves.error[..., i]).all() for i, o in enumerate(curves.options) if o.pattern == 1)
    alpha = curves.alpha[:, :, :, 3 if pattern else 0]
    modes = np.array([[[int(Mode.FULL)] * 4], [[int(mode)] * 4]], np.uint8)
    memory = AttentionMemory(ModeTable(modes, alpha=np.repeat(alpha, 2, 0)))
    for step, (q, k, v) in enumerate((first, second)):
        view = view_of(q, k, SMALL, TILES)
        memory.begin(1.0 - step / 10, step)
        decision = memory.decide(0, [Branch("cond", 0)], q.shape, q)
        select = partial(head_selection, view, patterns, np.full(4, pattern), np.full(4, 0.3))
        out, full = memory.compute(decision, q, k, v, select, (16, 16)), full_rows(view, v)
    wanted = (0, 0.0) if mode == Mode.SHARE else (pattern, 0.0 if pattern else 0.3)
    option = next(i for i, o in enumerate(curves.options) if o.mode == mode and (o.pattern, o.budget) == wanted)
    rows = slice(0, 27 * 16)
    expected = ((out - full)[:, :, rows].square().sum((0, 2, 3)) / full[:, :, rows].square().sum((0, 2, 3))).numpy()
    # The probe's MEAN takes rho of the same step, the memory that of the step before, as a run must; its alpha is fitted to
    # both steps, and its errors are those of both.
    rough = {Mode.MEAN: 0.2, Mode.BLEND: 0.1}.get(mode, 0.05)
    assert np.allclose(curves.error[0, 0, :, option], expected, rtol=rough)


def test_blending_is_never_worse_than_the_lists_alone(curves):
    places = {(o.mode, o.budget): i for i, o in enumerate(curves.options) if not o.pattern}
    for budget in LADDER[:-1]:
        blended, alone = (curves.error[..., places[mode, budget]] for mode in (Mode.BLEND, Mode.LIST))
        assert (blended <= alone * (1 + 1e-6)).all()
    assert (curves.error[..., places[Mode.BLEND, 0.05]] < 0.9 * curves.error[..., places[Mode.LIST, 0.05]]).any()


def test_a_second_evaluation_of_a_step_teaches_nothing_about_reuse():
    probe, (q, k, v) = Probe(samples=2), small()
    for _ in range(2):
        probe.observe(view_of(q, k, SMALL, TILES), v, "cond", 1.0)
    share = next(i for i, o in enumerate(probe.curves(1, 4).options) if o.mode == Mode.SHARE)
    assert np.isnan(probe.curves(1, 4).error[..., share]).all()


def test_a_layer_that_was_never_seen_is_a_programming_error():
    with pytest.raises(ValueError, match="layer 0"):
        Probe().curves(1, 4)


# The four kinds of heads of the fixture, drifting


def drifted(heads, size, seed):
    """Return heads after a drift of relative size ``size``: smooth and independent noise in equal parts."""
    make, place = random(seed), fixture.positions(fixture.GRID)
    made = []
    for head in heads.values():
        parts = []
        for x in (head.q, head.k, head.v):
            smooth = fixture.fourier(place, (2.0, 6.0, 6.0), x.shape[1], make)
            smooth = smooth @ fixture.normal((x.shape[1], x.shape[1]), make)
            white = fixture.normal(x.shape, make)
            noise = smooth / smooth.norm() + white / white.norm()
            parts.append(math.sqrt(1 - size**2) * x + size * x.norm() * noise / noise.norm())
        made.append(parts)
    return [torch.stack(parts)[None] for parts in zip(*made)]


ORDER = OrderSpec("tiles", (1, 8, 8))
GEOMETRY = Geometry(fixture.GRID, 0, 4096)


@pytest.fixture(scope="module")
def drifts():
    """Return views and values of the fixture's heads: as they are, and three drifts by 30 %."""
    heads, order = fixture.heads(), token_order(ORDER, GEOMETRY)
    found = []
    for seed in (None, 1, 2, 3):
        q, k, v = [torch.stack(x)[None] for x in zip(*((h.q, h.k, h.v) for h in heads.values()))]
        if seed is not None:
            q, k, v = drifted(heads, 0.3, seed)
        q, k, v = (x[:, :, order.permutation] for x in (q, k, v))
        found.append((view_of(q, k, GEOMETRY, ORDER, 64), v))
    return found


@pytest.fixture(scope="module")
def curves(drifts):
    """Return the curves of two drifts, eight query blocks of each."""
    probe = Probe(samples=8, reuse=False)
    for number, (view, v) in enumerate(drifts[1:3]):
        probe.observe(view, v, "cond", 1.0 - number / 10)
    return probe.curves(1, 4)


def relative(out, full):
    return ((out - full).square().sum((0, 2, 3)) / full.square().sum((0, 2, 3))).sqrt().numpy()


@pytest.mark.parametrize("density, least", [(0.3, 0.5), (0.2, 0.3), (0.1, 0.25)])
def test_budgets_by_head_beat_equal_ones_on_inputs_that_were_held_out(drifts, curves, density, least):
    view, v = drifts[3]
    full = full_rows(view, v)
    problem = pose(curves, limits=Limits(modes=(Mode.LIST,)))
    errors, kept, keep = [], [], np.full(4, density)
    for _ in range(2):
        mask = head_selection(view, curves.patterns, np.zeros(4, int), keep).mask
        errors.append(float(np.sqrt(np.mean(relative(full_rows(view, v, mask), full) ** 2))))
        kept.append(float(mask.float().mean()))
        plan = as_plan(problem, problem.best(kept[0]), ModelTag("fixture"), steps=2, grid=fixture.GRID, tokens=4096)
        keep = np.where(plan.mode[0, 0] == int(Mode.FULL), 1.0, plan.budget[0, 0])
    gain = 1 - errors[1] / errors[0]
    figures = f"uniform {errors[0]:.3f}, by head {errors[1]:.3f}, {gain:.1%} less"
    sys.stdout.write(f"at {kept[0]:.1%} of the blocks: {figures}; budgets {keep.round(3)}\n")
    assert kept[1] <= kept[0] + 0.002
    assert gain >= least


def test_predicted_errors_hold_on_inputs_that_were_held_out(drifts, curves):
    view, v = drifts[3]
    full = full_rows(view, v)
    for budget in (0.08, 0.3):
        option = next(i for i, o in enumerate(curves.options) if o.mode == Mode.LIST and o.budget == budget)
        mask = head_selection(view, curves.patterns, np.zeros(4, int), np.full(4, budget)).mask
        found = relative(full_rows(view, v, mask), full)
        assert np.allclose(np.sqrt(curves.error[0, 0, :, option]), found, rtol=0.25, atol=0.02)


def run_modes(drifts, later, density, modes, frozen=True):
    """Return the relative errors [H] of modes at a drifted step after a full one."""
    first, found = drifts[0], {}
    for mode in modes:
        memory = AttentionMemory(uniform(2, 1, 4, [Mode.FULL, mode]), static=not frozen)
        for step, (view, v) in enumerate((first, later)):
            memory.begin(1.0 - step / 10, step)
            decision = memory.decide(0, [Branch("cond", 0)], view.q.shape, view.q)
            select = partial(head_selection, view, (Pattern("router", 0),), np.zeros(4, int), np.full(4, density))
            out = memory.compute(decision, view.q, view.k, v, select, (64, 64))
        found[mode] = relative(out, full_rows(*later))
    return found


@pytest.mark.parametrize("size, residual, rho", [(0.1, 0.11, 0.07), (0.3, 0.34, 0.21)])
def test_drift_costs_what_was_measured_before(drifts, size, residual, rho):
    """Relative errors on the content head at 10 % density by block means, lists frozen, within 30 % of what was expected.

    Expected from another implementation of the same recipe, whose noise and head differ in their random numbers.
    """
    heads, order = fixture.heads(), token_order(ORDER, GEOMETRY)
    q, k, v = (x[:, :, order.permutation] for x in drifted(heads, size, 9))
    later = view_of(q, k, GEOMETRY, ORDER, 64), v
    content = list(heads).index("content")
    modes = (Mode.LIST, Mode.SHARE, Mode.RESIDUAL, Mode.RHO, Mode.MEAN)
    found = {mode: error[content] for mode, error in run_modes(drifts, later, 0.1, modes).items()}
    thawed = run_modes(drifts, later, 0.1, (Mode.RESIDUAL, Mode.RHO), frozen=False)
    sys.stdout.write(f"drift {size}: { {mode.name: round(float(error), 3) for mode, error in found.items()} }\n")
    assert found[Mode.LIST] == pytest.approx(1.08, rel=0.2)
    assert found[Mode.RESIDUAL] == pytest.approx(residual, rel=0.3)
    assert found[Mode.RHO] == pytest.approx(rho, rel=0.3)
    assert found[Mode.RHO] < found[Mode.RESIDUAL] < found[Mode.LIST]
    assert thawed[Mode.RESIDUAL][content] > found[Mode.RESIDUAL] and thawed[Mode.RHO][content] > found[Mode.RHO]
    assert found[Mode.MEAN] == pytest.approx(0.60, rel=0.25)


def test_heads_of_one_attention_take_what_suits_each(drifts):
    """With everything allowed, heads that short lists serve get lists, and the content head reuses: no list serves it."""
    probe = Probe(samples=8, period=2)
    for step, (view, v) in enumerate(drifts[:2]):
        probe.observe(view, v, "cond", 1.0 - step / 10)
    problem = pose(probe.curves(1, 4), limits=Limits(period=4))
    options = [problem.curves.options[index] for index in problem.best(0.3).chosen]
    modes = dict(zip(fixture.heads(), (option.mode for option in options)))
    assert modes["temporal"] in (Mode.LIST, Mode.BLEND)
    assert modes["content"] in (Mode.RHO, Mode.RESIDUAL, Mode.SHARE)
    table = ModeTable(np.array([[[int(Mode.FULL)] * 4], [[int(option.mode) for option in options]]], np.uint8))
    table.check()
