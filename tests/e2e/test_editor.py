"""ComfyUI's editor in a real browser: drop a workflow, press Run, see picture, report and timeline."""

import itertools
import json
import re

import pytest

from .conftest import SCREENSHOTS
from .shipped import KINDS, MEDIA, OTHERS, path_of

DROP = """
(text) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], 'workflow.json', {type: 'application/json'}));
    const canvas = document.querySelector('#graph-canvas') || document.querySelector('canvas');
    canvas.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
}
"""
TYPES = "() => window.app.graph.nodes.map(node => node.type)"
HAS_PICTURE = "(type) => (window.app.graph.nodes.find(node => node.type === type)?.imgs || []).length > 0"
PLAYS_VIDEO = """
() => {
    const node = window.app.graph.nodes.find(node => node.type === 'SaveVideo');
    const elements = [node?.videoContainer, ...(node?.widgets || []).map(widget => widget.element)];
    return elements.some(element => element?.querySelector?.('video')) || document.querySelector('video') !== null;
}
"""
REPORT_TEXT = """
() => {
    const node = window.app.graph.nodes.find(node => node.type === 'StrettoReport');
    const texts = (node?.widgets || []).map(widget => widget.element?.textContent || widget.element?.value || widget.value);
    return texts.filter(text => typeof text === 'string' && text.trim()).join('\\n');
}
"""


@pytest.fixture
def editor(page, server):
    """The editor, loaded and with nothing in front of it."""
    page.goto(server.url)
    page.wait_for_function("() => window.app?.graph && window.app?.extensionManager")
    page.get_by_test_id("queue-button").wait_for()
    return page


def types_of(ui: dict) -> list[str]:
    """The node types of a workflow file, sorted."""
    return sorted(node["type"] for node in ui["nodes"])


def drop(editor, kind: str, medium: str = "image") -> dict:
    """Drop a shipped workflow onto the canvas, wait until it is loaded, and return it."""
    text = path_of(kind, medium).read_text(encoding="utf-8")
    editor.evaluate(DROP, text)
    wanted = types_of(json.loads(text))
    editor.wait_for_function(f"(wanted) => JSON.stringify(({TYPES})().sort()) === JSON.stringify(wanted)", arg=wanted)
    return json.loads(text)


def fit_and_shoot(editor, name: str) -> None:
    """Show the whole graph and keep a picture of it."""
    editor.locator("#graph-canvas").focus()
    editor.keyboard.press(".")
    editor.wait_for_timeout(1500)
    editor.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_workflow_runs_and_shows_its_report(editor, kind):
    drop(editor, kind)
    editor.get_by_test_id("queue-button").click()
    for node in ("SaveImage", "StrettoReport", "PreviewImage"):
        editor.wait_for_function(HAS_PICTURE, arg=node, timeout=180_000)
    fit_and_shoot(editor, f"editor-{kind}")
    assert re.search(r"\b28\b", editor.evaluate(REPORT_TEXT)), "the report's text is not on the node"
    assert editor.script_errors == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_workflow_runs_from_the_canvas(editor, name):
    _, medium, kind = name.split("-", 2)
    types = types_of(drop(editor, kind, medium))
    editor.get_by_test_id("queue-button").click()
    for node in ("SaveImage", "StrettoReport", "PreviewImage"):
        if node in types:
            editor.wait_for_function(HAS_PICTURE, arg=node, timeout=240_000)
    if "SaveVideo" in types:
        editor.wait_for_function(PLAYS_VIDEO, timeout=240_000)
    fit_and_shoot(editor, f"editor-{medium}-{kind}")
    if "StrettoReport" in types:
        editor.wait_for_function(f"() => ({REPORT_TEXT})().includes('in the sampler')")
    assert editor.script_errors == []


def test_a_dropped_video_workflow_runs_and_shows_its_clip(editor):
    drop(editor, "taylor", "video")
    editor.get_by_test_id("queue-button").click()
    for node in ("StrettoReport", "PreviewImage"):
        editor.wait_for_function(HAS_PICTURE, arg=node, timeout=180_000)
    editor.wait_for_function(PLAYS_VIDEO, timeout=60_000)
    fit_and_shoot(editor, "editor-video-taylor")
    assert re.search(r"\b28\b", editor.evaluate(REPORT_TEXT)), "the report's text is not on the node"
    assert editor.script_errors == []


def test_an_untouched_workflow_is_sent_as_our_converter_sends_it(editor, object_info):
    from stretto.web.panel.measure.workflow import ui_to_api

    for medium, kind in itertools.product(MEDIA, KINDS):
        ui = drop(editor, kind, medium)
        sent = editor.evaluate("async () => (await window.app.graphToPrompt()).output")
        ours = ui_to_api(ui, object_info)
        for node in (*sent.values(), *ours.values()):
            node.pop("_meta", None)
        assert {key: node for key, node in sent.items() if node["class_type"] in object_info} == ours


def test_a_workflow_in_the_api_form_can_be_opened_and_sent_again(editor, object_info):
    from stretto.web.panel.measure.workflow import api_to_ui, ui_to_api

    ui = json.loads(path_of("taylor").read_text(encoding="utf-8"))
    api = ui_to_api(ui, object_info)
    generated = api_to_ui(api, object_info)
    editor.evaluate(DROP, json.dumps(generated))
    wanted = types_of(generated)
    editor.wait_for_function(f"(wanted) => JSON.stringify(({TYPES})().sort()) === JSON.stringify(wanted)", arg=wanted)
    sent = editor.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in (*sent.values(), *api.values()):
        node.pop("_meta", None)
    assert sent == api
    fit_and_shoot(editor, "editor-generated")


def open_templates(editor):
    """Open the template browser at our workflows and return its dialog."""
    editor.get_by_role("button", name="Templates").first.click()
    dialog = editor.get_by_role("dialog")
    entry = dialog.get_by_text("stretto", exact=True)
    entry.first.scroll_into_view_if_needed()
    entry.first.click()
    dialog.get_by_text("demo-image-plain", exact=True).wait_for()
    return dialog


def test_the_template_browser_offers_our_workflows(editor):
    dialog = open_templates(editor)
    wanted, seen = {path.stem for path in path_of("plain").parent.glob("*.json")}, set()
    editor.wait_for_timeout(1000)
    editor.screenshot(path=SCREENSHOTS / "templates.png")
    dialog.get_by_text("demo-image-plain", exact=True).hover()
    for _ in range(80):  # cards are made as one scrolls
        seen |= {name for name in wanted if dialog.get_by_text(name, exact=True).count()}
        if seen == wanted:
            break
        editor.mouse.wheel(0, 600)
        editor.wait_for_timeout(300)
    assert seen == wanted


def test_a_template_is_loaded(editor):
    dialog = open_templates(editor)
    editor.wait_for_timeout(1500)  # cards move while their pictures come
    dialog.get_by_text("demo-image-plain", exact=True).hover()
    card = dialog.get_by_text("demo-image-taylor", exact=True)
    for _ in range(80):  # cards are made as one scrolls
        if card.count():
            break
        editor.mouse.wheel(0, 300)
        editor.wait_for_timeout(300)
    card.scroll_into_view_if_needed()
    editor.wait_for_timeout(500)
    card.click()
    wanted = types_of(json.loads(path_of("taylor").read_text(encoding="utf-8")))
    editor.wait_for_function(f"(wanted) => JSON.stringify(({TYPES})().sort()) === JSON.stringify(wanted)", arg=wanted)
