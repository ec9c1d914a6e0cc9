"""Schedules of the user's own: masks are the cache's, tables equal a plain interpreter of them."""

import asyncio
import json
import random

import pytest
import torch

import stretto
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request

from .tiny_models import CONFIGS, ONE_ROW, sample

#: Families whose blocks are out of reach.
HOOKLESS = {"lumina2", "z_image", "pixart", "cosmos_predict2", "hidream", "wan_vace"}
FAMILIES = sorted(set(CONFIGS) - ONE_ROW - HOOKLESS)


def keys_of(model):
    """Hook keys of a model's blocks in execution order."""
    network = model.model.diffusion_model
    return [site.key for site in describe(network).sites(network)]


@pytest.fixture(scope="module")
def node():
    asyncio.run(stretto.comfy_entrypoint())
    from stretto.nodes.schedule import StrettoCacheSchedule

    return StrettoCacheSchedule


@pytest.fixture(scope="module")
def scheduled(node):
    return lambda model, text, forecaster="line", required=True: node.execute(model, text, forecaster, required).result[0]


def random_table(blocks, steps, seed):
    rng = random.Random(seed)
    rows = ["#" * blocks, *("".join(rng.choice("#..") for _ in range(blocks)) for _ in range(steps - 1))]
    return rows


def interpreted(model, rows):
    """Hang a plain interpreter of the table on the model, as another pack would: one call a step, whole batches."""
    kept, steps = {}, {}

    def patch_of(depth):
        def patch(args, extra):
            step = steps[depth] = steps.get(depth, -1) + 1
            streams = [name for name in ("img", "txt") if isinstance(args.get(name), torch.Tensor)]
            if rows[step][depth] == "#":
                before = {name: args[name].clone() for name in streams}
                out = extra["original_block"](args)
                kept[depth] = {name: out[name] - before[name] for name in streams if out.get(name) is not None}
                return out
            return {name: args[name] + residual for name, residual in kept[depth].items()} | {
                name: args[name] for name in streams if name not in kept[depth]
            }

        return patch

    for depth, key in enumerate(keys_of(model)):
        model.set_model_patch_replace(patch_of(depth), "dit", *key)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_table_equals_its_interpreter(tiny, scheduled, family):
    blocks = len(keys_of(tiny(family)))
    for seed, cfg in ((0, 4.0), (1, 1.0)):
        rows = random_table(blocks, 6, seed)
        options = {"steps": 6, "cfg": cfg}
        expected = sample(interpreted(tiny(family), rows), family, **options)
        result = sample(scheduled(tiny(family), json.dumps(rows)), family, **options)
        trace = host.TRACES.of_prompt(None)[-1]
        assert trace["techniques"][0]["status"] == "active"
        counts = [entry["branches"][0]["blocks_computed"] for entry in trace["evaluations"]]
        assert counts == [row.count("#") for row in rows]
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result, sample(tiny(family), family, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "wan", "flux", "hunyuan_video"])
def test_a_table_that_computes_everything_changes_nothing(tiny, family):
    plain = sample(tiny(family), family, steps=5)
    rows = "/".join(["#" * len(keys_of(tiny(family)))] * 5)
    for force in (False, True):
        model = host.request(tiny(family), Request("table", {"rows": rows}, force=force))
        assert torch.equal(plain, sample(model, family, steps=5))
    assert host.TRACES.of_prompt(None)[-1]["techniques"][0]["status"] == "active"


def test_engaged_residuals_are_taken_without_a_change(tiny):
    """Kept for a step that is computed after all, because the branch has changed: the blocks that run are untouched."""
    rows = "####/####/####/####/...."
    plain = sample(tiny("flux"), "flux", steps=5)
    seen = []
    sample(
        host.request(tiny("flux"), Request("table", {"rows": rows})), "flux", steps=5,
        callback=lambda step, x0, x, total: seen.append(x0.clone()),
    )  # fmt: skip
    expected = []
    assert torch.equal(plain, sample(tiny("flux"), "flux", steps=5, callback=lambda i, x0, x, n: expected.append(x0.clone())))
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], expected[:4], strict=True))
    assert not torch.equal(seen[4], expected[4])


def test_a_mask_is_the_caches_own(tiny, scheduled):
    mask = "###.#.##"
    for forecaster, order in (("reuse", 0), ("line", 1), ("parabola", 2)):
        settings = {"method": "Schedule", "mask": mask, "order": order, "warmup": 0, "tail": 0}
        expected = sample(host.request(tiny("wan"), Request("cache", settings)), "wan")
        assert torch.equal(expected, sample(scheduled(tiny("wan"), f" {mask}\n", forecaster), "wan"))


def test_tables_come_from_files(tiny, scheduled, tmp_path):
    rows = random_table(3, 8, 3)
    expected = sample(scheduled(tiny("wan"), json.dumps({"computed": rows})), "wan")
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows))
    assert torch.equal(expected, sample(scheduled(tiny("wan"), str(path)), "wan"))


def test_a_table_of_modules_is_reused_or_forecast_as_chosen(tiny, scheduled):
    rows = [[2 * cell for cell in row] for row in random_table(3, 8, 3)]
    text = json.dumps({"modules": ["attn", "mlp"], "computed": rows})
    flat = "/".join(",".join(row) for row in rows)
    results = []
    for forecaster, order in (("reuse", 0), ("line", 1), ("parabola", 2)):
        extra = {"forecaster": "newton", "order": order} if order else {}
        asked = Request("table", {"rows": flat, "modules": "attn,mlp", **extra}, required=True)
        results.append(sample(scheduled(tiny("wan"), text, forecaster), "wan"))
        assert torch.equal(results[-1], sample(host.request(tiny("wan"), asked), "wan"))
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "schedule is empty"),
        ("##a#", "neither a mask of '#' and '.' nor JSON nor a readable file"),
        ("[1, 2", "not JSON"),
        ('["###", "##"]', r"computed\[1\] has 2 blocks; expected 3"),
        ('{"modules": ["attn", "ffn"], "computed": [["##", "#."]]}', "modules has 'ffn'; known modules: attn, cross_attn, mlp"),
        ('{"modules": ["attn", "mlp"], "computed": [["##", "#"]]}', r"computed\[0\]\[1\] has 1 entries; expected 2"),
        ('[[[1, 1], [1, 0]]]', "modules has 'module0'; known modules"),
    ],
)
def test_mistakes_are_told_plainly(tiny, scheduled, text, words):
    with pytest.raises(StrettoError, match=words):
        scheduled(tiny("wan"), text)


@pytest.mark.parametrize(
    ("rows", "words"),
    [(["####"] * 8, "it is for 4 blocks, this model has 3"), (["#.#"] * 5, "it is for 5 steps, this run has 8")],
)
def test_a_table_for_another_model_or_run_stays_off(tiny, scheduled, rows, words):
    plain = sample(tiny("wan"), "wan")
    assert torch.equal(plain, sample(scheduled(tiny("wan"), json.dumps(rows), required=False), "wan"))
    assert words in host.TRACES.of_prompt(None)[-1]["techniques"][0]["reason"]
    with pytest.raises(StrettoError, match=words):
        sample(scheduled(tiny("wan"), json.dumps(rows)), "wan")


def test_a_table_has_nothing_to_act_on_where_blocks_are_out_of_reach(tiny, scheduled):
    with pytest.raises(StrettoError, match="a table has nothing to act on"):
        sample(scheduled(tiny("lumina2"), '["##", ".."]'), "lumina2", steps=2)


def test_beside_another_cache_it_is_refused(tiny, scheduled):
    cached = host.request(tiny("wan"), Request("cache", {"method": "Taylor"}))
    with pytest.raises(ConflictError, match="cannot share a model with Stretto Cache"):
        scheduled(cached, '["###", "..."]')
    core = tiny("wan")
    core.model_options.setdefault("transformer_options", {})["easycache"] = object()
    with pytest.raises(ConflictError, match="ComfyUI's own EasyCache"):
        scheduled(core, '["###", "..."]')
