"""T9: Triton kernels of quantized layers against their references, compiled without a GPU; the choice of a product."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stretto.acceleration.quantization.arena import LayerState, arena_linear, dequantize_arena, patched_arena
from stretto.acceleration.quantization.layouts import fitting
from stretto.kernels import quantized_linear, rotate_quantize
from stretto.kernels.quantized_linear import Choices, reference

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")

#: In a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
INTERPRETED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import torch
import triton.runtime.interpreter as interpreter

# NumPy 2.4 no longer makes an integer of an array with one element, which Triton's interpreter relies on for ranges.
original = interpreter._patch_lang_tensor

def patched(tensor, scope):
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

interpreter._patch_lang_tensor = patched
torch.set_num_threads(1)
from stretto.acceleration.quantization.layouts import Grid, fitting
from stretto.kernels.quantized_linear import reference, triton_kernel
from stretto.kernels.rotate_quantize import reference as rounding, triton_kernel as quantizer

generator = torch.Generator().manual_seed(0)
checked = 0
for columns, size in ((256, 256), (768, 256), (1152, 64), (80, 16), (80, 0), (5120, 256)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 2, columns, generator=generator).to(dtype)
        x[0, 0] = 0
        pre = torch.rand(columns, generator=generator) + 0.5 if columns == 768 else None
        codes, scales = quantizer.rotate_quantize(x, size, pre)
        right, scale = rounding.rotate_quantize(x, size, pre)
        assert codes.shape == right.shape and scales.shape == scale.shape
        # Sums in another order move a tie by one code at most, hardly ever.
        assert (codes.int() - right.int()).abs().max() <= 1 and (codes != right).float().mean() < 2e-4
        torch.testing.assert_close(scales, scale, rtol=4e-7, atol=0)
        checked += 1
ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]])
assert quantizer.rotate_quantize(ties)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 0]]

for rows, width, depth, rank in ((14, 200, 256, 0), (70, 130, 256, 4), (1, 96, 384, 20), (600, 40, 128, 0)):
    a, w = (torch.randint(-127, 128, (n, depth), generator=generator).to(torch.int8) for n in (rows, width))
    sx, sw = torch.rand(rows, 1, generator=generator), torch.rand(width, generator=generator)
    ones = (torch.ones(rows, 1), torch.ones(width))
    exact = triton_kernel.int8_product(a, ones[0], w, ones[1], None, torch.float32)
    assert torch.equal(exact.to(torch.int32), reference.int8_product(a, w))
    bias = torch.randn(width, generator=generator)
    low, up = (torch.randn(n, rank, generator=generator).half() if rank else None for n in (rows, width))
    right = reference.int8_product(a, w).float() * sx * sw + bias
    right = right + low.float() @ up.float().T if rank else right
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        y = triton_kernel.int8_product(a, sx, w, sw, bias, dtype, low, up)
        assert y.dtype == dtype and (y.float() - right).norm() <= tolerance * right.norm()
        checked += 1

for layout in (fitting("w4a8", 24, 512), fitting("w6a8", 24, 512), Grid(4, 256, 32)):
    parts = layout.quantize(torch.randn(24, 512, generator=generator) * 0.02).parts
    table = parts.get("weight_codebook")
    decoded = triton_kernel.decode_grid(parts["weight"], parts["weight_s_rel"], table, layout.group, layout.bits)
    assert torch.equal(decoded, layout.int8(parts))
    checked += 1
# Every fp8 scale, subnormal ones too.
scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1)
packed, table = torch.randint(-128, 128, (1, 127 * 8), generator=generator).to(torch.int8), torch.linspace(-99, 99, 16)
assert torch.equal(triton_kernel.decode_grid(packed, scales, table, 16, 4), Grid(4)._int8(packed, scales, table))
print("checked", checked)
"""

#: Triton brings its own assembler.
COMPILED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stretto.kernels.quantized_linear import triton_kernel
from stretto.kernels.rotate_quantize import triton_kernel as quantizer

SHARED = {{80: 163, 89: 99, 90: 227}}  # KiB of a block

def compiled(kernel, types, constants, capability, **options):
    types = {{name: types.get(name, "constexpr") for name in kernel.arg_names}}
    aligned = {{
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n][0] == "*" or n in ("K", "N")
    }}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "local_depot" not in made.asm["ptx"]  # no registers spilled by the compiler's front end
    assert made.metadata.shared <= SHARED[capability] * 1024
    return made.asm["ptx"]

rounding = dict(x="*bf16", pre="*fp32", matrix="*fp32", codes="*i8", scales="*fp32", K="i32")
product = dict(a="*i8", w="*i8", row_scale="*fp32", column_scale="*fp32", bias="*fp32", low="*bf16", up="*bf16", out="*bf16",
               M="i32", N="i32", K="i32")
decoding = dict(packed="*u8", relative="*u8", table="*fp32", out="*i8", K="i32", COUNT="i64")
for capability in SHARED:
    for block, side, twice, warps in ((4096, 16, True, 4), (16384, 16, True, 8), (4096, 64, False, 4), (4096, 0, False, 4)):
        constants = dict(BLOCK=block, SIDE=side, TWICE=twice, PRE=False)
        ptx = compiled(quantizer._rotate_quantize, rounding, constants, capability, num_warps=warps)
        assert ".v4." in ptx
    for (most, (bm, bn, bk, warps, stages)), rank in zip(triton_kernel._TILES, (0, 128, 32)):
        constants = dict(BM=bm, BN=bn, BK=bk, GROUP=8, BIAS=True, RANK=rank)
        ptx = compiled(triton_kernel._product, product, constants, capability, num_warps=warps, num_stages=stages)
        assert "s32.s8.s8" in ptx and "cp.async" in ptx  # integer tensor cores, fed by prefetched tiles
        assert "wgmma" in ptx or capability < 90 or bm < 64
    for six in (False, True):
        compiled(triton_kernel._decode, decoding, dict(GROUP=16, SIX=six, TABLE=not six, BLOCK=1024), capability)
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    code = code.format(root=str(ROOT))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@needs_triton
def test_t9_triton_kernels_equal_the_references_in_the_interpreter():
    assert run(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") == "checked 29"


@needs_triton
def test_t9_triton_kernels_compile_to_integer_tensor_cores_for_every_generation(tmp_path):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


def test_the_rotation_in_two_products_is_the_rotation():
    x = torch.randn(3, 700, 512, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        ours, right = rotate_quantize.rotate(x.to(dtype), 256), rotate_quantize.reference.rotate(x.to(dtype), 256)
        assert ours.dtype == right.dtype and float((ours - right).abs().max()) < 10 * tolerance
    assert rotate_quantize.rotate(torch.zeros(0, 256), 256).shape == (0, 256)


def fake(**changes):
    """A tensor as far as the constraints look: on a GPU that this machine need not have."""
    values = {
        "is_cuda": True, "dtype": torch.bfloat16, "shape": (4, 256), "numel": lambda: 1024, "is_contiguous": lambda: True,
        "requires_grad": False, "device": "cuda:0",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("x", "size", "words"),
    [
        (fake(is_cuda=False), 256, "not on a CUDA device"),
        (fake(dtype=torch.float64), 256, "no 16- or 32-bit float"),
        (fake(), 4, "none of 16, 64 and 256"),
        (fake(shape=(4, 80)), 256, "does not divide"),
        (fake(shape=(4, 32768)), 256, "more than 16,384"),
        (fake(numel=lambda: 0), 256, "empty"),
        (fake(is_contiguous=lambda: False), 256, "not contiguous"),
        (fake(requires_grad=True), 256, "wants a gradient"),
    ],
)
def test_every_constraint_of_the_quantizer_says_why(x, size, words):
    assert words in rotate_quantize.why_not_triton(x, size)


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (fake(is_cuda=False), fake(), "not on a CUDA device"),
        (fake(dtype=torch.int8), fake(), "no 16- or 32-bit float"),
        (fake(), fake(shape=(8, 80)), "no multiple of 128"),
        (fake(), fake(shape=(8, 133_248)), "32-bit sums"),
    ],
)
def test_every_constraint_of_the_product_says_why(x, weight, words):
    assert words in quantized_linear.why_not_triton(x, weight)


def test_kernels_that_cannot_run_are_a_reason_and_no_error():
    """Without a GPU's driver the first launch fails, as it does where a compiler is missing."""
    for trial in (quantized_linear._triton_trial, rotate_quantize._triton_trial):
        assert trial(torch.device("cpu")).startswith("Triton does not run here (")


def test_comfy_kitchens_layer_agrees_with_the_reference():
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen, an oracle, is not installed")
    assert quantized_linear._kitchen_trial(torch.device("cpu")) is None
    x, weight = torch.randn(40, 512).bfloat16(), torch.randint(-127, 128, (24, 512)).to(torch.int8)
    scale, bias = torch.rand(24, 1) * 0.01, torch.randn(24)
    ours = reference.int8_linear(x, weight, scale, bias, 256).float()
    theirs = quantized_linear._kitchen_linear(x, weight, scale, bias, 256, None).float()
    assert float((ours - theirs).norm()) < 0.015 * float(ours.norm())


@pytest.mark.parametrize("form", ["int8", "w4a8"])
def test_a_lora_beside_the_weight_is_added_by_every_way(form):
    layout = fitting(form, 64, 256)
    state, x = LayerState(layout, (64, 256)), torch.randn(5, 256)
    arena = layout.quantize(torch.randn(64, 256) * 0.02).arena()
    delta = torch.randn(64, 2) @ torch.randn(2, 256) * 0.01
    patched = patched_arena(state, arena, dequantize_arena(state, arena) + delta, 1)
    change = arena_linear(state, x, patched, None, choices=Choices()) - arena_linear(state, x, arena, None)
    assert float((change - x @ delta.T).norm()) < 1e-2 * float((x @ delta.T).norm())


# The table of choices


@pytest.fixture
def counted():
    """Two ways that compute the same, one slow, and how often each was called."""
    calls = {"slow": 0, "fast": 0}

    def slow():
        calls["slow"] += 1
        return sum(torch.ones(400, 400) @ torch.ones(400, 400) for _ in range(4))

    def fast():
        calls["fast"] += 1
        return torch.ones(1)

    return {"slow": slow, "fast": fast}, calls


def test_the_fastest_way_is_measured_once_and_kept_on_disk(counted, tmp_path):
    ways, calls = counted
    cpu = torch.device("cpu")
    assert Choices(tmp_path).fastest("8x8", ways, cpu) == "fast"
    before = dict(calls)
    assert Choices(tmp_path).fastest("8x8", ways, cpu) == "fast" and calls == before
    assert Choices(tmp_path).fastest("16x8", ways, cpu) == "fast" and calls != before
    (file,) = tmp_path.glob("*.json")
    assert set(json.loads(file.read_text())["choices"]) == {"8x8", "16x8"} and not list(tmp_path.glob("*.part"))
    only = {"slow": ways["slow"]}
    before = dict(calls)
    assert Choices(tmp_path).fastest("8x8", only, cpu) == "slow" and calls == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"choices_version": 1}', '{"choices_version": 9, "about": {}, "choices": {}}', "[" * 5000],
)
def test_a_damaged_table_is_made_anew(counted, tmp_path, text):
    ways, calls = counted
    Choices(tmp_path).fastest("8x8", ways, torch.device("cpu"))
    (file,) = tmp_path.glob("*.json")
    file.write_text(text)
    before = calls["fast"]
    assert Choices(tmp_path).fastest("8x8", ways, torch.device("cpu")) == "fast" and calls["fast"] > before
    assert json.loads(file.read_text())["choices"] == {"8x8": "fast"}


def test_g14_choices_of_another_driver_or_kernel_and_unknown_ways_are_not_used(counted, tmp_path):
    ways, calls = counted
    Choices(tmp_path).fastest("8x8", ways, torch.device("cpu"))
    (file,) = tmp_path.glob("*.json")
    for change in (lambda d: d["about"].update(kernel="other"), lambda d: d["choices"].update({"8x8": "gone"})):
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))
        before = calls["fast"]
        assert Choices(tmp_path).fastest("8x8", ways, torch.device("cpu")) == "fast" and calls["fast"] > before


def test_a_way_that_fails_is_left_out_and_a_full_disk_is_no_error(counted, tmp_path):
    ways, _ = counted

    def broken():
        raise RuntimeError("no such instruction")

    blocked = tmp_path / "file"
    blocked.write_text("")
    choices = Choices(blocked / "folder")
    assert choices.fastest("8x8", {"broken": broken, **ways}, torch.device("cpu")) == "fast"
    with pytest.raises(RuntimeError, match="no product runs here.*no such instruction"):
        choices.fastest("9x9", {"broken": broken, "other": broken}, torch.device("cpu"))


def test_layers_take_the_way_that_the_table_names(monkeypatch, tmp_path):
    x, weight = torch.randn(4, 256), torch.randint(-9, 9, (8, 256)).to(torch.int8)
    taken = []
    ways = {name: lambda name=name: taken.append(name) or torch.zeros(4, 8) for name in ("torch._int_mm", "Triton")}
    monkeypatch.setattr(quantized_linear, "int8_ways", lambda *_: ways)
    monkeypatch.setattr(Choices, "fastest", lambda self, key, ways, device: taken.append(key) or "Triton")
    quantized_linear.int8_linear(x, weight, torch.ones(8), choices=Choices(tmp_path))
    assert taken == ["4x256x8 float32 rotation 0 rank 0", "Triton"]
    quantized_linear.int8_linear(x, weight, torch.ones(8))
    assert taken[-1] == "torch._int_mm"
