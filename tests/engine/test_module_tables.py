"""Tables of published methods against tables drawn by hand."""

import pytest

from stretto.acceleration.caching.masks import Table, strip
from stretto.acceleration.caching.module_tables import (
    delta_table,
    interval_table,
    pyramid_intervals,
    pyramid_table,
    timesteps,
    whole_steps,
)
from stretto.acceleration.caching.policy import Rails

FREE = Rails(0, 0)


def column(table, module, block=0):
    """How one module of one block is drawn along the run."""
    return strip(table.computed(step, block, module) for step in range(table.steps))


def drawn(table):
    """A table of blocks as rows."""
    return table.to_json()["computed"]


def test_fora_computes_every_nth_step_of_every_module():
    table = interval_table(9, Rails(2, 1), 3, 2, ("attn", "cross_attn", "mlp"))
    assert all(column(table, module, block) == "##..#..##" for module in table.modules for block in range(2))
    assert table.computed_share == 5 / 9


def test_pab_keeps_each_kind_of_attention_for_its_own_time():
    """Timesteps 1000, 950, ... 50: the band (100, 850) holds steps 4 (800) to 17 (150)."""
    sigmas = [1.0 - step / 20 for step in range(20)] + [0.0]
    table = pyramid_table(sigmas, FREE, {"attn": 2, "cross_attn": 6}, 3, ("attn", "cross_attn", "mlp"))
    for block in range(3):
        assert column(table, "attn", block) == "#####.#.#.#.#.#.#.##"
        assert column(table, "cross_attn", block) == "####..#.....#.....##"
        assert column(table, "mlp", block) == "#" * 20


def test_pab_leaves_rails_and_the_first_step_alone():
    sigmas = [0.8 - step / 20 for step in range(10)] + [0.0]
    table = pyramid_table(sigmas, Rails(3, 2, forced=frozenset({5})), {"attn": 4}, 1, ("attn",))
    assert column(table, "attn") == "###.##..##"
    assert column(pyramid_table(sigmas, FREE, {"attn": 4}, 1, ("attn",)), "attn")[0] == "#"


def test_pab_as_published_and_off():
    assert pyramid_intervals(2) == {"attn": 2, "cross_attn": 6}
    table = pyramid_table([0.8, 0.5, 0.3, 0.0], FREE, pyramid_intervals(1), 2, ("attn", "cross_attn", "mlp"))
    assert table.computed_share == 1.0


def test_delta_dit_reuses_the_back_early_and_the_front_late():
    assert drawn(delta_table(8, FREE, 2, 4, turn=0.5, share=0.5)) == [
        "##..", "####", "##..", "####", "..##", "####", "..##", "####",
    ]  # fmt: skip
    assert drawn(delta_table(6, Rails(1, 1), 3, 4, turn=0.5, share=0.75)) == [
        "####", "#...", "#...", "####", "...#", "####",
    ]  # fmt: skip


def test_delta_dit_always_runs_a_block_and_skips_a_block():
    assert drawn(delta_table(2, FREE, 2, 2, share=1.0)) == ["#.", "##"]
    assert drawn(delta_table(2, FREE, 2, 3, share=0.0)) == ["##.", "###"]


def test_timesteps_of_flow_models_and_of_others():
    assert timesteps([1.0, 0.75, 0.25, 0.0]) == [1000.0, 750.0, 250.0]
    assert timesteps([14.6, 3.0, 1.0, 0.3, 0.0]) == [1000.0, 750.0, 500.0, 250.0]


@pytest.mark.parametrize(
    ("rows", "modules", "mask"),
    [(("##", "#.", ".."), (), "#.."), ((("##", "##"), ("##", "#."), ("..", "..")), ("attn", "mlp"), "#..")],
)
def test_steps_computed_in_full(rows, modules, mask):
    table = Table.from_json({"computed": list(map(list, rows)) if modules else list(rows), "modules": list(modules)})
    assert strip(whole_steps(table)) == mask
