"""Presets: every built-in one is valid, says where it comes from, and bad files say what is wrong with them."""

import copy
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.masks import scm_mask
from stretto.acceleration.caching.policy import Accumulator
from stretto.acceleration.caching.polynomial import ClampedPolynomial
from stretto.acceleration.caching.presets import (
    FOLDER,
    MAX_BYTES,
    Preset,
    Provenance,
    builtin_presets,
    find,
    load_preset,
    save_preset,
)
from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.schemas import schema

GOOD = {
    "schema": "preset@1",
    "technique": "cache",
    "family": "flux",
    "variant": "dev",
    "method": "TeaCache",
    "settings": {"threshold": 0.25, "warmup": 1},
    "levels": {"fast": {"threshold": 0.4}},
    "steps": [20, 60],
    "data": {"coefficients": [1.0, 0.0], "range": [0.0, 0.5], "range_source": "seen", "indicator": "modulated_input"},
    "provenance": {"source": "a test", "kind": "measured", "measured": {"speedup": 1.5}},
}


def changed(path, value):
    document = copy.deepcopy(GOOD)
    *parents, last = path
    target = document
    for name in parents:
        target = target[name]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_builtin_files(path):
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema("preset"))
    preset = load_preset(path)
    if preset.provenance.kind == "published":
        assert "published, not measured here" in preset.provenance.words()
    else:  # every level was measured, and says on what
        assert set(preset.provenance.measured["levels"]) == set(preset.levels)
        assert all(figures for figures in preset.provenance.measured["levels"].values())
    assert Preset.from_json(json.loads(json.dumps(preset.to_json()))) == preset


def test_builtin_presets_are_found_and_unambiguous():
    presets = builtin_presets()
    assert len(presets) == len(list(FOLDER.glob("*.json"))) >= 60
    assert len({(p.family, p.variant, p.method, p.steps) for p in presets}) == len(presets)
    for preset in presets:
        assert find(preset.family, preset.variant, preset.method, preset.steps[0]) == preset


def test_the_best_fit_wins():
    assert find("flux", "dev", "FBCache").settings["threshold"] == 0.08
    assert find("flux", "kontext", "FBCache").settings["threshold"] == 0.05  # the one for any family
    assert find("wan", "2.2-t2v-14b", "EasyCache").variant == "any"
    assert [len(find("hunyuan_video", "1.5", "MagCache", steps).data["ratios"]) for steps in (20, 40)] == [20, 40]
    assert find("sd3", "3.5", "MagCache") is None


def test_levels_change_settings():
    preset = Preset.from_json(GOOD)
    assert preset.at() == {"threshold": 0.25, "warmup": 1} and preset.at("fast") == {"threshold": 0.4, "warmup": 1}
    with pytest.raises(StrettoError, match="no level 'turbo'; known levels: fast"):
        preset.at("turbo")
    assert preset.fits(20) and preset.fits(60) and not preset.fits(19)


def test_presets_are_frozen():
    with pytest.raises(TypeError):
        find("flux", "dev", "TeaCache").settings["threshold"] = 1.0
    with pytest.raises(StrettoError, match="it has no ratios"):
        find("flux", "dev", "TeaCache").curve()


def test_published_coefficients_verbatim():
    tea = find("flux", "dev", "TeaCache").data["coefficients"]
    assert tea == [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
    wan = find("wan", "2.1-t2v-14b", "TeaCache").data["coefficients"]
    assert wan == [-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404]
    assert find("qwen_image", "any", "MagCache").data["ratios"][-3:] == [0.781, 0.742, 0.547]


@pytest.mark.parametrize("steps", [9, 28])
def test_scm_presets_hold_the_published_masks(steps):
    preset = find("any", "any", "SCM", steps)
    for level in ("slow", "medium", "fast", "ultra"):
        assert preset.mask(level) == scm_mask(level, steps)
        assert preset.at(level)["level"] == level


TEACACHE = [preset for preset in builtin_presets() if preset.method == "TeaCache"]


@pytest.mark.parametrize("preset", TEACACHE, ids=lambda preset: f"{preset.family}-{preset.variant}")
def test_polynomials_stay_positive_where_they_are_trusted(preset):
    polynomial = preset.polynomial()
    xs = [polynomial.low + i / 400 * (polynomial.high - polynomial.low) for i in range(401)]
    assert min(map(polynomial.raw, xs)) >= 0.0
    smallest = min([preset.settings["threshold"], *(level["threshold"] for level in preset.levels.values())])
    # Even a run of the smallest changes computes again after a few steps, at every published threshold.
    assert polynomial(0.0) >= smallest / 8.2
    assert all(polynomial(x) >= 0.0 for x in (0.0, 0.01, 0.1, 0.15, 0.2, 0.3, 1.0, 50.0))


def test_flux_polynomial_is_nearly_constant_so_teacache_is_nearly_an_interval():
    polynomial = find("flux", "dev", "TeaCache").polynomial()
    values = [polynomial(x / 1000) for x in range(201)]
    assert min(values) > 0.17 and max(values) < 0.27
    accumulator, mask = Accumulator(0.25), []
    for _ in range(12):
        skip = accumulator.skip(polynomial(0.1))
        mask.append(not skip)
        if not skip:
            accumulator.reset()
    assert mask == [False, True] * 6


def test_clamped_polynomial_by_hand():
    polynomial = ClampedPolynomial([1.0, -1.0, 0.0], 0.25, 2.0)  # x^2 - x, negative below 1
    assert polynomial.raw(0.5) == -0.25 and polynomial(0.5) == 0.0 and polynomial.clamped == 1
    assert polynomial(1.5) == 0.75 and polynomial.clamped == 1
    assert polynomial(9.0) == 2.0 and polynomial.clamped == 2
    with pytest.raises(ValueError, match="low <= high"):
        ClampedPolynomial([1.0], 1.0, 0.0)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=5), st.lists(st.floats(0, 3), min_size=1, max_size=40))
def test_a_clamped_polynomial_never_lowers_the_sum(coefficients, changes):
    """The failure it prevents: a negative value outside the fit, after which nothing is ever computed again."""
    polynomial, accumulator, totals = ClampedPolynomial(coefficients, 0.0, 0.3), Accumulator(float("inf")), [0.0]
    for change in changes:
        accumulator.skip(polynomial(change))
        totals.append(accumulator.total)
    assert totals == sorted(totals)


def test_the_raw_published_polynomial_would_never_compute_again():
    """Wan 2.1 14B's retention fit is -188 at a relative change of 0.2, which fewer steps produce."""
    polynomial = find("wan", "2.1-t2v-14b-retention", "TeaCache").polynomial()
    assert polynomial.raw(0.2) == pytest.approx(-188, abs=1)
    assert polynomial(0.2) == polynomial(polynomial.high) >= 0.2 and polynomial.clamped == 1


def test_round_trip_through_a_file(tmp_path):
    path = tmp_path / "mine.json"
    preset = Preset.from_json(GOOD)
    save_preset(path, preset)
    assert load_preset(path) == preset
    with pytest.raises(StrettoError, match="exists already"):
        save_preset(path, preset)
    other = Preset("flux", "dev", "TeaCache", {"threshold": 0.1}, (1, 9), Provenance("else"))
    save_preset(path, other, overwrite=True)
    assert load_preset(path) == other
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_a_preset_that_would_not_load_is_not_written(tmp_path):
    bad = Preset("flux", "dev", "TeaCache", {"threshold": float("inf")}, (1, 9), Provenance("x"))
    with pytest.raises(StrettoError, match="settings.threshold is inf"):
        save_preset(tmp_path / "a.json", bad)
    with pytest.raises(StrettoError, match="cannot be written"):
        save_preset(tmp_path / "nowhere" / "a.json", Preset.from_json(GOOD))
    assert list(tmp_path.iterdir()) == []


BAD = [
    (("technique",), "region", "technique is 'region'; expected 'cache'"),
    (("family",), " ", "family is ' '; expected a text"),
    (("method",), KeyError, "has no field 'method'"),
    (("speed",), 2, "unknown field 'speed'"),
    (("settings", "threshold"), None, "settings.threshold is None; expected a finite number"),
    (("settings", "warmup"), [1], r"settings.warmup is \[1\]"),
    (("levels", "fast"), 3, "levels.fast is 3; expected an object"),
    (("levels", "fast", "threshold"), {}, "levels.fast.threshold is {}"),
    (("steps",), [9, 3], r"steps is \[9, 3\]; expected two whole numbers"),
    (("steps",), [True, 3], "steps is"),
    (("steps",), [0, 3], "1 <= fewest"),
    (("data", "coefficients"), [1, "x"], "data.coefficients is"),
    (("data", "range"), [1.0, 0.0], r"data.range is \[1.0, 0.0\]; expected \[low, high\]"),
    (("data", "range"), KeyError, "data.range is None; expected a list of 2"),
    (("data", "indicator"), KeyError, "data.indicator is None"),
    (("data", "ratios"), [1.0, -1.0], r"data.ratios\[1\] is -1.0; expected a number > 0"),
    (("data", "ratios"), [1.0, 0.9], "data.shift is None; expected the shift"),
    (("data", "masks"), {"slow": "##o"}, "data: mask: character 3 is 'o'"),
    (("data", "table"), {"computed": ["##", "#"]}, r"data.table: computed\[1\] has 1 blocks"),
    (("data", "curve"), [1], "data has an unknown field 'curve'"),
    (("provenance", "kind"), "guessed", "provenance.kind is 'guessed'; expected 'published' or 'measured'"),
    (("provenance", "kind"), "published", "provenance.measured is {'speedup': 1.5}; expected null"),
    (("provenance", "measured"), None, "provenance.measured is None; expected the figures"),
    (("provenance", "source"), 5, "provenance.source is 5"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=lambda value: str(value)[:30] if isinstance(value, str) else None)
def test_bad_fields_name_file_field_value_and_expectation(tmp_path, path, value, message):
    file = tmp_path / "bad.json"
    document = changed(path, value)
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(StrettoError, match=message) as caught:
        load_preset(file)
    assert str(file) in str(caught.value)


#: What JSON Schema cannot say: the order of two numbers, how rows fit together, what one kind of provenance implies.
BY_HAND_ONLY = ("1 <= fewest", "whole numbers", "low, high", "computed", "expected null", "the figures")


@pytest.mark.parametrize(("path", "value"), [row[:2] for row in BAD if not any(words in row[2] for words in BY_HAND_ONLY)])
def test_the_schema_refuses_what_the_checks_refuse(path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(path, value), schema("preset"))


@pytest.mark.parametrize("document", [{**GOOD, "schema": "preset@2"}, {**GOOD, "schema": "plan@1"}, [], {"schema": None}, 3])
def test_foreign_documents_and_majors_are_refused(tmp_path, document):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SchemaError, match="other.json.*preset"):
        load_preset(file)


def test_files_that_are_no_presets(tmp_path):
    with pytest.raises(StrettoError, match="missing.json: cannot be read"):
        load_preset(tmp_path / "missing.json")
    with pytest.raises(StrettoError, match="cannot be read"):
        load_preset(tmp_path)
    for name, raw, message in (
        ("broken.json", b"{", "not a JSON file"),
        ("binary.json", b"\xff\xfe\x00", "not a JSON file"),
        ("nan.json", b'{"schema": NaN}', "NaN is not a number"),
        ("deep.json", b"[" * 100_000, "not a JSON file"),
        ("huge.json", b" " * (MAX_BYTES + 1), "larger than 1048576 bytes"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(StrettoError, match=message) as caught:
            load_preset(tmp_path / name)
        assert name in str(caught.value)
