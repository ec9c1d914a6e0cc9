"""Edits of a workflow: found by links, never by ids, and never in place."""

import copy

import pytest

from stretto.web.panel.measure import arms
from stretto.web.panel.measure.errors import WorkflowError
from stretto.web.panel.measure.labels import label_of


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


@pytest.fixture
def dynamic(workflow):
    """The workflow on fewer latent frames: a sampler of the pack's own after the cache, and all its outputs in use."""
    sampling = workflow["5"]["inputs"]
    inputs = {name: sampling[name] for name in sampling} | {
        "vae": ["7", 0], "keep": 60.0, "after": 20.0, "restore": "linear", "layers": ["31", 0], "fresh": False,
    }  # fmt: skip
    probe = {name: sampling[name] for name in ("model", "positive", "negative", "latent_image")}
    more = {
        "5": {"class_type": "StrettoDynamicFrameRate", "inputs": inputs},
        "8": {"class_type": "StrettoDynamicVAEDecode", "inputs": {**workflow["8"]["inputs"], "restore": "none", "tile": 0}},
        "30": {"class_type": "StrettoRestoreFrames",
               "inputs": {"images": ["8", 0], "schedule": ["5", 1], "method": "motion"}},
        "31": {"class_type": "StrettoFrameRateProbe", "inputs": {**probe, "seed": 0, "steps": 20, "cfg": 5.0}},
        "32": {"class_type": "PreviewAny", "inputs": {"source": ["31", 1]}},
        "33": {"class_type": "PreviewAny", "inputs": {"source": ["5", 2]}},
    }  # fmt: skip
    return {**workflow, **more}


def test_a_sampler_of_the_packs_own_samples_plainly_in_the_plain_arm(dynamic):
    before = copy.deepcopy(dynamic)
    plain = arms.plain(dynamic)
    assert dynamic == before
    inputs = plain["5"]["inputs"]
    assert plain["5"]["class_type"] == "StrettoDynamicFrameRate" and inputs["keep"] == 100.0
    assert inputs["model"] == ["1", 0], "the cache before it is bypassed"
    for name in set(dynamic["5"]["inputs"]) - {"model", "keep", "layers"}:
        assert inputs[name] == dynamic["5"]["inputs"][name], name
    assert plain["8"] == dynamic["8"] and plain["30"] == dynamic["30"], "what reads latent and schedule keeps its links"
    assert not {"31", "32"} & set(plain) and "33" in plain, "the probe is gone with what shows it"
    links = [value for node in plain.values() for value in node["inputs"].values() if arms.is_link(value)]
    assert all(key in plain for key, _ in links)
    assert arms.plain(plain) == plain


def test_a_run_that_keeps_all_frames_is_the_plain_one(dynamic):
    kept = arms.set_inputs(arms.plain(dynamic), "StrettoDynamicFrameRate", keep=100)
    assert arms.accelerators(kept) == [] and label_of(kept, "fallback") == "fallback"
    assert label_of(dynamic, "x") == "Taylor (every 2, order 1) + DynamicFrameRate (keep 60 %)"
    linked = arms.set_inputs(dynamic, "StrettoDynamicFrameRate", keep=["9", 0])
    assert label_of(linked, "x").endswith("DynamicFrameRate")


def test_of_two_samplers_beside_each_other_only_the_packs_own_counts(dynamic, workflow):
    """The comparison workflow: KSampler and the pack's sampler in one file."""
    both = {**dynamic, "40": copy.deepcopy(workflow["5"])}
    plain = arms.plain(both)
    assert plain["40"]["inputs"]["model"] == plain["5"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize("name", ["StrettoDynamicFrameRate", "StrettoFrameRateProbe"])
def test_what_gives_no_model_is_not_bypassed(dynamic, name):
    with pytest.raises(WorkflowError, match=f"{name} .node .*gives more than a MODEL"):
        arms.bypass(dynamic, [name])


def test_a_run_cut_in_two_has_no_plain_arm_and_says_so(workflow):
    workflow["20"] = {"class_type": "StrettoFrameRateSecondPass", "inputs": {"model": ["2", 0], "keep": 60.0}}
    with pytest.raises(WorkflowError, match="between two samplers"):
        arms.plain(workflow)


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
    assert label_of(workflow, "x") == "Taylor (every 2, order 1)"
    assert (
        label_of(arms.set_inputs(workflow, "StrettoCache", method="EasyCache"), "x")
        == "EasyCache (threshold 0.05)"
    )
    assert label_of(arms.plain(workflow), "fallback") == "fallback"
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
    assert label_of({"1": {"class_type": "StrettoCache", "inputs": inputs}}, "x") == label


def test_charts_of_our_own_nodes_are_not_the_picture():
    api = {"1": {"class_type": "StrettoCalibrate"}, "2": {"class_type": "SaveImage"}, "3": {"class_type": "SaveWEBM"}}
    outputs = {
        "1": {"images": [{"filename": "curve.png"}]},
        "2": {"images": [{"filename": "a.png"}, {"filename": "b.png"}]},
        "3": {"images": [{"filename": "c.webm"}], "animated": [True]},
    }
    assert [image["filename"] for image in arms.pictures_of(api, outputs)] == ["a.png", "b.png"]


def test_a_pipeline_of_diffusers_is_measured_like_a_model():
    api = {
        "1": {"class_type": "StrettoLoadDiffusersPipeline", "inputs": {"folder": "x"}},
        "2": {"class_type": "StrettoCache", "inputs": {"model": ["1", 0], "method": "Taylor"}},
        "3": {
            "class_type": "StrettoDiffusersSample",
            "inputs": {"model": ["2", 0], "prompt": "a cat", "seed": 1, "steps": 28, "batch": 1, "cfg": 5.0},
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    }
    assert arms.accelerators(api) == ["StrettoCache"]
    plain = arms.plain(api)
    assert "2" not in plain and plain["3"]["inputs"]["model"] == ["1", 0]
    edited = arms.set_batch(arms.set_steps(arms.set_seed(arms.set_prompt(api, "noto bus"), 99), 12), 4)
    assert (arms.get_prompt(edited), arms.get_seed(edited), arms.get_steps(edited), arms.get_batch(edited)) == (
        "noto bus", 99, 12, 4,
    )  # fmt: skip
    measured = arms.ensure_measure(arms.prepare(plain), 5)
    assert measured["3"]["inputs"]["model"] == ["measure-3", 0] and measured["measure-3"]["inputs"]["model"] == ["1", 0]
    with pytest.raises(WorkflowError, match="cannot be bypassed"):
        arms.bypass(api, ["StrettoDiffusersSample"])
