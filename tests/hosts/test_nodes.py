"""Nodes: schemas that saved workflows can rely on, the report, and the picture."""

import asyncio
import json

import numpy as np
import pytest

import stretto
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample


@pytest.fixture(scope="module")
def nodes():
    extension = asyncio.run(stretto.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def test_ids_and_input_order_are_for_ever(nodes):
    """Saved workflows hold widget values by position: inputs may be appended, never moved."""
    inputs = {name: [item.id for item in node.define_schema().inputs] for name, node in nodes.items()}
    assert inputs["StrettoCache"][:8] == [
        "model", "method", "interval", "order", "threshold", "warmup", "tail", "required",
    ]
    assert inputs["StrettoMeasure"][:2] == ["model", "nonce"]
    assert inputs["StrettoReport"][:1] == ["samples"]
    assert inputs["StrettoDemoText"][:1] == ["text"]
    assert inputs["StrettoProfile"][:10] == [
        "model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise",
    ]
    assert inputs["StrettoCalibrate"][:8] == [
        "profile", "target", "value", "forecaster", "extra_seeds", "probes", "name", "vae",
    ]
    assert inputs["StrettoDynamicFrameRate"] == [
        "model", "vae", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler",
        "denoise", "keep", "after", "restore", "layers", "fresh",
    ]
    assert inputs["StrettoFrameSchedule"] == [
        "images", "vae", "mode", "keep", "half", "quarter", "rates", "coding", "restore", "slowest",
    ]
    assert inputs["StrettoLoadDiffusersPipeline"][:4] == ["folder", "dtype", "download", "hub_id"]
    assert inputs["StrettoDiffusersSample"][:12] == [
        "model", "prompt", "negative_prompt", "width", "height", "frames", "steps", "cfg", "seed", "batch", "positive",
        "negative",
    ]
    assert inputs["StrettoCacheSchedule"][:4] == ["model", "schedule", "forecaster", "required"]


def test_everything_is_explained(nodes):
    for name, node in nodes.items():
        schema = node.define_schema()
        assert schema.description, name
        assert all(item.tooltip for item in schema.inputs), name


def test_the_measuring_code_knows_which_nodes_give_no_model(nodes):
    """A plain arm is made by bypassing nodes that take a MODEL: those that give something else must be known to it."""
    from stretto.web.panel.measure import arms

    known = {*arms.PROBES, *arms.SWITCHED_OFF}
    for name, node in nodes.items():
        schema = node.define_schema()
        if any(item.id == "model" and item.get_io_type() == "MODEL" for item in schema.inputs):
            gives = any(item.get_io_type() == "MODEL" for item in schema.outputs)
            assert gives != (name in known), name
    for name, settings in arms.SWITCHED_OFF.items():
        assert set(settings) <= {item.id for item in nodes[name].define_schema().inputs}


def test_report_finds_the_sampler_upstream(nodes, tiny, monkeypatch):
    sample(host.request(tiny("sd3"), Request("cache", {"interval": 2, "warmup": 2, "tail": 1})), "sd3")
    made = host.TRACES.of_prompt(None)[-1]
    host.TRACES.add("prompt-a", "5", made)
    prompt = {
        "5": {"inputs": {"model": ["1", 0], "seed": 3}},
        "7": {"inputs": {"samples": ["5", 0]}},
        "9": {"inputs": {"samples": ["7", 0]}},
    }
    from stretto.nodes import report

    monkeypatch.setattr(report, "current_prompt_id", lambda: "prompt-a")
    trace, note = report._find(prompt, "9")
    assert trace["sampler_node"] == "5" and note == ""
    monkeypatch.setattr(report, "current_prompt_id", lambda: "prompt-b")
    trace, note = report._find(prompt, "9")
    assert trace["sampler_node"] == "5" and "cache of node outputs" in note
    with pytest.raises(StrettoError, match="no Stretto node took part"):
        report._find({"9": {"inputs": {"samples": ["4", 0]}}}, "9")


def test_timeline_shows_each_decision_in_its_colour(nodes, tiny):
    from stretto.nodes.timeline import COLOURS, timeline

    sample(host.request(tiny("wan"), Request("cache", {"interval": 2, "warmup": 2, "tail": 1})), "wan")
    trace = json.loads(json.dumps(host.TRACES.of_prompt(None)[-1]))
    picture = np.asarray(timeline(trace))
    assert picture.shape[1:] == (960, 3)

    def count(name):
        colour = [int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        return int((picture[84:150] == colour).all(-1).sum())

    assert count("reused") == 0
    assert count("computed") > count("forecast") > 1000


def test_timeline_of_a_run_that_evaluated_nothing(nodes, tiny):
    from stretto.nodes.timeline import timeline

    sample(host.request(tiny("wan"), Request("measure")), "wan")
    trace = {**host.TRACES.of_prompt(None)[-1], "evaluations": []}
    assert timeline(trace).size[0] == 960
