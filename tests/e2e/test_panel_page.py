"""The A/B page in a real browser, over the real server: run a small comparison, look at it, move the slider."""

import re

from .conftest import SCREENSHOTS

# Six steps are enough to see the page work; the cache computes the first three and the last.
STEPS = "10"


def test_a_small_comparison_from_start_to_slider(page, panel):
    page.goto(panel.url)
    run = page.locator("#run")
    run.wait_for()
    # The fields fill themselves from the workflow, in a moment of the page's choosing after loading.
    steps = page.get_by_label("Steps", exact=True)
    page.wait_for_function("(element) => element.value !== ''", arg=steps.element_handle())
    while steps.input_value() != STEPS:
        steps.fill(STEPS)
        steps.press("Tab")
        page.wait_for_timeout(3000)
    page.get_by_label("Prompts").fill("fluent red heart")
    repeats = page.locator("input[type=number][aria-label*='Repeats']")
    repeats.fill("1")
    repeats.press("Enter")
    fewer = page.get_by_label("Also fewer steps")
    if fewer.is_checked():
        fewer.uncheck()
    page.screenshot(path=SCREENSHOTS / "panel-before.png")
    run.click()
    slider = page.locator("#slider")
    slider.locator("img").nth(1).wait_for(timeout=300_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / "panel-after.png", full_page=True)
    assert re.search(r"plain", page.locator("#table").inner_text(), re.IGNORECASE)
    assert page.locator("#timeline").inner_text().strip() or page.locator("#timeline svg").count()
    before = handle_position(page)
    box = slider.locator("img").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(before, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / "panel-slider.png", full_page=True)
    assert abs(handle_position(page) - before) > box["width"] * 0.1
    assert page.script_errors == []


def handle_position(page) -> float:
    """The horizontal place of the slider's handle."""
    handle = page.locator("#slider .outer").first
    box = handle.bounding_box()
    return box["x"] + box["width"] / 2
