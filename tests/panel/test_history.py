"""The history: what it lists, what it survives, and that nothing of it costs time."""

import json
import math
import sqlite3
import threading
import time

import pytest

from stretto.web.panel.measure import history as module
from stretto.web.panel.measure.client import ComfyClient
from stretto.web.panel.measure.compare import arms_of, compare
from stretto.web.panel.measure.errors import MeasureError, ReportError
from stretto.web.panel.measure.history import History
from stretto.web.panel.measure.lock import folder_lock, is_locked


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One real report."""
    import sys

    fake_comfy = sys.modules["fake_comfy"]
    server = fake_comfy.FakeComfy()
    folder = tmp_path_factory.mktemp("report") / "first"
    workflow = {
        "1": {"class_type": "UNETLoader", "inputs": {}},
        "2": {"class_type": "StrettoCache",
              "inputs": {"model": ["1", 0], "method": "Taylor", "interval": 2, "order": 1}},
        "3": {"class_type": "StrettoDemoText", "inputs": {"text": "flat hot dog"}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["3", 0], "latent_image": ["6", 0],
              "seed": 7, "steps": 10, "denoise": 1.0}},
        "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
    }  # fmt: skip
    plain, arms = arms_of([("taylor", workflow)])
    with ComfyClient(server.start()) as client:
        made = compare(client, plain, arms, out_dir=folder, reference_steps=0, command="python cli.py compare x")
    server.stop()
    return made, folder


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "panel" / "history.sqlite")


def test_a_comparison_from_beginning_to_end(history, report, tmp_path):
    made, folder = report
    number = history.begin(folder, {"workflow": "demo.json", "prompts": ["flat hot dog"]})
    (entry,) = history.list()
    assert (entry.id, entry.state, entry.workflow) == (number, "running", "demo.json")
    history.finish(number, made)
    (entry,) = history.list()
    accelerated = made["arms"][1]
    assert entry.state == "finished" and entry.summary == made["headline"][0]
    assert entry.ratio == accelerated["ratio"]["sampler"]["median"] and entry.psnr == accelerated["quality"]["psnr"]["mean"]
    assert entry.folder == folder and entry.machine
    assert history.open(number) == (made, folder)
    assert history.request(number) == {"workflow": "demo.json", "prompts": ["flat hot dog"]}


def test_failed_and_stopped_ones_say_why(history, report, tmp_path):
    first = history.begin(tmp_path / "a", {"workflow": "a"})
    history.fail(first, "The server went away.")
    second = history.begin(tmp_path / "b", {})
    history.stopped(second)
    third = history.begin(tmp_path / "c", {})
    history.finish(third, {**report[0], "settings": {**report[0]["settings"], "complete": False}})
    states = {entry.id: (entry.state, entry.summary) for entry in history.list()}
    assert states[first] == ("failed", "The server went away.")
    assert states[second][0] == "stopped" and states[third][0] == "stopped"
    with pytest.raises(ReportError, match="cannot be opened: its folder .* is gone"):
        history.open(first)


def test_what_died_shows_as_interrupted_and_goes_on_in_its_row(history, tmp_path, monkeypatch):
    folder = tmp_path / "panel" / "run"
    number = history.begin(folder, {"workflow": "a"})
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    with folder_lock(folder):
        assert history.list()[0].state == "running"
    (entry,) = History(history.path).list()
    assert entry.state == "interrupted" and "can be continued" in entry.summary
    assert history.begin(folder, {"workflow": "a"}) == number and len(history.list()) == 1


def test_search(history, report):
    for name, prompt in (("demo-image.json", "a red fox"), ("100%_sure.json", "a blue bird"), ("other.json", "x")):
        number = history.begin(report[1] / name, {"workflow": name, "prompts": [prompt]})
        history.finish(number, report[0])
    assert [entry.workflow for entry in history.list(search="RED fox")] == ["demo-image.json"]
    assert [entry.workflow for entry in history.list(search="100%_")] == ["100%_sure.json"]
    assert history.list(search="'; DROP TABLE comparisons; --") == [] and len(history.list()) == 3
    assert len(history.list(limit=2)) == 2 and history.list(search="no such thing") == []
    assert [entry.workflow for entry in history.list()] == ["other.json", "100%_sure.json", "demo-image.json"]


def test_reports_of_the_command_line_are_adopted_once(history, report):
    _, folder = report
    first, second = history.adopt(folder), history.adopt(folder)
    (entry,) = history.list()
    assert first == second == entry.id and entry.state == "finished" and entry.workflow == "first"
    assert history.request(first)["command"] == "python cli.py compare x"
    with pytest.raises(ReportError, match="cannot be read"):
        history.adopt(folder / "nowhere")


def test_forgetting_leaves_the_files(history, report):
    number = history.adopt(report[1])
    history.forget(number)
    assert history.list() == [] and (report[1] / "report.json").exists()
    with pytest.raises(ReportError, match=f"no comparison {number}"):
        history.open(number)


def test_across_machines(history, report):
    made, folder = report
    first = history.adopt(folder)
    other = {
        **made,
        "server": {**made["server"], "devices": [{"name": "Big GPU", "type": "cuda", "memory_bytes": 1}]},
        "settings": {**made["settings"], "steps": 50},
    }
    second = history.begin(folder / "other", {"workflow": "b"})
    history.finish(second, other)
    rows = history.across([first, second])
    assert [row["arm"] for row in rows if row["id"] == first] == [arm["label"] for arm in made["arms"]]
    plain = [row for row in rows if row["role"] == "plain"]
    assert [row["same_machine"] for row in plain] == [True, False] and plain[0]["note"] == ""
    assert plain[1]["note"] == "another machine: compare speeds, not seconds; other steps, batch or sampler"
    accelerated = next(row for row in rows if row["role"] == "accelerated")
    spread = made["arms"][1]["ratio"]["sampler"]
    assert (accelerated["ratio"], accelerated["low"], accelerated["high"]) == (
        spread["median"], spread["low"], spread["high"],
    )  # fmt: skip
    assert accelerated["psnr"] == made["arms"][1]["quality"]["psnr"]["mean"] and accelerated["seconds"] > 0


def test_identical_pictures_are_infinitely_close(history, report, tmp_path):
    made = json.loads(json.dumps(report[0]))
    made["arms"][1]["quality"]["psnr"] = {"mean": "inf", "worst": "inf", "count": 1, "identical": 1}
    history.finish(history.begin(tmp_path / "a", {}), made)
    assert history.list()[0].psnr == math.inf


def test_the_file_can_move_with_its_folders(report, tmp_path):
    base = tmp_path / "old"
    (base / "run").mkdir(parents=True)
    (base / "run" / "report.json").write_bytes((report[1] / "report.json").read_bytes())
    number = History(base / "history.sqlite").adopt(base / "run")
    base.rename(tmp_path / "new")
    assert History(tmp_path / "new" / "history.sqlite").open(number)[1] == tmp_path / "new" / "run"


def test_64_runs_are_listed_and_one_opened_in_well_under_a_second(history, report):
    for number in range(64):
        history.finish(history.begin(report[1].parent / str(number), {"workflow": f"{number}.json"}), report[0])
    number = history.adopt(report[1])
    began = time.perf_counter()
    fresh = History(history.path)
    assert len(fresh.list()) == 65
    fresh.open(number)
    assert len(fresh.across(list(range(1, 65)))) >= 128
    assert time.perf_counter() - began < 1.0


def test_several_writers_at_once(history, report):
    def write(name):
        for number in range(5):
            History(history.path).adopt(report[1])
            history.finish(history.begin(report[1] / f"{name}-{number}", {}), report[0])

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.list()) == 21


def test_files_that_cannot_be_used(tmp_path, history):
    (tmp_path / "text").write_text("hello" * 500)
    with pytest.raises(ReportError, match="cannot be used .*move the file away"):
        History(tmp_path / "text")
    with pytest.raises(ReportError, match="cannot be used"):
        History(tmp_path / "text" / "below")
    with sqlite3.connect(history.path) as base:
        base.execute("PRAGMA user_version = 9")
    with pytest.raises(ReportError, match="newer version"):
        History(history.path)


def test_a_folder_is_used_by_one_comparison_at_a_time(tmp_path):
    assert not is_locked(tmp_path / "none")
    with folder_lock(tmp_path / "run"):
        assert is_locked(tmp_path / "run")
        with pytest.raises(MeasureError, match="Another comparison is running"), folder_lock(tmp_path / "run"):
            pass
    assert not is_locked(tmp_path / "run")
