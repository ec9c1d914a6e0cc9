"""Edits of a workflow: found by links, never by ids, and never in place."""

import copy

import pytest

from stretto.web.panel.measure import arms
from stretto.web.panel.measure.errors import WorkflowError


def renamed(api, prefix):
    """The same workflow with other node ids, as from a subgraph."""

    def link(value):
        return [prefix + value[0], value[1]] if arms.is_link(value) else value

    return {
        prefix + key: {**node, "inputs": {name: link(value) for name, value in node["inputs"].items()}}
        for key, node in api.items()
    }


def test_settings_are_found_whatever_the_ids_are(workflow):
    api = renamed(workflow, "12:")
    edited = arms.set_batch(arms.set_steps(arms.set_seed(arms.set_prompt(api, "noto bus"), 99), 12), 4)
    assert edited["12:3"]["inputs"]["text"] == "noto bus"
    assert edited["12:4"]["inputs"]["text"] == "", "the negative prompt stays"
    assert edited["12:5"]["inputs"]["seed"] == 99 and edited["12:5"]["inputs"]["steps"] == 12
    assert edited["12:6"]["inputs"]["batch_size"] == 4
    assert (arms.get_prompt(edited), arms.get_seed(edited), arms.get_steps(edited), arms.get_batch(edited)) == (
        "noto bus",
        99,
        12,
        4,
    )


def test_edits_leave_the_original_alone(workflow):
    before = copy.deepcopy(workflow)
    arms.set_prompt(workflow, "x")
    arms.plain(workflow)
    arms.prepare(workflow)
    arms.ensure_measure(workflow, 1)
    assert workflow == before


def test_custom_sampler_nodes_are_followed():
    api = {
        "a": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["n", 0], "guider": ["g", 0], "sigmas": ["s", 0], "latent_image": ["l", 0]},
        },
        "n": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "g": {"class_type": "CFGGuider", "inputs": {"model": ["m", 0], "positive": ["z", 0], "negative": ["t2", 0]}},
        "z": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["t", 0], "guidance": 3.5}},
        "s": {"class_type": "BasicScheduler", "inputs": {"model": ["m", 0], "steps": 20}},
        "l": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "batch_size": 1}},
        "m": {"class_type": "UNETLoader", "inputs": {}},
        "t": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["c", 0]}},
        "t2": {"class_type": "CLIPTextEncode", "inputs": {"text": "b", "clip": ["c", 0]}},
        "c": {"class_type": "CLIPLoader", "inputs": {}},
    }
    edited = arms.ensure_measure(arms.set_steps(arms.set_seed(arms.set_prompt(api, "new"), 5), 9), 77)
    assert edited["t"]["inputs"]["text"] == "new" and edited["t2"]["inputs"]["text"] == "b"
    assert edited["n"]["inputs"]["noise_seed"] == 5 and edited["s"]["inputs"]["steps"] == 9
    measure = edited["g"]["inputs"]["model"][0]
    assert edited[measure] == {"class_type": "StrettoMeasure", "inputs": {"model": ["m", 0], "nonce": 77}}


def test_bypass_relinks_a_chain_of_nodes(workflow):
    workflow["20"] = {"class_type": "StrettoCache", "inputs": {**workflow["2"]["inputs"], "model": ["2", 0]}}
    workflow["5"]["inputs"]["model"] = ["20", 0]
    plain = arms.plain(workflow)
    assert "2" not in plain and "20" not in plain
    assert plain["5"]["inputs"]["model"] == ["1", 0]
    assert "3" in plain, "nodes of the pack that do not accelerate stay"


def test_a_node_without_model_input_cannot_be_bypassed(workflow):
    with pytest.raises(WorkflowError, match="no MODEL input"):
        arms.bypass(workflow, ["KSampler", "VAEDecode"])


def test_measure_stands_before_the_sampler_once_and_with_a_fresh_nonce(workflow):
    once = arms.ensure_measure(workflow, 1)
    twice = arms.ensure_measure(once, 2)
    measures = [node for node in twice.values() if node["class_type"] == "StrettoMeasure"]
    assert len(measures) == 1 and measures[0]["inputs"] == {"model": ["2", 0], "nonce": 2}


def test_prepared_workflows_leave_no_files_and_draw_nothing(workflow):
    prepared = arms.prepare(workflow)
    classes = [node["class_type"] for node in prepared.values()]
    assert "SaveImage" not in classes and "StrettoReport" not in classes
    assert classes.count("PreviewImage") == 1 and prepared["9"] == {
        "class_type": "PreviewImage",
        "inputs": {"images": ["8", 0]},
    }


def test_without_the_pack_denoise_carries_the_nonce(workflow):
    first, second = (arms.defeat_cache_without_pack(workflow, nonce)["5"]["inputs"]["denoise"] for nonce in (1, 2))
    assert first != second and min(first, second) > arms.FULL_DENOISE
    workflow["5"]["inputs"]["denoise"] = 0.5
    with pytest.raises(WorkflowError, match="denoise 1"):
        arms.defeat_cache_without_pack(workflow, 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda api: arms.set_steps(api, 0),
        lambda api: arms.set_batch(api, 0),
        lambda api: arms.sampler_ids({}),
        lambda api: arms.set_prompt(arms.remove(api, ["StrettoDemoText"]), "x"),
    ],
)
def test_what_cannot_be_set_is_named(workflow, edit):
    with pytest.raises(WorkflowError):
        edit(workflow)


def test_shape_ignores_ids_prompt_seed_and_reports(workflow):
    other = renamed(arms.set_seed(arms.set_prompt(arms.remove(workflow, ["StrettoReport"]), "x"), 1), "9:")
    assert arms.shape(other) == arms.shape(workflow)
    assert arms.shape(arms.plain(workflow)) != arms.shape(workflow) != arms.shape(arms.set_steps(workflow, 5))
    assert arms.shape({"a": {"class_type": "KSampler", "inputs": {"model": ["a", 0]}}}), "a cycle ends"


def test_labels_and_names(workflow):
    assert arms.label_of(workflow, "x") == "Taylor (every 2, order 1)"
    assert (
        arms.label_of(arms.set_inputs(workflow, "StrettoCache", method="EasyCache"), "x")
        == "EasyCache (threshold 0.05)"
    )
    assert arms.label_of(arms.plain(workflow), "fallback") == "fallback"
    assert arms.name_of("Taylor (every 2)", ["taylor-every-2"]) == "taylor-every-2-2"
    with pytest.raises(ValueError, match="hyphens"):
        arms.Arm("../x", "x", workflow)


@pytest.mark.parametrize(
    ("inputs", "label"),
    [
        ({"method": "Taylor", "interval": 3, "order": 1}, "Taylor (every 3, order 1)"),
        ({"method": "FBCache", "threshold": 0.1, "preset": "as set"}, "FBCache (threshold 0.1)"),
        ({"method": "Taylor", "interval": 3, "order": 1, "preset": "fast"}, "Taylor (fast)"),
        ({"method": "SCM", "level": "slow"}, "SCM (slow)"),
        ({"method": "Spectrum"}, "Spectrum"),
        ({"method": "Taylor", "interval": 3, "calibrated": ["15", 0]}, "Calibrated"),
    ],
)
def test_a_cache_is_called_by_what_decides(inputs, label):
    assert arms.label_of({"1": {"class_type": "StrettoCache", "inputs": inputs}}, "x") == label


def test_charts_of_our_own_nodes_are_not_the_picture():
    api = {"1": {"class_type": "StrettoCalibrate"}, "2": {"class_type": "SaveImage"}, "3": {"class_type": "SaveWEBM"}}
    outputs = {
        "1": {"images": [{"filename": "curve.png"}]},
        "2": {"images": [{"filename": "a.png"}, {"filename": "b.png"}]},
        "3": {"images": [{"filename": "c.webm"}], "animated": [True]},
    }
    assert [image["filename"] for image in arms.pictures_of(api, outputs)] == ["a.png", "b.png"]
