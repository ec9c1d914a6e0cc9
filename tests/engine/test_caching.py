"""Policies, indicator and store against hand-made values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.indicator import TransformRate
from stretto.acceleration.caching.policy import Accumulator, Rails, interval_mask
from stretto.acceleration.caching.store import SnapshotStore


def strip(mask):
    return "".join("#" if computed else "." for computed in mask)


@pytest.mark.parametrize(
    ("steps", "warmup", "tail", "interval", "expected"),
    [
        (28, 3, 1, 2, "###.#.#.#.#.#.#.#.#.#.#.#.##"),
        (28, 3, 1, 3, "###..#..#..#..#..#..#..#..##"),
        (12, 2, 2, 4, "##...#...###"),
        (10, 0, 0, 2, ".#.#.#.#.#"),
        (5, 3, 2, 2, "#####"),
    ],
)
def test_interval_masks(steps, warmup, tail, interval, expected):
    assert strip(interval_mask(steps, Rails(warmup, tail), interval)) == expected


@given(st.integers(1, 60), st.integers(0, 10), st.integers(0, 10), st.integers(1, 16))
def test_rails_hold_and_gaps_stay_bounded(steps, warmup, tail, interval):
    mask = interval_mask(steps, Rails(warmup, tail), interval)
    assert all(mask[:warmup]) and all(mask[steps - tail :])
    assert "." * interval not in strip(mask)
    assert interval > 1 or all(mask)


def test_outside_the_interval_everything_is_computed():
    assert strip(interval_mask(10, Rails(0, 0, (0.5, 1.0)), 5)) == "#####....#"


def test_accumulator_skips_below_and_computes_at_the_threshold():
    accumulator = Accumulator(0.25)
    assert [accumulator.skip(change) for change in (None, 0.125, 0.0625, 0.0625)] == [False, True, True, False]
    accumulator.reset()
    assert accumulator.skip(0.2)


def test_transform_rate_by_hand():
    """x goes 0, 1, 1.5, 1.75; v = 2x + 4. kappa = |6 - 4| / |1 - 0| = 2, so E = 2 * |dx| / |v|."""
    rate = TransformRate()
    x = [torch.full((1, 2, 2, 2), value) for value in (0.0, 1.0, 1.5, 1.75)]
    v = [2 * value + 4 for value in x]
    assert rate.change(x[0]) is None
    rate.observe(x[0], v[0])
    assert rate.change(x[1]) is None  # one computed evaluation gives no rate: unknown, not zero
    rate.observe(x[1], v[1])
    assert rate.change(x[2]) == pytest.approx(2 * 0.5 / 6)
    assert rate.change(x[3]) == pytest.approx(2 * 0.25 / 6)  # measured from the previous evaluation, skipped or not
    rate.observe(x[3], v[3])
    assert rate.kappa == pytest.approx(2.0) and rate.output_norm == pytest.approx(7.5)


def test_a_scaled_identity_has_its_exact_gain():
    rate, generator = TransformRate(), torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(1, 4, 3, 3, generator=generator)
        rate.observe(x, -1.7 * x)
    assert rate.kappa == pytest.approx(1.7, rel=1e-5)


def test_store_copies_bounds_and_counts_bytes():
    store = SnapshotStore(depth=2, budget_bytes=1000)
    batch = torch.arange(16.0).reshape(4, 4)
    view = batch[1:3]
    for position in (0.0, 1.0, 2.0):
        assert store.push("a", position, view)
    batch.zero_()
    history = store.get("a")
    assert list(history.positions) == [2.0, 1.0] and store.bytes == 64 and store.peak_bytes <= 96
    assert history.tensors[0][0, 0] == 4.0 and history.tensors[0].untyped_storage().nbytes() == 32


def test_store_replaces_the_same_position_and_restarts_on_another_shape():
    store = SnapshotStore(depth=3, budget_bytes=1000)
    store.push("a", 1.0, torch.zeros(2))
    store.push("a", 1.0, torch.ones(2))
    assert list(store.get("a").positions) == [1.0] and store.get("a").tensors[0][0] == 1
    store.push("a", 2.0, torch.ones(3))
    assert list(store.get("a").positions) == [2.0] and store.bytes == 12


def test_store_over_budget_forgets_instead_of_guessing():
    store = SnapshotStore(depth=2, budget_bytes=20)
    assert store.push("a", 0.0, torch.zeros(4))
    assert not store.push("a", 1.0, torch.zeros(4))
    assert store.get("a") is None and store.bytes == 0
