"""Metrics against scikit-image and values that can be worked out by hand."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stretto.web.panel.measure import metrics
from stretto.web.panel.measure.pictures import data_uri, difference, enlarge, png_bytes
from stretto.web.panel.measure.summary import verdict_of


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    first = rng.integers(0, 200, (64, 48, 3), dtype=np.uint8)
    return first, first + rng.integers(0, 20, first.shape, dtype=np.uint8)


def test_psnr_of_a_known_error():
    black = np.zeros((8, 8, 3), np.uint8)
    assert metrics.psnr(black, black + 1) == pytest.approx(10 * math.log10(255**2))
    assert metrics.psnr(black, black + 255) == pytest.approx(0.0)


def test_identical_pictures_are_infinitely_close(pair):
    assert metrics.psnr(pair[0], pair[0].copy()) == math.inf
    assert metrics.ssim(pair[0], pair[0].copy()) == 1.0
    assert metrics.to_json_number(math.inf) == "inf" and metrics.from_json_number("inf") == math.inf


def test_agrees_with_scikit_image(pair):
    assert metrics.psnr(*pair) == peak_signal_noise_ratio(*pair, data_range=255)
    assert metrics.ssim(*pair) == structural_similarity(*pair, data_range=255, channel_axis=2)


@pytest.mark.parametrize("side", [3, 4, 6, 8])
def test_ssim_of_small_pictures(side):
    picture = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)
    assert metrics.ssim(picture, picture) == 1.0


def test_what_cannot_be_compared_is_refused(pair):
    with pytest.raises(ValueError, match="different sizes"):
        metrics.psnr(pair[0], pair[0][1:])
    with pytest.raises(ValueError, match="3 x 3"):
        metrics.ssim(pair[0][:2, :2], pair[1][:2, :2])
    with pytest.raises(ValueError, match="not a picture"):
        metrics.read_rgb(b"hello")


def test_png_round_trip_and_helpers(pair):
    assert np.array_equal(metrics.read_rgb(png_bytes(pair[0])), pair[0])
    assert difference(np.full((1, 1, 3), 10, np.uint8), np.full((1, 1, 3), 13, np.uint8)).max() == 12
    assert enlarge(pair[0], 512).shape == (512, 384, 3) and np.array_equal(enlarge(pair[0])[::8, ::8], pair[0])
    assert data_uri(np.zeros((64, 64, 3), np.uint8)).startswith("data:image/png")
    assert data_uri(np.zeros((1024, 1024, 3), np.uint8)).startswith("data:image/jpeg")


def test_quality_leaves_identical_pictures_out_of_the_mean():
    summary = metrics.quality([math.inf, 30.0, 20.0], math.inf)
    assert (summary.mean, summary.worst, summary.count, summary.identical) == (25.0, 20.0, 3, 1)
    assert metrics.quality([math.inf], math.inf).to_json() == {
        "mean": "inf",
        "worst": "inf",
        "count": 1,
        "identical": 1,
    }
    assert metrics.quality([], 1.0) is None


def test_spread_by_hand():
    spread = metrics.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.median, spread.q1, spread.q3, spread.minimum, spread.maximum) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert (spread.low, spread.high) == (1.0, 5.0), "five values have no 95 % interval"
    assert metrics.spread([]) is None


@pytest.mark.parametrize("count,rank", [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (25, 8)])
def test_interval_of_the_median_has_the_tabulated_ranks(count, rank):
    """Ranks of the 95 % sign-test interval as in printed tables (Conover, Practical Nonparametric Statistics)."""
    spread = metrics.spread(list(range(1, count + 1)))
    assert (spread.low, spread.high) == (rank, count + 1 - rank)


def test_interval_covers_the_true_median():
    rng = np.random.default_rng(0)
    spreads = [metrics.spread(sample) for sample in rng.exponential(1.0, (2000, 11))]
    assert np.mean([s.low <= math.log(2) <= s.high for s in spreads]) >= 0.95


@pytest.mark.parametrize(
    "values,words",
    [
        ([1.5] * 6, "faster"),
        ([0.5] * 6, "slower"),
        ([1.01] * 6, "no measurable difference"),
        ([0.9, 1.6, 1.2, 1.1], "no measurable difference"),
        ([2.0, 2.0], "too few rounds for a verdict"),
        ([], "not measured"),
        ([1.5, 1.55, 1.52], "faster"),
        ([0.6, 0.62, 0.61], "slower"),
        ([1.05, 1.3, 1.02], "too few rounds for a verdict"),
    ],
)
def test_verdict(values, words):
    assert verdict_of(values) == words
