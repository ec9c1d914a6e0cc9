"""MagCache's masks from the published curves, and the same curves over the noise level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.indicator import magnitude_ratio
from stretto.acceleration.caching.magnitude import (
    MagnitudeCurve,
    MagnitudePolicy,
    flow_sigmas,
    forced_steps,
    magnitude_mask,
    retained_steps,
    stretch_ratios,
)
from stretto.acceleration.caching.masks import strip
from stretto.acceleration.caching.presets import find

FLUX, KONTEXT, CHROMA, QWEN = ("flux", "dev"), ("flux", "kontext"), ("chroma", "any"), ("qwen_image", "any")
HUNYUAN, HUNYUAN15 = ("hunyuan_video", "1"), ("hunyuan_video", "1.5")
GOLDEN = [
    (FLUX, 28, 0.24, 5, 0.1, True, "##.#..#...##.....#.....#..#."),
    (FLUX, 28, 0.24, 5, 0.1, False, "##.#..#...#.....#.....#...#."),
    (FLUX, 50, 0.24, 5, 0.1, True, "#####.#..#...#...#..##.#.....#.....#.....#....#..#"),
    (KONTEXT, 20, 0.05, 4, 0.2, False, "####.#.#..#..#..#..#"),
    (CHROMA, 26, 0.10, 2, 0.25, False, "######.#..#..#..#..#..#.#."),
    (QWEN, 40, 0.10, 2, 0.2, False, "##########.#.##.#.#.#.#.#.#.#..#..######"),
    (HUNYUAN, 50, 0.24, 6, 0.2, False, "##########....#...#....#.....#....#......#....#.##"),
    (HUNYUAN, 50, 0.12, 4, 0.2, False, "##########..#..#..#...#..#...#...#....#....#..#.##"),
    (HUNYUAN15, 20, 0.03, 2, 0.25, False, "#####..#..#..#.#.###"),
    (("wan", "2.1-t2v-1.3b"), 50, 0.12, 4, 0.2, False, "##########....#....#....#....#....#...#..#..#.#.##"),
    (("wan", "2.1-t2v-1.3b"), 50, 0.12, 2, 0.2, False, "##########..#..#..#..#..#..#..#..#..#..#..#.#.#.##"),
    (("wan", "2.1-t2v-14b"), 50, 0.24, 6, 0.2, False, "##########......#......#......#.....#....#..#..#.#"),
    (("wan", "2.1-i2v-480p"), 40, 0.24, 6, 0.2, False, "########......#.....#....#....#...#..#.#"),
    (("wan", "2.1-i2v-720p"), 40, 0.24, 6, 0.2, False, "########......#......#.....#....#..#..#."),
    (("wan", "2.2-t2v-14b"), 40, 0.06, 2, 0.2, False, "########..#..#..#..#..#..##..#..#.#.####"),
    (("wan", "2.2-i2v-14b"), 40, 0.06, 2, 0.2, False, "########..#..#.#..#..#..#..#.#.#.#.#####"),
]


def ratios(model, steps):
    return find(*model, "MagCache", steps).data["ratios"]


@pytest.mark.parametrize(("model", "steps", "threshold", "most", "retention", "force", "expected"), GOLDEN)
def test_magcache_golden_masks(model, steps, threshold, most, retention, force, expected):
    forced = forced_steps(11, 28, steps) if force else ()
    mask = magnitude_mask(ratios(model, steps), threshold, most, retention, steps, forced)
    assert strip(mask) == expected
    preset = find(*model, "MagCache", steps)
    levels = [preset.at(level) for level in (None, *preset.levels)]
    assert (threshold, most, retention) in [(s["threshold"], s["max_skips"], s["retention"]) for s in levels]


@given(st.floats(0, 0.5), st.integers(0, 8), st.floats(0, 1), st.integers(2, 80))
def test_magcache_limits(threshold, most, retention, steps):
    mask = magnitude_mask(ratios(FLUX, 28), threshold, most, retention, steps)
    drawn = strip(mask)
    assert len(mask) == steps and "." * (most + 1) not in drawn and all(mask[: int(retention * steps)])
    assert all(magnitude_mask(ratios(FLUX, 28), 0.0, most, retention, steps))


@pytest.mark.parametrize("model", sorted({row[0] for row in GOLDEN}))
def test_sigma_mode_equals_index_mode_on_the_calibration_grid(model):
    preset = find(*model, "MagCache")
    curve, settings, count = preset.curve(), preset.settings, len(preset.data["ratios"])
    sigmas = flow_sigmas(count, preset.data["shift"])
    assert curve.step_ratios(sigmas[:count]) == pytest.approx(preset.data["ratios"], rel=1e-9)
    policy = MagnitudePolicy(curve, settings["threshold"], settings["max_skips"], retained_steps(settings["retention"], count))
    decided = [not policy.skip(i, sigmas[i - 1] if i else None, sigmas[i]) for i in range(count)]
    expected = magnitude_mask(preset.data["ratios"], settings["threshold"], settings["max_skips"], settings["retention"], count)
    assert strip(decided) == strip(expected)


@pytest.mark.parametrize(("coarse", "every"), [(25, 2), (10, 5), (5, 10)])
def test_a_coarser_grid_multiplies_the_ratios_it_crosses(coarse, every):
    preset = find("wan", "2.1-t2v-14b", "MagCache")
    fine, curve = preset.data["ratios"], preset.curve()
    stepped = curve.step_ratios(flow_sigmas(coarse, preset.data["shift"])[:coarse])
    for i in range(1, coarse):
        assert stepped[i] == pytest.approx(math.prod(fine[(i - 1) * every + 1 : i * every + 1]), rel=1e-9)


def test_twenty_steps_where_they_meet_the_fifty_step_grid():
    """Every second of 20 steps is a fifth of 50: between those, the product of two ratios is that of the five crossed."""
    preset = find("wan", "2.1-t2v-1.3b", "MagCache")
    fine, stepped = preset.data["ratios"], preset.curve().step_ratios(flow_sigmas(20, preset.data["shift"])[:20])
    for i in range(2, 20, 2):
        crossed = math.prod(fine[(i - 2) * 5 // 2 + 1 : i * 5 // 2 + 1])
        assert stepped[i - 1] * stepped[i] == pytest.approx(crossed, rel=1e-9)
    naive = stretch_ratios(fine, 20)
    assert abs(math.log(naive[18])) < 0.7 * abs(math.log(stepped[18]))  # what the index stretch leaves out


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_ratios_compose(sigmas):
    curve = find(*QWEN, "MagCache").curve()
    a, b, c = sorted(sigmas, reverse=True)
    assert curve.ratio(a, b) * curve.ratio(b, c) == pytest.approx(curve.ratio(a, c), rel=1e-9)
    assert curve.ratio(b, b) == 1.0


@given(st.integers(0, 26), st.floats(0, 1), st.floats(0, 1))
def test_interpolation_is_monotone_between_levels(index, first, second):
    curve = find(*FLUX, "MagCache").curve()
    high, low = curve.sigmas[index], curve.sigmas[index + 1]
    near, far = sorted((first, second))
    values = [curve.log_magnitude(high + share * (low - high)) for share in (0, near, far, 1)]
    assert values in (pytest.approx(sorted(values), abs=1e-12), pytest.approx(sorted(values, reverse=True), abs=1e-12))


def test_beyond_the_calibrated_levels():
    curve = MagnitudeCurve.from_ratios([1.0, 2.0, 0.5], [1.0, 0.5, 0.25, 0.0])
    assert curve.ratio(5.0, 1.0) == 1.0 and curve.ratio(1.0, 0.25) == pytest.approx(1.0)
    assert curve.ratio(0.25, 0.0) == pytest.approx(0.5)  # the last slope goes on


def test_flow_grid():
    assert flow_sigmas(4, 1.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    shifted = flow_sigmas(50, 5.0)
    assert len(shifted) == 51 and shifted[25] == pytest.approx(5 / 6) and shifted[-1] == 0.0


def test_wan22_switches_experts_where_its_curve_dips():
    """The experts change below sigma 0.875 (text) and 0.9 (image): steps 26 and 15 of 40, which carry the outlying ratio."""
    for variant, boundary, step in (("2.2-t2v-14b", 0.875, 26), ("2.2-i2v-14b", 0.9, 15)):
        preset = find("wan", variant, "MagCache")
        sigmas, values = flow_sigmas(40, preset.data["shift"]), preset.data["ratios"]
        assert sigmas[step] < boundary <= sigmas[step - 1]
        assert values[step] == min(values[: step + 8])


def test_policy_by_hand_and_after_a_forced_compute():
    curve = MagnitudeCurve.from_ratios([1.0, 0.9, 0.9, 0.9, 0.9], [5.0, 4.0, 3.0, 2.0, 1.0])
    policy = MagnitudePolicy(curve, threshold=0.35, max_skips=9, retained=1)
    assert not policy.skip(0, None, 5.0)
    assert policy.skip(1, 5.0, 4.0) and policy.error == pytest.approx(0.1)
    assert policy.skip(2, 4.0, 3.0) and policy.error == pytest.approx(0.1 + 0.19)
    policy.computed()  # something else computed this evaluation
    assert policy.error == 0.0 and policy.skip(3, 3.0, 2.0) and policy.error == pytest.approx(0.1)
    assert policy.skip(4, 2.0, 1.0) and not policy.skip(5, 1.0, 0.0)


@pytest.mark.parametrize(
    ("values", "sigmas", "message"),
    [
        ([1.0, 0.0], [1.0, 0.5], "must be positive"),
        ([1.0, float("nan")], [1.0, 0.5], "must be positive"),
        ([1.0, 0.9], [0.5, 1.0], "fall strictly"),
        ([1.0, 0.9, 0.8], [1.0, 0.5], "as many noise levels, got 2"),
        ([1.0], [1.0], "two or more levels"),
    ],
)
def test_curves_that_cannot_be(values, sigmas, message):
    with pytest.raises(ValueError, match=message):
        MagnitudeCurve.from_ratios(values, sigmas)


def test_magnitude_ratio_averages_over_tokens():
    """Two tokens whose norms grow to 2 and 4 times: the mean of the quotients is 3, not the quotient of the means."""
    before = torch.tensor([[[3.0, 4.0], [0.6, 0.8]]])
    now = torch.tensor([[[6.0, 8.0], [-2.4, 3.2]]])
    assert magnitude_ratio(now, before) == pytest.approx(3.0)
    assert magnitude_ratio(before.half(), before.half()) == pytest.approx(1.0)
    assert math.isfinite(magnitude_ratio(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)))
