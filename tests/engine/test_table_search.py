"""The search for a table of modules, against exhaustive search and by hand."""

import itertools
import random

import pytest

from stretto.acceleration.caching.masks import strip
from stretto.acceleration.caching.policy import Rails
from stretto.acceleration.caching.table_search import Unit, choose_table
from stretto.acceleration.errors import StrettoError

FREE = Rails(0, 0)


def error_of(unit, mask):
    """Sum of the errors of a mask: every skipped step is off by the changes since the one computed last."""
    total = age = 0.0
    for step, computed in enumerate(mask):
        age = 0.0 if computed else age + unit.changes[step]
        total += age
    return total


def masks_of(choice, units):
    return [
        [choice.table.computed(step, unit.block, unit.names[0]) for step in range(choice.table.steps)] for unit in units
    ]


def random_units(rng, blocks, steps):
    return [
        Unit(block, (name,), rng.uniform(0.5, 2.0), (0.0, *(rng.uniform(0.01, 1.0) for _ in range(steps - 1))))
        for block in range(blocks)
        for name in ("attn", "mlp")
    ]


def test_the_prediction_is_that_of_the_table():
    rng = random.Random(1)
    for _ in range(20):
        units, share = random_units(rng, 3, 9), rng.uniform(0.5, 0.95)
        choice = choose_table(units, share, Rails(2, 1), 3)
        masks = masks_of(choice, units)
        cells = 9 * len(units)
        assert choice.error == pytest.approx(sum(map(error_of, units, masks)) / cells)
        computed = sum(unit.cost * sum(mask) for unit, mask in zip(units, masks))
        whole = sum(unit.cost for unit in units) * 9
        assert choice.share == pytest.approx(computed / whole) and choice.share <= share * (1 + 1e-6)
        for mask in masks:
            drawn = strip(mask)
            assert drawn.startswith("##") and drawn.endswith("#") and "...." not in drawn


def test_of_equal_costs_and_no_neighbours_the_smallest_changes_go():
    """With runs of one skip at most the greedy choice of the cheapest isolated steps is the best one."""
    unit = Unit(0, ("attn",), 1.0, (0.0, 0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6))
    choice = choose_table([unit], 5 / 8, FREE, 1)
    assert strip(masks_of(choice, [unit])[0]) == "##.#.#.#"
    best = min(
        (error_of(unit, mask), mask)
        for mask in itertools.product((True, False), repeat=8)
        if mask[0] and sum(mask) == 5 and ".." not in strip(mask)
    )
    assert choice.error == pytest.approx(best[0] / 8)


def test_it_comes_close_to_the_best_table():
    rng = random.Random(4)
    for _ in range(10):
        units = random_units(rng, 1, 7)
        choice = choose_table(units, 0.7, FREE, 6)
        every = list(itertools.product((True, False), repeat=6))
        best = min(
            sum(error_of(unit, (True, *mask)) for unit, mask in zip(units, pair))
            for pair in itertools.product(every, repeat=2)
            if sum(unit.cost * (1 + sum(mask)) for unit, mask in zip(units, pair))
            <= 0.7 * 7 * sum(unit.cost for unit in units)
        )
        assert best <= choice.error * 14 * (1 + 1e-9) <= 1.6 * best


def test_the_costly_module_goes_first_where_changes_are_equal():
    changes = (0.0,) + (0.1,) * 5
    units = [Unit(0, ("attn",), 1.0, changes), Unit(0, ("mlp",), 3.0, changes)]
    choice = choose_table(units, 0.9, FREE, 4)
    assert strip(masks_of(choice, units)[0]) == "######" and masks_of(choice, units)[1].count(False) == 1


def test_a_module_of_two_names_goes_as_one():
    changes = (0.0, 0.1, 0.1, 0.1)
    units = [Unit(0, ("attn",), 1.0, (0.0, 9.0, 9.0, 9.0)), Unit(1, ("attn", "mlp"), 1.0, changes)]
    table = choose_table(units, 0.8, FREE, 4).table
    assert table.modules == ("attn", "mlp") and table.blocks == 2
    for step in range(4):
        assert table.computed(step, 1, "attn") == table.computed(step, 1, "mlp")
        assert table.computed(step, 0, "mlp"), "what nobody speaks for is computed"
    assert table.computed_share < 1


def test_steps_that_count_for_more_are_computed():
    unit = Unit(0, ("attn",), 1.0, (0.0,) + (0.1,) * 7)
    early = choose_table([unit], 5 / 8, FREE, 1, [8, 8, 8, 8, 1, 1, 1, 1])
    late = choose_table([unit], 5 / 8, FREE, 1, [1, 1, 1, 1, 8, 8, 8, 8])
    assert strip(masks_of(early, [unit])[0])[:4].count(".") == 1 and strip(masks_of(late, [unit])[0])[4:].count(".") == 1
    assert choose_table([unit], 5 / 8, FREE, 1, [3] * 8) == choose_table([unit], 5 / 8, FREE, 1)


def test_nothing_to_do():
    units = random_units(random.Random(2), 2, 5)
    choice = choose_table(units, 1.0)
    assert choice.table.computed_share == 1.0 and choice.error == 0.0 and choice.share == 1.0


@pytest.mark.parametrize(
    ("units", "options", "words"),
    [
        ([], {}, "no modules to choose among"),
        ([Unit(0, ("attn",), 1.0, (0.0, 1.0)), Unit(0, ("mlp",), 1.0, (0.0,))], {}, r"over \[1, 2\] steps"),
        ([Unit(0, ("attn",), 1.0, (0.0, float("nan")))], {}, "attn of block 0 has a cost or a change that is no number"),
        ([Unit(0, ("attn",), -1.0, (0.0, 1.0))], {}, "no number >= 0"),
        ([Unit(0, ("attn",), 0.0, (0.0, 1.0))], {}, "every cost is 0"),
        ([Unit(0, ("attn",), 1.0, (0.0, 1.0))], {"share": 0.0}, r"share is 0.0; it must be in \(0, 1\]"),
        ([Unit(0, ("attn",), 1.0, (0.0, 1.0))], {"most_skips": 0}, "most_skips is 0; it must be at least 1"),
        ([Unit(0, ("attn",), 1.0, (0.0, 1.0))], {"importance": [1.0]}, r"importance is \[1.0\]; expected 2 numbers > 0"),
        ([Unit(0, ("attn",), 1.0, (0.0,) * 6)], {"share": 0.2}, "33% of the modules' cost is left .* 20% was wanted"),
    ],
)
def test_mistakes_are_told_plainly(units, options, words):
    with pytest.raises(StrettoError, match=words):
        choose_table(units, **{"share": 0.5, "most_skips": 2, "rails": Rails(1, 0), **options})
