"""Distances between features from their sketches."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from stretto.acceleration.caching import sketch as module
from stretto.acceleration.caching.sketch import CountSketch, distance


def heavy_tailed(count, seed):
    """Student's t with 3 degrees of freedom: rare elements carry much of the norm, as in hidden states."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, count, generator=generator)
    return normal[0] / (normal[1:].square().mean(0)).sqrt()


def test_relative_error_on_two_million_heavy_tailed_elements():
    """||a - b|| / ||b|| for neighbours that differ by 0.1 to 10 %, in a vector whose energy sits in few elements."""
    base = heavy_tailed(2_000_000, 0)
    errors = []
    for seed in range(4):
        other = base + 10 ** (-3 + seed % 3) * heavy_tailed(2_000_000, 100 + seed)
        sketch = CountSketch(4096, seed)
        a, b = sketch(base), sketch(other)
        estimate = distance(a, b) / distance(b, torch.zeros_like(b))
        truth = ((base - other).double().norm() / other.double().norm()).item()
        errors.append(abs(estimate / truth - 1))
    assert max(errors) < 0.05 and sum(errors) / len(errors) < 0.03


def test_sketches_are_linear():
    sketch, a, b = CountSketch(64, 5), torch.randn(3, 100), torch.randn(3, 100)
    torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b), rtol=1e-5, atol=1e-5)


def test_every_element_lands_in_one_bucket_with_one_sign():
    sketch = CountSketch(32, 1)
    units = torch.stack([sketch(unit) for unit in torch.eye(200)])
    assert torch.equal(units.abs().sum(1), torch.ones(200))
    assert set(units.sum(1).tolist()) == {1.0, -1.0} and (units.abs().sum(0) > 0).all()


def test_buckets_and_signs_are_balanced_and_independent_of_each_other():
    count, size = 1 << 20, 64
    signed, sketch = torch.ones(count), CountSketch(size, 3)
    buckets, signs = sketch._table(0, count, signed)
    filled = torch.bincount(buckets.long(), minlength=size).double()
    expected = count / size
    assert ((filled - expected).abs() < 6 * expected**0.5).all()
    assert abs(signs.double().mean()) < 6 / count**0.5
    assert (sketch(signed).double().abs() < 6 * expected**0.5).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 500), st.integers(1, 64))
@limits(max_examples=30, deadline=None)
def test_seeded_determinism(seed, count, size):
    tensor = heavy_tailed(count, 7)
    first, second = CountSketch(size, seed)(tensor), CountSketch(size, seed)(tensor.reshape(1, count))
    assert torch.equal(first, second) and first.shape == (size,) and first.dtype == torch.float32


def test_the_hash_is_the_same_for_ever():
    """Profiles are kept: a sketch taken today must compare with one taken by any other process, machine or release."""
    units = torch.stack([CountSketch(8, 42)(unit) for unit in torch.eye(6)])
    assert [(int(row.abs().argmax()), int(row.sum())) for row in units] == [
        (3, -1), (6, -1), (5, -1), (0, -1), (3, -1), (1, 1),
    ]  # fmt: skip


def test_large_tensors_are_hashed_in_pieces_to_the_same_sketch(monkeypatch):
    tensor, whole = torch.randn(1000), CountSketch(64, 9)
    expected = whole(tensor)
    monkeypatch.setattr(module, "_PIECE", 64)
    pieces = CountSketch(64, 9)
    torch.testing.assert_close(pieces(tensor), expected)
    assert whole._tables and not pieces._tables


def test_other_seeds_give_other_sketches():
    tensor = torch.randn(1000)
    assert not torch.equal(CountSketch(64, 0)(tensor), CountSketch(64, 1)(tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_is_summed_wide(dtype):
    tensor = (1000 * torch.rand(50_000)).to(dtype)
    narrow, wide = CountSketch(16, 2)(tensor), CountSketch(16, 2)(tensor.double())
    assert narrow.dtype == torch.float32 and narrow.isfinite().all()
    torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-2)


def test_memory_of_the_tables_can_be_given_back():
    sketch = CountSketch(16)
    sketch(torch.zeros(10)), sketch(torch.zeros(20))
    assert len(sketch._tables) == 1
    sketch.clear()
    assert not sketch._tables


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (8, -1), (8, 2**32)])
def test_sizes_and_seeds_are_checked(size, seed):
    with pytest.raises(ValueError, match="size >= 1"):
        CountSketch(size, seed)
