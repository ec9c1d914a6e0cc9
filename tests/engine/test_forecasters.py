"""Every linear forecaster: what it reproduces, where it is exact, and what it does to constants."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.forecast import (
    FORECASTERS,
    chebyshev_weights,
    damped_line_weights,
    hermite_weights,
    newton_weights,
    probe_weights,
    taylor_weights,
)

histories = st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(lambda xs: sorted(xs, reverse=True))
settings = st.fixed_dictionaries(
    {
        "order": st.integers(0, 3),
        "damping": st.floats(0, 1),
        "degree": st.integers(1, 5),
        "ridge": st.floats(0, 10),
        "blend": st.floats(0, 1),
    }
)


def forecast(weights, coordinates, function):
    return sum(weight * function(u) for weight, u in zip(weights, coordinates))


def quadratic(t):
    return 1 - t + 0.5 * t * t


@pytest.mark.parametrize(
    ("order", "expected"), [(1, (197.5, 230.5, 247.0)), (2, (198.0, 235.0, 255.0))], ids=["order 1", "order 2"]
)
def test_taylorseer_compat(order, expected):
    """The published recursion on f(t) = 1 - t + t^2 / 2, computed at ..., 10, 15, 20; the truth is 200.5, 242.5, 265."""
    coordinates = [20, 15, 10, 5]
    values = [forecast(taylor_weights(coordinates, t, order), coordinates, quadratic) for t in (21, 23, 24)]
    assert values == pytest.approx(expected, abs=1e-9)


def test_taylorseer_equals_its_recursion_run_step_by_step():
    """The oracle keeps tensors the way the publication does: differences rebuilt at every computed step."""
    rng = np.random.default_rng(3)
    steps, order = [0, 1, 2, 5, 9, 12, 14], 3
    features = rng.normal(size=(len(steps), 4))
    kept = []
    for index, step in enumerate(steps):
        fresh = [features[index]]
        for i in range(min(order, len(kept))):
            fresh.append((fresh[i] - kept[i]) / (step - steps[index - 1]))
        kept = fresh
        newest_first = steps[index::-1]
        weights = taylor_weights(newest_first, step + 2.5, order)
        expected = sum(d * 2.5**i / math.factorial(i) for i, d in enumerate(kept))
        ours = sum(w * f for w, f in zip(weights, features[index::-1]))
        np.testing.assert_allclose(ours, expected, atol=1e-9 * sum(map(abs, weights)))


@given(histories, st.integers(1, 12), st.integers(0, 3))
def test_all_of_them_are_exact_on_straight_lines_that_they_extend(coordinates, ahead, order):
    if len(coordinates) < 2 or order < 1:
        return
    target = coordinates[0] + ahead
    line = lambda u: 3.0 - 0.25 * u  # noqa: E731
    for weights in (
        newton_weights(coordinates, target, order),
        taylor_weights(coordinates, target, order),
        damped_line_weights(coordinates, target, 1.0),
        hermite_weights(coordinates, target, 1, math.sqrt(0.5)),
    ):
        assert forecast(weights, coordinates, line) == pytest.approx(line(target), abs=1e-7 * sum(map(abs, weights)))


def test_hermite_scale_sets_the_slope():
    """sqrt(1/2) is the whole line, HiCache's 0.5 half of it; forwards in time, not backwards."""
    coordinates, target = [20, 15], 23
    assert hermite_weights(coordinates, target, 1, math.sqrt(0.5)) == pytest.approx(newton_weights(coordinates, target, 1))
    assert hermite_weights(coordinates, target, 1) == pytest.approx(damped_line_weights(coordinates, target, 0.5))
    assert hermite_weights(coordinates, target, 1)[0] > 1.0


def test_hermite_second_and_third_order_by_hand():
    """H2 = 4x^2 - 2, H3 = 8x^3 - 12x at scale s and distance k, on unit gaps (where the differences are plain)."""
    coordinates, k, s = [3, 2, 1, 0], 2.0, 0.5
    d = [[1, 0, 0, 0], [1, -1, 0, 0], [1, -2, 1, 0], [1, -3, 3, -1]]
    h = [1.0, 2 * s * k, 4 * (s * k) ** 2 - 2, 8 * (s * k) ** 3 - 12 * s * k]
    expected = sum(np.asarray(d[i]) * s**i * h[i] / math.factorial(i) for i in range(4))
    assert hermite_weights(coordinates, 5.0, 3, s) == pytest.approx(expected.tolist())


def test_damping_interpolates_reuse_and_line():
    assert damped_line_weights([8, 6], 9, 0.0) == [1.0, 0.0]
    assert damped_line_weights([8, 6], 9, 1.0) == pytest.approx(newton_weights([8, 6], 9, 1))
    assert damped_line_weights([8, 6], 9, 0.5) == pytest.approx([1.25, -0.25])
    assert damped_line_weights([8], 9, 1.0) == [1.0]


@given(histories.filter(lambda us: len(us) >= 6), st.integers(1, 8), st.booleans())
def test_chebyshev_without_penalty_is_exact_up_to_its_degree(coordinates, ahead, anchored):
    target, steps = coordinates[0] + ahead, 60
    weights = chebyshev_weights(coordinates, target, steps, degree=4, ridge=1e-14, anchored=anchored, blend=1.0)
    function = lambda u: np.polyval([3.0, -2.0, 1.0, 0.5, -1.0], 2 * u / steps - 1)  # noqa: E731
    assert forecast(weights, coordinates, function) == pytest.approx(function(target), abs=1e-5 * sum(map(abs, weights)))


@given(histories, st.floats(0.5, 9), st.floats(0, 100), st.floats(0, 1), st.integers(1, 6))
def test_anchored_chebyshev_preserves_constants_for_any_penalty(coordinates, ahead, ridge, blend, degree):
    weights = chebyshev_weights(coordinates, coordinates[0] + ahead, 50, degree, ridge, True, blend)
    assert len(weights) == len(coordinates)
    assert sum(weights) == pytest.approx(1.0, abs=1e-7 * sum(map(abs, weights)))


def test_anchored_chebyshev_tends_to_reuse_and_passes_through_the_newest():
    coordinates = [20, 16, 14, 12, 9, 7]
    assert chebyshev_weights(coordinates, 23, 50, ridge=1e9, blend=1.0) == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-6)
    assert chebyshev_weights(coordinates, 20, 50, ridge=0.1, blend=1.0) == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-12)


def test_published_chebyshev_shrinks_and_the_anchored_one_does_not():
    """The ridge penalises T_0: at the first forecast of the published schedule 6 % of every feature is lost."""
    published = chebyshev_weights([4, 3, 2, 1, 0], 5, 50, anchored=False, blend=1.0)
    assert sum(published) == pytest.approx(0.94, abs=0.005)
    anchored = chebyshev_weights([4, 3, 2, 1, 0], 5, 50, blend=1.0)
    trend = lambda u: 10.0 + u  # noqa: E731
    ours, theirs = (abs(forecast(w, [4, 3, 2, 1, 0], trend) - 15.0) for w in (anchored, published))
    assert ours < 0.75 * theirs


def test_published_chebyshev_matches_the_normal_equations():
    coordinates, target, steps, ridge = [21, 16, 12, 9, 7, 5, 4, 3, 2, 1], 24, 50, 0.1
    design = np.polynomial.chebyshev.chebvander(np.asarray(coordinates) / 25.0 - 1.0, 4)
    at = np.polynomial.chebyshev.chebvander([target / 25.0 - 1.0], 4)
    expected = at @ np.linalg.solve(design.T @ design + ridge * np.eye(5), design.T)
    ours = chebyshev_weights(coordinates, target, steps, anchored=False, blend=1.0)
    assert ours == pytest.approx(expected[0].tolist(), abs=1e-10)


def test_blend_mixes_with_the_local_line():
    coordinates, target = [20, 16, 14, 12, 9, 7], 22
    fit = chebyshev_weights(coordinates, target, 50, blend=1.0)
    line = [*newton_weights(coordinates, target, 1), 0, 0, 0, 0]
    half = chebyshev_weights(coordinates, target, 50, blend=0.5)
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(fit, line)])
    assert chebyshev_weights(coordinates, target, 50, blend=0.0) == pytest.approx(line)


def test_probe_step_is_clipped():
    assert probe_weights(0.3, 0.25) == pytest.approx([1.2, -0.2])
    assert probe_weights(0.1, 0.25) == [1.0, 0.0] and probe_weights(9.0, 0.25) == [1.5, -0.5]
    assert probe_weights(1.0, 0.0) == [1.0, 0.0]


def test_a_far_quadratic_amplifies_rounding_noise():
    """Order 2 three steps ahead of unit gaps: weights 10, -15, 6, whose Euclidean norm is 19."""
    weights = newton_weights([2, 1, 0], 5, 2)
    assert weights == pytest.approx([10, -15, 6])
    assert math.hypot(*weights) == pytest.approx(19.0)


@given(st.sampled_from(sorted(FORECASTERS)), histories, st.floats(0.5, 9), settings)
def test_every_forecaster_takes_any_history_and_keeps_constants(name, coordinates, ahead, keywords):
    forecaster = FORECASTERS[name]
    coordinates = coordinates[: forecaster.depth(**keywords)]
    weights = forecaster.weights(coordinates, coordinates[0] + ahead, 50, **keywords)
    assert 1 <= len(weights) <= len(coordinates) and all(math.isfinite(weight) for weight in weights)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6 * sum(map(abs, weights)))
    assert forecaster.name == name and forecaster.depth(**keywords) >= 1


def test_depths():
    depth = {name: forecaster.depth(order=2) for name, forecaster in FORECASTERS.items()}
    assert depth == {"reuse": 1, "aligned": 2, "line": 2, "newton": 3, "taylor": 3, "hermite": 3, "chebyshev": 10}


@pytest.mark.parametrize("name", sorted(set(FORECASTERS) - {"reuse", "aligned"}))
def test_two_snapshots_at_one_position_are_refused(name):
    with pytest.raises(ValueError, match=r"share the position 7: \[7.0, 7.0"):
        FORECASTERS[name].weights([7, 7, 3], 8, 20, order=2)
    with pytest.raises(ValueError, match="at least one snapshot"):
        FORECASTERS[name].weights([], 8, 20)
