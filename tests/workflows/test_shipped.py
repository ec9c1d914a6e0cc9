"""Every workflow that the pack ships fits the nodes it uses: ids, links, types, ranges and widget order."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
COMMENTS = ("Note", "MarkdownNote")
# Lists that ComfyUI fills with the files it finds; checked against demo/models by the server tests, against what nodes
# ask to download by test_models.py.
FILE_LISTS = (
    "unet_name", "vae_name", "ckpt_name", "model_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4",
)
DEMOS = sorted(WORKFLOWS.glob("demo-*.json"))


def nodes_of(ui: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that run."""
    return [node for node in ui["nodes"] if node["type"] not in COMMENTS]


@pytest.mark.parametrize("medium", ["image", "video"])
def test_the_demo_workflows_exist(medium):
    assert {path.stem for path in WORKFLOWS.glob("*.json")} >= {
        f"demo-{medium}-{kind}" for kind in ("plain", "easycache", "taylor")
    }


def test_names_are_fit_for_a_template_address():
    for path in WORKFLOWS.iterdir():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", path.name), path.name


def test_no_second_folder_hides_the_templates():
    root = WORKFLOWS.parent
    assert not [name for name in ("example_workflows", "example", "examples", "workflow") if (root / name).exists()]


def test_ids_are_unique_and_counted(shipped):
    ids = [node["id"] for node in shipped["nodes"]]
    links = [link[0] for link in shipped["links"]]
    assert len(set(ids)) == len(ids)
    assert len(set(links)) == len(links)
    assert shipped["last_node_id"] >= max(ids)
    assert shipped["last_link_id"] >= max(links)
    assert shipped["version"] == 0.4


def test_both_ends_of_every_link_agree(shipped):
    nodes = {node["id"]: node for node in shipped["nodes"]}
    for link_id, source, source_slot, target, target_slot, kind in shipped["links"]:
        output = nodes[source]["outputs"][source_slot]
        entry = nodes[target]["inputs"][target_slot]
        assert link_id in output["links"]
        assert entry["link"] == link_id
        # Pipelines of diffusers pass for models on their way through nodes.
        assert set(output["type"].split(",")) & set(entry["type"].split(","))
        assert kind in (output["type"], entry["type"])
    mentioned = [entry["link"] for node in shipped["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(mentioned) == sorted(link[0] for link in shipped["links"])


def test_slots_are_those_of_the_node_schemas(shipped, object_info, workflow):
    for node in nodes_of(shipped):
        schema = workflow.node_schema(node["type"], object_info, node["id"])
        sockets = [(socket.name, socket.kind) for socket in schema.sockets]
        widgets = [widget.name for widget in schema.widgets]
        assert [(e["name"], e["type"]) for e in node["inputs"] if "widget" not in e] == sockets
        assert [e["widget"]["name"] for e in node["inputs"] if "widget" in e] == widgets
        assert [(output["name"], output["type"]) for output in node["outputs"]] == list(schema.outputs)


def test_widget_values_are_complete_and_allowed(shipped, object_info, workflow):
    api = workflow.ui_to_api(shipped, object_info)
    for node in nodes_of(shipped):
        schema = workflow.node_schema(node["type"], object_info, node["id"])
        stored = len(schema.widgets) + sum(widget.has_control for widget in schema.widgets)
        assert len(node["widgets_values"]) == stored
        for widget in schema.widgets:
            inputs = object_info[node["type"]]["input"]
            spec = {**inputs.get("optional", {}), **inputs["required"]}[widget.name]
            options = spec[1] if len(spec) > 1 else {}
            value = api[str(node["id"])]["inputs"][widget.name]
            if widget.kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), (node["type"], widget.name)
            if widget.kind == "COMBO" and widget.name not in FILE_LISTS:
                assert value in widget.choices, (node["type"], widget.name)


def test_every_node_says_where_it_comes_from(shipped):
    for node in nodes_of(shipped):
        ours = node["type"].startswith("Stretto")
        assert node["properties"]["cnr_id"] == ("stretto" if ours else "comfy-core")
        assert node["properties"]["Node name for S&R"] == node["type"]


def test_a_note_says_what_to_look_at(shipped):
    notes = [node for node in shipped["nodes"] if node["type"] == "MarkdownNote"]
    assert [note["title"] for note in notes] in (["What to look at"], ["What to look at", "Files"])
    assert len(notes[0]["widgets_values"][0]) > 100


def test_nodes_do_not_overlap(shipped):
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in shipped["nodes"]]
    title = 30
    for index, (first, x, y, width, height) in enumerate(boxes):
        for second, x2, y2, width2, height2 in boxes[index + 1:]:
            apart = x + width <= x2 or x2 + width2 <= x or y + height <= y2 - title or y2 + height2 <= y - title
            assert apart, f"nodes {first} and {second} overlap"


@pytest.mark.parametrize("medium", ["image", "video"])
@pytest.mark.parametrize("kind", ["easycache", "taylor"])
def test_an_accelerated_workflow_is_the_plain_one_and_a_cache(medium, kind, object_info, workflow):
    plain, accelerated = (
        json.loads((WORKFLOWS / f"demo-{medium}-{name}.json").read_text(encoding="utf-8")) for name in ("plain", kind)
    )
    for node in accelerated["nodes"]:
        if node["type"] == "StrettoCache":
            node["mode"] = workflow.BYPASSED
    bypassed = workflow.ui_to_api(accelerated, object_info)
    wanted = workflow.ui_to_api(plain, object_info)
    for node in (*bypassed.values(), *wanted.values()):
        node["inputs"].pop("filename_prefix", None)
    assert bypassed == wanted


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_the_text_is_made_for_the_model_it_goes_to(path):
    shipped = json.loads(path.read_text(encoding="utf-8"))
    loaders = ("UNETLoader", "StrettoLoadDiffusionModel")
    models = {node["widgets_values"][0] for node in shipped["nodes"] if node["type"] in loaders}
    pipelines = [node["widgets_values"][0] for node in shipped["nodes"] if node["type"] == "StrettoLoadDiffusersPipeline"]
    models |= {f"{name}.safetensors" for name in pipelines}
    combined = [node["widgets_values"][0] for node in shipped["nodes"] if node["type"] == "StrettoCombineWeights"]
    models |= {line.split()[1] for text in combined for line in text.splitlines()}
    texts = [node["widgets_values"] for node in shipped["nodes"] if node["type"] == "StrettoDemoText"]
    assert {f"stretto-demo-{model}.safetensors" for _, model in texts} == models and len(texts) == 2


def test_a_workflow_saved_before_the_text_had_a_model_means_pictures(object_info, workflow):
    ui = json.loads((WORKFLOWS / "demo-image-taylor.json").read_text(encoding="utf-8"))
    wanted = workflow.ui_to_api(ui, object_info)
    for node in ui["nodes"]:
        if node["type"] == "StrettoDemoText":
            del node["inputs"][1:], node["widgets_values"][1:]
    assert workflow.ui_to_api(ui, object_info) == wanted
    assert {node["inputs"]["model"] for node in wanted.values() if node["class_type"] == "StrettoDemoText"} == {"image"}


@pytest.mark.parametrize("stem", ["demo-video-plain", "demo-video-easycache", "demo-video-taylor"])
def test_a_video_workflow_is_measured_on_lossless_frames(stem, object_info, workflow):
    from stretto.web.panel.measure import arms

    api = workflow.ui_to_api(json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8")), object_info)
    assert arms.get_frame_rate(api) == 8.0 and arms.get_batch(api) == 1
    prepared = arms.prepare(api)
    outputs = [node for node in prepared.values() if object_info[node["class_type"]].get("output_node")]
    (source,) = (prepared[node["inputs"]["images"][0]]["class_type"] for node in outputs)
    assert [node["class_type"] for node in outputs] == ["PreviewImage"] and source == "VAEDecode"
    arms.set_prompt(arms.set_seed(arms.set_steps(arms.set_batch(prepared, 2), 9), 5), "fluent red heart")


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_every_workflow_has_a_thumbnail(path):
    thumbnail = path.with_suffix(".jpg")  # the only ending that ComfyUI looks for; made by scripts/make_thumbnails.py
    assert thumbnail.exists()
    assert thumbnail.read_bytes()[:3] == b"\xff\xd8\xff"


def test_a_workflow_saved_before_the_cache_had_a_store_keeps_features_as_computed(object_info, workflow):
    ui = json.loads((WORKFLOWS / "demo-image-taylor.json").read_text(encoding="utf-8"))
    wanted = workflow.ui_to_api(ui, object_info)
    (cache,) = (node for node in ui["nodes"] if node["type"] == "StrettoCache")
    assert cache["inputs"].pop()["name"] == "text_features" and cache["widgets_values"].pop() is True
    assert workflow.ui_to_api(ui, object_info) == wanted  # text is kept by default: it changes no picture
    assert cache["inputs"].pop()["name"] == "store" and cache["widgets_values"].pop() == "as computed"
    assert workflow.ui_to_api(ui, object_info) == wanted


def test_a_workflow_saved_before_stages_were_corrected_keeps_its_method(object_info, workflow):
    ui = json.loads((WORKFLOWS / "demo-image-progressive.json").read_text(encoding="utf-8"))
    (stages,) = (node for node in ui["nodes"] if node["type"] == "StrettoProgressiveResolution")
    assert stages["inputs"].pop()["name"] == "refresh" and stages["widgets_values"].pop() == 4
    stages["widgets_values"][-1] = "Coupled"
    (found,) = (n for n in workflow.ui_to_api(ui, object_info).values() if n["class_type"] == "StrettoProgressiveResolution")
    assert found["inputs"]["method"] == "Coupled" and found["inputs"].get("refresh", 4) == 4
