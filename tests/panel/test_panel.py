"""The A/B page without a browser: what it runs and shows, what it refuses, and that it stays at home."""

import json
import shutil
import socket
import time
from pathlib import Path

import gradio as gr
import httpx
import pytest
from PIL import Image, PngImagePlugin

from stretto.web.panel import app, controls, downloads, past, results, views
from stretto.web.panel.measure.errors import MeasureError, WorkflowError
from stretto.web.panel.measure.variants import Variant
from stretto.web.panel.results import Results
from stretto.web.panel.session import Request, Session

NAME = "image-taylor.json"


@pytest.fixture
def place(tmp_path, workflow):
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / NAME).write_text(json.dumps(workflow), encoding="utf-8")
    (folder / "image-plain.json").write_text(json.dumps(workflow), encoding="utf-8")
    return folder, tmp_path / "out"


@pytest.fixture
def served(fake, place):
    server, url = fake(schemas=fake_schemas())
    return Session(url, *place), server


def fake_schemas():
    import sys

    return sys.modules["fake_comfy"].SCHEMAS


def ask(session, **changes):
    """A small comparison, as the fields of the page say it."""
    fields = {
        "key": NAME, "ticked": ["drawn:", "fewer-steps:"], "node_id": "2", "setting": None, "values": "", "second": "",
        "prompts": "flat hot dog\nnoto bus", "seeds": "7", "steps": 12.0, "repeats": 1, "reference": False,
    }  # fmt: skip
    return controls.request_of(session, **{**fields, **changes})


def finish(session):
    return list(session.watch())[-1]


def shown(updates):
    """Updates by the names of the components."""
    return dict(zip(Results.__dataclass_fields__, updates, strict=True))


def value(update):
    return update["value"] if isinstance(update, dict) and "value" in update else update


# A run and what it shows


def test_a_run_fills_the_page(served):
    session, server = served
    session.start(ask(session))
    state = finish(session)
    page = shown(results.page_of(session, state))
    assert state.error is None and page["outcome"]["visible"]
    assert "speed of the plain run" in page["headline"] and "fake" not in page["progress"]
    assert [label for label, _ in page["picture"]["choices"]] == ["flat hot dog (seed 7)", "noto bus (seed 7)"]
    assert [name for _, name in page["left"]["choices"]] == ["plain", "taylor-every-2-order-1", "fewer-steps"]
    assert (value(page["left"]), value(page["right"])) == ("plain", "taylor-every-2-order-1")
    assert value(page["slider"])[0].size == (512, 512), "64 pixels, each eight times"
    assert page["slider"]["visible"] and not page["clip"]["visible"]
    assert page["maps"].count("<img") == 2 and "PSNR" in page["maps"]
    assert "MS-SSIM: its five scales need" in page["table"], "what is missing says why"
    assert "<table" in page["table"] and "<svg" in page["timeline"] and "<svg" in page["front"]
    report = session.shown(state.entry).report
    assert "image-taylor.json --prompts 'flat hot dog' 'noto bus' --seed 7 --steps 12" in report["command"]
    for kind in ("html", "json", "csv"):
        path = Path(value(page[kind]))
        assert path.name.startswith("stretto-") and path.suffix == f".{kind}" and path.stat().st_size > 100
    assert "http" not in Path(value(page["html"])).read_text().partition("<script")[0].replace("http://127.0.0.1", "")
    drawing = json.loads(Path(value(page["drawing"])).read_text())
    assert {node["type"] for node in drawing["nodes"]} >= {"StrettoCache", "KSampler"}
    assert set(server.previews[:4]) == {"auto"} and set(server.previews[4:]) == {None}, "none while time is measured"


def test_any_two_arms_and_any_picture(served):
    session, _ = served
    session.start(ask(session))
    report, folder = (opened := session.shown(finish(session).entry)).report, opened.folder
    first, second = results.pairs.slider(report, folder, 0, ("taylor-every-2-order-1", "fewer-steps"))
    assert first.tobytes() != second.tobytes()
    other = results.pairs.slider(report, folder, 1, ("taylor-every-2-order-1", "fewer-steps"))
    assert other[0].tobytes() != first.tobytes()
    assert results.pairs.slider(report, folder, 5, ("plain", "fewer-steps")) is None
    assert results.pairs.maps(report, folder, 0, ("plain", "plain")) == ""
    assert "SSIM" not in results.pairs.maps(report, folder, 0, ("taylor-every-2-order-1", "fewer-steps"))


def test_clips_move_side_by_side(fake, place, video_workflow):
    _, url = fake()
    session = Session(url, *place)
    drawn = Variant("drawn", "Taylor")
    session.start(Request("clip.json", video_workflow, (drawn,), steps=8, repeats=1))
    page = shown(results.page_of(session, finish(session)))
    assert page["clip"]["visible"] and "data:image/webp" in value(page["clip"]) and page["picture"]["label"] == "Clip"
    assert not page["slider"]["visible"] and not page["beside"]["visible"]


def test_large_pictures_are_shown_as_they_are(fake, place):
    _, url = fake(side=200, schemas=fake_schemas())
    session = Session(url, *place)
    session.start(ask(session))
    opened = session.shown(finish(session).entry)
    files = results.pairs.slider(opened.report, opened.folder, 0, ("plain", "fewer-steps"))
    assert all(Path(name).suffix == ".png" for name in files), "the very files, with no encoding in between"


def test_progress_shows_a_picture(served):
    session, _ = served
    session.start(ask(session))
    pages = [shown(results.page_of(session, state))["progress"] for state in session.watch()]
    assert any("Run " in page and "data:image/png" in page for page in pages) and not any("preview" in p for p in pages)
    assert "img" not in views._glimpse(b"<script>alert(1)</script>")


# What is asked for


def test_a_sweep_and_seeds(served):
    session, _ = served
    request = ask(session, ticked=["drawn:"], setting="interval", values="3, 4", seeds="1, 2 2", prompts="", steps=None)
    assert [v.kind for v in request.variants] == ["drawn", "sweep", "sweep"] and request.seeds == (1, 2)
    session.start(request)
    report = session.shown(finish(session).entry).report
    assert len(report["arms"]) == 4 and report["settings"]["seeds"] == [1, 2]
    assert "--sweep 2.interval=3,4" in report["command"] and "--no-fewer-steps" in report["command"]
    drawing = session.drawing(session.shown(session.entry), report["arms"][3]["name"])
    assert next(node for node in drawing["nodes"] if node["type"] == "StrettoCache")["widgets_values"][1] == 4


def test_a_second_workflow(served, workflow):
    session, _ = served
    workflow["2"]["inputs"]["interval"] = 5
    token = session.shelf.put(workflow, "other.json")
    session.start(ask(session, second=token))
    report = session.shown(finish(session).entry).report
    assert [arm["label"] for arm in report["arms"]].count("other") == 1
    drawing = session.drawing(session.shown(session.entry), "other")
    assert next(node for node in drawing["nodes"] if node["type"] == "StrettoCache")["widgets_values"][1] == 5


@pytest.mark.parametrize(
    "changes,sentence",
    [
        ({"key": None}, "Choose a workflow"),
        ({"key": "../image-taylor.json"}, "There is no workflow"),
        ({"key": "/etc/passwd"}, "There is no workflow"),
        ({"key": "missing.json"}, "There is no workflow"),
        ({"ticked": []}, "Tick at least one"),
        ({"values": "3"}, "Choose the node"),
        ({"setting": "interval", "values": "3, nine"}, "nine"),
        ({"setting": "interval", "values": "99"}, "1 to 8"),
        ({"steps": 0}, "at least 1"),
        ({"seeds": "1, -3"}, "-3"),
        ({"seeds": "one"}, "one"),
        ({"seeds": " ".join(map(str, range(99)))}, "too many"),
        ({"second": "gone"}, "There is no workflow"),
    ],
)
def test_what_cannot_be_run_is_said_in_words(served, changes, sentence):
    session, server = served
    with pytest.raises(WorkflowError, match=sentence):
        ask(session, **changes)
    assert not server.runs


def test_a_workflow_fills_the_fields(served):
    session, _ = served
    found, variants, node, setting, _, prompt, seed, steps = controls.defaults(session, NAME)
    assert "Stretto Cache" in found and "method Taylor" in found
    assert variants["value"] == ["drawn:", "fewer-steps:"] and node["value"] == "2" and "interval" in setting["choices"]
    assert (prompt, seed, steps) == ("flat hot dog", "7", 28)
    assert session.shelf.files() == [NAME, "image-plain.json"]
    wrong = controls.defaults(session, "../secret.json")
    assert 'role="alert"' in wrong[0] and wrong[1]["choices"] == []


def test_a_picture_that_carries_a_workflow_is_dropped_in(served, workflow, tmp_path):
    session, _ = served
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(workflow))
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    token = session.shelf.drop(path.read_bytes(), path.name)
    assert session.shelf.choices()[0] == ("picture.png", token)
    assert controls.defaults(session, token)[5] == "flat hot dog"
    assert ask(session, key=token).document == workflow
    with pytest.raises(WorkflowError, match="empty.png"):
        session.shelf.drop(b"\x89PNG\r\n\x1a\n", "empty.png")


def test_a_handed_over_workflow_is_what_the_page_begins_with(served, place, workflow):
    session, _ = served
    config = app.PanelConfig(session.server, *place)
    token = session.shelf.put(workflow, "My canvas")
    workflow_update, second, found, *_ = app._beginning(config, session, token)
    assert workflow_update["value"] == token and "Stretto Cache" in found and ("My canvas", token) in second["choices"]
    gone = app._beginning(config, session, "no-such-token")
    assert gone[0]["value"] == NAME and "no longer here" in gone[2]


# Trouble


def test_one_run_at_a_time_and_stop(served):
    session, server = served
    server.fail = "hang"
    session.start(ask(session))
    with pytest.raises(MeasureError, match="already running"):
        session.start(ask(session))
    session.stop()
    state = finish(session)
    assert "Stopped" in state.error and 'role="alert"' in shown(results.page_of(session, state))["progress"]
    assert [entry.state for entry in session.history.list()] == ["stopped"]
    server.fail = ""
    session.start(ask(session))
    assert finish(session).error is None, "a stopped run leaves nothing behind"


@pytest.mark.parametrize(
    "fail,sentence", [("execution", "KSampler (node 5) failed"), ("die", "went away"), ("interrupt", "cancelled")]
)
def test_trouble_is_one_sentence_and_stays_in_the_history(served, fail, sentence):
    session, server = served
    request = ask(session)
    server.fail = fail
    session.start(request)
    assert sentence in finish(session).error
    (entry,) = session.history.list()
    assert entry.state == "failed" and sentence in entry.summary


def test_a_server_that_is_down(place):
    session = Session("http://127.0.0.1:9", *place)
    assert "No ComfyUI server answers" in controls.defaults(session, NAME)[0]
    assert "No ComfyUI server answers" in views.status("x", *session.check_server())
    assert "not a server address" in views.status("x", *Session("ftp://<b>", *place).check_server())


def test_status_line(served):
    session, _ = served
    assert "ComfyUI 0.0-fake" in views.status("http://x", *session.check_server())


def test_a_full_disk_is_one_sentence(served, monkeypatch):
    session, _ = served
    request = ask(session)
    monkeypatch.setattr("stretto.web.panel.session.compare", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    session.start(request)
    assert "No space left" in finish(session).error


# Resuming


def test_a_comparison_goes_on_after_comfyui_died(served, fake):
    session, server = served
    request = ask(session, prompts="flat hot dog", repeats=2)
    server.fail, server.fail_at = "die", 8  # after the probe, the warm-up, the first round and a run of the second
    session.start(request)
    assert "went away" in finish(session).error
    again, url = fake(schemas=fake_schemas())
    session.server = url
    (entry,) = session.history.list()
    session.resume(entry.id)
    state = finish(session)
    assert state.error is None and state.entry == entry.id and session.history.entry(entry.id).state == "finished"
    assert len(session.shown(entry.id).report["measurements"]) == 6
    assert len(again.runs) == 7, "the probe, the warm-up and the second round: the first one was kept"


def test_a_page_that_was_killed_offers_to_go_on(served, place, monkeypatch):
    """What a killed process leaves: a row that says running, measurements, and no lock on the folder."""
    session, server = served
    request = ask(session, repeats=3, ticked=["drawn:"], prompts="flat hot dog")
    session.start(request)
    entry = finish(session).entry
    folder = session.shown(entry).folder
    results.opened(session, entry)
    before = len(server.runs)
    for name in ("report.json", "index.html"):
        (folder / name).unlink()
    lines = (folder / "measurements.jsonl").read_text().splitlines(keepends=True)
    (folder / "measurements.jsonl").write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    session.history.begin(folder, request.to_json())
    monkeypatch.setattr("stretto.web.panel.measure.history.GRACE_SECONDS", 0.0)

    later = Session(session.server, *place)
    assert past.unfinished(later).id == entry and later.history.entry(entry).state == "interrupted"
    assert app._offer(later)[0]["visible"] and NAME in app._offer(later)[1]
    later.resume(entry)
    state = finish(later)
    assert state.error is None and state.entry == entry
    assert len(server.runs) - before == 4, "a warm-up round, and the round that was torn"
    assert len(later.shown(entry).report["measurements"]) == 6
    assert not downloads.path_of(folder, "html").exists(), "downloads of before are made anew"
    assert past.unfinished(later) is None and not app._offer(later)[0]["visible"]


def test_what_the_command_line_made_cannot_be_resumed_here(served, tmp_path):
    session, _ = served
    number = session.history.begin(tmp_path / "x", {"workflow": "x", "command": "y"})
    with pytest.raises(MeasureError, match="not started from the page"):
        session.resume(number)


def test_a_request_survives_as_json(served):
    session, _ = served
    request = ask(session, setting="threshold", values="0.1, 0.2", second="image-plain.json")
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert all(isinstance(variant, Variant) for variant in request.variants)


# The history


def test_sixty_four_runs_open_within_a_second(served):
    session, _ = served
    session.start(ask(session, prompts="flat hot dog"))
    one = session.shown(finish(session).entry)
    for number in range(63):
        folder = session.out / f"copy-{number}"
        shutil.copytree(one.folder, folder)
        session.history.finish(session.history.begin(folder, ask(session).to_json()), one.report)
    busy = time.process_time()
    listed = past.listed(session)
    across = views.across(session.history.across([number for _, number in listed["choices"]]))
    opened = shown(results.opened(session, listed["choices"][0][1]))
    seconds = time.process_time() - busy
    assert len(listed["choices"]) == 64 and across.count("<tr") == 1 + 64 * 3 and "<table" in opened["table"]
    assert seconds < 1.0
    assert len(past.listed(session, "hot dog")["choices"]) == 64 and not past.listed(session, "nowhere")["choices"]


def test_a_comparison_is_opened_again_and_forgotten(served):
    session, _ = served
    session.start(ask(session))
    entry = finish(session).entry
    folder = session.shown(entry).folder
    for path in folder.glob("stretto-*"):
        path.unlink()
    page = shown(results.opened(session, entry))
    assert page["entry"] == entry and Path(value(page["csv"])).exists(), "downloads are made where they are missing"
    session.history.forget(entry)
    assert 'role="alert"' in shown(results.opened(session, entry))["progress"] and folder.exists()


# The page


@pytest.mark.parametrize("chosen,first", [("image-plain.json", "image-plain.json"), ("gone.json", NAME)])
def test_the_page_can_begin_with_another_workflow(place, chosen, first):
    with gr.Blocks():
        assert controls.build(Session("http://x", *place), chosen).workflow.value == first


def test_the_page_is_served_on_loopback_with_nothing_from_outside(served, place, workflow):
    session, _ = served
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = app.PanelConfig(session.server, *place, port=port)
    options = app.launch_options(config, session)
    assert config.host == "127.0.0.1" and options["share"] is False and "http" not in options["css"] + options["head"]
    page = app.build_app(config, session)
    assert page.analytics_enabled is False
    began = time.monotonic()
    page.launch(prevent_thread_lock=True, **options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answer = client.get("/")
            html, theme = answer.text, client.get("/theme.css").text
            assert "Stretto" in html and "@import" not in theme and "fonts.googleapis.com/css" not in html + theme
            assert session.server in answer.headers["content-security-policy"]
            token = client.post("/stretto/workflow", json={"workflow": workflow, "name": "canvas"}).json()["token"]
            assert session.shelf.has(token) and client.get(f"/?workflow={token}&embed=1").status_code == 200
            assert client.get("/", headers={"host": "evil.example"}).status_code == 403
            foreign = {"origin": "https://evil.example"}
            assert client.post("/gradio_api/queue/join", json={}, headers=foreign).status_code == 403
        assert (
            app.port_problem("127.0.0.1", port) is not None and app.port_problem("no.such.host.invalid", 1) is not None
        )
        assert time.monotonic() - began < 5
    finally:
        page.close(verbose=False)
