"""Choosing under a total: hulls and knapsacks against brute force, and planted structure found by every search."""

import itertools

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.builders import Selection
from stretto.acceleration.attention.geometry import Geometry
from stretto.acceleration.attention.order import OrderSpec, token_order
from stretto.acceleration.attention.plan import View
from stretto.acceleration.attention.reuse import Mode
from stretto.acceleration.attention.search import (
    SEARCHES,
    LatencyTable,
    Limits,
    ModelTag,
    Pattern,
    Probe,
    as_plan,
    cheapest_that_passes,
    greedy,
    hull,
    ideal,
    knapsack,
    measure,
    of_attention,
    pose,
    within_cost,
    within_error,
)
from stretto.acceleration.attention.search.heads import ditfastattn_v2, rse, sparse_vdit
from stretto.kernels.block_sparse_attention import BlockList, block_sparse_attention

from .attention_fixture import fourier, normal, positions

BLOCK, SIZE = 16, 32
CLIP = Geometry((4, 8, 16), 0, 512)


def random(seed):
    return torch.Generator().manual_seed(seed)


# Totals


def test_a_hull_has_the_best_trades_only():
    costs, errors = [0, 1, 2, 3, 4, 4, 5], [10, 9, 4, 3.9, 1, 2, 1]
    assert hull(costs, errors) == [0, 2, 4]
    assert hull([2, 1], [0, 5]) == [1, 0] and hull([1, 1], [np.nan, 3]) == [1]
    with pytest.raises(ValueError, match="no option"):
        hull([1], [np.inf])


def convex(seed, groups=4, options=5):
    """Return convex curves over equal costs, for which steps along hulls are optimal at every whole budget."""
    make = np.random.default_rng(seed)
    gains = -np.sort(-make.random((groups, options - 1)), axis=1)
    errors = np.concatenate([gains.sum(1, keepdims=True), gains.sum(1, keepdims=True) - gains.cumsum(1)], 1)
    return np.tile(np.arange(options, dtype=float), (groups, 1)), errors


@pytest.mark.parametrize("seed", range(5))
def test_steps_along_hulls_are_optimal_on_convex_curves(seed):
    costs, errors = convex(seed)
    choices = list(itertools.product(range(5), repeat=4))
    total_cost, total_error = (
        [sum(x[g, c] for g, c in enumerate(choice)) for choice in choices] for x in (costs, errors)
    )
    for budget in range(17):
        best = min(error for cost, error in zip(total_cost, total_error) if cost <= budget)
        found = within_cost(costs, errors, budget)
        assert found.cost <= budget and found.error == pytest.approx(best, abs=1e-9)
        back = within_error(costs, errors, best)
        cheapest = min(cost for cost, error in zip(total_cost, total_error) if error <= best + 1e-9)
        assert back.error <= best + 1e-9 and back.cost == pytest.approx(cheapest)


def test_a_budget_that_nothing_fits_gives_the_cheapest():
    costs, errors = convex(1)
    assert within_cost(costs, errors, -1).cost == 0
    assert within_error(costs, errors, -1).error == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_knapsacks_against_brute_force(seed):
    make = np.random.default_rng(seed)
    gains, losses = make.random((5, 4)), make.random((5, 4))
    gains[:, 0] = losses[:, 0] = 0
    losses[2, 3] = np.inf
    for limit in (0.0, 0.3, 1.0, 5.0):
        best = max(
            sum(gains[g, c] for g, c in enumerate(choice))
            for choice in itertools.product(range(4), repeat=5)
            if sum(losses[g, c] for g, c in enumerate(choice)) <= limit
        )
        found = knapsack.exact(gains, losses, limit)
        assert losses[range(5), found].sum() <= limit + 1e-12
        assert 0.97 * best - 1e-12 <= gains[range(5), found].sum() <= best + 1e-12
        found = knapsack.lagrangian(gains, losses, limit)
        spent = losses[range(5), found].sum()
        assert spent <= limit + 1e-12
        within = max(
            sum(gains[g, c] for g, c in enumerate(choice))
            for choice in itertools.product(range(4), repeat=5)
            if sum(losses[g, c] for g, c in enumerate(choice)) <= spent + 1e-12
        )
        assert gains[range(5), found].sum() == pytest.approx(within)  # nobody does better with as much


def test_knapsacks_refuse_what_cannot_be_solved():
    with pytest.raises(ValueError, match="without loss"):
        knapsack.exact(np.ones((1, 2)), np.ones((1, 2)), 1.0)


# Latency


def test_latency_is_what_was_measured():
    table = LatencyTable((0.0, 0.5, 1.0), (0.2, 0.6, 1.4), 1.0)
    assert table.relative(0.25) == pytest.approx(0.4) and table.break_even == pytest.approx(0.75, abs=1e-3)
    assert ideal(0.1, 0.8).break_even == pytest.approx(0.72, abs=1e-3)
    assert LatencyTable((0.0, 1.0), (2.0, 3.0), 1.0).break_even == 0
    assert LatencyTable((0.0, 0.5, 1.0), (0.3, 0.2, 0.9), 1.0).seconds == (0.3, 0.3, 0.9)
    with pytest.raises(ValueError, match="ascending"):
        LatencyTable((1.0, 0.0), (1.0, 2.0), 1.0)


def test_measuring_takes_turns_and_discards_the_first():
    log = []
    table = measure(lambda d: lambda: log.append(d), lambda: log.append("dense"), densities=(0.0, 1.0), repeats=2)
    assert log == ["dense", 0.0, 1.0] * 3 and table.dense > 0


def test_where_lists_cost_more_than_they_save_heads_stay_full():
    curves = planted_curves()[0]
    slow = LatencyTable((0.0, 1.0), (1.5, 3.0), 1.0)
    problem = pose(curves, slow, Limits(modes=(Mode.LIST, Mode.MEAN)))
    assert all(problem.curves.options[i].mode == Mode.FULL for i in problem.best(1.0).chosen)


# Planted structure: a clip whose heads attend along the sequence, across frames, to the first frame, to all, to nothing


def heads(step):
    """Return q, k, v [1, 6, N, d] at a step: band, frame band, first frame, all, none, and one that never changes."""
    make, place = random(0), positions(CLIP.grid)
    line = torch.arange(512, dtype=torch.float32)[:, None].expand(-1, 3)
    drift = random(100 + step)
    made = []
    for kind in ("band", "frame band", "first", "all", "none", "still"):
        v = normal((512, SIZE), make)
        if kind == "band":
            q = k = 14 * fourier(line, (9.0, 1e9, 1e9), SIZE, make)
        elif kind == "frame band":
            q = k = 14 * fourier(place, (1e9, 0.7, 1.0), SIZE, make)
        elif kind == "first":
            liked = torch.nn.functional.normalize(normal((SIZE,), make), dim=0)
            q, k = 8 * liked + 0.3 * normal((512, SIZE), make), 0.3 * normal((512, SIZE), make)
            k[:128] += 8 * liked
        else:
            q, k = (0.05 * normal((512, SIZE), make) for _ in range(2))
        v = v * (0.005 if kind == "none" else 1.0)
        if kind != "still":
            v = 0.8 * v + 0.6 * v.std() * normal(v.shape, drift)
        made.append((q, k, v))
    return [torch.stack(x)[None] for x in zip(*made)]


PATTERNS = (Pattern(), Pattern("band", 1 / 16), Pattern("frame band", 0.13), Pattern("first frames", 0.25))
NAMES = ["full", "band", "frame band", "first frames", "skip"]


def view_of(step, geometry=CLIP):
    q, k, v = heads(step)
    order = token_order(OrderSpec(), geometry)
    return View(geometry, order, BLOCK, BLOCK, q, k, None, SIZE**-0.5, 0, 1, q.shape[1]), v


def attention(view, v, chosen=None):
    chosen = Selection(torch.ones(1, 1, 32, 32, dtype=torch.bool)) if chosen is None else chosen
    return block_sparse_attention(view.q, view.k, v, BlockList.from_mask(chosen.mask, BLOCK, BLOCK), scale=view.scale)[
        0
    ]


def planted_curves():
    probe = Probe(patterns=PATTERNS, samples=8, period=2)
    for step in range(3):
        view, v = view_of(step)
        probe.observe(view, v, "cond", 1 - step / 10)
    return probe.curves(1, 6), probe


def test_sparse_vdit_finds_the_patterns():
    view, v = view_of(0)
    full = attention(view, v)
    errors, cost = [torch.zeros(6)], [1.0]
    for pattern in PATTERNS[1:]:
        chosen = pattern.builder()(view)
        errors.append(rse(attention(view, v, chosen), full))
        cost.append(chosen.density)
    errors.append(full.square().mean((0, 2, 3)) / full.square().mean((0, 2, 3)).mean())  # of the layer, for skipping
    table = torch.stack(errors, -1).numpy()[None]
    found = sparse_vdit(table, np.array([*cost, 0.0]), skip=4, skipped_at_most=0.2)
    assert [NAMES[index] for index in found[0]] == ["band", "frame band", "first frames", "full", "skip", "full"]
    assert NAMES.index("skip") not in sparse_vdit(table, np.array([*cost, 0.0]), skip=4)  # 2 % of six heads is none
    assert (sparse_vdit(table, np.array([*cost, 0.0]), weight=0, limit=1e-9)[0] == 0).all()


@pytest.mark.parametrize("solver", ["exact", "lagrangian"])
def test_ditfastattn_v2_finds_windows_and_heads_to_share(solver):
    methods = ["full", "1/8", "1/16", "1/32", "share"]
    (view, v), (before, v_before) = view_of(1), view_of(0)
    full = attention(view, v)
    errors, seconds = [torch.zeros(6)], [1.0]
    for share in (8, 16, 32):
        chosen = Pattern("arrow", 1 / (2 * share)).builder()(view)
        errors.append(rse(attention(view, v, chosen), full))
        seconds.append(chosen.density)
    errors.append(rse(attention(before, v_before), full))
    table = torch.stack(errors, -1).numpy()
    found = [methods[index] for index in ditfastattn_v2(table, np.array([*seconds, 0.0]), 0.2, solver)]
    assert found[0].startswith("1/") and found[5] == "share" and found[1:5] == ["full"] * 4
    assert (ditfastattn_v2(table, np.array([*seconds, 0.0]), 0.0, solver) == 0).all()


def test_ditfastattns_greedy_search_finds_what_each_layer_bears():
    """Layers whose output is off by a known amount with each method; layer 2 changes its mind at step 3."""
    off = [
        {"output_share": 0.001, "residual_window_attn+cfg_attn_share": 0.0, "residual_window_attn": 0.0},
        {"output_share": 0.5, "residual_window_attn+cfg_attn_share": 0.4, "residual_window_attn": 0.001},
        {"output_share": 0.5, "residual_window_attn+cfg_attn_share": 0.001, "residual_window_attn": 0.001},
        {"output_share": 0.5, "residual_window_attn+cfg_attn_share": 0.5, "residual_window_attn": 0.5},
    ]
    committed = []

    def evaluate(step, methods, last):
        if last:
            committed.append(step)
        total = sum(off[layer].get(m.name, 0.0) for layer, m in enumerate(methods))
        if step == 3 and methods[2].mode != Mode.FULL:
            total += 0.5
        return torch.full((4,), 1.0 + total)

    found = greedy.search(evaluate, 4, 4, 0.05)
    assert committed == [0, 1, 2, 3] and all(method is greedy.FULL for method in found[0])
    names = [[method.name for method in methods] for methods in found[1:]]
    first = ["output_share", "residual_window_attn", "residual_window_attn+cfg_attn_share", "full_attn+cfg_attn_share"]
    assert names[0] == names[1] == first and names[2][2] == "full_attn+cfg_attn_share"
    table = greedy.as_table(found, 2)
    table.check()
    assert table.modes[1, :, 0].tolist() == [int(Mode.SHARE), int(Mode.RESIDUAL), int(Mode.RESIDUAL), int(Mode.FULL)]
    assert table.cfg[1, :, 1].tolist() == [False, False, True, True]


def test_the_loss_is_relative_and_clipped():
    a, b = torch.tensor([1.0, -2.0, 0.0, 1.0]), torch.tensor([1.0, -1.0, 0.0, -1.0])
    assert greedy.clipped_relative(a, b) == pytest.approx((0 + 0.5 + 0 + 2) / 4, rel=1e-5)


def test_probe_and_choice_find_what_was_planted():
    curves, probe = planted_curves()
    # Nearly uniform attention is what the mean of all left-out values stands in for.
    problem = pose(curves, ideal(0.02), Limits(period=4, skipped_at_most=0.2))
    assert problem.curves.options[problem.cheapest(0.05).chosen[3]].mode in (Mode.MEAN, Mode.BLEND)
    modes = tuple(mode for mode in Mode if mode not in (Mode.MEAN, Mode.BLEND))
    problem = pose(curves, ideal(0.02), Limits(modes, period=4, skipped_at_most=0.2))
    chosen = problem.cheapest(0.05)
    options = [problem.curves.options[index] for index in chosen.chosen]
    for head, pattern in ((0, 1), (1, 2), (2, 3)):  # by the pattern itself, or by a router that needs no more blocks
        planted = next(index for index, option in enumerate(problem.curves.options) if option.pattern == pattern)
        density = problem.curves.density[0, 0, head]
        assert options[head].mode == Mode.LIST and density[chosen.chosen[head]] <= density[planted] + 1e-9
    assert options[3].mode == Mode.FULL and options[4].mode == Mode.ZERO and options[5].mode == Mode.SHARE
    assert chosen.error**0.5 <= 0.05
    probe.close()
    with pytest.raises(ValueError, match="nothing"):
        probe.curves(1, 6)


def test_weights_and_shares_move_budgets():
    probe = Probe(edges=(0.5,), samples=8, reuse=False)
    for sigma in (0.9, 0.1):
        view, v = view_of(int(10 * sigma))
        probe.observe(view, v, "cond", sigma)
    curves = probe.curves(1, 6)
    limits = Limits(modes=(Mode.LIST,))

    def spent(problem, bucket):
        found = problem.best(0.4)
        return problem.cost.reshape(2, 6, -1)[bucket, range(6), found.chosen.reshape(2, 6)[bucket]].sum()

    plain, heavy = pose(curves, limits=limits), pose(curves, limits=limits, weights=np.array([[[10.0]], [[1.0]]]))
    assert spent(heavy, 0) > 1.2 * spent(plain, 0)
    long = pose(curves, limits=limits, share=(3, 1))
    assert long.cost.reshape(2, 6, -1)[0].max() == pytest.approx(0.75 / 6)
    costs, errors = zip(*plain.curve())
    assert list(costs) == sorted(costs) and list(errors) == sorted(errors, reverse=True)


def test_the_cheapest_plan_that_passes_is_measured_not_predicted():
    problem = pose(planted_curves()[0])
    runs = []

    def make(chosen):
        return as_plan(problem, chosen, ModelTag("toy"), steps=10, grid=CLIP.grid, tokens=512, block=(16, 16))

    def quality(plan):
        runs.append(plan.achieved["predicted_cost"])
        return 20 + 40 * runs[-1]

    plan, found = cheapest_that_passes(problem.best, make, quality, 30.0, tries=6)
    assert len(found) == len(runs) == 6
    assert plan.achieved["predicted_cost"] == pytest.approx(0.26, abs=0.04)
    assert 30 <= min(tried.quality for tried in found if tried.quality >= 30) <= 32
    nothing, _ = cheapest_that_passes(problem.best, make, lambda plan: 0.0, 30.0, tries=3)
    assert nothing is None


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_every_search_has_its_own_options_and_its_knob_buys_quality(name):
    curves, _ = planted_curves()
    problem, method = pose(curves, ideal(0.02), Limits(period=4, skipped_at_most=0.2)), SEARCHES[name]
    choose = method.search(problem)
    found = [choose(knob / 8) for knob in range(9)]
    errors = [choice.error for choice in found]
    assert found[0].cost < found[-1].cost and errors[-1] <= errors[0]
    for choice in found:
        for option in {problem.curves.options[index] for index in choice.chosen}:
            assert option.mode == Mode.FULL or method.allowed(option, curves.patterns[option.pattern].kind)
        table = choice.chosen.reshape(curves.error.shape[:3])
        if name in ("DiTFastAttn", "Re-ttention"):  # heads of a layer do the same
            assert (table == table[:, :, :1]).all()
        if name == "Re-ttention":
            assert (table == table[:, :1, :1]).all()


def test_a_search_without_its_patterns_says_so():
    probe = Probe(samples=8, reuse=False)
    probe.observe(*view_of(0), "cond", 1.0)
    with pytest.raises(ValueError, match="Re-ttention has nothing to choose from"):
        SEARCHES["Re-ttention"].search(pose(probe.curves(1, 6)))


def test_an_attention_is_timed_at_its_own_shape():
    table = of_attention(Geometry((1, 8, 8), 0, 70), OrderSpec("tiles", (1, 4, 4)), 16, 4, 2, 8, repeats=1)
    assert table.dense > 0 and len(table.seconds) == len(table.densities)
    assert list(table.seconds) == sorted(table.seconds)
