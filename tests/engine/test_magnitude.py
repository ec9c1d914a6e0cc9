"""MagCache's masks from the published curves, and the same curves over the noise level."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.lookup import effective
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
from stretto.acceleration.caching.methods import CacheSettings
from stretto.acceleration.caching.presets import (
    Preset,
    Provenance,
    builtin_presets,
    find,
    load_preset,
    magnitude_preset,
    save_preset,
)
from stretto.acceleration.caching.profile import Profile
from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.facts import Facts
from stretto.acceleration.models.flux import FLUX as FLUX_FAMILY
from stretto.acceleration.models.wan import WAN
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import schedule_of, traits_of

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


def facts(descriptor, network, steps):
    """A run on a network of which nothing but its sizes exists."""
    shape = (1, 16, 4, 4) if descriptor is FLUX_FAMILY else (1, 16, 1, 4, 4)
    return Facts(network, descriptor, traits_of("euler"), schedule_of(list(flow_sigmas(steps, 3.0))), shape)


def wan_14b(**sizes):
    """Wan 2.1's 14B by its sizes, or another."""
    known = {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "out_dim": 16, "model_type": "t2v", "patch_size": (1, 2, 2)}
    return SimpleNamespace(**{**known, "blocks": [None] * 40, "ref_conv": None, **sizes})


def unknown_wan():
    """A Wan of nobody's."""
    return wan_14b(dim=64)


def flux_dev():
    """FLUX.1 [dev], or Kontext, by its sizes."""
    sizes = {"hidden_size": 3072, "patch_size": 2, "in_channels": 64, "out_channels": 64}
    lists = {"double_blocks": [None] * 19, "single_blocks": [None] * 38}
    return SimpleNamespace(**sizes, **lists, params=SimpleNamespace(guidance_embed=True))


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


# A curve of one's own


def recorded(**about):
    """A profile whose residual's norm halves over five steps, evenly in the noise level."""
    sigmas = flow_sigmas(5, 3.0)
    logs = tuple(math.log(0.5) * (1.0 - sigma) for sigma in sigmas[:5])
    about = {"family": "wan", "variant": "", **about}
    return Profile(sigmas, tuple(range(5)), np.zeros((5, 4)), logs, 0.0, about=about)


def test_a_curve_survives_as_text():
    curve = find(*FLUX, "MagCache").curve()
    again = MagnitudeCurve.from_text(curve.to_text())
    assert again.sigmas == pytest.approx(curve.sigmas) and again.logs == pytest.approx(curve.logs, abs=1e-8)
    assert again.ratios == pytest.approx(curve.ratios)
    shifted = MagnitudeCurve.from_text("1:7.5 0.5:7")
    assert shifted.logs == (0.0, -0.5) and shifted.ratios == pytest.approx((1.0, math.exp(-0.5)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:0 0.5:x", "curve: '0.5:x' is no level; expected sigma:logarithm"),
        ("1:0 nan:1", "'nan:1' is no level"),
        ("1", "'1' is no level"),
        ("0.5:0 1:0.1", "curve: '0.5:0 1:0.1': the levels of a magnitude curve must fall strictly"),
        ("1:0", "two or more levels"),
    ],
)
def test_texts_that_are_no_curve(tmp_path, text, message):
    with pytest.raises(StrettoError, match=message):
        CacheTechnique().validate(Request("cache", {"method": "MagCache", "curve": text}))
    preset = replace(find(*FLUX, "MagCache"), settings={"curve": text}, data={})
    (tmp_path / "mine.json").write_text(json.dumps(preset.to_json()), encoding="utf-8")
    with pytest.raises(StrettoError, match=message) as caught:
        load_preset(tmp_path / "mine.json")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.json'}: settings.curve: ")


def test_a_recorded_curve_runs(tmp_path):
    """Out of a profile, into a file, and out of it into a request: the mask is the curve's."""
    preset = magnitude_preset(recorded(), threshold=0.3, max_skips=2, retention=0.4)
    save_preset(tmp_path / "mine.json", preset)
    settings = load_preset(tmp_path / "mine.json").request("mine.json")
    assert (settings["warmup"], settings["family"], settings["variant"]) == (2, "wan", "")
    outcome = CacheTechnique().resolve(Request("cache", settings), facts(WAN, unknown_wan(), 20))
    curve, sigmas = recorded().curve(), facts(WAN, unknown_wan(), 20).schedule.sigmas
    mask = (True, True, *magnitude_mask(curve.step_ratios(sigmas[:20])[2:], 0.3, 2, 0.0, 18))
    assert strip((*mask[:-1], True)) in outcome.reason and outcome.session is not None


def test_a_curve_of_another_model_is_refused_by_file_field_and_expectation():
    settings = magnitude_preset(recorded(variant="2.1-t2v-14b")).request("mine.json")
    CacheTechnique().resolve(Request("cache", settings), facts(WAN, wan_14b(), 20))
    with pytest.raises(StrettoError, match="mine.json: variant is '2.1-t2v-14b'; expected a preset of a model with size"):
        CacheTechnique().resolve(Request("cache", settings), facts(WAN, unknown_wan(), 20))
    with pytest.raises(StrettoError, match="mine.json: the preset was calibrated for wan, this model is flux"):
        CacheTechnique().resolve(Request("cache", settings), facts(FLUX_FAMILY, flux_dev(), 20))
    with pytest.raises(StrettoError, match="about.family is None"):
        magnitude_preset(recorded(family=None))


def test_masks_do_not_belong_to_a_variant():
    preset = Preset("wan", "2.1-t2v-14b", "Schedule", {"mask": "#.#"}, (3, 3), Provenance("x"))
    assert preset.request() == {"method": "Schedule", "mask": "#.#", "family": "wan", "origin": ""}


# Numbers that may belong to another model, and numbers that have no place


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "MagCache"}, True),
        ({"method": "TeaCache"}, True),
        ({"method": "TaylorSeer", "preset": "published"}, False),  # one preset for all of Wan
        ({"method": "Taylor"}, False),
        ({"method": "MagCache", "curve": "1:0 0:-1"}, False),
    ],
)
def test_a_model_that_may_be_another_is_told_so(settings, told):
    outcome = CacheTechnique().resolve(Request("cache", settings), facts(WAN, wan_14b(), 20))
    sentence = "sizes of 2.1-t2v-14b and of Wan 2.2's text-to-video experts: the numbers of 2.1-t2v-14b are used"
    assert (sentence in outcome.reason) == told, outcome.reason


def test_kontext_is_told_that_it_gets_the_numbers_of_dev():
    told = CacheTechnique().resolve(
        Request("cache", {"method": "FBCache", "preset": "published"}), facts(FLUX_FAMILY, flux_dev(), 20)
    )
    assert "the sizes of dev and of FLUX.1 Kontext [dev]" in told.reason
    plain = CacheTechnique().resolve(Request("cache", {"method": "FBCache"}), facts(FLUX_FAMILY, flux_dev(), 20))
    assert "Kontext" not in plain.reason


def test_numbers_without_a_place_are_named():
    settings, note = effective(CacheSettings(method="SpeCa", preset="published"), "wan", "", 50)
    assert note.endswith("(not supported here: min_skips)")
    assert (settings.decay, settings.order, settings.max_skips, settings.threshold) == (0.3, 2, 8, 0.05)


@pytest.mark.parametrize("preset", builtin_presets(), ids=lambda p: f"{p.method}-{p.family}-{p.variant}-{p.steps[0]}")
def test_no_other_published_number_is_passed_over(preset):
    _, note = effective(CacheSettings(method=preset.method, preset="published"), preset.family, preset.variant, 30)
    assert ("not supported" in note) == (preset.method == "SpeCa")


def test_numbers_that_once_were_passed_over():
    def published(method, family, variant, steps=50):
        return effective(CacheSettings(method=method, preset="published"), family, variant, steps)[0]

    assert (published("DBCache", "flux", "dev").first_blocks, published("DBCache", "flux", "dev").last_blocks) == (8, 0)
    assert published("CG-Taylor", "wan", "2.1-t2v-14b").probe_order == 3
    assert published("Spectrum", "wan", "").window == 2
    assert (published("DiCache", "flux", "dev", 30).warmup, published("DiCache", "flux", "dev", 30).tail) == (6, 1)
    assert [published("AdaCache", "wan", "", steps).codebook for steps in (30, 100)] == [
        "",
        "0.03:12 0.05:10 0.07:8 0.09:6 0.11:4 1:3",
    ]
