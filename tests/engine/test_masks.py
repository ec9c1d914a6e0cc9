"""Static masks against published bins and schedules, and what stretching must keep."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.masks import (
    SCM_BINS,
    Table,
    bins_mask,
    growing_mask,
    parse_mask,
    scm_mask,
    stretch,
    strip,
)
from stretto.acceleration.caching.policy import Rails, interval_mask, limit_skips
from stretto.acceleration.errors import StrettoError

masks = st.lists(st.booleans(), min_size=1, max_size=60).map(tuple)


def longest_gap(mask):
    return max(len(run) for run in strip(mask).split("#"))


def test_parsing_accepts_the_usual_spellings():
    assert parse_mask("##..#") == parse_mask("11 00\n1") == parse_mask("xx--x") == (True, True, False, False, True)


@given(masks)
def test_drawing_and_parsing_are_inverse(mask):
    assert parse_mask(strip(mask)) == mask


@pytest.mark.parametrize(("text", "message"), [("##o#", "character 3 is 'o'"), ("# ?", "character 3 is '?'"), (" ", "empty")])
def test_a_bad_character_is_named_with_its_position(text, message):
    with pytest.raises(StrettoError, match=message.replace("?", r"\?")):
        parse_mask(text)


@pytest.mark.parametrize(
    ("steps", "growth", "expected", "computed"),
    [
        (50, 0.75, "#####.#.#..#...#....#....#.....#......#.......#...", 14),
        (28, 0.75, "#####.#.#..#...#....#....#..", 11),
        (20, 0.75, "#####.#.#..#...#....", 9),
        (50, 3.0, "#####.#....#.......#..........#.............#.....", 10),
    ],
)
def test_spectrum_schedule(steps, growth, expected, computed):
    mask = growing_mask(steps, Rails(5, 0), 2, growth)
    assert strip(mask) == expected and sum(mask) == computed


@pytest.mark.parametrize("growth", [0.1, 0.25, 0.75, 1.9])
def test_the_window_grows_by_exactly_its_growth(growth):
    """The k-th distance between computed steps is 2 + k * growth, rounded down; a tenth adds up to a whole one too."""
    mask, at = growing_mask(400, Rails(1, 0), 2, growth), 0
    for k in range(12):
        distance = int(2 + k * growth + 1e-9)
        assert strip(mask[at + 1 : at + distance + 1]) == "." * (distance - 1) + "#"
        at += distance


def test_spectrum_schedule_with_a_tail_ends_on_computed_steps():
    assert strip(growing_mask(28, Rails(5, 3), 2, 0.75)) == "#####.#.#..#...#....#....###"


@given(st.integers(1, 60), st.integers(0, 8), st.integers(0, 8), st.floats(1, 6), st.floats(0, 4))
def test_growing_gaps_never_shrink(steps, warmup, tail, window, growth):
    mask = growing_mask(steps, Rails(warmup, tail), window, growth)
    gaps = [len(run) for run in strip(mask[warmup : steps - tail]).split("#")[:-1]]
    assert gaps == sorted(gaps) and all(mask[:warmup]) and all(mask[steps - tail :])


@pytest.mark.parametrize(
    ("steps", "level", "computed"),
    [
        (28, "slow", 18), (28, "medium", 15), (28, "fast", 11), (28, "ultra", 8),
        (9, "slow", 8), (9, "medium", 7), (9, "fast", 6), (9, "ultra", 5),
    ],
)  # fmt: skip
def test_scm_bins(steps, level, computed):
    mask = scm_mask(level, steps)
    assert len(mask) == steps and sum(mask) == computed and mask[0] and mask[-1]
    assert mask == bins_mask(*SCM_BINS[steps][level], steps)


def test_scm_drawings():
    assert strip(scm_mask("medium", 28)) == "######.##...##...##...##...#"
    assert strip(scm_mask("ultra", 28)) == "####..#.....#......#.......#"
    assert strip(scm_mask("slow", 9)) == "#####.###" and strip(scm_mask("ultra", 9)) == "###..#..#"


@given(st.integers(4, 120), st.sampled_from(["slow", "medium", "fast", "ultra"]))
def test_scm_keeps_its_share_at_every_step_count(steps, level):
    mask, base = scm_mask(level, steps), 9 if steps < 16 else 28
    assert len(mask) == steps and mask[0] and mask[-1]
    assert abs(sum(mask) - sum(scm_mask(level, base)) * steps / base) <= 1 + 0.5 * steps / base


@pytest.mark.parametrize("steps", [4, 6, 9, 12, 20, 28, 40, 50])
def test_scm_levels_are_ordered(steps):
    counts = [sum(scm_mask(level, steps)) for level in ("slow", "medium", "fast", "ultra")]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (((3, 2), (1,)), "add up to 6 steps, the run has 8"),
        (((3,), (1, 4)), "1 computed and 2 skipped runs cannot alternate"),
        (((3, 0, 4), (1,)), "every run must be a whole number >= 1"),
    ],
)
def test_bins_that_do_not_fit_say_why(bins, message):
    with pytest.raises(StrettoError, match=message):
        bins_mask(*bins, 8)
    with pytest.raises(StrettoError, match="level is 'turbo'; known levels: slow, medium, fast, ultra"):
        scm_mask("turbo", 28)


@given(masks, st.integers(1, 120))
def test_stretching_keeps_ends_and_share(mask, steps):
    stretched = stretch(mask, steps)
    assert len(stretched) == steps
    if mask[0]:
        assert stretched[0]
    if mask[-1]:
        assert stretched[-1]
    assert stretch(mask, len(mask)) == mask
    assert abs(sum(stretched) - sum(mask) * steps / len(mask)) <= 1 + steps / len(mask)
    assert any(mask) or not any(stretched)
    assert not all(mask) or all(stretched)


@given(st.integers(6, 60), st.integers(6, 60), st.integers(2, 5))
def test_stretching_keeps_the_distance_between_computed_steps(old, new, interval):
    mask = interval_mask(old, Rails(1, 1), interval)
    assert longest_gap(stretch(mask, new)) <= interval


def test_stretching_by_hand():
    assert strip(stretch(parse_mask("#.#.#.#.#"), 17)) == "#.#.#.#.#.#.#.#.#"
    assert strip(stretch(parse_mask("#.#.#.#.#.#"), 6)) == "#.##.#"  # two and a half gaps: rounded up to three
    assert strip(stretch(parse_mask("####"), 9)) == "#########"


@given(masks, st.integers(0, 6))
def test_limited_skips(mask, most):
    limited = limit_skips(mask, most)
    assert longest_gap(limited) <= most
    assert all(new >= old for new, old in zip(limited, mask))
    assert longest_gap(mask) > most or limited == mask


def test_forced_steps_are_rails():
    rails = Rails(1, 1, forced=frozenset({4}))
    assert strip(interval_mask(9, rails, 3)) == "#..##.#.#" and rails.reason(4, 9) == "forced"


BLOCKS = {"computed": ["##", "#.", ".#"]}
MODULES = {"modules": ["attn", "mlp"], "computed": [["##", "##"], ["#.", ".."], ["..", ".#"]]}


def test_table_of_blocks():
    table = Table.from_json(BLOCKS)
    assert (table.steps, table.blocks, table.modules) == (3, 2, ())
    assert table.computed(1, 0) and not table.computed(1, 1) and table.computed_share == pytest.approx(4 / 6)
    table.require_shape(2, 3)


def test_table_of_modules():
    table = Table.from_json(MODULES)
    assert table.computed(1, 0, "attn") and not table.computed(1, 0, "mlp")
    assert table.computed(2, 1) and not table.computed(1, 1)
    assert table.computed_share == pytest.approx(6 / 12)
    with pytest.raises(StrettoError, match="no module 'cross'; it has attn, mlp"):
        table.computed(0, 0, "cross")


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_tables_survive_json(steps, blocks, modules, rng: random.Random):
    def cell():
        return tuple(rng.random() < 0.5 for _ in range(modules)) if modules else rng.random() < 0.5

    table = Table(tuple(tuple(cell() for _ in range(blocks)) for _ in range(steps)), tuple("abc"[:modules]))
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    bare = json.loads(json.dumps(table.rows))
    assert Table.from_json(bare).rows == table.rows


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"computed": []}, r"t.json: computed is \[\]; expected one row per step"),
        ({"computed": ["##", "#"]}, r"t.json: computed\[1\] has 1 blocks; expected 2"),
        ({"computed": ["##", "#?"]}, r"t.json: computed\[1\]: mask: character 2 is '\?'"),
        ({"computed": [[1, 0], [1, 2]]}, r"t.json: computed\[1\] is \[1, 2\]; expected a mask"),
        ({"computed": [["##", "#"]], "modules": ["a", "b"]}, r"t.json: computed\[0\]\[1\] has 1 entries; expected 2"),
        ({"computed": ["##"], "modules": ["a", "a"]}, "expected different names"),
        ({"computed": ["##"], "modules": "attn"}, "modules is 'attn'; expected a list of names"),
        ({"rows": ["##"]}, r"expected the fields computed and modules, found \['rows'\]"),
        (7, "computed is 7; expected one row per step"),
    ],
)
def test_bad_tables_name_file_field_and_expectation(document, message):
    with pytest.raises(StrettoError, match=message):
        Table.from_json(document, "t.json")


def test_a_table_for_another_model_is_refused():
    with pytest.raises(StrettoError, match="t.json: it is for 2 blocks, this model has 4"):
        Table.from_json(BLOCKS).require_shape(4, source="t.json")
    with pytest.raises(StrettoError, match="it is for 3 steps, this run has 5"):
        Table.from_json(BLOCKS).require_shape(2, 5)
