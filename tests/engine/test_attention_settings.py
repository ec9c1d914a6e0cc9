"""Settings of a request: what is refused, and in which words."""

import dataclasses

import pytest

from stretto.acceleration.attention.settings import AttentionSettings
from stretto.acceleration.errors import StrettoError


def test_defaults_are_valid_and_survive_a_round_trip():
    asked = AttentionSettings()
    assert AttentionSettings.from_mapping(dataclasses.asdict(asked)) == asked


def test_lists_of_json_become_tuples():
    asked = AttentionSettings.from_mapping({"tile": [1, 8, 8], "dense_layers": [0, 3], "heads": ["skip", "full"]})
    assert (asked.tile, asked.dense_layers, asked.heads) == ((1, 8, 8), (0, 3), ("skip", "full"))


@pytest.mark.parametrize(("field", "value", "words"), [
    ("method", "Flash", "known methods: Block mass, Top-k"), ("keep", 0, "above 0 and at most 1"),
    ("keep", 1.01, "above 0 and at most 1"), ("keep", float("nan"), "above 0"), ("keep", True, "a number"),
    ("keep", "0.5", "a number"), ("dense_until", 1.5, "in [0, 1]"), ("dense_until", None, "in [0, 1]"),
    ("dense_layers", [-1], "whole numbers from 0 on"), ("dense_layers", 3, "whole numbers from 0 on"),
    ("dense_layers", [1.5], "whole numbers from 0 on"), ("min_tokens", -1, "in [0, 10000000]"),
    ("min_tokens", 1.5, "whole number"), ("block", 48, "16, 32, 64, 128"), ("block", "64", "16, 32, 64, 128"),
    ("tile", "8x8", '"auto" or three whole numbers'), ("tile", [0, 8, 8], "[1, 1024]"), ("tile", [8, 8], "three"),
    ("radius", -1, "in [0, 4096]"), ("radius", 2.5, "whole number"), ("tail", "yes", "auto, on, off"),
    ("tail", True, "auto, on, off"), ("exact", "maybe", "auto, on, off"), ("pool", 3, "0, 2, 4, 8"),
    ("tau", -1, "in [0, 10]"), ("decay", 17, "in [0, 16]"), ("parts", 3, "1, 2, 4, 8"), ("parts", True, "1, 2, 4, 8"),
    ("pattern", "box", "window, top-k"), ("heads", ["skp"], "one per head"), ("heads", "skip", "one per head"),
    ("sink_frames", -2, "in [-1, 100]"), ("weights", None, "path"), ("probe", 1, "true or false"),
])  # fmt: skip
def test_wrong_values_are_refused_by_field_value_and_range(field, value, words):
    with pytest.raises(StrettoError) as caught:
        AttentionSettings.from_mapping({field: value})
    message = str(caught.value)
    assert message.startswith(f"Stretto Sparse Attention: {field} is {value!r}; ") and words in message


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(StrettoError, match="unknown setting 'kept'"):
        AttentionSettings.from_mapping({"kept": 0.5})
