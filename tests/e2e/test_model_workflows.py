"""Workflows for published models in a real browser: nothing red, and ComfyUI offers exactly the files that are missing."""

import json

from .conftest import SCREENSHOTS
from .shipped import MODELS, ROOT
from .test_editor import DROP, TYPES, editor, types_of  # noqa: F401  (a fixture)

UNKNOWN = "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.type)"
LISTED = "() => [...document.querySelectorAll('.comfy-missing-models li')].map(entry => entry.innerText)"
SHOWN = ("flux-fast", "sd35-calibrate", "wan22-fast")


def test_each_opens_and_offers_the_files_it_names(editor, object_info):  # noqa: F811
    from stretto.web.panel.measure.workflow import ui_to_api

    for name in MODELS:
        ui = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        editor.evaluate(DROP, json.dumps(ui))
        dialog = editor.locator(".comfy-missing-models")
        dialog.wait_for()
        named = {
            (entry["directory"], entry["name"])
            for node in ui["nodes"]
            for entry in node["properties"].get("models", ())
        }
        lines = [line.split("\n")[0] for line in editor.evaluate(LISTED)]
        assert sorted(lines) == sorted(f"{folder} / {file}" for folder, file in named), name
        if name in SHOWN:
            editor.screenshot(path=SCREENSHOTS / f"missing-{name}.png")
        editor.keyboard.press("Escape")
        dialog.wait_for(state="detached")
        wanted = types_of(ui)
        editor.wait_for_function(
            f"(wanted) => JSON.stringify(({TYPES})().sort()) === JSON.stringify(wanted)", arg=wanted
        )
        assert editor.evaluate(UNKNOWN) == [], name
        if name in SHOWN:
            editor.locator("#graph-canvas").focus()
            editor.keyboard.press(".")
            editor.wait_for_timeout(1500)
            editor.screenshot(path=SCREENSHOTS / f"editor-{name}.png")
        sent = editor.evaluate("async () => (await window.app.graphToPrompt()).output")
        ours = ui_to_api(ui, object_info)
        for entry in (*sent.values(), *ours.values()):
            entry.pop("_meta", None)
        assert {key: entry for key, entry in sent.items() if entry["class_type"] in object_info} == ours, name
    assert editor.script_errors == []
