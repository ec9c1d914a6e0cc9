"""Rows of tokens: the reference by hand, the Triton kernels against it, refusals in words."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stretto.kernels.token_rows import put_rows, reference, take_rows, why_reference

ROOT = Path(__file__).resolve().parents[2]


def test_rows_by_hand():
    x = torch.arange(12.0).reshape(2, 3, 2)
    rows = torch.tensor([2, 0])
    taken = take_rows(x, rows)
    assert taken.tolist() == [[[4, 5], [0, 1]], [[10, 11], [6, 7]]]
    assert put_rows(torch.zeros_like(x), rows, taken)[0].tolist() == [[0, 1], [0, 0], [4, 5]]


@pytest.mark.parametrize("axis", [1, 2])
def test_taking_all_and_putting_back_changes_nothing(axis):
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(2))
    assert torch.equal(put_rows(torch.empty_like(x), rows, take_rows(x, rows, axis), axis), x)


def test_putting_is_in_place_and_into_views():
    whole = torch.zeros(2, 4, 3)
    part = whole[1:]
    assert put_rows(part, torch.tensor([1]), torch.ones(1, 1, 3)) is part
    assert whole.sum() == 3 and whole[1, 1].sum() == 3


def test_values_of_another_shape_or_dtype_are_refused():
    kept = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\)"):
        put_rows(kept, torch.tensor([0, 1]), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="float64"):
        put_rows(kept, torch.tensor([0]), torch.zeros(1, 1, 2, dtype=torch.float64))


def test_the_reason_for_the_reference_is_told():
    assert "CUDA" in why_reference(torch.zeros(1, 2, 3), torch.tensor([0]))


KERNEL = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import torch
from stretto.kernels.token_rows import reference, triton_kernel
for shape, axis in (((2, 9, 5), 1), ((2, 3, 9, 1030), 2), ((1, 9, 64), 1)):
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        x = (torch.rand(shape) * 100).to(dtype)
        rows = torch.randperm(9)[:4]
        taken = triton_kernel.take_rows(x, rows, axis)
        assert torch.equal(taken, reference.take_rows(x, rows, axis)), (shape, dtype)
        kept = torch.zeros_like(x)
        expected = reference.put_rows(torch.zeros_like(x), rows, taken, axis)
        assert torch.equal(triton_kernel.put_rows(kept, rows, taken, axis), expected)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_the_reference_in_the_interpreter():
    found = subprocess.run(
        [sys.executable, "-c", KERNEL.format(root=str(ROOT))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.strip() == "equal", found.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_kernels_equal_the_reference_on_the_gpu(dtype):
    x = (torch.rand(2, 1000, 384, device="cuda") * 100).to(dtype)
    rows = torch.randperm(1000, device="cuda")[:300]
    assert why_reference(x, rows) is None
    taken = take_rows(x, rows)
    assert torch.equal(taken, reference.take_rows(x, rows, 1))
    assert torch.equal(
        put_rows(torch.zeros_like(x), rows, taken), reference.put_rows(torch.zeros_like(x), rows, taken, 1)
    )
