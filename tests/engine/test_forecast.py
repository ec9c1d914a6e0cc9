"""Forecasters against polynomials, published values and SciPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BarycentricInterpolator

from stretto.acceleration.caching.forecast import newton_weights
from stretto.kernels.weighted_sum import weighted_sum

nodes = st.lists(st.integers(0, 60), min_size=2, max_size=4, unique=True).map(lambda xs: sorted(xs, reverse=True))


@given(nodes, st.integers(1, 3), st.floats(61, 70))
def test_weights_sum_to_one_and_match_scipy(coordinates, order, target):
    weights = newton_weights(coordinates, target, order)
    used = coordinates[: order + 1]
    assert len(weights) == len(used)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6 * sum(map(abs, weights)))
    values = np.random.default_rng(0).normal(size=len(used))
    oracle = float(BarycentricInterpolator(used, values)(target))
    assert float(np.dot(weights, values)) == pytest.approx(oracle, rel=1e-6, abs=1e-6 * sum(map(abs, weights)))


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3), st.sampled_from([[20, 15, 10], [20, 19, 11], [7.5, 7, 3]]))
def test_exact_for_polynomials_on_any_spacing(coefficients, coordinates):
    order, target = len(coefficients) - 1, 23.5
    weights = newton_weights(coordinates, target, order)
    features = [torch.tensor([np.polyval(coefficients, u)], dtype=torch.float64) for u in coordinates]
    forecast = weighted_sum(features[: len(weights)], weights)
    assert forecast.item() == pytest.approx(np.polyval(coefficients, target), abs=1e-8 * (1 + abs(forecast.item())))


def test_order_one_reproduces_taylorseer_on_a_line():
    """f(t) = 1 - t + t^2 / 2 at 10, 15, 20: the straight line gives 197.5, 230.5 and 247 at 21, 23 and 24."""
    f = lambda t: 1 - t + 0.5 * t * t  # noqa: E731
    for target, expected in ((21, 197.5), (23, 230.5), (24, 247.0)):
        weights = newton_weights([20, 15, 10], target, 1)
        assert sum(w * f(t) for w, t in zip(weights, (20, 15), strict=True)) == pytest.approx(expected)


def test_quadratic_is_exact_where_the_published_recursion_is_not():
    f = lambda t: 1 - t + 0.5 * t * t  # noqa: E731
    for target, truth in ((21, 200.5), (23, 242.5), (24, 265.0)):
        weights = newton_weights([20, 15, 10], target, 2)
        assert sum(w * f(t) for w, t in zip(weights, (20, 15, 10), strict=True)) == pytest.approx(truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weighted_sum_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 17, generator=generator).to(dtype) for _ in range(3)]
    weights = [3.0, -3.0, 1.0]
    exact = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    result = weighted_sum(tensors, weights)
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert torch.equal(weighted_sum(tensors[:1], [1.0]), tensors[0])


@pytest.mark.parametrize("tensors, weights", [([], []), ([torch.zeros(2)], [1, 2]), ([torch.zeros(2), torch.zeros(3)], [1, 1])])
def test_weighted_sum_refuses_what_does_not_fit(tensors, weights):
    with pytest.raises(ValueError, match="weighted_sum needs"):
        weighted_sum(tensors, weights)
