"""Linear attention: both forms against the specification, and what its rows may not see."""

import pytest
import torch

from stretto.kernels.block_sparse_attention import BlockList
from stretto.kernels.linear_attention import FEATURES, feature_map, linear_attention, reference


def inputs(dtype=torch.float32, batch=2, heads=4, shared=2, queries=150, keys=150, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (shared, keys), (shared, keys))
    return [torch.randn((batch, h, n, size), generator=generator, dtype=torch.float64).to(dtype) for h, n in shapes]


def lists(rows=2, columns=4, queries=150, keys=150, q_block=64, kv_block=32, share=0.4, seed=1):
    shape = (rows, columns, -(-queries // q_block), -(-keys // kv_block))
    return BlockList.from_mask(
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share, q_block, kv_block
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("queries,keys", [(150, 150), (64, 200), (1, 1), (129, 33)])
def test_all_keys_equal_the_specification(feature, queries, keys):
    q, k, v = inputs(queries=queries, keys=keys)
    exact = reference.linear_attention(q.double(), k.double(), v.double(), feature=feature)
    assert (linear_attention(q, k, v, feature=feature) - exact).abs().max() < 2e-6


def test_all_keys_in_several_chunks_equal_the_specification(monkeypatch):
    from stretto.kernels import linear_attention as package

    monkeypatch.setattr(package, "_TOKENS", 37)
    q, k, v = inputs()
    exact = reference.linear_attention(q.double(), k.double(), v.double(), kv_length=torch.tensor([41, 150]))
    assert (linear_attention(q, k, v, kv_length=torch.tensor([41, 150])) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rows,columns", [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("states", [1 << 24, 1000])
def test_the_complement_equals_the_direct_sum(feature, rows, columns, states, monkeypatch):
    from stretto.kernels import linear_attention as package

    monkeypatch.setattr(package, "_STATES", states)
    q, k, v = inputs(keys=170)
    blocks, length = lists(rows, columns, keys=170), torch.tensor([75, 170], dtype=torch.int32)
    for kv_length in (None, length):
        exact = reference.linear_attention(
            q.double(), k.double(), v.double(), feature=feature, blocks=blocks, kv_length=kv_length
        )
        ours = linear_attention(q, k, v, feature=feature, blocks=blocks, kv_length=kv_length)
        assert (ours - exact).abs().max() < 2e-6


def test_all_is_the_complement_of_nothing_and_nothing_that_of_all():
    q, k, v = inputs(torch.float64)
    nothing, everything = lists(share=0.0), lists(share=1.1)
    assert torch.allclose(linear_attention(q, k, v), linear_attention(q, k, v, blocks=nothing), atol=1e-13)
    assert torch.equal(linear_attention(q, k, v, blocks=everything), torch.zeros_like(q))


def test_a_list_and_its_complement_add_up_to_the_total():
    q, k, v = inputs(torch.float64)
    blocks = lists()
    one, other = (
        linear_attention(q, k, v, blocks=blocks, eps=0.0),
        linear_attention(q, k, v, blocks=blocks.complement(5), eps=0.0),
    )
    ones = torch.ones_like(v)
    # With values of 1 an eps that dwarfs the weights yields them: w / (w + eps) = w / eps, nearly.
    share, rest = (linear_attention(q, k, ones, blocks=b, eps=1e9) for b in (blocks, blocks.complement(5)))
    merged = (one.nan_to_num() * share + other.nan_to_num() * rest) / (share + rest)
    assert torch.allclose(merged, linear_attention(q, k, v, eps=0.0), atol=1e-6)


@pytest.mark.parametrize("blocks", [None, lists()])
def test_tokens_past_the_valid_ones_are_never_seen(blocks):
    q, k, v = inputs()
    length = torch.tensor([40, 130])
    spoiled_k, spoiled_v = k.clone(), v.clone()
    for row, valid in enumerate(length.tolist()):
        spoiled_k[row, :, valid:], spoiled_v[row, :, valid:] = torch.inf, torch.nan
    clean = linear_attention(q, k, v, blocks=blocks, kv_length=length)
    assert torch.equal(clean, linear_attention(q, spoiled_k, spoiled_v, blocks=blocks, kv_length=length))


def test_grouped_queries_equal_repeated_keys_and_strides_do_not_matter():
    q, k, v = inputs(torch.float64)
    repeated = linear_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), blocks=lists())
    assert torch.allclose(linear_attention(q, k, v, blocks=lists()), repeated, atol=1e-13)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.allclose(linear_attention(*strided), linear_attention(q, k, v), atol=1e-13)


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("blocks", [None, lists()])
def test_half_precision_is_rounded_once(dtype, bound, blocks):
    q, k, v = inputs(dtype)
    exact = reference.linear_attention(q.double(), k.double(), v.double(), blocks=blocks)
    ours = linear_attention(q, k, v, blocks=blocks)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() / exact.norm() < bound / 4  # rounding alone: eps / (2 sqrt 3) rms


def test_softmax_features_sum_to_one_and_none_is_negative():
    x = torch.randn(3, 40, 24)
    assert torch.allclose(feature_map(x, "softmax").sum(-1), torch.ones(3, 40))
    assert all((feature_map(x, feature) >= 0).all() for feature in FEATURES)
    assert torch.equal(feature_map(torch.tensor([-1.0, 2.0]), "relu"), torch.tensor([0.0, 2.0]))


def test_gradients_pass():
    q, k, v = (
        x.requires_grad_() for x in inputs(torch.float64, queries=20, keys=20, size=4, batch=1, heads=2, shared=1)
    )
    blocks = lists(1, 1, 20, 20, 16, 16)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, feature="elu", blocks=blocks), (q, k, v))


def test_what_does_not_fit_is_refused_in_words():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="must be one of softmax, elu, relu"):
        linear_attention(q, k, v, feature="cosine")
    with pytest.raises(ValueError, match="do not fit"):
        linear_attention(q, k, v[:, :, :-1])
    with pytest.raises(ValueError, match="cannot share 3 key heads"):
        linear_attention(q, *[torch.randn(2, 3, 9, 24)] * 2)
    with pytest.raises(ValueError, match="kv_length must have shape"):
        linear_attention(q, k, v, kv_length=torch.tensor([3]))
    with pytest.raises(ValueError, match="for 150 queries in blocks of 64"):
        linear_attention(q, k, v, blocks=lists(queries=20))
