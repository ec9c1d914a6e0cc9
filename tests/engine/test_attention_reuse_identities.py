"""Identities of attention in parts, and of steps that reuse: to rounding, whatever backend, shape and mask."""

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.builders import Selection
from stretto.acceleration.attention.reuse import AttentionMemory, Mode, ModeTable, uniform
from stretto.acceleration.attention.reuse.modes import merge_heads
from stretto.acceleration.attention.reuse.refresh import (
    advanced_rho,
    beside_full,
    by_complement,
    complement_is_cheaper,
    left_out_mean,
)
from stretto.acceleration.attention.reuse.storage import EIGHTH, POLICIES, pack, pack_bits, unpack_bits
from stretto.acceleration.evaluation import Branch
from stretto.kernels.block_sparse_attention import BlockList, Predicate, reference

BLOCKS = 16, 16
#: Relative L2 distance in fp32 to what fp64 says; the logits go up to about 10.
ROUNDING = 5e-7


def random(seed):
    return torch.Generator().manual_seed(seed)


def inputs(seed=0, rows=2, heads=4, key_heads=4, tokens=83, size=16, dtype=torch.float32):
    make = random(seed)
    shapes = (heads, key_heads, key_heads)
    return [torch.randn(rows, h, tokens, size, generator=make).to(dtype) * 1.5 for h in shapes]


def lists(seed=1, rows=2, heads=4, tokens=83, density=0.3):
    count = -(-tokens // BLOCKS[0])
    mask = torch.rand(rows, heads, count, count, generator=random(seed)) < density
    return Selection(mask | torch.eye(count, dtype=torch.bool))


def dense(q, k, v, kv_length=None):
    count = -(-q.shape[2] // BLOCKS[0])
    every = BlockList.from_mask(torch.ones(1, 1, count, count, dtype=torch.bool), *BLOCKS)
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), every, kv_length=kv_length)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("length", [None, (83, 70)])
@pytest.mark.parametrize("how", [by_complement, beside_full])
def test_a_refresh_is_dense_attention_and_gives_rho_and_both_residuals(how, length, key_heads):
    q, k, v = inputs(key_heads=key_heads)
    kv_length = None if length is None else torch.tensor(length, dtype=torch.int32)
    chosen = lists()
    made = how(q, k, v, chosen, BLOCKS, kv_length=kv_length)
    full, lse_f = dense(q, k, v, kv_length)
    sparse, lse_s = reference.block_sparse_attention(
        q, k, v, BlockList.from_mask(chosen.mask, *BLOCKS), kv_length=kv_length
    )
    assert distance(made.out, full) < ROUNDING
    assert torch.allclose(made.rho, (lse_s - lse_f).exp().float(), atol=1e-6)
    rho = made.rho[..., None]
    assert distance(rho * sparse + made.residual(Mode.RHO), full) < ROUNDING
    assert distance(sparse + made.residual(Mode.RESIDUAL), full) < ROUNDING
    assert float(made.rho.max()) <= 1 and float(made.rho.min()) > 0


def test_residuals_are_shares_of_what_the_complement_says():
    q, k, v = (x.double() for x in inputs())
    chosen = lists()
    made = by_complement(q.float(), k.float(), v.float(), chosen, BLOCKS)
    rest = reference.block_sparse_attention(q, k, v, BlockList.from_mask(~chosen.mask, *BLOCKS))[0]
    sparse = reference.block_sparse_attention(q, k, v, BlockList.from_mask(chosen.mask, *BLOCKS))[0]
    left = 1 - made.rho[..., None].double()
    assert distance(made.residual(Mode.RHO), left * rest) < 1e-6
    assert distance(made.residual(Mode.RESIDUAL), left * (rest - sparse)) < 1e-6


def test_rows_that_keep_everything_or_nothing_are_no_exception():
    q, k, v = inputs()
    mask = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    mask[:, 1] = False
    made = by_complement(q, k, v, Selection(mask), BLOCKS)
    assert distance(made.out, dense(q, k, v)[0]) < ROUNDING
    assert (made.rho[:, 0] == 1).all() and (made.rho[:, 1] == 0).all() and torch.isfinite(made.out).all()
    nothing = by_complement(q, k, v, Selection(mask), BLOCKS, kv_length=torch.tensor([83, 0], dtype=torch.int32))
    assert torch.isfinite(nothing.out).all() and (nothing.out[1] == 0).all()


def test_a_refresh_with_token_predicates_is_still_dense_attention():
    q, k, v = inputs()
    chosen = lists()
    coordinates = torch.zeros(83, 3, dtype=torch.int16)
    coordinates[:, 2] = torch.arange(83)
    partial = Selection(chosen.mask, torch.zeros_like(chosen.mask), Predicate("band", coordinates, (-9, 9)))
    made = by_complement(q, k, v, partial, BLOCKS)
    assert distance(made.out, dense(q, k, v)[0]) < ROUNDING
    some = BlockList.from_mask(partial.mask, *BLOCKS, partial.full)
    sparse = reference.block_sparse_attention(q, k, v, some, predicate=partial.predicate)[0]
    assert distance(made.rho[..., None] * sparse + made.residual(Mode.RHO), dense(q, k, v)[0]) < ROUNDING


def test_the_mean_of_what_is_left_out():
    v = inputs(key_heads=2)[2]
    mask = lists().mask
    mask[0, 0, 0] = True
    kv_length = torch.tensor([83, 50], dtype=torch.int32)
    found = left_out_mean(v, mask, 16, 4, kv_length)
    for row, head, block in ((0, 0, 0), (0, 3, 2), (1, 1, 5), (1, 2, 1)):
        tokens = [t for t in range(int(kv_length[row])) if not mask[row, head, block, t // 16]]
        expected = v[row, head // 2, tokens].mean(0) if tokens else torch.zeros(16)
        assert torch.allclose(found[row, head, block], expected, atol=1e-6)


def test_rho_rises_by_lambda_and_never_above_one():
    rho = torch.tensor([0.2, 0.9])
    assert torch.allclose(advanced_rho(rho, 0.04, 2), torch.tensor([0.28, 0.98]))
    assert torch.equal(advanced_rho(rho, 0.04, 30), torch.ones(2))
    assert advanced_rho(rho, 0.0, 3) is rho


def test_which_refresh_costs_less():
    assert complement_is_cheaper(0.3) and not complement_is_cheaper(0.2)  # Hopper: from about a quarter on
    assert complement_is_cheaper(0.06, ratio=0.95) and not complement_is_cheaper(0.03, ratio=0.95)


def test_heads_of_all_modes_become_one_list():
    chosen = lists(rows=1)
    modes = np.array([Mode.FULL, Mode.LIST, Mode.SHARE, Mode.ZERO], np.uint8)
    mask = merge_heads(modes, chosen, (6, 6), torch.device("cpu")).mask
    assert mask[0, 0].all() and torch.equal(mask[0, 1], chosen.mask[0, 1]) and not mask[0, 2:].any()
    with pytest.raises(ValueError, match="none are given"):
        merge_heads(modes, None, (6, 6), torch.device("cpu"))


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("mode", [Mode.RESIDUAL, Mode.RHO, Mode.SHARE])
@pytest.mark.parametrize("complement", [True, False])
def test_with_the_same_inputs_a_cached_step_is_the_full_step(complement, mode, key_heads):
    q, k, v = inputs(key_heads=key_heads)
    memory = AttentionMemory(uniform(3, 1, 4, [Mode.FULL, mode, mode]), complement=complement)
    full = dense(q, k, v)[0]
    for step, sigma in enumerate((1.0, 0.8, 0.6)):
        out = attend(memory, sigma, step, q, k, v)
        assert distance(out, full) < ROUNDING


def test_heads_may_do_different_things_at_one_step():
    q, k, v = inputs(key_heads=2)
    modes = np.full((2, 1, 4), int(Mode.FULL), np.uint8)
    modes[1, 0] = [Mode.RHO, Mode.LIST, Mode.SHARE, Mode.ZERO]
    memory = AttentionMemory(ModeTable(modes))
    full, sparse = (
        dense(q, k, v)[0],
        reference.block_sparse_attention(q, k, v, BlockList.from_mask(lists().mask, *BLOCKS))[0],
    )
    assert distance(attend(memory, 1.0, 0, q, k, v), full) < ROUNDING
    out = attend(memory, 0.8, 1, q, k, v)
    assert distance(out[:, 0], full[:, 0]) < ROUNDING and distance(out[:, 2], full[:, 2]) < ROUNDING
    assert distance(out[:, 1], sparse[:, 1]) < ROUNDING and not out[:, 3].any()


def test_rho_without_residual_adds_the_mean_of_what_is_left_out():
    q, k, v = inputs()
    memory = AttentionMemory(uniform(2, 1, 4, [Mode.FULL, Mode.MEAN]))
    attend(memory, 1.0, 0, q, k, v)
    out = attend(memory, 0.8, 1, q, k, v)
    made = by_complement(q, k, v, lists(), BLOCKS)
    mean = left_out_mean(v, lists().mask, 16, 4).repeat_interleave(16, 2)[:, :, :83]
    rho = made.rho[..., None]
    assert torch.allclose(out, rho * made.sparse + (1 - rho) * mean, atol=1e-5)


def test_lists_stay_as_they_were_at_the_last_full_step():
    q, k, v = inputs()
    memory = AttentionMemory(uniform(4, 1, 4, [Mode.FULL, Mode.RHO, Mode.RHO, Mode.FULL]))
    asked = []

    def select(seed):
        asked.append(seed)
        return lists(seed)

    for step, sigma in enumerate((1.0, 0.8, 0.6)):
        out = attend(memory, sigma, step, q, k, v, lambda step=step: select(step))
        assert distance(out, dense(q, k, v)[0]) < ROUNDING
    assert asked == [0]


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_way_of_keeping_gives_back_what_it_was_given(name):
    tensor = torch.randn(2, 3, 40, 16, generator=random(5)).to(torch.bfloat16)
    kept = pack(tensor, (0, 2, 5), torch.bfloat16, POLICIES[name])
    assert kept.bytes == POLICIES[name].value_bytes(2, 3, 40, 16, 2)
    back = kept.read()
    assert back.dtype == torch.bfloat16 and back.shape == tensor.shape
    if POLICIES[name].eighth:
        scale = tensor.float().abs().amax(-1, keepdim=True) / 448
        assert ((back.float() - tensor.float()).abs() <= tensor.float().abs() * 2**-4 * 1.05 + scale * 2**-10).all()
    else:
        assert torch.equal(back, tensor)
    assert torch.equal(kept.only((2, 5)).read(), back[:, 1:])


def test_eight_bits_with_a_scale_per_token_survive_outliers():
    if EIGHTH.name not in POLICIES:
        pytest.skip("this torch has no float8")
    tensor = torch.randn(1, 1, 64, 32, generator=random(6))
    tensor[0, 0, 3] *= 1e4
    others = [t for t in range(64) if t != 3]
    back = pack(tensor, (0,), torch.float32, EIGHTH).read()
    assert distance(back[0, 0, others], tensor[0, 0, others]) < 0.04


def test_bits_of_masks():
    for number in (1, 7, 8, 9, 33):
        mask = torch.rand(2, 3, 5, number, generator=random(number)) < 0.5
        bits = pack_bits(mask)
        assert bits.shape[-1] == -(-number // 8) and torch.equal(unpack_bits(bits, number), mask)


def attend(memory, sigma, step, q, k, v, select=lists):
    memory.begin(sigma, step)
    branches = [Branch("cond", "a"), Branch("uncond", "b")]
    decision = memory.decide(0, branches, q.shape, q)
    return memory.compute(decision, q, k, v, select, BLOCKS)
