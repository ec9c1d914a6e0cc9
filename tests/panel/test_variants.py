"""Variants of one workflow: which nodes are found, what each variant runs, and how it is drawn again."""

import copy

import pytest

from stretto.web.panel.measure import arms as edit
from stretto.web.panel.measure.errors import WorkflowError
from stretto.web.panel.measure.variants import Variant, arm_of, arms_from, offered, stretto_nodes, sweep, ui_of
from stretto.web.panel.measure.workflow import api_to_ui, ui_to_api


def info(required, output=("MODEL",), **more):
    return {"input": {"required": required}, "output": list(output), "output_node": False, **more}


@pytest.fixture
def object_info():
    link, text = (lambda kind: [kind]), ["STRING", {"multiline": True}]
    sampler = {
        "model": link("MODEL"), "positive": link("CONDITIONING"), "negative": link("CONDITIONING"),
        "latent_image": link("LATENT"), "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1}],
        "steps": ["INT", {"default": 20, "min": 1, "max": 10000}], "cfg": ["FLOAT", {"default": 8.0}],
        "sampler_name": [["euler", "heun"]], "scheduler": [["simple", "normal"]], "denoise": ["FLOAT", {"default": 1.0}],
    }  # fmt: skip
    cache = {
        "model": link("MODEL"), "method": ["COMBO", {"options": ["Taylor", "EasyCache"]}],
        "interval": ["INT", {"default": 2, "min": 1, "max": 8}], "order": ["INT", {"default": 1, "min": 0, "max": 3}],
        "threshold": ["FLOAT", {"default": 0.05, "min": 0.0, "max": 1.0}], "warmup": ["INT", {"default": 3}],
        "tail": ["INT", {"default": 1}], "required": ["BOOLEAN", {"default": False}],
    }  # fmt: skip
    size = ["INT", {"default": 64}]
    return {
        "UNETLoader": info({"unet_name": [["m.safetensors"]], "weight_dtype": [["default"]]}),
        "VAELoader": info({"vae_name": [["v.safetensors"]]}, ["VAE"]),
        "StrettoDemoText": info({"text": text}, ["CONDITIONING"]),
        "KSampler": info(sampler, ["LATENT"]),
        "EmptySD3LatentImage": info({"width": size, "height": size, "batch_size": ["INT", {"default": 1}]}, ["LATENT"]),
        "VAEDecode": info({"samples": link("LATENT"), "vae": link("VAE")}, ["IMAGE"]),
        "SaveImage": info({"images": link("IMAGE"), "filename_prefix": ["STRING", {}]}, [], output_node=True),
        "PreviewImage": info({"images": link("IMAGE")}, [], output_node=True),
        "StrettoReport": info({"samples": link("LATENT")}, ["IMAGE"]),
        "StrettoCache": info(cache, display_name="Stretto Cache"),
        "StrettoGuidanceSaver": info({"model": link("MODEL"), "from_step": ["INT", {"default": 5, "min": 0, "max": 50}]}),
        "StrettoCalibrate": info({"model": link("MODEL"), "positive": link("CONDITIONING")}, ["STRETTO_PRESET", "STRING"]),
    }  # fmt: skip


@pytest.fixture
def two(workflow):
    """Two techniques, one behind the other."""
    workflow["20"] = {
        "class_type": "StrettoGuidanceSaver",
        "inputs": {"model": ["2", 0], "from_step": 5},
        "_meta": {"title": "Save guidance"},
    }
    workflow["5"]["inputs"]["model"] = ["20", 0]
    return workflow


def test_nodes_are_found_with_their_settings(two, object_info):
    cache, saver = stretto_nodes(two, object_info)
    assert (cache.id, cache.title, cache.technique) == ("2", "Stretto Cache", "Cache") and saver.title == "Save guidance"
    interval = cache.settings["interval"]
    assert (interval.kind, interval.value, interval.minimum, interval.maximum) == ("int", 2, 1, 8)
    assert cache.settings["method"].choices == ("Taylor", "EasyCache") and cache.settings["required"].kind == "bool"
    assert "model" not in cache.settings


def test_a_linked_setting_has_no_value(two, object_info):
    two["2"]["inputs"]["interval"] = ["9", 0]
    assert stretto_nodes(two, object_info)[0].settings["interval"].value is None


def test_measuring_and_examining_nodes_are_none_to_switch(workflow, object_info):
    measured = edit.ensure_measure(workflow, 1)
    measured["30"] = {"class_type": "StrettoProfile", "inputs": {"model": ["1", 0]}}
    assert [node.id for node in stretto_nodes(measured, object_info)] == ["2"]


def test_what_is_offered(two, workflow, object_info):
    assert [(v.kind, v.node) for v in offered(two, object_info)] == [
        ("drawn", None), ("alone", "2"), ("alone", "20"), ("fewer-steps", None),
    ]  # fmt: skip
    one = edit.bypass_ids(two, ["20"])
    assert [v.kind for v in offered(one, object_info)] == ["drawn", "fewer-steps"]
    (fewer,) = offered(edit.plain(two), object_info)
    assert (fewer.kind, fewer.steps) == ("fewer-steps", 14)


def test_each_alone_leaves_the_other_out(two, object_info):
    before = copy.deepcopy(two)
    cache = arm_of(Variant("alone", "Cache", node="2"), two, object_info).workflow
    saver = arm_of(Variant("alone", "Saver", node="20"), two, object_info).workflow
    assert two == before
    assert edit.accelerators(cache) == ["StrettoCache"] and cache["5"]["inputs"]["model"] == ["2", 0]
    assert edit.accelerators(saver) == ["StrettoGuidanceSaver"] and saver["20"]["inputs"]["model"] == ["1", 0]


def test_a_node_alone_keeps_what_feeds_its_settings(two, object_info):
    two["21"] = {"class_type": "StrettoCalibrate", "inputs": {"model": ["1", 0], "positive": ["3", 0]}}
    two["2"]["inputs"]["calibrated"] = ["21", 0]
    two["22"] = {"class_type": "StrettoProfile", "inputs": {"model": ["1", 0]}}
    assert [node.id for node in stretto_nodes(two, object_info)] == ["2", "20"], "what calibrates is no technique"
    cache = arm_of(Variant("alone", "Cache", node="2"), two, object_info).workflow
    assert "21" in cache and cache["2"]["inputs"]["calibrated"] == ["21", 0] and not {"20", "22"} & set(cache)


def test_a_sampler_of_the_packs_own_is_switched_off_beside_a_node_alone(two, object_info):
    two["5"] = {"class_type": "StrettoDynamicFrameRate", "inputs": {**two["5"]["inputs"], "keep": 60.0, "layers": "3,4"}}
    cache = arm_of(Variant("alone", "Cache", node="2"), two, object_info).workflow
    assert cache["5"]["inputs"]["keep"] == 100.0
    own = arm_of(Variant("alone", "Frames", node="5"), two, object_info).workflow
    assert own["5"]["inputs"]["keep"] == 60.0 and own["5"]["inputs"]["model"] == ["1", 0]


def test_a_sweep_runs_every_value(two, object_info):
    cache = stretto_nodes(two, object_info)[0]
    variants = sweep(cache, "interval", ["2", 3, "4", "3"])
    assert [v.value for v in variants] == [2, 3, 4] and variants[0].label == "Cache, interval 2"
    _, arms, competitor = arms_from(variants, two, object_info)
    assert [arm.workflow["2"]["inputs"]["interval"] for arm in arms] == [2, 3, 4] and not competitor
    assert all("20" in arm.workflow for arm in arms), "everything else stays as drawn"
    assert [v.value for v in sweep(cache, "method", ["EasyCache"])] == ["EasyCache"]
    assert [v.value for v in sweep(cache, "required", ["yes", "false"])] == [True, False]
    assert [v.value for v in sweep(cache, "threshold", ["0.1", "2e-1"])] == [0.1, 0.2]


@pytest.mark.parametrize(
    "setting,values,message",
    [
        ("interval", ["0"], "interval cannot be '0'; allowed are whole numbers from 1 to 8"),
        ("interval", ["2.5"], "whole numbers"),
        ("interval", ["x"], "whole numbers"),
        ("interval", [], "at least one value"),
        ("threshold", ["nan"], "numbers from 0 to 1"),
        ("warmup", ["inf"], "whole numbers"),
        ("method", ["Other"], "allowed are Taylor, EasyCache"),
        ("required", ["maybe"], "true, false"),
        ("nothing", ["1"], "no setting 'nothing'; it has method, interval"),
        ("warmup", range(30), "24 values at most"),
    ],
)
def test_a_sweep_names_what_is_allowed(two, object_info, setting, values, message):
    with pytest.raises(WorkflowError, match=message):
        sweep(stretto_nodes(two, object_info)[0], setting, values)


def test_arms_have_names_of_their_own_and_the_plain_one_is_no_second_time(two, object_info):
    found = offered(two, object_info)
    again = Variant("drawn", found[0].label)
    second = Variant("second", "Other file", workflow=edit.set_steps(edit.plain(two), 9))
    same = Variant("second", "Plain", workflow=edit.plain(two))
    plain, arms, competitor = arms_from([*found, again, second, same, Variant("plain", "Plain")], two, object_info)
    assert edit.shape(plain) == edit.shape(edit.plain(two)) and competitor
    assert len({arm.name for arm in arms}) == len(arms) == 5
    assert not {arm.name for arm in arms} & {"plain", "reference", "fewer-steps"}
    with pytest.raises(WorkflowError, match="nothing to compare"):
        arms_from([same], two, object_info)


def test_incomplete_variants_are_refused(two, object_info):
    for variant, message in (
        (Variant("alone", "x", node="99"), "no node 99"),
        (Variant("alone", "x"), "does not say"),
        (Variant("second", "x"), "does not say"),
        (Variant("fewer-steps", "x"), "only known when"),
    ):
        with pytest.raises(WorkflowError, match=message):
            arm_of(variant, two, object_info)
    with pytest.raises(ValueError, match="kind"):
        Variant("other", "x")


# As drawings


@pytest.fixture
def drawing(two, object_info):
    ui = api_to_ui(two, object_info)
    for node in ui["nodes"]:
        node["pos"] = [1234, node["id"]]
    return ui


VARIANTS = {
    "plain": Variant("plain", "x"),
    "drawn": Variant("drawn", "x"),
    "alone": Variant("alone", "x", node="20"),
    "sweep": Variant("sweep", "x", node="2", setting="interval", value=5),
    "fewer": Variant("fewer-steps", "x", steps=9),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_given_drawing_changed(two, drawing, object_info, name):
    before = copy.deepcopy(drawing)
    ui = ui_of(VARIANTS[name], drawing, two, object_info)
    assert drawing == before
    assert [node["pos"] for node in ui["nodes"]] == [node["pos"] for node in drawing["nodes"]], "nothing moves"
    assert edit.shape(ui_to_api(ui, object_info)) == edit.shape(arm_of(VARIANTS[name], two, object_info).workflow)


def test_bypassed_nodes_stay_in_the_drawing(two, drawing, object_info):
    ui = ui_of(VARIANTS["plain"], drawing, two, object_info)
    assert {node["id"]: node["mode"] for node in ui["nodes"] if node["mode"]} == {2: 4, 20: 4}


def test_without_a_drawing_or_with_another_one_it_is_laid_out(two, drawing, object_info):
    for ui in (None, {"nodes": [], "links": []}, {"nodes": [7]}, {**drawing, "links": []}):
        fresh = ui_of(VARIANTS["alone"], ui, two, object_info)
        assert edit.shape(ui_to_api(fresh, object_info)) == edit.shape(arm_of(VARIANTS["alone"], two, object_info).workflow)


def test_a_second_workflow_gets_its_own_drawing(two, drawing, object_info):
    other = edit.set_steps(edit.plain(two), 9)
    ui = ui_of(Variant("second", "x", workflow=other), drawing, two, object_info)
    assert edit.shape(ui_to_api(ui, object_info)) == edit.shape(other)


def test_files_that_end_before_newer_inputs_can_be_swept(two, drawing, object_info):
    cache = next(node for node in drawing["nodes"] if node["type"] == "StrettoCache")
    cache["widgets_values"] = cache["widgets_values"][:3]
    api = ui_to_api(drawing, object_info)
    variant = Variant("sweep", "x", node="2", setting="tail", value=4)
    ui = ui_of(variant, drawing, api, object_info)
    assert ui["nodes"][1]["pos"][0] == 1234 and ui_to_api(ui, object_info)["2"]["inputs"]["tail"] == 4
