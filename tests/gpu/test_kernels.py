"""Every kernel on the CUDA device against its specification on the CPU."""

import dataclasses

import pytest
import torch

from stretto.acceleration.quantization.layouts import fitting
from stretto.kernels import block_sparse_attention as sparse
from stretto.kernels import quantized_linear, rotate_quantize, token_rows, weighted_sum
from stretto.kernels.block_sparse_attention import BlockList
from stretto.kernels.linear_attention import FEATURES, linear_attention
from stretto.kernels.linear_attention import reference as linear_reference
from stretto.kernels.quantized_linear import reference as product_reference
from stretto.kernels.rotate_quantize import reference as rounding_reference

HEADS, SIZE = 4, 64


def on_device(x):
    """Return a tensor, or a dataclass of tensors, on the CUDA device."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if not dataclasses.is_dataclass(x):
        return x
    return type(x)(*(on_device(getattr(x, field.name)) for field in dataclasses.fields(x)))


def inputs(tokens=1000, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, HEADS, tokens, SIZE, generator=generator).to(dtype) for _ in range(3)]


def lists(tokens=1000, block=64, share=0.3):
    """A third of all pairs of blocks, each query block its own among them."""
    side = -(-tokens // block)
    wanted = torch.rand(2, HEADS, side, side, generator=torch.Generator().manual_seed(1)) < share
    return BlockList.from_mask(wanted | torch.eye(side, dtype=torch.bool), block, block)


def relative(ours, right):
    return float((ours.cpu().double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("tokens", [64, 1000, 2048])
def test_block_sparse_attention(tokens, dtype, bound):
    q, k, v = inputs(tokens, dtype)
    blocks = lists(tokens)
    right = sparse.block_sparse_attention(q.float(), k.float(), v.float(), blocks, backend="dense")[0]
    moved = [on_device(x) for x in (q, k, v, blocks)]
    assert sparse.choose_backend(*moved)[0] == "triton"
    assert relative(sparse.block_sparse_attention(*moved)[0], right) < bound


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rest", [False, True], ids=["all keys", "keys a list leaves out"])
def test_linear_attention(feature, rest):
    q, k, v = inputs()
    blocks = lists() if rest else None
    right = linear_reference.linear_attention(q.double(), k.double(), v.double(), feature=feature, blocks=blocks)
    moved = on_device(blocks) if rest else None
    assert relative(linear_attention(*map(on_device, (q, k, v)), feature=feature, blocks=moved), right) < 1e-5


@pytest.mark.parametrize("dtype", weighted_sum.DTYPES)
def test_weighted_sum_of_features_of_real_size(dtype):
    tensors = [torch.randn(2, 4096, 3072).to(dtype) for _ in range(3)]
    moved, weights = [x.cuda() for x in tensors], [3.0, -3.0, 1.0]
    assert weighted_sum.why_reference(moved) is None
    ours, right = weighted_sum.weighted_sum(moved, weights).cpu(), weighted_sum.weighted_sum(tensors, weights)
    torch.testing.assert_close(ours, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_token_rows_are_equal_to_the_bit(axis):
    x = torch.randn(2, 600, 600, 8).bfloat16()
    rows = torch.randperm(600, generator=torch.Generator().manual_seed(2))[:200]
    taken = token_rows.take_rows(x.cuda(), rows.cuda(), axis)
    assert torch.equal(taken.cpu(), token_rows.take_rows(x, rows, axis))
    put = token_rows.put_rows(torch.zeros_like(x).cuda(), rows.cuda(), taken, axis)
    assert torch.equal(put.cpu(), token_rows.put_rows(torch.zeros_like(x), rows, taken.cpu(), axis))


@pytest.mark.parametrize("rotation", [0, 16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_and_rounding(rotation, dtype):
    """A sum in another order may round a code the other way, never by more than one."""
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert rotate_quantize.why_not_triton(x.cuda(), rotation) is None
    codes, scales = rotate_quantize.rotate_quantize(x.cuda(), rotation)
    right, right_scales = rounding_reference.quantize_rows(rounding_reference.rotate(x.float(), rotation))
    apart = (codes.cpu().int() - right.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < (0.02 if dtype == torch.float32 else 0.1)
    torch.testing.assert_close(scales.cpu().flatten(), right_scales.flatten(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 40, 4608])
@pytest.mark.parametrize("rank", [0, 8])
def test_every_int8_product(rows, rank):
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(rows, 1024, generator=generator), torch.randn(512, 1024, generator=generator) * 0.02
    layout = fitting("int8", 512, 1024)
    parts = layout.quantize(weight).parts
    bias = torch.randn(512, generator=generator)
    branch = tuple(torch.randn(*shape, generator=generator) * 0.01 for shape in ((rank, 1024), (512, rank))) if rank else None
    right = product_reference.int8_linear(x, parts["weight"], parts["weight_scale"], bias, layout.rotation)
    if rank:
        right = right + x @ branch[0].T @ branch[1].T
    moved = branch and tuple(on_device(x) for x in branch)
    ways = quantized_linear.int8_ways(
        x.cuda(), parts["weight"].cuda(), parts["weight_scale"].cuda(), bias.cuda(), layout.rotation, None, moved
    )
    assert {"torch._int_mm", "Triton"} <= set(ways)
    for name, way in ways.items():
        assert relative(way(), right) < 2e-2, name


@pytest.mark.parametrize("form", ["w4a8", "w6a8"])
def test_grids_are_decoded_to_the_bit(form):
    layout = fitting(form, 64, 1024)
    parts = layout.quantize(torch.randn(64, 1024, generator=torch.Generator().manual_seed(5)) * 0.02).parts
    moved = {name: tensor.cuda() for name, tensor in parts.items()}
    table = moved.get("weight_codebook")
    decoded = quantized_linear.decode_grid(moved["weight"], moved["weight_s_rel"], table, layout.group, layout.bits)
    assert decoded is not None and torch.equal(decoded.cpu(), layout.int8(parts))


def test_fp8_product():
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(64, 512, generator=generator).bfloat16(), torch.randn(256, 512, generator=generator) * 0.02
    parts = {name: part.cuda() for name, part in fitting("fp8_rows", 256, 512).quantize(weight).parts.items()}
    reason = quantized_linear.why_not_fp8(x.cuda(), parts["weight"])
    if reason is not None:
        pytest.skip(reason)
    ours = quantized_linear.fp8_linear(x.cuda(), parts["weight"], parts["weight_scale"])
    assert relative(ours.float(), x.float() @ weight.T) < 0.05
