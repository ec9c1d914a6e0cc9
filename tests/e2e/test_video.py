"""The real ComfyUI makes clips: a file to watch, lossless frames to measure, a comparison from the command line."""

import functools
import io
import json
import subprocess

import av
import jsonschema
import numpy as np
import pytest

from stretto.web.panel.measure import arms as edit
from stretto.web.panel.measure.workflow import BYPASSED, ui_to_api

from .conftest import PANEL_PYTHON
from .shipped import ACCELERATED, KINDS, ROOT, key_of, load_ui

FRAMES, RATE, SIDE = 17, 8, 64
STEPS = 14  # enough for the defaults to skip some


@pytest.fixture(scope="session")
def clip(comfy):
    """`clip(api)` runs a workflow; returns the run and the frames of its clips, uint8 [batch * F, H, W, 3]."""

    def run(api):
        api = edit.set_steps(edit.prepare(api), STEPS)
        run = comfy.run(api)
        node = key_of(api, "PreviewImage")
        count = len(run.outputs[node]["images"])
        return run, np.stack([comfy.pixels(run, node, index) for index in range(count)])

    return run


@pytest.fixture(scope="session")
def first(clip, object_info):
    """`first(kind)` is the first run of a workflow and its frames."""
    return functools.cache(lambda kind: clip(ui_to_api(load_ui(kind, "video"), object_info)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_has_frames_that_differ_and_a_trace(kind, comfy, first):
    run, frames = first(kind)
    assert frames.shape == (FRAMES, SIDE, SIDE, 3)
    assert frames.std() > 1.0 and np.abs(np.diff(frames.astype(int), axis=0)).max() > 0, "nothing moves"
    (trace,) = comfy.traces(run)
    assert trace["model"]["family"] == "wan" and trace["totals"]["evaluations"] == STEPS
    assert kind == "plain" or {item["status"] for item in trace["techniques"] if item["technique"] == "cache"} <= {
        "active",
        "reduced",
    }


def test_taylor_skips_steps_of_a_clip(comfy, first):
    (trace,) = comfy.traces(first("taylor")[0])
    assert trace["totals"]["forecast"] > 0


def test_a_repeated_clip_is_the_same_frame_by_frame(clip, api, first):
    np.testing.assert_array_equal(first("taylor")[1], clip(api("taylor", "video"))[1])


@pytest.mark.parametrize("kind", ACCELERATED)
def test_bypassing_the_cache_gives_the_plain_clip(kind, clip, object_info, first):
    ui = load_ui(kind, "video")
    for node in ui["nodes"]:
        if node["type"] == "StrettoCache":
            node["mode"] = BYPASSED
    np.testing.assert_array_equal(first("plain")[1], clip(ui_to_api(ui, object_info))[1])


def test_sparse_attention_keeps_half_of_the_blocks_in_the_later_steps(comfy, first):
    run, frames = first("sparse")
    (trace,) = comfy.traces(run)
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and not np.array_equal(frames, first("plain")[1])
    assert [item["status"] for item in trace["techniques"] if item["technique"] == "attention"] == ["active"]
    kept = [entry["attention_kept"] for entry in trace["evaluations"]]
    assert kept[: STEPS // 2] == [None] * (STEPS // 2)
    assert all(0.3 <= share <= 0.6 for share in kept[STEPS // 2 :])
    assert len(trace["attention"]["layers"]) == 8 and trace["attention"]["pictures"]


def test_bypassing_sparse_attention_gives_the_plain_clip(clip, object_info, first):
    ui = load_ui("sparse", "video")
    for node in ui["nodes"]:
        if node["type"] == "StrettoSparseAttention":
            node["mode"] = BYPASSED
    np.testing.assert_array_equal(first("plain")[1], clip(ui_to_api(ui, object_info))[1])


def test_frames_of_a_batch_come_clip_after_clip(clip, api, first):
    _, frames = clip(edit.set_batch(api("plain", "video"), 2))
    assert len(frames) == 2 * FRAMES
    alone = first("plain")[1].astype(int)
    near, far = (np.abs(half - alone).mean() for half in (frames[:FRAMES], frames[FRAMES:]))
    assert near < 1.0 < far, "the first half is not the clip that this seed gives alone"


def test_what_people_see_is_a_video_file(comfy, api):
    prompt = edit.set_steps(api("taylor", "video"), STEPS)
    run = comfy.run(prompt)
    (reference,) = run.outputs[key_of(prompt, "SaveVideo")]["images"]
    with av.open(io.BytesIO(comfy.raw("/view", **reference))) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (SIDE, SIDE, RATE)
        assert sum(1 for _ in file.decode(stream)) == FRAMES


def test_a_comparison_of_clips_from_the_command_line(server, tmp_path):
    command = [str(PANEL_PYTHON), "cli.py", "compare", "--server", server.url, "--out", str(tmp_path), "--json"]
    command += ["--workflow", "workflows/demo-video-taylor.json", "--steps", str(STEPS), "--repeats", "1"]
    command += ["--warmup", "0", "--reference-steps", "0", "--no-fewer-steps"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    schema = json.loads((ROOT / "acceleration" / "schemas" / "report.v1.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert (report["settings"]["frames"], report["settings"]["frame_rate"]) == (FRAMES, RATE)
    accelerated = report["arms"][1]
    assert accelerated["calls"]["skipped"] > 0
    assert accelerated["quality"]["psnr"]["count"] == FRAMES and accelerated["quality"]["change_psnr"]["count"] == 1
    assert "data:image/webp" in (tmp_path / "index.html").read_text(encoding="utf-8")
