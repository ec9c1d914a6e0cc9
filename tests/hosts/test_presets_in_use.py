"""Presets reach the run, and the report says where the numbers come from."""

import pytest

from stretto.acceleration.caching.lookup import effective
from stretto.acceleration.caching.methods import METHODS, CacheSettings
from stretto.acceleration.caching.presets import builtin_presets
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample


def reason(tiny, family, settings, steps=28):
    sample(host.request(tiny(family), Request("cache", settings)), family, steps=steps, cfg=1.0)
    trace = host.TRACES.of_prompt(None)[-1]
    return trace["techniques"][0]["reason"], trace["totals"]["computed"]


@pytest.mark.parametrize(("level", "computed"), [("quality", 18), ("balanced", 15), ("fast", 14)])
def test_measured_levels_replace_the_numbers(tiny, level, computed):
    text, count = reason(tiny, "wan", {"method": "Taylor", "interval": 9, "tail": 0, "preset": level})
    assert count == computed and f"{level} preset: Stretto" in text


@pytest.mark.parametrize(("method", "words"), [("Schedule", "no mask is known"), ("Fitted", "no weights are known")])
def test_what_a_preset_would_have_to_bring_is_missed_in_words(tiny, method, words):
    text, count = reason(tiny, "wan", {"method": method, "preset": "balanced"})
    assert words in text and count == 28


def test_published_numbers_say_that_nobody_measured_them_here(tiny):
    text, _ = reason(tiny, "wan", {"method": "EasyCache", "preset": "published"})
    assert "published, not measured here" in text
    text, count = reason(tiny, "wan", {"method": "Taylor", "interval": 3, "preset": "published"})
    assert "no published preset of Taylor" in text and count == 15


@pytest.mark.parametrize("steps", range(2, 61))
def test_every_preset_gives_valid_settings_at_every_length(steps):
    for preset in builtin_presets():
        if preset.method in METHODS:
            asked = CacheSettings(method=preset.method, preset="published")
            found, note = effective(asked, preset.family, preset.variant, steps)
            assert note and -1 <= found.forced < steps, (preset.family, preset.variant, preset.method)


def test_a_preset_of_another_family_is_refused(tiny):
    settings = {"method": "Schedule", "mask": "##.#", "warmup": 0, "tail": 0, "family": "flux"}
    with pytest.raises(StrettoError, match="calibrated for flux, this model is wan"):
        reason(tiny, "wan", settings)
