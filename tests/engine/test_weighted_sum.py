"""The weighted sum's Triton kernel against its reference, and what sends which tensors where."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stretto.kernels import weighted_sum as package
from stretto.kernels.weighted_sum import CONSTRAINTS, reference, weighted_sum, why_reference

ROOT = Path(__file__).resolve().parents[2]
#: Run in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
INTERPRETED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import torch
from stretto.kernels.weighted_sum import reference, triton_kernel

generator = torch.Generator().manual_seed(0)
checked = 0
shapes = [(1,), (3, 5), (1023,), (1024,), (1025,), (2, 7, 301), (2, 2048)]
dtypes = [torch.float32, torch.float16, torch.bfloat16]
cases = [(shape, count, dtype) for shape in shapes for count in (1, 3, 16) for dtype in dtypes]
cases += [((1025,), count, dtype) for count in range(1, 17) for dtype in dtypes]
for shape, count, dtype in cases:
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    before = [tensor.clone() for tensor in tensors]
    weights = (3 * torch.randn(count, generator=generator)).tolist()
    ours, expected = triton_kernel.weighted_sum(tensors, weights), reference.weighted_sum(tensors, weights)
    assert ours.shape == expected.shape and ours.dtype == dtype and ours.is_contiguous()
    assert all(map(torch.equal, tensors, before))
    exact = sum(w * t.double() for w, t in zip(weights, tensors))
    size = sum(abs(w) * t.double().abs() for w, t in zip(weights, tensors))
    # fp32 sums in some order, then one rounding, to nearest; only the interpreter's bf16 is cut off instead.
    ulps = 1.0 if dtype == torch.bfloat16 else 0.5
    bound = ulps * torch.finfo(dtype).eps * exact.abs() + 2 * count * torch.finfo(torch.float32).eps * size + 1e-7
    error = (ours.double() - exact).abs()
    assert (error <= bound).all(), (shape, count, dtype, (error - bound).max())
    # One ulp: fused and separate multiply-adds may fall on either side of a rounding boundary.
    gap = (ours.double() - expected.double()).abs()
    assert (gap <= torch.finfo(dtype).eps * expected.double().abs() + 1e-7 + 2 * count * 1.2e-7 * size).all()
    checked += 1
tensors = [torch.full((5,), 60000.0, dtype=torch.float16), torch.full((5,), 49152.0, dtype=torch.float16)]
assert triton_kernel.weighted_sum(tensors, [1.0, -1.0]).tolist() == [10848.0] * 5
assert triton_kernel.weighted_sum(tensors, [2.0, -1.5]).tolist() == [46272.0] * 5  # 120000 overflows in half precision
same = [torch.randn(77, generator=generator).bfloat16()]
assert torch.equal(triton_kernel.weighted_sum(same, [1.0]), same[0])
print("checked", checked)
"""

#: Compiled for a GPU that need not be there: Triton brings its own assembler.
COMPILED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stretto.kernels.weighted_sum import triton_kernel

kernel, count = triton_kernel._weighted_sum, 3
for kind in ("fp32", "fp16", "bf16"):
    types = {{n: "fp32" if n[0] == "w" else "*" + kind if n == "out" or n[0] == "p" else "i32" for n in kernel.arg_names}}
    types |= {{"COUNT": "constexpr", "BLOCK": "constexpr"}}
    aligned = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n] != "fp32" and n.islower()}}
    source = ASTSource(kernel, types, constexprs={{"COUNT": count, "BLOCK": 1024}}, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert loads and all(".v4." in line for line in loads), loads  # 128 bits at a time
    assert len(loads) == count * (2 if kind == "fp32" else 1), loads  # every element once
    assert kind == "fp32" or "cvt.rn." in ptx  # rounded to nearest
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_triton_kernel_compiles_to_wide_loads_and_one_rounding(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    code = COMPILED.format(root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "compiled"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_triton_kernel_equals_the_reference_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = INTERPRETED.format(root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "checked 111"


def fake(**changes):
    """A tensor as far as the constraints look: on a GPU that this machine need not have."""
    values = {
        "is_cuda": True, "device": "cuda:0", "dtype": torch.float16, "shape": (2, 3), "numel": lambda: 6,
        "is_contiguous": lambda: True, "requires_grad": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([], "nothing to sum"),
        ([fake()] * 17, "more than 16 tensors"),
        ([fake(), fake(is_cuda=False)], "not on a CUDA device"),
        ([fake(), fake(device="cuda:1")], "on different devices"),
        ([fake(), fake(dtype=torch.bfloat16)], "dtypes differ"),
        ([fake(dtype=torch.float64)], "none of fp32, fp16 and bf16"),
        ([fake(), fake(shape=(6,))], "shapes differ"),
        ([fake(numel=lambda: 0)], "empty"),
        ([fake(), fake(is_contiguous=lambda: False)], "not contiguous"),
        ([fake(), fake(requires_grad=True)], "wants a gradient"),
    ],
)
def test_every_constraint_says_why(tensors, reason):
    assert reason in why_reference(tensors)


def test_the_kernel_takes_what_all_constraints_allow(monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda name: object())
    monkeypatch.setattr(package, "_trial", lambda device: None)
    for dtype in package.DTYPES:
        assert why_reference([fake(dtype=dtype)] * 16) is None
    with torch.no_grad():
        assert why_reference([fake(requires_grad=True)]) is None
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    assert why_reference([fake()]) == CONSTRAINTS[-1].otherwise == "Triton is not installed"


def test_a_triton_that_cannot_run_is_a_reason_and_no_error():
    """Without a GPU's driver the first launch fails, as it does where a compiler is missing."""
    assert package._trial(torch.device("cpu")).startswith("Triton does not run here (")


def test_the_cpu_takes_the_reference_and_never_imports_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "stretto.kernels.weighted_sum.triton_kernel", None)  # importing it would raise
    tensors = [torch.randn(4, 5), torch.randn(4, 5)]
    assert why_reference(tensors) == "the tensors are not on a CUDA device"
    assert torch.equal(weighted_sum(tensors, [2.0, -1.0]), reference.weighted_sum(tensors, [2.0, -1.0]))


def test_gradients_pass_through_the_reference():
    tensors = [torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)]
    weighted_sum(tensors, [2.0, -1.0]).sum().backward()
    assert torch.equal(tensors[0].grad, torch.full((3,), 2.0)) and torch.equal(tensors[1].grad, torch.full((3,), -1.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("dtype", package.DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_triton_kernel_equals_the_reference_on_the_device(dtype, count):
    tensors = [torch.randn(3, 1025, device="cuda").to(dtype) for _ in range(count)]
    weights = torch.randn(count).tolist()
    assert why_reference(tensors) is None
    ours, expected = weighted_sum(tensors, weights), reference.weighted_sum(tensors, weights)
    torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
