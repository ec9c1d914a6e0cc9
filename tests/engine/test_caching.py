"""Policies, indicator and store against hand-made values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.decision import CodebookPolicy, ThresholdPolicy
from stretto.acceleration.caching.indicator import FeatureDrift, TransformRate
from stretto.acceleration.caching.policy import Accumulator, Codebook, Rails, interval_mask
from stretto.acceleration.caching.probe import Trajectory, elementwise_l1, relative_l1
from stretto.acceleration.caching.store import SnapshotStore
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.evaluation import Evaluation


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


def evaluation(step, position=None):
    return Evaluation(step, 0.5, float(step if position is None else position), step, torch.zeros(1))


def test_a_falling_threshold_follows_its_formula_down_to_its_floor():
    policy = ThresholdPolicy(8.0, decay=0.25, floor=3.0, steps=4)
    limits = []
    for step in range(4):
        policy.skip(evaluation(step), 1.0)
        limits.append(policy.limit)
    assert limits == pytest.approx([8.0, 8.0 * 0.25**0.25, 4.0, 3.0])  # 8 / 4 ** (3 / 4) is 2.83
    assert policy.skip(evaluation(3), 2.9) and not policy.skip(evaluation(3), 3.0)
    assert not policy.skip(evaluation(3), None)


def test_errors_of_a_forecast_as_a_whole_and_element_by_element():
    forecast, actual = torch.tensor([9.0, 0.5]), torch.tensor([10.0, 1.0])
    assert relative_l1(forecast, actual) == pytest.approx(1.5 / 11)
    assert elementwise_l1(forecast, actual) == pytest.approx((0.1 + 0.5) / 2)


def test_codebooks():
    book = Codebook.parse("0.03:12, 0.05:10 1:3")
    assert [book.rate(change) for change in (0.0, 0.03, 0.049, 0.5, 1.0, 9.0)] == [12, 10, 10, 3, 1, 1]
    # The two that are published for 30 steps.
    assert [rate for _, rate in Codebook.even(0.08, 6).rungs] == [6, 5, 4, 3, 2]
    assert [below for below, _ in Codebook.even(0.08, 6).rungs] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    assert [rate for _, rate in Codebook.even(0.08, 3).rungs] == [3, 2]
    for never in (Codebook.even(0.08, 1), Codebook.even(0.0, 6)):
        assert never.rate(0.0) == 1


@pytest.mark.parametrize("text", ["0.1", "a:2", "0.1:2 0.1:1", "0.2:2 0.1:3", "0.1:0", "", "nan:2", "inf:2", "0.1:2.5"])
def test_texts_that_are_no_codebook(text):
    with pytest.raises(StrettoError, match="codebook: .*expected"):
        Codebook.parse(text)


def test_a_codebook_counts_from_the_last_computed_step_and_evaluations_of_a_step_agree():
    policy = CodebookPolicy(Codebook(((0.1, 3),)))
    decided = []
    for step, position in ((0, 0), (0, 0.5), (1, 1), (1, 1.5), (2, 2), (3, 3)):
        skip = policy.skip(evaluation(step, position), 0.05 if step else None)
        decided.append(skip)
        if not skip:
            policy.computed()
    assert decided == [False, False, True, True, True, False]
    policy.reset()
    assert not policy.skip(evaluation(4), 0.05)


def test_drift_is_the_change_per_step_between_computed_evaluations():
    drift, features = FeatureDrift(), [torch.full((2, 3), value) for value in (4.0, 5.0, 6.0)]
    drift.observe(0.0, features[0], None)
    assert drift.change() is None
    drift.observe(1.0, features[1], features[0])
    assert drift.change() == drift.change() == pytest.approx(0.25)
    drift.observe(1.0, features[2], features[1])  # another evaluation at the same place: no distance to divide by
    assert drift.change() == pytest.approx(0.25)
    drift.observe(5.0, features[2], features[1])
    assert drift.change() == pytest.approx(0.2 / 4)
    drift.observe(6.0, torch.ones(4), features[2])  # another shape is another story
    assert drift.change() is None
    drift.observe(7.0, features[1], features[0])
    drift.reset()
    assert drift.change() is None


def test_a_trajectory_by_hand():
    """The blocks yield 8, 9 (both computed) and 12, and add 4, 6 and 7: change 1/3, gain (7 - 4) / (6 - 4)."""
    probe, starts = Trajectory(1), [torch.full((1, 2, 2), value) for value in (4.0, 3.0, 5.0)]
    seen = [torch.full((1, 2, 2), value) for value in (8.0, 9.0, 12.0)]
    assert probe.measure("a", seen[0], 0.0, starts[0]) is None and probe.weights is None
    probe.computed("a", seen[0], 0.0, starts[0])
    assert probe.measure("a", seen[1], 1.0, starts[1]) == pytest.approx(1 / 8) and probe.weights is None
    probe.computed("a", seen[1], 1.0, starts[1])
    assert probe.measure("a", seen[2], 2.0, starts[2]) == pytest.approx(1 / 3)
    assert probe.weights == pytest.approx((1.5, -0.5))
    assert probe.measure("b", seen[2], 2.0, starts[2]) is None and probe.weights is None  # another branch
    assert probe.measure("a", torch.ones(1, 3, 2), 3.0, torch.ones(1, 3, 2)) is None  # another shape
    probe.reset()
    assert probe.measure("a", seen[2], 2.0, starts[2]) is None


def test_a_second_evaluation_at_one_position_replaces_the_first_on_the_trajectory():
    probe, start = Trajectory(1), torch.zeros(1, 1, 1)
    for value, position in ((1.0, 0.0), (3.0, 1.0), (5.0, 1.0)):
        probe.measure("a", torch.full((1, 1, 1), value), position, start)
        probe.computed("a", torch.full((1, 1, 1), value), position, start)
    probe.measure("a", torch.full((1, 1, 1), 6.0), 2.0, start)
    assert probe.weights == pytest.approx((5 / 4, -1 / 4))  # on the way from 1 to 5


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
