"""The real ComfyUI runs the shipped workflows: exact where exactness is promised, clear where something is wrong."""

import functools
import itertools
import json
import time

import jsonschema
import numpy as np
import pytest

from stretto.web.panel.measure.workflow import BYPASSED, ui_to_api

from .comfy_api import Refused
from .shipped import ACCELERATED, KINDS, MEDIA, ROOT, key_of, load_ui

STEPS = 28


@pytest.fixture(scope="session")
def schema():
    """The JSON Schema of a trace."""
    return json.loads((ROOT / "acceleration" / "schemas" / "trace.v1.json").read_text(encoding="utf-8"))


def picture(comfy, api):
    """Run a workflow; return the run and its picture."""
    run = comfy.run(api)
    return run, comfy.pixels(run, key_of(api, "SaveImage"))


@pytest.fixture(scope="session")
def first(comfy, object_info):
    """`first(kind)` is the first run of a workflow and its picture: everything later must equal it."""
    return functools.cache(lambda kind: picture(comfy, ui_to_api(load_ui(kind), object_info)))


def test_the_nodes_are_there(object_info):
    assert {"StrettoCache", "StrettoMeasure", "StrettoReport", "StrettoDemoText"} <= set(object_info)


def test_comfyui_loaded_the_pack_without_complaints(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log
    assert "Unable to parse pyproject" not in log


def test_the_templates_are_offered(comfy):
    offered = comfy.get("/workflow_templates")["stretto"]
    for medium, kind in itertools.product(MEDIA, KINDS):
        name = f"demo-{medium}-{kind}"
        assert name in offered
        assert comfy.get(f"/api/workflow_templates/stretto/{name}.json") == load_ui(kind, medium)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_workflow_runs_and_repeats(kind, comfy, api, first):
    run, pixels = first(kind)
    second, again = picture(comfy, api(kind))
    assert run.prompt_id != second.prompt_id
    assert len(comfy.traces(second)) == 1, "the second run came from the node cache, so it proves nothing"
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 1.0, "the picture is empty"
    np.testing.assert_array_equal(pixels, again)


@pytest.mark.parametrize("kind", ACCELERATED)
def test_bypassing_the_cache_gives_the_plain_picture(kind, comfy, object_info, first):
    ui = load_ui(kind)
    for node in ui["nodes"]:
        if node["type"] == "StrettoCache":
            node["mode"] = BYPASSED
    _, bypassed = picture(comfy, ui_to_api(ui, object_info))
    np.testing.assert_array_equal(first("plain")[1], bypassed)
    assert not np.array_equal(first(kind)[1], bypassed), "the cache changes nothing, so this test proves nothing"


def test_a_run_without_any_of_our_nodes_gives_the_plain_picture(comfy, api, first):
    bare = api("plain")
    for name in ("PreviewImage", "StrettoReport", "StrettoMeasure"):
        del bare[key_of(bare, name)]
    bare[key_of(bare, "KSampler")]["inputs"]["model"] = [key_of(bare, "UNETLoader"), 0]
    _, without = picture(comfy, bare)
    np.testing.assert_array_equal(first("plain")[1], without)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_tells_what_happened(kind, comfy, api, first, schema):
    run, _ = first(kind)
    (trace,) = comfy.traces(run)
    jsonschema.validate(trace, schema)
    assert trace["prompt_id"] == run.prompt_id
    assert trace["sampler_node"] == key_of(api(kind), "KSampler")
    assert trace["outcome"] == "completed"
    assert len(trace["evaluations"]) == trace["totals"]["evaluations"] == STEPS
    skipped = trace["totals"]["forecast"] + trace["totals"]["reused"]
    assert trace["totals"]["computed"] + skipped == STEPS
    assert (skipped > 0) == (kind != "plain")


def test_an_unknown_run_has_no_traces(comfy):
    assert comfy.get("/stretto/traces", prompt_id="no-such-run")["traces"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_shows_text_and_timeline(kind, comfy, api, first):
    run, _ = first(kind)
    shown = run.outputs[key_of(api(kind), "StrettoReport")]
    assert len(shown["text"]) == 1
    assert str(STEPS) in shown["text"][0]
    assert shown["images"][0]["type"] == "temp"
    timeline = comfy.pixels(run, key_of(api(kind), "StrettoReport"))
    assert timeline.shape[1] > timeline.shape[0] > 20
    np.testing.assert_array_equal(timeline, comfy.pixels(run, key_of(api(kind), "PreviewImage")))


def test_the_fitted_preset_knows_the_demo_model(comfy, first):
    (trace,) = comfy.traces(first("fitted")[0])
    (item,) = (item for item in trace["techniques"] if item["technique"] == "cache")
    assert item["status"] == "active" and "balanced preset: Stretto, benchmarks/search_schedule.py" in item["reason"]
    assert trace["totals"]["computed"] == STEPS // 2


def test_the_schedule_workflow_runs_as_drawn(comfy, api):
    prompt = api("schedule")
    drawn = prompt[key_of(prompt, "StrettoCacheSchedule")]["inputs"]["schedule"]
    (trace,) = comfy.traces(comfy.run(prompt))
    assert "".join("#" if entry["decision"] == "computed" else "." for entry in trace["evaluations"]) == drawn


def test_two_caches_are_refused_with_both_names(comfy, api):
    prompt = api("taylor")
    cache = key_of(prompt, "StrettoCache")
    prompt["second"] = {
        "class_type": "StrettoCache",
        "inputs": {**prompt[cache]["inputs"], "model": [cache, 0], "method": "EasyCache"},
    }
    prompt[key_of(prompt, "StrettoMeasure")]["inputs"]["model"] = ["second", 0]
    error = comfy.attempt(prompt).error
    assert error["node_id"] == "second"
    assert "Taylor" in error["exception_message"]
    assert "EasyCache" in error["exception_message"]


@pytest.mark.parametrize(("field", "value"), [("threshold", 10.5), ("interval", 0), ("order", 4)])
def test_settings_out_of_range_are_refused_before_anything_runs(field, value, comfy, api):
    prompt = api("taylor")
    cache = key_of(prompt, "StrettoCache")
    prompt[cache]["inputs"][field] = value
    with pytest.raises(Refused) as refused:
        comfy.queue(prompt)
    assert refused.value.errors[cache]["errors"][0]["extra_info"]["input_name"] == field


def test_an_unknown_method_is_refused_by_the_node(comfy, api):
    # ComfyUI 0.3.76 does not check the choices of V3 nodes, so the node has to.
    prompt = api("taylor")
    cache = key_of(prompt, "StrettoCache")
    prompt[cache]["inputs"]["method"] = "Magic"
    try:
        error = comfy.attempt(prompt).error
    except Refused:
        return
    assert error["node_id"] == cache
    for word in ("method", "Magic", "Taylor", "EasyCache"):
        assert word in error["exception_message"]


@pytest.mark.parametrize("name", ["truncated.safetensors", "foreign.safetensors"])
def test_a_broken_model_file_is_one_message_and_the_next_run_is_fine(name, comfy, api, first):
    prompt = api("taylor")
    prompt[key_of(prompt, "UNETLoader")]["inputs"]["unet_name"] = name
    error = comfy.attempt(prompt).error
    assert error["node_type"] == "UNETLoader"
    assert error["exception_message"]
    np.testing.assert_array_equal(first("plain")[1], picture(comfy, api("plain"))[1])


def test_an_interrupt_in_the_middle_leaves_nothing_behind(comfy, api, first):
    expected = first("taylor")[1]
    prompt = api("taylor")
    prompt[key_of(prompt, "KSampler")]["inputs"]["steps"] = 5000
    prompt_id = comfy.queue(prompt)
    deadline = time.monotonic() + 30
    while not comfy.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    comfy.post("/interrupt", {})
    assert "execution_interrupted" in comfy.wait(prompt_id, limit=60.0).messages
    np.testing.assert_array_equal(expected, picture(comfy, api("taylor"))[1])


@pytest.mark.parametrize(("width", "batch"), [(128, 1), (64, 2)])
def test_another_size_in_between_leaves_nothing_behind(width, batch, comfy, api, first):
    expected = first("taylor")[1]
    other = api("taylor")
    other[key_of(other, "EmptySD3LatentImage")]["inputs"].update(width=width, batch_size=batch)
    run, pixels = picture(comfy, other)
    assert pixels.shape[1] == width
    assert len(run.outputs[key_of(other, "SaveImage")]["images"]) == batch
    np.testing.assert_array_equal(expected, picture(comfy, api("taylor"))[1])
