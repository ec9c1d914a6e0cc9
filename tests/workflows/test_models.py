"""Workflows that are drawn from a description: the files are what is described, can be read, and name what they need."""

import json
import re
from itertools import permutations
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stretto.acceleration.compatibility import add_request, compatible
from stretto.acceleration.plan import Plan, Request
from stretto.scripts.shipped_workflows.catalogue import WORKFLOWS
from stretto.scripts.shipped_workflows.drawing import draw, dump
from stretto.scripts.shipped_workflows.models import FILES
from stretto.scripts.shipped_workflows.table import table

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
REAL = [workflow for workflow in WORKFLOWS if not workflow.model.demo]
FAMILIES = {"flux", "sd35", "qwen-image", "z-image", "wan21", "wan22", "hunyuan-video", "ltx"}
LOADERS = ("UNETLoader", "CheckpointLoaderSimple", "VAELoader", "CLIPLoader", "DualCLIPLoader", "StrettoLoadDiffusionModel",
           "StrettoLoadTextEncoder", "StrettoQuantize")
FOLDERS = {"UNETLoader": "diffusion_models", "StrettoLoadDiffusionModel": "diffusion_models", "VAELoader": "vae",
           "StrettoQuantize": "diffusion_models", "CheckpointLoaderSimple": "checkpoints"}


def ui_of(workflow):
    """The file of a description."""
    return json.loads((FOLDER / f"{workflow.name}.json").read_text(encoding="utf-8"))


every = pytest.mark.parametrize("described", WORKFLOWS, ids=lambda workflow: workflow.name)
real = pytest.mark.parametrize("described", REAL, ids=lambda workflow: workflow.name)


@every
def test_the_file_is_what_is_described(described, object_info, workflow):
    """After a change: .venv/bin/python scripts/make_workflows.py"""
    text = (FOLDER / f"{described.name}.json").read_text(encoding="utf-8")
    assert text == dump(draw(described, object_info, workflow.api_to_ui)) + "\n"


def test_no_file_is_without_description():
    models = {path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("demo-")}
    assert models == {workflow.name for workflow in REAL}


def test_every_family_has_a_fast_one_and_every_twin_exists():
    assert {workflow.family for workflow in REAL} == FAMILIES
    assert {f"{family}-fast" for family in FAMILIES} <= {workflow.name for workflow in REAL}
    for workflow in REAL:
        assert (FOLDER / f"{workflow.twin}.json").is_file(), workflow.name
        assert workflow.source, workflow.name


def test_every_technique_has_a_real_model_or_a_reason(object_info):
    shown = {node["type"] for workflow in REAL for node in ui_of(workflow)["nodes"]}
    without = {
        "StrettoCombineWeights": "wants checkpoints or LoRAs of the user's own training",
        "StrettoLoadAttentionWeights": "wants a checkpoint whose folder ComfyUI does not know",
        "StrettoSpectrum": "measures a model once; see its demo workflow",
        "StrettoFrameRateSecondPass": "Stretto Dynamic Frame Rate in parts",
        "StrettoFrameRateProbe": "measures a model once",
        "StrettoRestoreFrames": "part of Stretto Dynamic VAE Decode",
        "StrettoSaveScheduledLatent": "files of latents",
        "StrettoLoadScheduledLatent": "files of latents",
        "StrettoLoadDiffusersPipeline": "opens folders, which ComfyUI cannot offer to download",
        "StrettoDiffusersSample": "runs such a pipeline",
        "StrettoDemoText": "is the demo models' text encoder",
    }
    ours = {name for name in object_info if name.startswith("Stretto")}
    assert ours - shown == set(without) & ours


@real
def test_every_file_says_where_it_comes_from_and_where_it_goes(described, object_info, workflow):
    ui = ui_of(described)
    for node in ui["nodes"]:
        models = node["properties"].get("models", [])
        assert bool(models) == (node["type"] in LOADERS), node["type"]
        texts = [value for value in node.get("widgets_values", ()) if isinstance(value, str)]
        named = [text for text in texts if text.endswith((".safetensors", ".sft"))]
        assert named == [entry["name"] for entry in models]
        for entry in models:
            assert set(entry) == {"name", "url", "directory"}
            parts = urlsplit(entry["url"])
            # The only places from which ComfyUI's dialog downloads, and the only kind of file.
            assert (parts.scheme, parts.netloc, parts.query) == ("https", "huggingface.co", "")
            assert parts.path.rsplit("/", 1)[-1] == entry["name"] and entry["name"].endswith(".safetensors")
            assert re.fullmatch(r"/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", parts.path)
            assert entry["directory"] == FOLDERS.get(node["type"], "text_encoders")
            assert FILES[entry["name"]].url == entry["url"]


def test_folders_are_those_of_comfyui(comfyui_folders):
    assert {file.folder for file in FILES.values()} <= comfyui_folders


def test_a_name_has_one_address():
    """The dialog tells files apart by address: two for one name would be offered twice."""
    assert len({file.url for file in FILES.values()}) == len(FILES)


@real
def test_the_notes_name_files_twin_and_what_was_measured(described):
    notes = {node["title"]: node["widgets_values"][0] for node in ui_of(described)["nodes"] if node["type"] == "MarkdownNote"}
    ui = ui_of(described)
    files = [entry for node in ui["nodes"] for entry in node["properties"].get("models", ())]
    for entry in files:
        assert f"[{entry['name']}]({entry['url']}) | ComfyUI/models/{entry['directory']} |" in notes["Files"]
    assert described.twin in notes["What to look at"]
    assert "measured" in notes["What to look at"]


@every
def test_links_of_the_file_run_from_left_to_right(described):
    nodes = {node["id"]: node for node in ui_of(described)["nodes"]}
    for _, source, _, target, _, _ in ui_of(described)["links"]:
        assert nodes[source]["pos"][0] + nodes[source]["size"][0] < nodes[target]["pos"][0]


@every
def test_every_node_stands_in_one_group_and_groups_stand_apart(described):
    ui = ui_of(described)
    boxes = [group["bounding"] for group in ui["groups"]]
    for index, (x, y, width, height) in enumerate(boxes):
        for x2, y2, width2, height2 in boxes[index + 1:]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    for node in ui["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        around = [x <= left and y <= top - 30 and left + width <= x + w and top + height <= y + h for x, y, w, h in boxes]
        assert sum(around) == (node["type"] != "MarkdownNote"), node["type"]


@every
def test_the_stack_is_legal(described):
    """Every chain, in any order, is one plan."""
    for chain in described.chains:
        names = [TECHNIQUES[entry.kind] for entry in chain]
        assert all(compatible(*pair) for pair in permutations(names, 2))
        plans = set()
        for order in permutations(names):
            plan = Plan()
            for name in order:
                plan = add_request(plan, request(name))
            plans.add(plan)
        assert len(plans) == 1


#: Node -> technique.
TECHNIQUES = {
    "StrettoCache": "cache", "StrettoCacheSchedule": "cache", "StrettoGuidanceSaver": "guidance",
    "StrettoSparseAttention": "attention", "StrettoAttentionPlan": "attention_plan", "StrettoRegionAdaptive": "region",
    "StrettoProgressiveResolution": "resolution", "StrettoTemporalFeatureCache": "temporal_features",
}


def request(name):
    """A request of a technique with its defaults."""
    settings = {"attention_plan": {"schedule": "DiTFastAttn"}}.get(name, {})
    return Request(name, settings)


def test_the_table_names_every_workflow_once():
    text = table(WORKFLOWS)
    assert all(text.count(f"`{workflow.name}`") == 1 for workflow in REAL)
    assert text in (FOLDER.parent / "README.md").read_text(encoding="utf-8")  # scripts/make_workflows.py --table
