"""Clips are measured as clips: lossless frames, scores per frame and for the motion, and something that moves."""

import base64
import io
import json
import math
import re

import jsonschema
import numpy as np
import pytest
from PIL import Image

from stretto.web.panel import pairs
from stretto.web.panel.measure import arms as edit
from stretto.web.panel.measure import metrics
from stretto.web.panel.measure.client import ComfyClient
from stretto.web.panel.measure.compare import arms_of, compare
from stretto.web.panel.measure.errors import MeasureError, WorkflowError
from stretto.web.panel.measure.gallery import SHEET_FRAMES, clip_view, gallery
from stretto.web.panel.measure.pictures import CLIP_SIDE, GUTTER, abreast, motion_uris, sheet_uri, shrunk, webp_bytes
from stretto.web.panel.measure.report import read_report, render_html
from stretto.web.panel.measure.table import columns

FRAMES = 5


def change_psnr(first, second):
    """Over all frames of two clips."""
    error = metrics.ChangeError()
    for a, b in zip(first, second, strict=True):
        error.add(a, b)
    return error.psnr


@pytest.fixture
def run(fake, video_workflow, tmp_path):
    """`run(server options, **compare options)` compares the cached clip with its plain form."""

    def go(configure=lambda server: None, **settings):
        server, url = fake()
        configure(server)
        plain, found = arms_of([("taylor", video_workflow)])
        settings = {"repeats": 2, "warmup": 1, "reference_steps": 200, "prompts": ["fluent blue heart"], **settings}
        with ComfyClient(url) as client:
            return compare(client, plain, found, out_dir=tmp_path, **settings), server

    return go


@pytest.fixture
def clips():
    rng = np.random.default_rng(3)
    first = rng.integers(40, 200, (6, 16, 12, 3), dtype=np.uint8)
    return first, first + rng.integers(0, 20, first.shape, dtype=np.uint8)


def decoded(address):
    """The frames of a data address, uint8 [F, H, W, C], and their milliseconds."""
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    frames, durations = [], []
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        frames.append(np.asarray(image))
        durations.append(image.info.get("duration"))
    return np.stack(frames), durations


# Recognising clips


def test_a_video_writer_makes_clips_of_its_rate(video_workflow):
    assert edit.get_frame_rate(video_workflow) == 8.0
    video_workflow["9"]["inputs"]["fps"] = ["77", 0]
    assert edit.get_frame_rate(video_workflow) == edit.USUAL_RATE, "a linked rate cannot be known"


def test_a_video_latent_makes_clips_where_only_frames_are_saved(video_workflow):
    frames = edit.prepare(video_workflow)
    assert edit.get_frame_rate(frames) == edit.USUAL_RATE
    frames["6"]["inputs"]["length"] = 1
    assert edit.get_frame_rate(frames) is None, "one frame is a picture"


def test_pictures_are_no_clips(workflow):
    assert edit.get_frame_rate(workflow) is None


@pytest.mark.parametrize("writer", [name for name in edit.VIDEO_WRITERS if name != "CreateVideo"])
def test_other_writers_are_known_too(workflow, writer):
    workflow["9"] = {"class_type": writer, "inputs": {"images": ["8", 0], edit.VIDEO_WRITERS[writer]: 24}}
    assert edit.get_frame_rate(workflow) == 24.0
    assert edit.prepare(workflow)["9"] == {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}


def test_lossless_frames_replace_the_video(video_workflow):
    video_workflow["20"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "y"}}
    prepared = edit.prepare(video_workflow)
    previews = {key: node for key, node in prepared.items() if node["class_type"] == "PreviewImage"}
    assert previews == {"9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}}
    assert not {"CreateVideo", "SaveVideo", "SaveImage"} & {node["class_type"] for node in prepared.values()}
    assert edit.shape(edit.prepare(video_workflow)) == edit.shape(video_workflow)


def test_a_video_made_of_a_video_is_refused(video_workflow):
    video_workflow["30"] = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    video_workflow["8"] = {"class_type": "CreateVideo", "inputs": {"images": ["30", 0], "fps": 8}}
    video_workflow["9"]["inputs"]["images"] = ["31", 0]
    video_workflow["31"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["8", 0]}}
    video_workflow = dict(reversed(video_workflow.items()))
    with pytest.raises(WorkflowError, match="node 9 are made from another video"):
        edit.prepare(video_workflow)


# Metrics


def test_psnr_of_changes_by_hand():
    still = np.full((3, 4, 4, 3), 100, np.uint8)
    assert change_psnr(still, still + 9) == math.inf, "another brightness moves the same"
    flicker = still.copy()
    flicker[1] += 10
    # Up by 10, then down by 10: both changes are wrong by 10.
    assert change_psnr(still, flicker) == pytest.approx(20 * math.log10(255 / 10))
    assert change_psnr(flicker, still) == change_psnr(still, flicker)


def test_psnr_of_changes_agrees_with_its_definition(clips):
    first, second = (np.diff(clip.astype(float), axis=0) for clip in clips)
    expected = 10 * math.log10(255**2 / np.mean((first - second) ** 2))
    assert change_psnr(*clips) == pytest.approx(expected)


def test_changes_need_two_frames_of_one_size(clips):
    with pytest.raises(ValueError, match="at least 2 frames"):
        change_psnr(clips[0][:1], clips[1][:1])
    with pytest.raises(ValueError, match="different sizes"):
        change_psnr(clips[0], clips[1][:, 1:])


# Things to look at


def test_a_moving_picture_keeps_every_pixel_and_the_speed(clips):
    canvas = abreast(clips)
    assert canvas.shape == (6, 16, 2 * 12 + GUTTER, 4)
    assert not canvas[:, :, 12 : 12 + GUTTER].any(), "transparent between neighbours"
    motion, still = motion_uris(canvas, 12.0)
    frames, durations = decoded(motion)
    assert np.array_equal(frames[:, :, :12, :3], clips[0]) and np.array_equal(frames[:, :, 12 + GUTTER :, :3], clips[1])
    assert durations == [83, 84, 83, 83, 84, 83], "whole milliseconds that add up to half a second"
    assert np.array_equal(decoded(still)[0][0], frames[3])
    assert np.array_equal(decoded(sheet_uri(clips[0]))[0][0], np.concatenate(list(clips[0]), axis=1))


def test_large_frames_are_shrunk():
    large = np.zeros((2, 500, 800, 3), np.uint8)
    assert shrunk(large[0], CLIP_SIDE).shape == (200, CLIP_SIDE, 3)
    assert sheet_uri(large).startswith("data:image/jpeg")
    assert len(webp_bytes(large, 16.0, lossless=False)) > 0


# Whole comparisons


def test_a_comparison_of_clips(run, schema, tmp_path):
    report, server = run()
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert report["settings"]["frames"] == FRAMES and report["settings"]["frame_rate"] == 8.0
    assert not any(node["class_type"] in ("CreateVideo", "SaveVideo") for api in server.runs for node in api.values())
    entry = report["cells"][0]["pictures"]["taylor-every-2-order-1"]
    assert entry["frames"] == FRAMES == len(entry["files"]) == len(entry["psnr"]) == len(entry["ssim"])
    assert len(entry["reference_psnr"]) == FRAMES and len(entry["change_psnr"]) == 1
    quality = report["arms"][1]["quality"]
    assert quality["psnr"]["count"] == FRAMES and quality["psnr"]["worst"] == min(entry["psnr"])
    assert quality["psnr"]["mean"] == pytest.approx(np.mean(entry["psnr"]))
    assert quality["change_psnr"]["count"] == 1
    files = [tmp_path / name for name in entry["files"]]
    frames = np.stack([metrics.read_rgb(path.read_bytes()) for path in files])
    plain = report["cells"][0]["pictures"]["plain"]["files"]
    others = np.stack([metrics.read_rgb((tmp_path / name).read_bytes()) for name in plain])
    assert entry["change_psnr"][0] == pytest.approx(change_psnr(frames, others))
    assert all(words in report["headline"][0] for words in ("in the worst frame", "for the changes from frame to frame"))
    titles = {column.title: column for column in columns(report)}
    assert titles["PSNR to plain"].meaning == "mean / worst frame" and "PSNR of changes" in titles


def test_a_batch_is_cut_into_its_clips(run, tmp_path):
    report, _ = run(batch=2, reference_steps=0, competitor=False)
    entry = report["cells"][0]["pictures"]["plain"]
    assert entry["frames"] == FRAMES and len(entry["files"]) == 2 * FRAMES
    assert entry["files"][FRAMES].endswith("plain-000-1-000.png"), "the second clip starts where the first ends"
    assert len(report["cells"][0]["pictures"]["taylor-every-2-order-1"]["change_psnr"]) == 2
    assert "the first of 2 in the batch" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_frames_that_are_no_whole_clips_are_refused(run):
    def lose_one(server):
        original = server._finish

        def finish(key, *rest):
            original(key, *rest)
            for output in server.history[key]["outputs"].values():
                output["images"].pop()

        server._finish = finish

    with pytest.raises(MeasureError, match="9 frames, which cannot be 2 clips"):
        run(configure=lose_one, batch=2)


def test_a_resumed_comparison_knows_its_clips(run):
    first, _ = run()
    again, server = run(resume=True)
    assert again["settings"]["frames"] == FRAMES and again["cells"] == first["cells"]
    assert len(server.runs) == 1, "only the probe that counts steps"


def test_the_page_moves_and_shows_frames_without_motion(run, tmp_path):
    run(prompts=["fluent blue heart", '<script>alert("x")</script>'])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/webp') == page.count('srcset="data:image/webp') == 2
    assert page.count("(prefers-reduced-motion: reduce)") == 2 + 1, "one per clip, and the button that undoes it"
    assert page.count('class="sheets"') == 2 and page.count('<img src="data:image/png') == 2 * (4 + 3)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page) and "url(" not in page
    assert "<script>alert" not in page and "Stop the motion" in page and 'class="slider"' not in page
    assert render_html(read_report(tmp_path / "report.json"), tmp_path) == page


def test_the_gallery_shows_all_arms_in_step(run, tmp_path):
    report, _ = run()
    (entry,) = gallery(report, tmp_path)
    assert [shot["label"] for shot in entry["shots"]] == [arm["label"] for arm in report["arms"]]
    frames, durations = decoded(entry["motion"])
    assert frames.shape[0] == FRAMES and durations == [125] * FRAMES
    assert entry["width"] == 4 * 64 + 3 * GUTTER and entry["numbers"] == [1, 2, 3, 4, 5]
    assert len(entry["numbers"]) <= SHEET_FRAMES
    scores = entry["shots"][1]["scores"]
    psnr = report["cells"][0]["pictures"]["taylor-every-2-order-1"]["psnr"]
    assert scores["worst"] == min(psnr) == psnr[scores["worst_frame"] - 1]


def test_the_panel_shows_the_pair_and_its_difference(run, tmp_path):
    report, _ = run()
    pair = pairs.first_pair(report)
    cell = report["cells"][0]["index"]
    assert pairs.slider(report, tmp_path, cell, pair) is None and pairs.maps(report, tmp_path, cell, pair) == ""
    page = pairs.clips(report, tmp_path, cell, pair)
    assert page.count("data:image/webp") == 2 and "Difference" in page
    view = clip_view(report, tmp_path, report["cells"][0], ("plain", "taylor-every-2-order-1"))
    assert view["width"] == 3 * 64 + 2 * GUTTER, "plain, accelerated, difference"


def test_identical_clips_say_so(run):
    def freeze(server):
        server._finish = lambda key, api, sampler, number, keep=server._finish: keep(
            key, {k: node for k, node in api.items() if node["class_type"] != "StrettoCache"}, sampler, number
        )

    report, _ = run(configure=freeze, reference_steps=0)
    assert report["arms"][1]["quality"]["change_psnr"] == {"mean": "inf", "worst": "inf", "count": 1, "identical": 1}
    assert "identical clips" in report["headline"][0]


def test_reports_of_pictures_from_before_clips_still_open(fake, workflow, tmp_path):
    _, url = fake()
    plain, arms = arms_of([("x", workflow)])
    with ComfyClient(url) as client:
        report = compare(client, plain, arms, repeats=1, warmup=0, out_dir=tmp_path, reference_steps=0)
    for name in ("frames", "frame_rate"):
        assert report["settings"].pop(name) is None
    for arm in report["arms"]:
        assert arm["quality"].pop("change_psnr") is None
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert "<h2>Pictures</h2>" in render_html(read_report(tmp_path / "report.json"), tmp_path)
