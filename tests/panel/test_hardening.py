"""Whatever goes wrong: one sentence that says what to do, nothing measured lost, nothing let in."""

import errno
import io
import json
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from stretto.web.panel.measure import files
from stretto.web.panel.measure.client import ComfyClient
from stretto.web.panel.measure.compare import arms_of, compare
from stretto.web.panel.measure.errors import (
    CannotWrite,
    InvalidWorkflow,
    MeasureError,
    ServerDied,
    WorkflowError,
)
from stretto.web.panel.measure.gallery import clip_view
from stretto.web.panel.measure.interleave import MeasurementFile
from stretto.web.panel.measure.lock import folder_lock
from stretto.web.panel.measure.perceptual import Perceptual
from stretto.web.panel.measure.report import read_report
from stretto.web.panel.measure.scores import score_pictures


@pytest.fixture
def run(fake, workflow, tmp_path):
    """`run(configure, **compare options)` compares the cache workflow with its plain form in one folder."""

    def go(configure=lambda server: None, out=tmp_path / "out", **settings):
        server, url = fake()
        configure(server)
        plain, arms = arms_of([("taylor", workflow)])
        settings = {"repeats": 2, "warmup": 0, "reference_steps": 0, "competitor": False, **settings}
        with ComfyClient(url, timeout=settings.pop("timeout", 15.0)) as client:
            return compare(client, plain, arms, ["a"], [7], out_dir=out, **settings), server

    return go


def kept(folder):
    return len((folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()) - 1


# The workflow


def test_unknown_nodes_are_all_named_before_anything_runs(run, workflow):
    workflow["6"]["class_type"], workflow["7"]["class_type"] = "EmptyMagicLatent", "MagicLoader"
    servers = []
    with pytest.raises(WorkflowError, match="no node 'EmptyMagicLatent', 'MagicLoader'; install the pack they come from"):
        run(servers.append)
    assert servers[0].runs == []


def test_a_missing_model_is_named_without_the_list_of_all_others(run):
    def without_model(server):
        server.models = {"unet_name": [f"other-{number}.safetensors" for number in range(900)]}

    with pytest.raises(InvalidWorkflow) as caught:
        run(without_model)
    text = str(caught.value)
    assert "no 'm.safetensors' for UNETLoader (node 1), input 'unet_name'" in text and "folder of models" in text
    assert len(text) < 250


# The server


def test_a_server_that_dies_says_what_is_kept_and_resume_goes_on(run, tmp_path):
    def die(server):
        server.fail, server.fail_at = "die", 3

    with pytest.raises(ServerDied, match="3 finished runs are kept in .*: start ComfyUI again if it is down, then resume"):
        run(die)
    assert kept(tmp_path / "out") == 3
    report, server = run(resume=True)
    assert report["arms"][1]["runs"] == 2 and len(server.runs) == 2, "only the torn round ran again"


def test_a_server_that_dies_between_runs(run, tmp_path):
    def die(progress):
        if progress.done == 2:
            servers[0].stop()

    servers = []
    with pytest.raises(ServerDied, match="2 finished runs are kept"):
        run(servers.append, progress=die)


def test_a_server_that_is_busy_during_a_run_is_waited_for(run, monkeypatch):
    monkeypatch.setattr("stretto.web.panel.measure.client.SILENCE_SECONDS", 0.1)

    def slow(server):
        original = server._finish

        def finish(*arguments):
            time.sleep(1.0)  # as long as its event loop stands still nothing answers
            original(*arguments)

        server._finish = finish

    report, _ = run(slow, timeout=0.3, repeats=1)
    assert report["arms"][1]["runs"] == 1


def test_a_server_that_stops_answering_says_so(run):
    def hang(server):
        server.delay = 2.0

    with pytest.raises(ServerDied, match="did not answer /history/run-0 in time. 0 finished runs are kept"):
        run(hang, timeout=0.3)


@pytest.mark.parametrize("data", [b"hello", b"", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_picture_is_named(run, data):
    def broken(server):
        original = server._finish

        def finish(*arguments):
            original(*arguments)
            server.files = dict.fromkeys(server.files, data)

        server._finish = finish

    with pytest.raises(MeasureError, match="not a picture. It is 'run-0-0-0.png' of the arm 'Plain'"):
        run(broken)


def test_names_from_the_server_never_become_paths_here(run, tmp_path):
    def hostile(server):
        original = server._finish

        def finish(key, *arguments):
            original(key, *arguments)
            (output,) = server.history[key]["outputs"].values()
            for image in output["images"]:
                server.files["../../../../outside.png"] = server.files[image["filename"]]
                image.update(filename="../../../../outside.png", subfolder="/etc", type="../x")
            output["images"] += ["text", {"filename": 5}, None]

        server._finish = finish

    report, _ = run(hostile)
    assert not list(tmp_path.rglob("outside*")) and not (tmp_path.parent / "outside.png").exists()
    names = [name for cell in report["cells"] for entry in cell["pictures"].values() for name in entry["files"]]
    assert names and all((tmp_path / "out" / name).is_file() and name.startswith("pictures/") for name in names)


def test_a_picture_of_too_many_pixels_is_not_unpacked(run):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")

    def huge(server):
        original = server._finish

        def finish(*arguments):
            original(*arguments)
            server.files = dict.fromkeys(server.files, buffer.getvalue())

        server._finish = finish

    with pytest.raises(MeasureError, match="not a picture"):
        run(huge)


# The disk


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_measuring_loses_nothing(run, tmp_path, monkeypatch):
    original, count = MeasurementFile.append, []

    def append(self, measurement):
        if len(count) == 3:
            with self.path.open("a", encoding="utf-8") as file:
                file.write('{"arm": "torn')
            full()
        count.append(measurement)
        original(self, measurement)

    monkeypatch.setattr(MeasurementFile, "append", append)
    with pytest.raises(CannotWrite, match="The disk is full: .*out. Everything measured before is kept .* then resume"):
        run()
    monkeypatch.undo()
    report, server = run(resume=True)
    assert report["arms"][1]["runs"] == 2 and len(server.runs) == 2


@pytest.mark.parametrize("name", ["report.json", "index.html", "pictures"])
def test_a_disk_that_fills_up_at_the_report(run, tmp_path, monkeypatch, name):
    run()
    before = (tmp_path / "out" / "report.json").read_bytes()
    original = files.os.fsync

    def fsync(number):
        if name in str(files.os.readlink(f"/proc/self/fd/{number}")):
            full()
        original(number)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(CannotWrite, match="disk is full"):
        run(resume=name != "pictures")
    assert name != "report.json" or (tmp_path / "out" / "report.json").read_bytes() == before, "the old one is whole"
    read_report(tmp_path / "out" / "report.json")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.undo()
    report, server = run(resume=True)
    assert len(server.runs) == (0 if name != "pictures" else 4) and report["arms"][1]["runs"] == 2


def test_an_all_but_full_disk_is_refused_at_once(run, monkeypatch):
    monkeypatch.setattr(files, "LEAST_FREE", 2**60)
    with pytest.raises(CannotWrite, match="MiB are free .* Free some space or choose another folder"):
        run()


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite, match="cannot be written"):
        run(out=tmp_path / "file" / "below")


def test_two_comparisons_in_one_folder(run, tmp_path):
    with folder_lock(tmp_path / "out"), pytest.raises(MeasureError, match="Another comparison is running"):
        run()
    run()


# Long clips


def test_200_frames_are_scored_and_shown_in_bounded_memory(tmp_path):
    count, size = 200, (64, 400, 3)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    base = np.full(size, 90, np.uint8) + rng.integers(0, 9, size, dtype=np.uint8)
    names = {"plain": [], "fast": []}
    for number in range(count):
        for name, found in names.items():
            found.append(f"pictures/{name}-000-0-{number:03d}.png")
            pixels = np.roll(base, number, axis=1) ^ (1 if name == "fast" and number % 2 else 0)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", compress_level=0)
            (tmp_path / found[-1]).write_bytes(buffer.getvalue())
    one_clip = count * np.prod(size)
    score_pictures(tmp_path, names["fast"][1:2], names["plain"][1:2], None, perceptual=Perceptual())  # imports, once for all
    tracemalloc.start()
    scores = score_pictures(tmp_path, names["fast"], names["plain"], names["plain"], count, 16.0, Perceptual())
    scoring = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    report = {
        "settings": {"frames": count, "frame_rate": 16.0},
        "arms": [{"name": "plain", "label": "Plain"}, {"name": "fast", "label": "Fast"}],
    }
    cell = {"prompt": "a", "seed": 1, "pictures": {"plain": {"files": names["plain"], "frames": count}, "fast": scores}}
    view = clip_view(report, tmp_path, cell)
    showing = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(scores["psnr"]) == count and len(scores["flip"]) == 9 and len(scores["change_psnr"]) == 1
    assert scoring < 0.8 * one_clip, "no whole clip is ever in memory"
    assert showing < 15 * count * 320 * 52 * 3 and len(view["shots"]) == 3


def test_reports_are_json_without_nan(run, tmp_path):
    run()
    text = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
