"""Linear branches of SLA, SLA2 and SALAD against their formulas in fp64, written here from the papers."""

import math

import pytest
import torch

from stretto.acceleration.attention import linear as module
from stretto.acceleration.attention.linear import LayerBranch, LinearBranch, complete_rows
from stretto.kernels.block_sparse_attention import BlockList, block_sparse_attention

BATCH, HEADS, TOKENS, SIZE, BLOCK = 2, 4, 75, 8, 16
BLOCKS = math.ceil(TOKENS / BLOCK)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def inputs(kv_heads=HEADS, dtype=torch.float32):
    q = normal(BATCH, HEADS, TOKENS, SIZE, seed=1)
    k, v = (normal(BATCH, kv_heads, TOKENS, SIZE, seed=seed) for seed in (2, 3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def lists(batch=BATCH, heads=HEADS, share=0.4):
    """Lists with a complete row, and at least one block in every row."""
    mask = torch.rand(batch, heads, BLOCKS, BLOCKS, generator=torch.Generator().manual_seed(4)) < share
    mask |= torch.eye(BLOCKS, dtype=torch.bool)
    mask[:, :, 2] = True
    return mask, BlockList.from_mask(mask, BLOCK, BLOCK)


def phi(feature, x):
    x = x.double()
    if feature == "softmax":
        return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
    return torch.where(x > 0, x + 1, torch.exp(x)) if feature == "elu" else x.clamp_min(0)


def formula(variant, feature, part, q, k, v, mask, lengths=None):
    """Return the method's output in fp64, with every matrix written out."""
    group = HEADS // k.shape[1]
    out = torch.zeros(BATCH, HEADS, TOKENS, SIZE, dtype=torch.float64)
    others = torch.zeros_like(out)
    done = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)
    mask = mask.expand(BATCH, HEADS, BLOCKS, BLOCKS)
    for b in range(BATCH):
        length = TOKENS if lengths is None else int(lengths[b])
        for h in range(HEADS):
            keys, values = k[b, h // group, :length].double(), v[b, h // group, :length].double()
            features = phi(feature, keys)
            kept = mask[b, h][torch.arange(TOKENS) // BLOCK][:, torch.arange(length) // BLOCK]
            logits = q[b, h].double() @ keys.T / SIZE**0.5
            out[b, h] = torch.softmax(logits.masked_fill(~kept, -torch.inf), 1) @ values
            done[b, h] = kept.all(1)
            over = torch.ones_like(kept) if variant in ("all", "salad") else ~kept
            weight = phi(feature, q[b, h]) @ features.T * over
            others[b, h] = weight @ values / (weight.sum(1, keepdim=True) + 1e-5)
    if variant == "sla2":
        alpha = part.alpha.double()
        alpha = alpha[:, torch.arange(TOKENS) // BLOCK] if alpha.ndim == 2 else alpha[:, None].expand(-1, TOKENS)
        mixed = alpha[None, :, :, None] * out + (1 - alpha[None, :, :, None]) * others
    elif variant == "salad":
        joined = others.permute(0, 2, 1, 3).reshape(BATCH, TOKENS, HEADS * SIZE)
        joined = joined @ part.weight.double().T + part.bias.double()
        mixed = torch.zeros_like(out)
        for b in range(BATCH):
            length = TOKENS if lengths is None else int(lengths[b])
            hidden = torch.cat([v[b, h, :length].double().mean(0) for h in range(v.shape[1])])
            logit = float(hidden @ part.gate_weight.double() + part.gate_bias.double())
            for h in range(HEADS):
                gate = float(part.scale[h]) / (1 + math.exp(-logit))
                mixed[b, h] = out[b, h] + gate * joined[b, :, h * SIZE : (h + 1) * SIZE]
    else:
        mixed = out + others @ part.weight.double().T + part.bias.double()
    return torch.where(done[..., None], out, mixed), done


def weights(variant, kv_heads=HEADS):
    if variant == "sla2":
        return LayerBranch(alpha=torch.rand(HEADS, BLOCKS, generator=torch.Generator().manual_seed(5)))
    if variant == "salad":
        width = HEADS * SIZE
        return LayerBranch(
            normal(width, width, seed=6, scale=0.3), normal(width, seed=7), scale=normal(HEADS, seed=8),
            gate_weight=normal(kv_heads * SIZE, seed=9), gate_bias=torch.tensor([0.3]),
        )  # fmt: skip
    return LayerBranch(normal(SIZE, SIZE, seed=6), normal(SIZE, seed=7))


def branch(variant, feature="softmax", part=None, kv_heads=HEADS):
    return LinearBranch(variant, feature, (None, part or weights(variant, kv_heads)), SIZE)


@pytest.mark.parametrize("variant", module.VARIANTS)
@pytest.mark.parametrize(
    ("feature", "case"),
    [*((feature, "plain") for feature in module.FEATURES), ("relu", "lengths"), ("elu", "grouped"), ("softmax", "shared lists")],
)
def test_equals_the_formula(variant, feature, case):
    kv_heads = 2 if case == "grouped" else HEADS
    q, k, v = inputs(kv_heads)
    mask, blocks = lists(1, 1) if case == "shared lists" else lists()
    lengths = torch.tensor([TOKENS, 50], dtype=torch.int32) if case == "lengths" else None
    if lengths is not None:
        k[1, :, 50:], v[1, :, 50:] = 30.0, 1e4  # padding may hold anything
        mask = mask & (torch.arange(BLOCKS) < 4)  # 50 keys are 4 blocks
        mask[0] |= torch.eye(BLOCKS, dtype=torch.bool)
        mask[:, :, :, 0] = True
        blocks = BlockList.from_mask(mask, BLOCK, BLOCK)
    it = branch(variant, feature, kv_heads=kv_heads)
    expected, done = formula(variant, feature, it.layers[1], q, k, v, mask, lengths)
    out, lse = block_sparse_attention(q, k, v, blocks, kv_length=lengths, return_lse=True)
    before = out.clone()
    found = it.apply(1, out, lse, q, k, v, blocks, lengths)
    assert torch.equal(out, before)
    assert found.dtype == q.dtype and done.any() and not done.all()
    assert (found.double() - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert torch.equal(found[done], out[done])
    assert (found - out)[~done].abs().max() > 1e-2, "the branch changes what it should"


@pytest.mark.parametrize("variant", module.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_everything_is_plain_attention(variant, dtype):
    q, k, v = inputs(dtype=dtype)
    blocks = BlockList.from_mask(torch.ones(1, 1, BLOCKS, BLOCKS, dtype=torch.bool), BLOCK, BLOCK)
    out, _ = block_sparse_attention(q, k, v, blocks)
    found = branch(variant).apply(1, out, None, q, k, v, blocks)
    assert torch.equal(found, out)
    dense = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (found.float() - dense).abs().max() < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ("complement", LayerBranch(torch.zeros(SIZE, SIZE), torch.zeros(SIZE))),
        ("all", LayerBranch(torch.zeros(SIZE, SIZE), torch.zeros(SIZE))),
        ("sla2", LayerBranch(alpha=torch.ones(HEADS))),
        ("salad", LayerBranch(torch.zeros(HEADS * SIZE, HEADS * SIZE), torch.zeros(HEADS * SIZE))),
        ("salad", LayerBranch(torch.ones(HEADS * SIZE, HEADS * SIZE), scale=torch.zeros(1))),
    ],
)
def test_untrained_layers_and_layers_without_branch_are_sparse_attention(variant, part):
    q, k, v = inputs()
    _, blocks = lists()
    out, _ = block_sparse_attention(q, k, v, blocks)
    it = branch(variant, part=part)
    assert not it.active(1) and not it.active(0) and not it.active(7)
    assert it.apply(1, out, None, q, k, v, blocks) is out
    assert it.apply(0, out, None, q, k, v, blocks) is out
    assert branch(variant).active(1)


def test_a_bias_alone_is_a_branch():
    q, k, v = inputs()
    _, blocks = lists()
    out, _ = block_sparse_attention(q, k, v, blocks)
    bias = normal(SIZE, seed=7)
    found = branch("all", part=LayerBranch(torch.zeros(SIZE, SIZE), bias)).apply(1, out, None, q, k, v, blocks)
    rows = complete_rows(blocks, TOKENS, TOKENS)
    torch.testing.assert_close(found, torch.where(rows[..., None], out, out + bias))


def test_pieces_of_rows_make_no_difference(monkeypatch):
    q, k, v = inputs()
    _, blocks = lists()
    out, _ = block_sparse_attention(q, k, v, blocks)
    for variant in module.VARIANTS:
        whole = branch(variant).apply(1, out, None, q, k, v, blocks)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_PIECE_BYTES", 4 * BATCH * HEADS * SIZE * 7)
            torch.testing.assert_close(branch(variant).apply(1, out, None, q, k, v, blocks), whole, rtol=1e-6, atol=1e-6)


def test_a_salad_branch_does_not_know_the_order_of_keys():
    q, k, v = inputs()
    _, blocks = lists()
    out, _ = block_sparse_attention(q, k, v, blocks)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    it = branch("salad", "relu")
    found = it.apply(1, out, None, q, k[:, :, order], v[:, :, order], blocks)
    torch.testing.assert_close(found, it.apply(1, out, None, q, k, v, blocks), rtol=1e-4, atol=1e-5)


def test_complete_rows_count_valid_keys_and_no_partial_blocks():
    mask = torch.tensor([[[[1, 1, 1], [1, 1, 0], [0, 1, 1]]]], dtype=torch.bool)
    blocks = BlockList.from_mask(mask, 4, 4)
    assert complete_rows(blocks, 10, 12)[0, 0].tolist() == [True] * 4 + [False] * 6
    lengths = torch.tensor([12, 8, 4], dtype=torch.int32)
    found = complete_rows(blocks, 10, 12, lengths)[:, 0, ::4].tolist()
    assert found == [[True, False, False], [True, True, False], [True, True, False]]
    partial = BlockList.from_mask(mask, 4, 4, full=torch.tensor([[[[True, True, False]]]]))
    assert not complete_rows(partial, 10, 12).any()


def test_what_does_not_fit_is_said_in_words():
    assert branch("all").mismatch(2, HEADS, SIZE) is None
    assert "2 layers, the model has 3" in branch("all").mismatch(3, HEADS, SIZE)
    assert "8 channels, the model's have 16" in branch("all").mismatch(2, HEADS, 16)
    assert "32 channels, the model has 64" in branch("salad").mismatch(2, 8, SIZE)
    assert "4 heads, the model has 8" in branch("sla2").mismatch(2, 8, SIZE)
    assert "5 query blocks, the run has 9" in branch("sla2").mismatch(2, HEADS, SIZE, 9)
    one_gate = LayerBranch(torch.eye(32), scale=torch.ones(3))
    assert "gates for 3 heads" in branch("salad", part=one_gate).mismatch(2, HEADS, SIZE)
    q, k, v = inputs()
    _, blocks = lists()
    with pytest.raises(ValueError, match=r"alpha has shape \(4, 3\)"):
        branch("sla2", part=LayerBranch(alpha=torch.zeros(4, 3))).apply(1, q, None, q, k, v, blocks)
    with pytest.raises(ValueError, match="layer is 2"):
        branch("all").apply(2, q, None, q, k, v, blocks)
    with pytest.raises(ValueError, match="variant"):
        LinearBranch("sla3")
    with pytest.raises(ValueError, match="hedgehog"):
        LinearBranch("all", "hedgehog")


def test_moving_weights_copies_only_what_is_elsewhere():
    part = weights("salad")
    assert part.to("cpu") is part
    moved = branch("salad", part=part).to("meta")
    assert moved.layers[0] is None and moved.layers[1].weight.device.type == "meta"
    assert moved.active(1), "known without looking at the numbers again"
