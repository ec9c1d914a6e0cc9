"""Tables as the resolver sees them: what fits, what memory it takes, and every reason why not. Networks made by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from stretto.acceleration.caching.masks import Table
from stretto.acceleration.caching.methods import METHODS
from stretto.acceleration.caching.named_tables import OF_BLOCKS, OF_MODULES
from stretto.acceleration.caching.table import TableTechnique, table_of, table_settings
from stretto.acceleration.caching.table_run import Terms, run_table
from stretto.acceleration.caching.tap import TABLE
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.facts import Facts
from stretto.acceleration.models import FAMILIES, MODULE_NAMES, describe
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import schedule_of, traits_of

TERMS = Terms("table", 0.5)


def named(name, **attributes):
    """An object of a class called ``name``."""
    return type(name, (SimpleNamespace,), {})(**attributes)


def wan(blocks=2):
    made = [SimpleNamespace(self_attn=1, cross_attn=1, ffn=1) for _ in range(blocks)]
    return named("WanModel", blocks=made, dim=64, patch_size=(1, 2, 2), ref_conv=None)


def facts(network, steps=4, sampler="euler", **more):
    sigmas = [1.0 - step / steps for step in range(steps + 1)]
    return Facts(network, describe(network), traits_of(sampler), schedule_of(sigmas), (1, 16, 1, 8, 8), **more)


def table(*rows, modules=("attn", "mlp")):
    """A table of modules; every row holds a mask per block, with spaces between them."""
    return Table.from_json({"modules": list(modules), "computed": [row.split() for row in rows]})


def test_an_active_table_says_what_it_computes_and_takes():
    outcome = run_table(table("## ##", "#. ##", "#. ##", "## ##"), facts(wan()), TERMS)
    assert outcome.status == "active" and outcome.needs_modules and not outcome.needs_blocks
    assert outcome.reason == "88% of all modules (attn, mlp) are computed, over 4 steps"
    # One module is ever skipped: a snapshot of 16 tokens x 64 x 4 bytes, for two branches.
    assert outcome.reserve_bytes == outcome.store_bytes == 2 * 16 * 64 * 4


def test_a_forecast_takes_as_many_snapshots_as_it_has_points_and_the_table_gives():
    one = 2 * 16 * 64 * 4
    skipping = table("## ##", "## ##", "## ##", "#. ##")
    for order, snapshots in ((1, 2), (2, 3), (3, 3)):
        outcome = run_table(skipping, facts(wan()), replace(TERMS, forecaster="newton", order=order))
        assert outcome.store_bytes == snapshots * one, order
    noisy = run_table(skipping, facts(wan(), sampler="euler_ancestral"), replace(TERMS, forecaster="taylor", order=2))
    assert noisy.status == "reduced" and noisy.store_bytes == one
    assert "euler_ancestral adds fresh noise each step: forecasting falls back to reuse" in noisy.reason


def test_a_module_of_two_names_is_skipped_where_both_are():
    block = SimpleNamespace(linear1=1, linear2=1, mlp_act=1)
    flux = named("Flux", double_blocks=[], single_blocks=[block], hidden_size=64, patch_size=2)
    both, one = table("##", "..", "##", "##"), table("##", ".#", "##", "##")
    assert run_table(both, facts(flux), TERMS).store_bytes > 0
    assert run_table(one, facts(flux), TERMS).store_bytes == 0


@pytest.mark.parametrize(
    ("asked", "situation", "words"),
    [
        (table("## ##", "## ##", "## ##", "## ##"), {}, "computes every module of every block at every step: nothing to skip"),
        (table("##", "##", "##", ".."), {}, "it is for 1 blocks, this model has 2"),
        (table("## ##", ".. .."), {}, "it is for 2 steps, this run has 4"),
        (table("## ##", ".. ..", ".. ..", ".. .."), {"free_bytes": 1 << 14}, "stored features would take 0 MiB, 0 MiB may be"),
        (table("## ##", ".. ..", ".. ..", ".. .."), {"modules_in_place": False}, "another node has replaced parts"),
    ],
)
def test_why_not(asked, situation, words):
    outcome = run_table(asked, facts(wan(), **situation), TERMS)
    assert outcome.status == "off" and outcome.session is None and words in outcome.reason
    assert "store =" not in outcome.reason, "a table cannot choose a store"


def test_names_that_a_family_does_not_have():
    flux = named("Flux", double_blocks=[], single_blocks=[], hidden_size=64, patch_size=2)
    asked = table("##", "..", modules=("attn", "cross_attn"))
    assert "names the module cross_attn; blocks of flux have attn, mlp" in run_table(asked, facts(flux), TERMS).reason


@pytest.mark.parametrize(
    "rows", [["##.", "#.#"], [["##", ".#"], ["#.", ".."]]], ids=["blocks", "modules"]
)
def test_settings_are_the_table(rows):
    document = {"computed": rows} | ({"modules": ["attn", "mlp"]} if isinstance(rows[0], list) else {})
    made = Table.from_json(document)
    settings = table_settings(made)
    assert table_of(settings) == made and made.to_json() == document
    request = Request("table", settings)
    TableTechnique().validate(request)
    assert TableTechnique().inside_blocks(request) == bool(made.modules)


def test_unknown_modules_are_refused_with_the_known_ones():
    with pytest.raises(StrettoError, match="modules has 'module0'; known modules: attn, cross_attn, mlp"):
        table_settings(Table.from_json([[[1, 1], [1, 0]]]))


def test_every_method_that_is_a_table_has_one():
    assert {*OF_MODULES, *OF_BLOCKS} == {name for name, method in METHODS.items() if method.tap == TABLE}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_every_family_names_its_modules_as_the_others_do(family):
    assert family.module_names and set(family.module_names) <= set(MODULE_NAMES)
    if family.has_blocks:
        assert tuple((kind, name) for kind, name, _ in family.module_lists) == family.block_lists
