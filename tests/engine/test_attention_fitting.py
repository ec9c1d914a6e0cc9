"""Fitted corrections: what is planted is found, and what was not proven on held-out steps stays off."""

import json
import sys

import pytest
import torch

from stretto.acceleration.attention.fitting import (
    Fitting,
    best_alpha,
    blend,
    pair_sums,
    sampled_blocks,
    sampled_rows,
    take_blocks,
)
from stretto.acceleration.attention.linear import LinearBranch
from stretto.acceleration.attention.ridge import RIDGE, RidgeFitting
from stretto.kernels.block_sparse_attention import BlockList, Tail, block_sparse_attention, pool_blocks

HEADS, ROWS, SIZE = 3, 64, 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(alpha, noise=0.0, seed=0):
    """Return (full, sparse, other) with full = alpha sparse + (1 - alpha) other + noise, per head."""
    shape = 2, HEADS, ROWS, SIZE
    sparse, other = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    share = torch.as_tensor(alpha).view(1, -1, 1, 1)
    return share * sparse + (1 - share) * other + noise * normal(*shape, seed=seed + 2), sparse, other


def rel(found, truth):
    return float((found.float() - truth.float()).norm() / truth.float().norm())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_planted_shares_are_recovered(noise):
    alpha = torch.tensor([0.2, 0.55, 0.8])
    fitting = Fitting()
    for step in range(4):
        fitting.observe(0, "cond", step, *planted(alpha, noise, seed=10 * step))
    torch.testing.assert_close(fitting.alpha(0), alpha, atol=0.02 if noise else 1e-5, rtol=0)
    report = fitting.report()
    assert report["enabled"] == report["heads"] == 3
    assert report["layers"][0]["gain"] > 0.3
    assert json.loads(json.dumps(report)) == report


def test_the_closed_form_is_the_least_squares_solution():
    full, sparse, other = planted([0.4, 0.4, 0.4], 0.5)
    alpha = best_alpha(pair_sums(full, sparse, other))
    for head in range(HEADS):
        d = (sparse - other)[:, head].double().reshape(-1, 1)
        f = (full - other)[:, head].double().reshape(-1, 1)
        assert float(alpha[head]) == pytest.approx(float(torch.linalg.lstsq(d, f).solution), abs=1e-5)


def test_shares_stay_between_zero_and_one():
    sums = pair_sums(*planted([-0.7, 0.5, 1.6]))
    assert best_alpha(sums).tolist() == [0.0, pytest.approx(0.5, abs=1e-5), 1.0]
    same = normal(1, HEADS, 4, SIZE)
    assert best_alpha(pair_sums(normal(1, HEADS, 4, SIZE, seed=5), same, same)).tolist() == [1.0] * HEADS


@pytest.mark.parametrize(("improvement", "on"), [(0.09, False), (0.11, True)])
def test_a_branch_must_improve_the_held_out_step_by_ten_percent(improvement, on):
    """The error without branch is 1; with the branch that the first step calls for it is 1 - improvement."""
    shape = 1, 1, 1, 3
    sparse, other = torch.tensor([1.0, 0, 0]).view(shape), torch.tensor([0.0, 0, 0]).view(shape)
    fitting = Fitting()
    fitting.observe(0, "cond", 0, torch.tensor([0.5, 0, 0]).view(shape), sparse, other)  # alpha 1/2
    # |full - sparse| = 1 and |full - sparse / 2| = 1 - improvement: full = (x, y) by intersecting two circles.
    x = 1 - (0.25 + 1 - (1 - improvement) ** 2)
    full = torch.tensor([x, (1 - (x - 1) ** 2) ** 0.5, 0]).view(shape)
    assert float((full - sparse).norm()) == pytest.approx(1.0)
    assert float((full - sparse / 2).norm()) == pytest.approx(1 - improvement)
    fitting.observe(0, "cond", 1, full, sparse, other)
    assert (fitting.alpha(0) is not None) == on
    assert fitting.report()["layers"][0]["gain"] == pytest.approx(improvement, abs=1e-5)
    assert fitting.report()["enabled"] == int(on)


def test_what_worked_before_the_held_out_step_but_not_on_it_stays_off():
    fitting = Fitting()
    for step in range(3):
        fitting.observe(0, "cond", step, *planted([0.3, 0.3, 0.3], seed=10 * step))
    fitting.observe(0, "cond", 3, *planted([0.3, 1.0, 0.3], seed=77))
    alpha = fitting.alpha(0)
    assert alpha[1] == 1 and alpha[0] < 0.5 and alpha[2] < 0.5
    assert fitting.report()["enabled"] == 2


def test_every_guidance_branch_must_improve():
    fitting = Fitting()
    for step in range(3):
        fitting.observe(0, "cond", step, *planted([0.3, 0.3, 0.3], seed=step))
        fitting.observe(0, "uncond", step, *planted([0.3, 0.3, 1.0], seed=50 + step))
    assert (fitting.alpha(0) < 1).tolist() == [True, True, False]
    other_way_round = Fitting()
    for step in range(3):
        other_way_round.observe(0, "cond", step, *planted([1.0, 0.3, 0.3], seed=step))
        other_way_round.observe(0, "uncond", step, *planted([0.3, 0.3, 0.3], seed=50 + step))
    assert (other_way_round.alpha(0) < 1).tolist() == [False, True, True]


def test_held_out_steps_are_judged_with_shares_fitted_before_them():
    """A share fitted on the held-out step itself would always look good there."""
    fitting = Fitting()
    fitting.observe(0, "cond", 0, *planted([0.1, 0.5, 0.6]))
    fitting.observe(0, "cond", 1, *planted([0.6, 0.6, 0.6], seed=20))  # head 0: |0.6 - 0.1| > |0.6 - 1|
    alpha = fitting.alpha(0)
    assert alpha[0] == 1
    torch.testing.assert_close(alpha[1:], torch.tensor([0.55, 0.6]), atol=0.02, rtol=0)  # refitted on both


def test_one_step_proves_nothing():
    fitting = Fitting()
    assert fitting.alpha(0) is None
    fitting.observe(0, "cond", 0, *planted([0.3] * 3))
    fitting.observe(0, "uncond", 0, *planted([0.3] * 3, seed=9))
    assert fitting.alpha(0) is None and fitting.report()["enabled"] == 0
    assert fitting.alpha(5) is None
    fitting.observe(0, "cond", 1, *planted([0.3] * 3, seed=20))
    assert fitting.alpha(0) is not None


def test_a_perfect_sparse_output_needs_no_branch():
    fitting = Fitting()
    for step in range(3):
        sparse, other = normal(1, HEADS, ROWS, SIZE, seed=step), normal(1, HEADS, ROWS, SIZE, seed=9 + step)
        fitting.observe(0, "cond", step, sparse, sparse, other)
    assert fitting.alpha(0) is None


def test_an_earlier_step_begins_a_new_trajectory():
    fitting = Fitting()
    for step in range(3):
        fitting.observe(0, "cond", step, *planted([0.3] * 3, seed=step))
    assert fitting.alpha(0) is not None
    fitting.observe(0, "cond", 0, *planted([0.5] * 3, seed=30))
    assert fitting.alpha(0) is None and fitting.report()["layers"][0]["steps"] == 1
    fitting.observe(0, "cond", 1, *planted([0.5] * 3, seed=40))
    torch.testing.assert_close(fitting.alpha(0), torch.full((3,), 0.5), atol=1e-4, rtol=0)


def test_noise_levels_are_fitted_apart_where_asked():
    fitting = Fitting(edges=(0.5,))
    for step in range(3):
        fitting.observe(0, "cond", step, *planted([0.2] * 3, seed=step), level=0.9)
    for step in range(3, 6):
        fitting.observe(0, "cond", step, *planted([0.7] * 3, seed=step), level=0.1)
    torch.testing.assert_close(fitting.alpha(0, 0.8), torch.full((3,), 0.2), atol=1e-4, rtol=0)
    torch.testing.assert_close(fitting.alpha(0, 0.2), torch.full((3,), 0.7), atol=1e-4, rtol=0)
    assert [entry["bucket"] for entry in fitting.report()["layers"]] == [0, 1]
    alone = Fitting(edges=(0.5,))
    for step in range(3):
        alone.observe(0, "cond", step, *planted([0.2] * 3, seed=step), level=0.9)
    torch.testing.assert_close(alone.alpha(0, 0.1), alone.alpha(0, 0.9))


def test_memory_is_bounded():
    fitting = Fitting(held_out=2)

    def numbers():
        evidence = fitting._evidence[0, 0]
        held = [sums for _, branches in evidence.held for sums in branches.values()]
        return sum(sums.numel() for sums in [evidence.train, *held])

    sizes = []
    for step in range(6):
        for branch in range(30):
            fitting.observe(0, branch, step, *planted([0.4] * 3, seed=step))
        if step >= 2:
            sizes.append(numbers())
    assert max(sizes) <= (1 + 2 * 8) * 5 * HEADS
    assert len(set(sizes)) == 1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        Fitting().observe(0, "cond", 0, normal(1, 2, 3, 4), normal(1, 2, 3, 4), normal(1, 2, 3, 5))
    for arguments in ({"held_out": 0}, {"min_gain": 1.0}, {"edges": (0.5, 0.2)}):
        with pytest.raises(ValueError, match="must"):
            Fitting(**arguments)


def test_blend_leaves_heads_and_rows_without_branch_alone():
    _, sparse, other = planted([0.5] * 3)
    sparse, other = sparse.bfloat16(), other.bfloat16()
    assert blend(sparse, other, None) is sparse
    complete = torch.zeros(1, 1, ROWS, dtype=torch.bool)
    complete[..., :10] = True
    found = blend(sparse, other, torch.tensor([1.0, 0.25, 0.0]), complete)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, 0], sparse[:, 0]) and torch.equal(found[:, :, :10], sparse[:, :, :10])
    expected = 0.25 * sparse[:, 1, 10:].double() + 0.75 * other[:, 1, 10:].double()
    assert (found[:, 1, 10:].double() - expected).abs().max() < 0.02
    assert torch.equal(found[:, 2, 10:], other[:, 2, 10:])


def test_sampled_blocks_spread_and_move():
    for blocks in (1, 2, 5, 64, 1182):
        for step in range(20):
            chosen = sampled_blocks(blocks, 8, step)
            assert chosen == sorted(set(chosen)) and 1 <= len(chosen) <= 8
            assert chosen[0] >= 0 and chosen[-1] <= max(0, blocks - 2)
    seen = {block for step in range(40) for block in sampled_blocks(65, 8, step)}
    assert len(seen) > 55
    assert max(b - a for a, b in zip(sampled_blocks(1182, 32), sampled_blocks(1182, 32)[1:], strict=False)) < 40


def test_attention_of_sampled_blocks_is_that_of_the_whole():
    q, k, v = (normal(1, 2, 200, SIZE, seed=seed) for seed in range(3))
    mask = torch.rand(1, 2, 13, 13, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = True
    blocks = BlockList.from_mask(mask, 16, 16)
    whole, _ = block_sparse_attention(q, k, v, blocks)
    chosen = sampled_blocks(13, 4)
    rows = sampled_rows(chosen, 16)
    assert len(rows) == 64
    part, _ = block_sparse_attention(q[:, :, rows], k, v, take_blocks(blocks, chosen))
    torch.testing.assert_close(part, whole[:, :, rows])


# ---------------------------------------------------------------------------------------------------------------------
# A head that is hard to make sparse, drifting from step to step.


def smooth(channels, grid, seed, cells=5):
    """Return smooth random fields [T*Y*X, channels] of unit variance."""
    coarse = normal(1, channels, max(2, grid[0] // 2), cells, cells, seed=seed)
    fine = torch.nn.functional.interpolate(coarse, grid, mode="trilinear", align_corners=True)[0]
    fine = fine.reshape(channels, -1).T
    return (fine - fine.mean(0)) / fine.std(0)


def tiles(x, grid, side=8):
    """Reorder tokens so that each 8 x 8 tile of a frame is one block of 64."""
    t, y, x_ = grid
    order = torch.arange(t * y * x_).view(t, y // side, side, x_ // side, side).permute(0, 1, 3, 2, 4).reshape(-1)
    return x[order]


def content_head(grid, size, seed=0):
    """q = k: embeddings of 12 smooth label fields; v: a smooth field with noise."""
    labels = torch.softmax(4 * smooth(12, grid, seed), dim=1)
    embedding = torch.nn.functional.normalize(normal(12, size, seed=seed + 1), dim=1) * size**0.5 * 1.3
    q = labels @ embedding + 0.25 * normal(len(labels), size, seed=seed + 2)
    k = labels @ embedding + 0.25 * normal(len(labels), size, seed=seed + 3)
    v = smooth(size, grid, seed + 4) + 0.3 * normal(len(labels), size, seed=seed + 5)
    return [tiles(x, grid)[None, None] for x in (q, k, v)]


def temporal_head(grid, size, seed=0):
    """q = k: sharp in the plane, long in time; routing finds its few keys, so nothing is to be gained."""
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    frequencies = normal(3, size // 2, seed=seed) / torch.tensor([[50.0], [1.5], [1.5]])
    phase = torch.stack([t, y, x], -1).reshape(-1, 3) @ frequencies
    features = torch.cat([phase.cos(), phase.sin()], 1) * (10.0**0.5)
    v = smooth(size, grid, seed + 4) + 0.3 * normal(len(features), size, seed=seed + 5)
    return [tiles(z, grid)[None, None] for z in (features, features, v)]


def drifted(tensors, share, seed):
    """Replace a share of the norm by other numbers, half of them smooth over neighbours."""
    moved = []
    for number, x in enumerate(tensors):
        noise = normal(*x.shape, seed=seed + number)
        groups = noise.unflatten(2, (-1, 16))
        noise = (groups + 4 * groups.mean(3, keepdim=True)).flatten(2, 3)
        moved.append((1 - share**2) ** 0.5 * x + share * noise * (x.norm() / noise.norm()))
    return moved


def routed(q, k, share):
    """Top-k blocks by mean-pooled scores with centred keys."""
    means = [pool_blocks(x, 64)[0] for x in (q, k - k.mean(2, keepdim=True))]
    scores = means[0] @ means[1].transpose(-1, -2)
    kept = max(1, int(share * scores.shape[-1]))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(kept).indices, True)
    return BlockList.from_mask(mask, 64, 64)


def candidate(name, q, k, v, blocks):
    if name == "tail":
        keys, sizes = pool_blocks(k, 64)
        return block_sparse_attention(q, k, v, blocks, tail=Tail(keys, pool_blocks(v, 64)[0], sizes))[0]
    feature, variant = name.split()
    return LinearBranch(variant, feature).linear(q, k, v, blocks)


CANDIDATES = ("tail", "softmax all", "softmax complement", "relu complement")


@pytest.fixture(scope="module")
def drifting():
    """Return four steps of (full, sparse, candidates) on a hard and an easy head: 10 % of the blocks, 30 % drift a step.

    Three steps hold sampled rows, as dense steps give them; the fourth is a sparse step in full.
    """
    grid, size, steps = (4, 24, 24), 64, []
    tensors = [torch.cat(pair, dim=1) for pair in zip(content_head(grid, size), temporal_head(grid, size), strict=True)]
    for step in range(4):
        q, k, v = tensors
        blocks = routed(q, k, 0.1)
        if step < 3:
            chosen = sampled_blocks(36, 12, step)
            blocks, q = take_blocks(blocks, chosen), q[:, :, sampled_rows(chosen, 64)]
        full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        sparse = block_sparse_attention(q, k, v, blocks)[0]
        steps.append((full, sparse, {name: candidate(name, q, k, v, blocks) for name in CANDIDATES}))
        tensors = drifted(tensors, 0.3, seed=100 * (step + 1))
    return steps


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_fitted_branch_pays_on_a_content_head_after_drift(drifting, name):
    """Fitted on two steps, proven on a third, measured on a fourth."""
    fitting = Fitting()
    for step, (full, sparse, others) in enumerate(drifting[:3]):
        fitting.observe(0, "cond", step, full, sparse, others[name])
    full, sparse, others = drifting[3]
    found = blend(sparse, others[name], fitting.alpha(0))
    before, easy_before = (rel(sparse[:, h], full[:, h]) for h in range(2))
    after, easy_after = (rel(found[:, h], full[:, h]) for h in range(2))
    assert before > 0.6, "the content head is hard to make sparse"
    assert after <= 0.9 * before
    assert easy_after <= easy_before * 1.001, "and a head that needs nothing is not made worse"


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_joint_map_pays_more_than_a_share_after_drift(drifting, name):
    shares, maps = Fitting(), RidgeFitting()
    for step, (full, sparse, others) in enumerate(drifting[:3]):
        for fitting in (shares, maps):
            fitting.observe(0, "cond", step, full, sparse, others[name])
    full, sparse, others = drifting[3]
    by_share, by_map = (f.blend(0)(sparse, others[name], None, slice(None)) for f in (shares, maps))
    alone, share, joint = (rel(out[:, 0], full[:, 0]) for out in (sparse, by_share, by_map))
    sys.stdout.write(f"{name}: sparse {alone:.3f}, share {share:.3f}, map {joint:.3f}\n")
    assert joint < 0.9 * alone
    assert rel(by_map[:, 1], full[:, 1]) <= rel(sparse[:, 1], full[:, 1]) * 1.001
    told = maps.report()
    assert told["enabled"] >= 1 and told["layers"][0]["map"] == [2 * full.shape[-1], full.shape[-1]]


def test_a_joint_map_is_the_ridge_solution_and_recovers_a_planted_one():
    make = torch.Generator().manual_seed(0)
    sparse, other = (torch.randn(2, 3, 400, 8, generator=make) for _ in range(2))
    planted = torch.randn(3, 16, 8, generator=make)
    full = torch.cat([sparse, other], -1) @ planted
    fitting = RidgeFitting()
    sums = fitting.sums(full, sparse, other)
    found = fitting.fit(sums)
    assert torch.allclose(found, planted, atol=5e-3)
    both = torch.cat([sparse, other], -1).transpose(0, 1).flatten(1, 2)
    target = full.transpose(0, 1).flatten(1, 2)
    ridge = RIDGE * (both.mT @ both).diagonal(dim1=1, dim2=2).mean(-1)
    for head in range(3):  # against plain least squares on rows that stand for the penalty
        rows = torch.cat([both[head], ridge[head].sqrt() * torch.eye(16)])
        wanted = torch.linalg.lstsq(rows, torch.cat([target[head], torch.zeros(16, 8)])).solution
        assert torch.allclose(found[head], wanted, atol=1e-4)
    other_map = planted + 0.1 * torch.randn(planted.shape, generator=make)
    assert torch.allclose(fitting.lost(sums, other_map), (target - both @ other_map).square().sum((1, 2)), rtol=1e-3)
    with pytest.raises(ValueError, match="one shape"):
        fitting.sums(full, sparse[:, :2], other)


def test_a_joint_map_that_does_not_hold_stays_off_and_changes_nothing():
    make = torch.Generator().manual_seed(1)
    fitting = RidgeFitting()
    for step in range(3):
        full, sparse, other = (torch.randn(1, 2, 64, 8, generator=make) for _ in range(3))
        if step < 2:
            full = sparse + 0.1 * full  # the held-out step has nothing to do with what was learned
        fitting.observe(0, "cond", step, full, sparse, other)
    assert fitting.blend(0) is None or not bool(fitting.fitted(0)[1].all())
    good = RidgeFitting()
    for step in range(3):
        sparse, other = (torch.randn(1, 2, 64, 8, generator=make) for _ in range(2))
        full = torch.stack([0.5 * sparse[:, 0] + 0.5 * other[:, 0], sparse[:, 1]], 1)
        good.observe(0, "cond", step, full, sparse, other)
    complete = torch.zeros(1, 1, 64, dtype=torch.bool)
    complete[..., :16] = True
    out = good.blend(0)(sparse, other, complete, slice(None))
    assert torch.equal(out[:, 1], sparse[:, 1]) and torch.equal(out[:, 0, :16], sparse[:, 0, :16])
    assert rel(out[:, 0, 16:], full[:, 0, 16:]) < 0.01
    some = good.blend(0)(sparse[:, 1:], other[:, 1:], None, slice(1, 2))
    assert torch.equal(some, sparse[:, 1:])
