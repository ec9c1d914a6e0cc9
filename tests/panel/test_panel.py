"""The A/B page without a browser: what it shows, what it refuses, and that it stays at home."""

import json
import socket
import time
from pathlib import Path

import gradio as gr
import httpx
import pytest

from stretto.web.panel import app, views
from stretto.web.panel.measure.errors import MeasureError, WorkflowError
from stretto.web.panel.session import Request, Session

ASK = Request("image-taylor.json", ("flat hot dog", "noto bus"), 7, 12, 1, True, False)


@pytest.fixture
def place(tmp_path, workflow):
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "image-taylor.json").write_text(json.dumps(workflow), encoding="utf-8")
    (folder / "image-plain.json").write_text(json.dumps(workflow), encoding="utf-8")
    return folder, tmp_path / "out"


@pytest.fixture
def session(fake, place):
    server, url = fake()
    return Session(url, *place), server


def finish(session):
    return list(session.watch())[-1]


def test_a_run_fills_the_page(session):
    session, _ = session
    session.start(ASK)
    state = finish(session)
    page = views.page_of(state)
    assert state.error is None and "1.5" in page.progress and "speed of the plain run" in page.progress
    assert page.slider["value"][0].size == (512, 512), "64 pixels, each eight times"
    assert page.slider["visible"] and not page.clip["visible"]
    assert [choice for choice, _ in page.picture.choices] == [
        "flat hot dog (seed 7)",
        "noto bus (seed 7)",
    ] and page.picture.visible
    assert "<table" in page.table and "<svg" in page.timeline
    assert Path(page.export.value["path"] if isinstance(page.export.value, dict) else page.export.value).exists()
    assert "image-taylor.json --prompts 'flat hot dog' 'noto bus' --seed 7 --steps 12" in state.report["command"]
    other = views.slider_pair(session.report, session.folder, "noto bus (seed 7)")
    assert other[0].tobytes() != page.slider["value"][0].tobytes()
    assert views.slider_pair(session.report, session.folder, "no such picture") is None


def test_one_run_at_a_time_and_stop(session):
    session, server = session
    server.fail = "hang"
    session.start(ASK)
    with pytest.raises(MeasureError, match="already running"):
        session.start(ASK)
    session.stop()
    state = finish(session)
    assert "Stopped" in state.error and 'role="alert"' in views.page_of(state).progress
    server.fail = ""
    session.start(ASK)
    assert finish(session).error is None, "a stopped run leaves nothing behind"


@pytest.mark.parametrize(
    "fail,sentence", [("execution", "KSampler (node 5) failed"), ("die", "went away"), ("interrupt", "cancelled")]
)
def test_trouble_is_one_sentence(session, fail, sentence):
    session, server = session
    server.fail = fail
    session.start(ASK)
    assert sentence in finish(session).error


@pytest.mark.parametrize("name", ["../image-taylor.json", "/etc/passwd", "missing.json"])
def test_only_files_of_the_folder_are_opened(session, name):
    session, server = session
    session.start(Request(name, (), None, None, 1, False, False))
    assert "There is no workflow" in finish(session).error and not server.runs


def test_fields_of_the_page():
    assert Request.from_page("x", " a \n\n b", 3.0, None, 2, True, False) == Request(
        "x", ("a", "b"), 3, None, 2, True, False
    )
    for workflow, steps in ((None, 3), ("x", 0)):
        with pytest.raises(WorkflowError):
            Request.from_page(workflow, "", None, steps, 1, True, True)


def test_status_line(session):
    session, _ = session
    assert "ComfyUI 0.0-fake" in views.status("http://x", *session.check_server())
    assert "No ComfyUI server answers" in views.status(
        "x", *Session("http://127.0.0.1:9", session.workflows, session.out).check_server()
    )
    assert "not a server address" in views.status(
        "x", *Session("ftp://<b>", session.workflows, session.out).check_server()
    )


def test_defaults_come_from_the_workflow(session, place):
    session, _ = session
    config = app.PanelConfig(session.server, *place)
    assert app.workflow_files(place[0]) == ["image-taylor.json", "image-plain.json"]
    assert app.workflow_defaults(config, "image-taylor.json") == ["flat hot dog", 7, 28]
    assert app.workflow_defaults(config, "../secret.json")[0]["__type__"] == "update"
    assert app.workflow_files(place[0] / "nowhere") == []


@pytest.mark.parametrize("chosen,first", [("image-plain.json", "image-plain.json"), ("gone.json", "image-taylor.json")])
def test_the_page_can_begin_with_another_workflow(place, chosen, first):
    with gr.Blocks():
        assert app._controls(app.PanelConfig("http://x", *place, chosen=chosen)).workflow.value == first


def test_the_page_is_served_on_loopback_with_nothing_from_outside(session, place):
    session, _ = session
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = app.PanelConfig(session.server, *place, port=port)
    options = app.launch_options(config)
    assert config.host == "127.0.0.1" and options["share"] is False and "http" not in options["css"]
    page = app.build_app(config)
    assert page.analytics_enabled is False
    began = time.monotonic()
    page.launch(prevent_thread_lock=True, **options)
    try:
        html = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text
        theme = httpx.get(f"http://127.0.0.1:{port}/theme.css", trust_env=False).text
        assert "Stretto" in html and "@import" not in theme and "fonts.googleapis.com/css" not in html + theme
        assert (
            app.port_problem("127.0.0.1", port) is not None and app.port_problem("no.such.host.invalid", 1) is not None
        )
        assert time.monotonic() - began < 5
    finally:
        page.close(verbose=False)
