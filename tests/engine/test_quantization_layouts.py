"""Layouts of quantized weights: packing, rotation, rounding, and how much of a product survives."""

import math

import numpy as np
import pytest
import torch

from stretto.acceleration.quantization.layouts import (
    NAMES,
    Awq,
    Fp8,
    Grid,
    Int8Rows,
    Packed,
    fitting,
    from_marker,
    rotation_for,
)
from stretto.acceleration.quantization.packing import pack, row_bytes, unpack
from stretto.kernels import quantized_linear
from stretto.kernels import rotate_quantize as rotate_kernels
from stretto.kernels.quantized_linear import reference
from stretto.kernels.rotate_quantize import hadamard, quantize_rows, rotate, rotate_quantize


def seeded(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def snr(got, right):
    """Signal-to-noise ratio in dB."""
    right = right.double()
    return 10 * math.log10(float(right.square().sum() / (got.double() - right).square().sum()))


# T1: packing


def test_t1_every_byte_of_4_bit_codes_survives():
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    codes = unpack(every, 512, 4)
    assert torch.equal(pack(codes, 4), every)
    assert codes[0, 2 * 0x5A].item() == 0xA and codes[0, 2 * 0x5A + 1].item() == 0x5  # the low half is the even column


def test_t1_every_pattern_of_6_bit_codes_survives():
    low, high = np.meshgrid(np.arange(256), np.arange(256))
    raw = np.stack([low.ravel(), low.ravel()[::-1], high.ravel()], 1).astype(np.uint8)  # 4 columns: 2 + 1 bytes
    packed = torch.from_numpy(raw.copy())
    assert torch.equal(pack(unpack(packed, 4, 6), 6), packed)
    codes = torch.tensor([[0b100001, 0b010010, 0b110011, 0b000100]], dtype=torch.uint8)
    assert pack(codes, 6).tolist() == [[0x21, 0x43, 0b00_11_01_10]]


def test_t1_unsigned_codes_with_zeros_survive():
    """AWQ: the stored codes decode to exactly (q - 8) s + z."""
    layout = Awq(group=64)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8).view(1, 128)
    parts = {
        "weight": pack(codes, 4).view(torch.int8),
        "weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
        "weight_zeros": torch.tensor([[1.0], [-3.0]], dtype=torch.bfloat16),
    }
    decoded = layout.decode(parts)
    assert torch.equal(decoded[0, :16], (torch.arange(16.0) - 8) * 0.5 + 1)
    assert torch.equal(decoded[0, 64:80], (torch.arange(16.0) - 8) * 2.0 - 3)


@pytest.mark.parametrize(("columns", "bits"), [(3, 4), (6, 6), (8, 5)])
def test_t1_codes_that_do_not_fill_bytes_are_refused(columns, bits):
    with pytest.raises(ValueError, match="bits"):
        row_bytes(columns, bits)


# T2: the int8 product


@pytest.mark.parametrize("m", [1, 2, 17, 33, 128])
@pytest.mark.parametrize("k", [64, 80, 256, 1152, 5120])
def test_t2_int8_linear_equals_the_product_of_its_dequantized_factors(m, k):
    for n in (8, 17, 96, 1536) if m in (1, 33) else (8, 17, 96):
        x, weight, bias = seeded(m, k, seed=m), seeded(n, k, seed=k, scale=k**-0.5), seeded(n, seed=n)
        size = rotation_for(k)
        packed = Int8Rows(size).quantize(weight)
        codes, rows = rotate_quantize(x, size)
        accumulated = reference.int8_product(codes, packed.parts["weight"])
        assert torch.equal(torch._int_mm(codes, packed.parts["weight"].t()), accumulated)
        exact = (codes.double() * rows.double()) @ (
            packed.parts["weight"].double() * packed.parts["weight_scale"].double()
        ).T + bias.double()
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            y = quantized_linear.int8_linear(
                x.to(dtype), packed.parts["weight"], packed.parts["weight_scale"], bias, size
            )
            right = (
                exact
                if dtype == torch.float32
                else reference.int8_linear(
                    x.to(dtype), packed.parts["weight"], packed.parts["weight_scale"], bias, size
                ).double()
            )
            assert y.dtype == dtype and y.shape == (m, n)
            assert float((y.double() - right).abs().max()) <= bound * float(right.abs().max())


def test_t2_leading_axes_strides_and_chunks_do_not_matter(monkeypatch):
    x = seeded(2, 3, 70, 64).transpose(0, 1)
    packed = Int8Rows(64).quantize(seeded(24, 64, seed=1))
    args = (packed.parts["weight"], packed.parts["weight_scale"], None, 64)
    whole = quantized_linear.int8_linear(x, *args)
    monkeypatch.setattr(quantized_linear, "CHUNK", 24 * 33)
    assert torch.equal(quantized_linear.int8_linear(x, *args), whole)
    assert whole.shape == (3, 2, 70, 24)
    assert torch.allclose(whole, reference.int8_linear(x, *args), atol=1e-5)
    with pytest.raises(ValueError, match="the input has 32 channels"):
        quantized_linear.int8_linear(x[..., :32], *args)


# T3: rotation


@pytest.mark.parametrize("size", [16, 64, 256])
def test_t3_the_rotation_is_its_own_inverse_and_spreads_constants_evenly(size):
    h = hadamard(size)
    assert float((h @ h.T - torch.eye(size)).abs().max()) <= 1e-6
    assert torch.equal(h, h.T) and torch.allclose(h.sum(0), torch.ones(size))
    x, weight = seeded(9, 2 * size), seeded(11, 2 * size, seed=1)
    rotated = rotate(x, size) @ rotate(weight, size).T
    assert float((rotated - x @ weight.T).norm() / (x @ weight.T).norm()) <= 1e-5


def test_t3_the_rotation_falls_back_to_what_divides():
    assert [rotation_for(k) for k in (3072, 2432, 1152, 80, 20)] == [256, 64, 64, 16, 0]
    assert fitting("int8", 8, 20) == Int8Rows(0) and fitting("w4a8", 8, 1152) == Grid(4, 64)
    assert "no rotation size" in fitting("w6a8", 8, 20)
    with pytest.raises(ValueError, match="does not divide the 80 input channels"):
        rotate(torch.zeros(2, 80), 64)
    with pytest.raises(ValueError, match="use one of 256, 64, 16, 4"):
        hadamard(128)


# T5: the quantizer


def test_t5_zeros_ties_and_the_unused_code():
    codes, scale = quantize_rows(torch.zeros(2, 8))
    assert codes.eq(0).all() and scale.gt(0).all()
    codes, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]]))
    assert scale.item() == 1.0 and codes.tolist() == [[127, 0, 2, 2, 0, -2, -127]]  # halves go to the even neighbour
    for seed in range(20):
        assert int(quantize_rows(seeded(7, 33, seed=seed))[0].min()) >= -127


@pytest.mark.parametrize("name", NAMES)
def test_t5_zeros_are_kept_and_what_is_not_finite_is_refused(name):
    layout = fitting(name, 16, 256)
    assert layout.quantize(torch.zeros(16, 256)).dequantize().abs().max() < 1e-6
    for bad in (math.inf, -math.inf, math.nan):
        weight = torch.ones(16, 256)
        weight[3, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            layout.quantize(weight)


# T6: the table of signal-to-noise ratios


def cases():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1024, 3072, generator=generator)
    outliers = torch.randn(1024, 3072, generator=generator) * torch.exp(0.5 * torch.randn(1024, 1, generator=generator))
    outliers[:, torch.randperm(3072, generator=generator)[:10]] *= 50
    return seeded(1024, 3072, seed=5, scale=3072**-0.5), plain, outliers


#: Layout -> dB for a normal activation, and for one with ten channels fifty times as large.
TABLE = {
    "int8 without rotation": (Int8Rows(0), 38.4, 22.7),
    "int8": (Int8Rows(256), 38.4, 38.8),
    "w6a8": (Grid(6), 33.0, 33.0),
    "w4a8": (Grid(4), 22.7, 22.7),
    "fp8": (Fp8(), 28.5, 28.6),
    "fp8 rows": (Fp8(rows=True), 28.6, 29.4),
}


def test_t6_signal_to_noise_ratios():
    weight, *inputs = cases()
    for name, (layout, *expected) in TABLE.items():
        packed = layout.quantize(weight)
        for x, decibels in zip(inputs, expected):
            assert snr(product(layout, packed, x), x @ weight.T) == pytest.approx(decibels, abs=0.5), name


def product(layout, packed, x):
    if isinstance(layout, Fp8):
        span = x.abs().amax(-1, keepdim=True) if layout.rows else x.abs().max()
        scale = span / 448
        return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale) @ packed.dequantize().T
    codes = layout.int8(packed.parts) if isinstance(layout, Grid) else packed.parts["weight"]
    scale = packed.parts["weight_s_channel" if isinstance(layout, Grid) else "weight_scale"]
    return quantized_linear.int8_linear(x, codes, scale, rotation=layout.rotation)


def test_t6_bytes_and_errors_of_weights():
    weight = cases()[0]
    expected = {"int8": (1.0013, 0.0085), "w6a8": (0.8138, 0.0207), "w4a8": (0.5638, 0.073), "fp8": (1.0, 0.0265)}
    for name, (per_weight, error) in expected.items():
        packed = fitting(name, *weight.shape).quantize(weight)
        assert packed.nbytes / weight.numel() == pytest.approx(per_weight, abs=1e-3)
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.parts.values())
        assert float((packed.dequantize() - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.03)


# T7: comfy-kitchen's eager functions read what we write


@pytest.fixture(scope="module")
def kitchen():
    return pytest.importorskip("comfy_kitchen", reason="comfy-kitchen, an oracle, is not installed")


@pytest.mark.parametrize(("bits", "error"), [(4, 0.0725), (6, 0.0206)])
def test_t7_kitchen_decodes_our_grids_to_the_same_weights(kitchen, bits, error):
    from comfy_kitchen.backends.eager import w4a8_int8 as eager

    weight = seeded(96, 512, scale=0.03)
    layout = Grid(bits)
    parts = layout.quantize(weight).parts
    tensors = (parts["weight"], parts["weight_s_rel"], parts["weight_s_channel"], parts.get("weight_codebook"))
    theirs = eager.dequantize_w4a8_int8_weight(*tensors, output_dtype=torch.float32)
    assert torch.allclose(theirs, layout.decode(parts), atol=1e-6)
    x = seeded(33, 512, seed=3)
    linear = eager.w4a8_int8_linear(x, *tensors, out_dtype=torch.float32)
    ours = quantized_linear.int8_linear(x, layout.int8(parts), parts["weight_s_channel"], rotation=256)
    assert float((linear - ours).norm() / ours.norm()) < 1e-4
    own = eager.quantize_w4a8_int8_weight(weight, bits=bits)
    other = eager.dequantize_w4a8_int8_weight(own[0], own[1], own[2], own[4], output_dtype=torch.float32)
    named = zip(("weight", "weight_s_rel", "weight_s_channel", "weight_codebook"), (own[0], own[1], own[2], own[4]))
    assert torch.allclose(
        other, layout.decode({suffix: tensor for suffix, tensor in named if tensor is not None}), atol=1e-6
    )
    ours_error = float((layout.decode(parts) - weight).norm() / weight.norm())
    assert ours_error == pytest.approx(float((other - weight).norm() / weight.norm()), rel=0.02)
    assert ours_error == pytest.approx(error, rel=0.03)


def test_t7_kitchen_decodes_our_int8_rows_to_the_same_weights(kitchen):
    from comfy_kitchen.backends.eager import quantization as eager

    weight, x = seeded(96, 512, scale=0.03), seeded(33, 512, seed=3)
    parts = Int8Rows(256).quantize(weight).parts
    theirs = eager.dequantize_int8_convrot_weight(parts["weight"], parts["weight_scale"], 256)
    assert torch.allclose(theirs, Int8Rows(256).decode(parts), atol=1e-6)
    codes, scale = eager.quantize_int8_convrot_weight(weight, 256)
    assert torch.allclose(scale, parts["weight_scale"], rtol=1e-5)
    assert (
        codes.int() - parts["weight"].int()
    ).abs().max() <= 1  # sums in another order fall on the other side of a half
    linear = eager.int8_linear(x, parts["weight"], parts["weight_scale"], out_dtype=torch.float32, convrot=True)
    ours = quantized_linear.int8_linear(x, parts["weight"], parts["weight_scale"], rotation=256)
    assert float((linear - ours).norm() / ours.norm()) < 1e-3


def test_t7_kitchen_decodes_our_4_bit_groups_to_the_same_weights(kitchen):
    from comfy_kitchen.backends.eager import awq as eager

    weight, x = seeded(96, 512, scale=0.03), seeded(3, 512, seed=3)
    layout = Awq(dtype=torch.float16)
    parts = layout.quantize(weight).parts
    theirs = eager.gemv_awq_w4a16(x.half(), parts["weight"], parts["weight_scale"], parts["weight_zeros"])
    ours = x.half().float() @ layout.decode(parts).T
    assert float((theirs.float() - ours).norm() / ours.norm()) < 2e-3


# T8: rounding with probabilities


@pytest.mark.parametrize("name", NAMES)
def test_t8_stochastic_rounding_keeps_the_mean_and_repeats_with_its_seed(name):
    weight = seeded(16, 256, scale=0.05)
    layout = fitting(name, 16, 256)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([layout.quantize(weight, generator).dequantize() for _ in range(64)]).double()
    again = torch.Generator().manual_seed(1)
    assert torch.equal(layout.quantize(weight, again).dequantize().double(), draws[0])
    nearest = layout.quantize(weight).dequantize().double()
    kept = float((draws.mean(0) - weight).norm() / weight.norm())
    single = float((nearest - weight).norm() / weight.norm())
    # The largest of a row or group cannot be rounded up; everything else averages out.
    assert kept < 0.55 * single


def test_t8_a_change_below_one_step_survives_in_the_mean():
    weight = seeded(64, 256, scale=0.05)
    layout = Int8Rows(0)
    step = layout.quantize(weight).parts["weight_scale"]
    delta = 0.2 * step * torch.ones_like(weight) * (weight.abs() < 0.5 * weight.abs().amax(-1, keepdim=True))
    moved = []
    for seed in range(24):
        codes = layout.quantize(weight + delta, torch.Generator().manual_seed(seed)).dequantize()
        moved.append(float(((codes - weight) * (delta > 0)).sum() / delta.sum()))
    mean, spread = np.mean(moved), np.std(moved) / np.sqrt(len(moved))
    assert abs(mean - 1) < max(4 * spread, 0.05)


# markers, arenas and guards


@pytest.mark.parametrize("name", NAMES)
def test_a_marker_and_its_tensors_tell_the_layout(name):
    layout = fitting(name, 48, 512)
    packed = layout.quantize(seeded(48, 512))
    kinds = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in packed.parts.items()}
    found, shape = from_marker(layout.marker(), kinds)
    assert shape == (48, 512)
    assert torch.equal(found.checked(shape, packed.parts).dequantize(), packed.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_g6_an_arena_is_one_tensor_with_all_parts(name):
    packed = fitting(name, 48, 512).quantize(seeded(48, 512))
    arena = packed.arena()
    assert arena.dtype == torch.uint8 and arena.dim() == 1 and arena.numel() >= packed.nbytes
    back = Packed.of_arena(packed.layout, packed.shape, arena)
    for suffix, tensor in packed.parts.items():
        assert torch.equal(back.parts[suffix].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert torch.equal(back.dequantize(), packed.dequantize())
    # LoRA patching widens a weight to fp32 and back: every byte survives.
    assert torch.equal(arena.float().to(torch.uint8), arena)


def test_g2_scales_of_one_per_row_come_in_both_shapes_and_no_others():
    layout = Int8Rows(256)
    packed = layout.quantize(seeded(48, 512))
    flat = {**packed.parts, "weight_scale": packed.parts["weight_scale"].view(-1)}
    assert torch.equal(layout.checked((48, 512), flat).dequantize(), packed.dequantize())
    for bad in (torch.ones(47, 1), torch.ones(512), torch.ones(48, 1, dtype=torch.float16)):
        with pytest.raises(ValueError, match="weight_scale has"):
            layout.checked((48, 512), {**packed.parts, "weight_scale": bad})
    shared, _ = from_marker(layout.marker(), {"weight": (torch.int8, (48, 512)), "weight_scale": (torch.float32, ())})
    assert shared.shared_scale


def test_g5_sums_stay_within_32_bits():
    k = 16384
    ones = torch.full((1, k), -127, dtype=torch.int8)
    assert torch._int_mm(ones.expand(32, -1).contiguous(), ones.t().contiguous())[0, 0].item() == k * 127 * 127
    x, w = torch.zeros(1, 133_152), torch.zeros(8, 133_152, dtype=torch.int8)
    assert "overflow" in quantized_linear.why_not_int8(x, w)


def test_g15_a_token_is_rounded_alike_in_any_batch():
    x = seeded(9, 256)
    packed = Int8Rows(256).quantize(seeded(32, 256, seed=2))
    whole = quantized_linear.int8_linear(x, packed.parts["weight"], packed.parts["weight_scale"], rotation=256)
    for row in range(9):
        codes, scale = rotate_quantize(x[row : row + 1], 256)
        batch, scales = rotate_quantize(x, 256)
        assert torch.allclose(scale, scales[row], rtol=1e-6) and (codes.int() - batch[row].int()).abs().max() <= 1
    alone = quantized_linear.int8_linear(x[3:4], packed.parts["weight"], packed.parts["weight_scale"], rotation=256)
    assert torch.allclose(alone, whole[3:4], rtol=2e-2, atol=1e-2)


def test_a_bf16_input_is_rotated_in_bf16_at_no_cost_in_quality():
    weight, plain, outliers = cases()
    packed = Int8Rows(256).quantize(weight)
    for x in (plain, outliers):
        x = x[:256].bfloat16()
        codes, scale = rotate_quantize(x, 256)
        exact, rows = rotate_kernels.reference.rotate_quantize(x, 256)
        assert (codes.int() - exact.int()).abs().max() <= 1 and torch.allclose(scale, rows, rtol=1e-2)
        args = packed.parts["weight"], packed.parts["weight_scale"]
        right = x.float() @ weight.T
        ours = codes.float() * scale @ (args[0].float() * args[1]).T
        theirs = exact.float() * rows @ (args[0].float() * args[1]).T
        assert snr(ours, right) > snr(theirs, right) - 0.2
    assert rotate_kernels.why_not_bf16(plain, 256) == "the input is not bf16"
    assert "nothing" in rotate_kernels.why_not_bf16(plain.bfloat16(), 0)


def test_products_say_why_they_are_not_used():
    x, w = torch.zeros(4, 64), torch.zeros(8, 64)
    assert quantized_linear.why_not_int8(x, w) == "the weight is not int8"
    assert quantized_linear.why_not_int8(x, w.to(torch.int8)) is None
    assert quantized_linear.why_not_fp8(x, w) == "the weight is not fp8 e4m3"
    assert "only on a GPU" in quantized_linear.why_not_fp8(x, w.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="fp8 product"):
        quantized_linear.fp8_linear(x, w.to(torch.float8_e4m3fn), torch.ones(()))
