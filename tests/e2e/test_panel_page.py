"""The A/B page in a real browser, over the real server: from a dropped file to an export that opens without a network."""

import csv
import json
import os
import signal

import pytest

from stretto.scripts.launch.comfyui_server import Child, free_port
from stretto.web.panel.measure.workflow import ui_to_api

from .conftest import LOGS, PANEL_PYTHON, SCREENSHOTS
from .shipped import ROOT, load_ui, path_of

# Ten steps are enough to see the page work; the cache computes the first three and the last.
STEPS = "10"
SIZES = {"wide": {"width": 1600, "height": 1000}, "narrow": {"width": 390, "height": 844}}


def opened(page, url):
    """Open the page and wait until the workflow has filled the fields."""
    page.goto(url)
    page.locator("#run").wait_for()
    page.wait_for_function("(label) => document.querySelectorAll('#variants input').length > 0")


def small(page, repeats="1", fewer=False):
    """Make the comparison a small one."""
    steps = page.get_by_label("Steps", exact=True)
    while steps.input_value() != STEPS:
        steps.fill(STEPS)
        steps.press("Tab")
        page.wait_for_timeout(500)
    page.locator("#rounds button").first.click()
    field = page.locator("input[type=number][aria-label*='Repeats']")
    field.wait_for()
    page.wait_for_timeout(500)
    field.fill(repeats)
    field.press("Enter")
    page.wait_for_timeout(500)
    box = page.locator("#variants").get_by_label("fewer steps")
    box.check() if fewer else box.uncheck()


def no_sideways(page):
    """Nothing makes the page wider than its window."""
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window


def saved(page, selector, folder):
    """Click a download button; the file."""
    with page.expect_download() as download:
        page.locator(selector).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_from_a_dropped_file_to_an_export(page, panel, browser, object_info, tmp_path):
    opened(page, panel.url)
    page.locator("#drop input[type=file]").set_input_files(path_of("taylor"))
    page.wait_for_function("document.querySelector('#found').textContent.includes('method Taylor')")
    small(page, fewer=True)
    page.get_by_label("Prompts").fill("fluent red heart")
    page.screenshot(path=SCREENSHOTS / "panel-before.png")
    page.locator("#run").click()
    page.locator("#progress .bar").wait_for()
    page.reload()
    page.locator("#progress .bar, #headline .headline").first.wait_for()  # it is there again after a reload
    page.locator("#progress img.glimpse, #headline .headline").first.wait_for(timeout=300_000)
    page.screenshot(path=SCREENSHOTS / "panel-running.png")
    slider = page.locator("#slider")
    slider.locator("img").nth(1).wait_for(timeout=300_000)
    page.wait_for_timeout(1500)
    assert "speed of the plain run" in page.locator("#headline").inner_text()
    assert "Plain" in page.locator("#table").inner_text()
    for place in ("#timeline", "#front"):
        assert page.locator(f"{place} svg").count()
    assert page.locator("#maps img").count() == 2
    for name, scheme in (("wide", "light"), ("wide", "dark"), ("narrow", "light"), ("narrow", "dark")):
        page.set_viewport_size(SIZES[name])
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(600)
        no_sideways(page)
        page.screenshot(path=SCREENSHOTS / f"panel-{name}-{scheme}.png", full_page=True)
    page.set_viewport_size(SIZES["wide"])
    page.emulate_media(color_scheme="light")
    before, box = handle_position(page), slider.locator("img").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(before, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / "panel-slider.png")
    assert abs(handle_position(page) - before) > box["width"] * 0.1

    source = slider.locator("img").nth(1).get_attribute("src")
    page.locator("#right input").click()
    page.get_by_role("option", name="Same sampler").click()
    page.wait_for_function("(old) => document.querySelectorAll('#slider img')[1].src !== old", arg=source)

    report = json.loads(saved(page, "#export-json", tmp_path).read_text(encoding="utf-8"))
    assert [arm["role"] for arm in report["arms"]] == ["plain", "accelerated", "fewer-steps"]
    assert list(csv.reader(saved(page, "#export-csv", tmp_path).open(encoding="utf-8")))[1:]
    drawing = json.loads(saved(page, "#drawing", tmp_path).read_text(encoding="utf-8"))
    asked = ui_to_api(load_ui("taylor"), object_info)
    assert {n["class_type"] for n in ui_to_api(drawing, object_info).values()} == {n["class_type"] for n in asked.values()}
    offline_report(browser, saved(page, "#export", tmp_path))

    page.get_by_role("tab", name="History").click()
    entry = page.locator("#entries label").filter(has_text="taylor").first
    entry.wait_for()
    page.screenshot(path=SCREENSHOTS / "panel-history.png")
    page.reload()
    page.get_by_role("tab", name="History").click()
    entry.locator("input").check()
    page.locator("#open").click()
    page.locator("#slider img").nth(1).wait_for()
    assert page.script_errors == []


def offline_report(browser, path):
    """The exported page opens from the disk with no network, asks for nothing, and its slider moves."""
    context = browser.new_context(offline=True, viewport=SIZES["wide"])
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    broken = "[...document.images].filter((image) => !image.complete || image.naturalWidth === 0).length"
    assert page.locator("img").count() > 3 and page.evaluate(broken) == 0
    page.locator(".slider input").evaluate("(el) => { el.value = 20; el.dispatchEvent(new Event('input')); }")
    assert page.locator(".slider").evaluate("(el) => el.style.getPropertyValue('--cut')") == "20%"
    page.screenshot(path=SCREENSHOTS / "panel-export.png", full_page=True)
    context.close()


def test_the_editor_hands_over_a_workflow_and_shows_the_page_in_a_frame(page, panel, server):
    message = {"workflow": load_ui("easycache"), "name": "My canvas"}
    token = page.request.post(f"{panel.url}/stretto/workflow", data=message).json()["token"]
    inner = f"{panel.url}/?workflow={token}&embed=1&__theme=dark"
    page.set_viewport_size({"width": 366, "height": 900})
    body = f'<body style="margin:8px"><iframe src="{inner}" style="width:350px;height:850px;border:0"></iframe>'
    page.route("**/frame", lambda route: route.fulfill(body=body, content_type="text/html"))
    page.context.grant_permissions(["local-network-access"])
    told = []
    page.on("console", lambda message: told.append(message.text))
    page.goto("http://localhost:9/frame")
    page.wait_for_timeout(1500)
    assert not [one for one in page.frames if one.url.startswith(panel.url)], "nobody else may frame the page"
    assert any("frame-ancestors" in text for text in told), told
    page.goto(f"{server.url}/frame")
    frame = page.frame_locator("iframe")
    frame.locator("#run").wait_for()
    frame.locator("#found b").wait_for()
    assert frame.locator("#workflow input").input_value() == "My canvas"
    assert not frame.locator(".masthead").is_visible()
    inside = next(one for one in page.frames if one.url.startswith(panel.url))
    width, window = inside.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window == 350
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / "panel-embedded.png")
    assert page.request.post(f"{panel.url}/stretto/workflow", data=message, headers={"Origin": "https://x.example"}).status == 403


@pytest.mark.skipif(os.name == "nt", reason="kills a process as a crash would")
def test_a_killed_page_offers_to_resume(page, server, tmp_path):
    port = free_port()
    command = [str(PANEL_PYTHON), "-u", "cli.py", "panel", "--server", server.url, "--port", str(port), "--out", str(tmp_path)]
    command += ["--workflow", "demo-image-taylor.json", "--history", str(tmp_path / "past.sqlite")]
    url = f"http://127.0.0.1:{port}"

    def start():
        child = Child(command, LOGS / "e2e-panel-killed.log", ROOT, "The panel")
        child.wait_for(url, lambda _: None, limit=120.0)
        return child

    first = start()
    try:
        opened(page, url)
        small(page, repeats="6")
        page.locator("#run").click()
        page.wait_for_function("document.querySelector('#progress').textContent.includes('measuring')", timeout=120_000)
        page.wait_for_function("/Run ([6-9]|1[0-9]) of/.test(document.querySelector('#progress').textContent)", timeout=120_000)
    finally:
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    (journal,) = tmp_path.glob("*/measurements.jsonl")
    before = journal.read_text(encoding="utf-8").splitlines()
    assert len(before) > 3
    page.wait_for_timeout(10_000)  # as long as the history waits before it calls a comparison interrupted
    second = start()
    try:
        opened(page, url)
        page.locator("#resume").wait_for()
        page.screenshot(path=SCREENSHOTS / "panel-resume.png")
        page.locator("#resume").click()
        page.locator("#headline .headline").wait_for(timeout=300_000)
        report = json.loads(saved(page, "#export-json", tmp_path).read_text(encoding="utf-8"))
        assert report["settings"]["complete"] and len(report["measurements"]) == 12
        assert [*tmp_path.glob("*/measurements.jsonl")] == [journal], "in the same folder"
        assert journal.read_text(encoding="utf-8").splitlines()[:3] == before[:3], "the finished ones were kept"
    finally:
        second.stop()


def handle_position(page) -> float:
    """The horizontal place of the slider's handle."""
    handle = page.locator("#slider .outer").first
    box = handle.bounding_box()
    return box["x"] + box["width"] / 2
