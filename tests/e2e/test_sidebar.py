"""The sidebar in a real browser: the plan of the graph, a run's timeline, and the panel in a frame of it."""

import json
import re

import pytest

from .conftest import SCREENSHOTS
from .shipped import load_ui
from .test_editor import DROP, TYPES, editor  # noqa: F401  (a fixture)

STEPS = 10
TOGGLE = "() => window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.stretto')"
MODE_OF = "(type) => window.app.graph.nodes.find(node => node.type === type).mode"
TOLD = "() => /(measured in|predicted from) the last run/.test(document.querySelector('.stretto-expected')?.textContent)"
SET = "([id, value]) => window.app.extensionManager.setting.set(id, value)"


def short(kind: str = "taylor") -> dict:
    """A shipped workflow with few steps."""
    ui = load_ui(kind)
    for node in ui["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = STEPS
    return ui


@pytest.fixture
def sidebar(editor):  # noqa: F811
    """The editor with a short workflow on the canvas and the tab open."""
    load(editor, short())
    editor.evaluate(TOGGLE)
    editor.locator(".stretto-nodes").first.wait_for()
    return editor


def load(editor, ui: dict) -> None:  # noqa: F811
    """Drop a workflow and wait until it is there."""
    editor.evaluate(DROP, json.dumps(ui))
    wanted = sorted(node["type"] for node in ui["nodes"])
    editor.wait_for_function(f"(wanted) => JSON.stringify(({TYPES})().sort()) === JSON.stringify(wanted)", arg=wanted)


def row(page, title: str):
    """The sidebar's row of a node."""
    return page.locator(".stretto-node").filter(has=page.get_by_role("button", name=title, exact=True))


def test_the_plan_follows_the_canvas(sidebar):
    cache = row(sidebar, "Stretto Cache")
    assert cache.locator(".stretto-state").inner_text() == "on"
    assert "unknown until run" in sidebar.locator(".stretto-expected").inner_text()
    cache.locator("input").click()
    row(sidebar, "Stretto Cache").and_(sidebar.locator(".stretto-bypassed")).wait_for()
    assert sidebar.evaluate(MODE_OF, "StrettoCache") == 4
    assert "nothing is on" in sidebar.locator(".stretto-expected").inner_text()
    sidebar.evaluate("() => { window.app.graph.nodes.find(node => node.type === 'StrettoCache').mode = 2; }")
    row(sidebar, "Stretto Cache").and_(sidebar.locator(".stretto-muted")).wait_for()
    row(sidebar, "Stretto Cache").locator("input").click()
    row(sidebar, "Stretto Cache").and_(sidebar.locator(".stretto-on")).wait_for()
    assert sidebar.script_errors == []


def test_conflicts_are_named_where_two_nodes_share_a_model(sidebar):
    """A second cache behind the first; not one beside it that no sampler uses."""
    sidebar.evaluate("""() => {
        const graph = window.app.graph, first = graph.nodes.find(node => node.type === 'StrettoCache');
        const second = window.LiteGraph.createNode('StrettoCacheSchedule');
        graph.add(second);
        window.second = second; window.first = first;
    }""")
    row(sidebar, "Stretto Cache Schedule").and_(sidebar.locator(".stretto-unused")).wait_for()
    assert sidebar.locator(".stretto-overview .stretto-warning").count() == 0
    sidebar.evaluate("""() => {
        const graph = window.app.graph, [first, second] = [window.first, window.second];
        const link = graph.links.get?.(first.outputs[0].links[0]) ?? graph.links[first.outputs[0].links[0]];
        const target = graph.getNodeById(link.target_id), slot = link.target_slot;
        first.connect(0, second, 0);
        second.connect(0, target, slot);
    }""")
    warning = sidebar.locator(".stretto-overview .stretto-warning")
    warning.wait_for()
    assert "Stretto Cache and Stretto Cache Schedule cannot share a model" in warning.inner_text()
    sidebar.screenshot(path=SCREENSHOTS / "sidebar-conflict.png")
    row(sidebar, "Stretto Cache Schedule").locator("input").click()
    warning.wait_for(state="detached")
    assert sidebar.script_errors == []


def test_a_run_appears_with_its_timeline(sidebar):
    sidebar.get_by_test_id("queue-button").click()
    run = sidebar.locator(".stretto-run").filter(has_text=f", {STEPS} steps")  # not the last run of another test
    run.locator("svg").first.wait_for(timeout=180_000)
    assert run.locator("svg").first.locator("rect").count() == STEPS
    assert run.locator("rect.stretto-forecast").count() > 0
    sidebar.wait_for_function(TOLD)
    assert "Last run: active" in row(sidebar, "Stretto Cache").inner_text()
    report = "() => window.app.graph.nodes.find(node => node.type === 'StrettoReport').widgets"
    sidebar.wait_for_function(f"() => ({report})().some(w => w.element?.querySelector?.('svg rect'))")
    for name, scheme, size in (
        ("dark", "dark", (1600, 1000)), ("light", "light", (1600, 1000)), ("narrow", "dark", (800, 900)),
    ):  # fmt: skip
        sidebar.set_viewport_size({"width": size[0], "height": size[1]})
        sidebar.evaluate(SET, ["Comfy.ColorPalette", scheme])
        sidebar.wait_for_timeout(1000)
        sidebar.screenshot(path=SCREENSHOTS / f"sidebar-{name}.png")
        wide, room = sidebar.evaluate("() => { const e = document.querySelector('.stretto-overview'); "
                                      "return [e.scrollWidth, e.clientWidth]; }")
        assert wide <= room, f"{name}: the sidebar scrolls sideways"
    sidebar.evaluate(SET, ["Comfy.ColorPalette", "dark"])
    load(sidebar, short("plain"))
    sidebar.wait_for_function(f"() => !({TOLD})()")
    assert sidebar.script_errors == []


def test_the_panel_starts_from_the_sidebar_and_stands_in_it(sidebar):
    sidebar.get_by_role("button", name="Compare now").click()
    sidebar.locator(".stretto-page iframe").wait_for(timeout=180_000)
    page = sidebar.frame_locator(".stretto-page iframe")
    page.locator("#run").wait_for(timeout=90_000)
    sidebar.wait_for_timeout(1500)
    sidebar.screenshot(path=SCREENSHOTS / "sidebar-panel.png")
    sidebar.get_by_role("button", name="Plan of this graph").click()
    stop = sidebar.get_by_role("button", name="Stop the panel")
    stop.click()
    stop.wait_for(state="detached", timeout=60_000)
    assert sidebar.script_errors == []


def test_the_tab_can_be_put_away(sidebar):
    button = sidebar.locator(".stretto-tab-button, .side-bar-button").filter(has=sidebar.locator(".pi-bolt"))
    sidebar.evaluate(SET, ["Stretto.Sidebar.Show", False])
    button.first.wait_for(state="detached")
    sidebar.evaluate(SET, ["Stretto.Sidebar.Show", True])
    button.first.wait_for()
    assert sidebar.script_errors == []


def test_commands_settings_and_the_about_badge(editor):  # noqa: F811
    """What the editor offers besides the tab: a command that opens it, settings in words, and the pack's name under About."""
    editor.evaluate("() => window.app.extensionManager.command.execute('Stretto.ShowSidebar')")
    editor.locator(".stretto-overview").wait_for()
    editor.evaluate("() => window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = editor.get_by_role("dialog")
    dialog.get_by_text("Stretto", exact=True).first.click()
    for words in ("Show the Stretto tab", "Port of the A/B panel", "Where Compare now opens the panel"):
        dialog.get_by_text(words).wait_for()
    editor.wait_for_timeout(500)
    editor.screenshot(path=SCREENSHOTS / "sidebar-settings.png")
    dialog.get_by_text("About", exact=True).first.click()
    dialog.get_by_text(re.compile(r"Stretto \d")).wait_for()
    editor.wait_for_timeout(500)
    editor.screenshot(path=SCREENSHOTS / "sidebar-about.png")
    assert editor.script_errors == []
