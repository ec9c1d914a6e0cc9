"""From a graph to the file that ComfyUI's editor opens: where nodes stand, groups, notes, and where everything comes from."""

from __future__ import annotations

import json
import uuid
from typing import Any

from .graphs import (
    FASTER,
    FILES_GROUP,
    PROMPT,
    PROMPT_FIRST,
    REPORT,
    RESULT,
    SAMPLING,
    THERE_AND_BACK,
    Graph,
    Workflow,
    build,
)

Json = dict[str, Any]

#: The version of ComfyUI and of the pack that a file says it was made with.
CORE_VERSION, PACK_VERSION = "0.3.76", "0.1.0"
# ComfyUI's own colours of groups.
_COLOURS = {
    FILES_GROUP: "#88A",
    PROMPT: "#A88",
    FASTER: "#8A8",
    SAMPLING: "#3f789e",
    RESULT: "#a1309b",
    REPORT: "#b58b2a",
    THERE_AND_BACK: "#b58b2a",
}
_OURS = {"color": "#2a363b", "bgcolor": "#3f5159"}
_NOTE = {"color": "#432", "bgcolor": "#653"}
_PICTURES = {"SaveImage": 300, "SaveVideo": 300, "PreviewImage": 380, "StrettoReport": 330}
_WIDE = {"StrettoReport": 460, "PreviewImage": 520, "CLIPTextEncode": 400} | dict.fromkeys(
    (
        "UNETLoader",
        "CheckpointLoaderSimple",
        "CLIPLoader",
        "DualCLIPLoader",
        "VAELoader",
        "StrettoLoadDiffusionModel",
        "StrettoLoadTextEncoder",
        "StrettoQuantize",
    ),
    440,  # names of files are long
)
_WIDTH, _NARROW, _COLUMN_GAP, _ROW_GAP, _TITLE = 320, 240, 60, 40, 30
_PAD, _GROUP_TITLE, _GROUP_GAP = 20, 40, 50
_NAMESPACE = uuid.UUID("5b0c0f6e-3d0a-4f2b-9a57-7d2a7b0f6b11")


def draw(workflow: Workflow, object_info: Json, api_to_ui: Any) -> Json:
    """Return the UI form (schema 0.4) of a description.

    `object_info` is the server's answer to /object_info, `api_to_ui` the converter of the measuring code.
    """
    graph = build(workflow)
    ui = api_to_ui(graph.api, object_info)
    nodes = {str(entry["id"]): entry for entry in ui["nodes"]}
    for key, entry in nodes.items():
        entry["size"] = _size(entry, object_info)
        _say_origin(entry, graph, key)
    top = _place(workflow, graph, nodes, ui)
    notes = _notes(workflow, graph, max(entry["id"] for entry in ui["nodes"]), top)
    ui["nodes"] += notes
    ui["last_node_id"] = max(entry["id"] for entry in ui["nodes"])
    ui["extra"] = {"ds": _view(ui["nodes"])}
    return {"id": str(uuid.uuid5(_NAMESPACE, workflow.name)), "revision": 0, **ui}


def _view(nodes: list[Json]) -> Json:
    """How the editor shows the graph at first: all of it, in a window of 1600 x 1000 with ComfyUI's bars around it."""
    left, top = (min(entry["pos"][axis] for entry in nodes) for axis in (0, 1))
    right, bottom = (max(entry["pos"][axis] + entry["size"][axis] for entry in nodes) for axis in (0, 1))
    scale = round(min(0.8, 1460 / (right - left), 800 / (bottom - top)), 2)
    return {"scale": scale, "offset": [round(100 / scale) - left, round(150 / scale) - top]}


def _say_origin(entry: Json, graph: Graph, key: str) -> None:
    """Which pack a node belongs to, and which files it wants: what ComfyUI offers to install and to download."""
    ours = entry["type"].startswith("Stretto")
    entry["properties"] = {
        "cnr_id": "stretto" if ours else "comfy-core",
        "ver": PACK_VERSION if ours else CORE_VERSION,
        **entry["properties"],
    }
    if key in graph.files:
        entry["properties"]["models"] = [
            {"name": file.name, "url": file.url, "directory": file.folder} for file in graph.files[key]
        ]
    if ours and entry["type"] != "StrettoDemoText":
        entry |= _OURS


def _size(entry: Json, object_info: Json) -> list[int]:
    """A size that shows all inputs, outputs and widgets of a node."""
    widgets = [slot for slot in entry["inputs"] if "widget" in slot]
    sockets = max(len(entry["inputs"]) - len(widgets), len(entry["outputs"]))
    specs = object_info[entry["type"]]["input"]
    options = {
        name: spec[1]
        for part in ("required", "optional")
        for name, spec in (specs.get(part) or {}).items()
        if len(spec) > 1
    }
    texts = sum(bool(options.get(slot["name"], {}).get("multiline")) for slot in widgets)
    height = 20 * sockets + 24 * len(entry["widgets_values"]) + 90 * texts + 14 + _PICTURES.get(entry["type"], 0)
    return [_WIDE.get(entry["type"], _WIDTH if widgets else _NARROW), height]


# Places


def _stages(workflow: Workflow) -> list[list[str]]:
    """Groups from left to right; those of one stage stand below each other."""
    if workflow.recipe in PROMPT_FIRST:
        return [[FILES_GROUP], [PROMPT], [FASTER], [SAMPLING], [RESULT, REPORT]]
    return [[FILES_GROUP], [FASTER, PROMPT], [SAMPLING], [RESULT, REPORT], [THERE_AND_BACK]]


def _place(workflow: Workflow, graph: Graph, nodes: dict[str, Json], ui: Json) -> int:
    """Set `pos` of every node and the groups around them; returns the upper edge."""
    x = 0
    for stage in _stages(workflow):
        y, right = 0, x
        for title in stage:
            members = {key: entry for key, entry in nodes.items() if graph.groups[key] == title}
            if not members:
                continue
            box = _place_group(members, ui["links"], x + _PAD, y)
            ui["groups"].append(
                {"title": title, "bounding": box, "color": _COLOURS[title], "font_size": 24, "flags": {}}
            )
            right, y = max(right, box[0] + box[2]), box[1] + box[3] + _GROUP_GAP + _GROUP_TITLE + _TITLE
        x = right + _GROUP_GAP
    for number, group in enumerate(ui["groups"], start=1):
        group["id"] = number
    return min(group["bounding"][1] for group in ui["groups"])


def _place_group(members: dict[str, Json], links: list[list[Any]], left: int, top: int) -> list[int]:
    """Columns by depth inside the group; returns the rectangle around them."""
    inside = {entry["id"] for entry in members.values()}
    depth = dict.fromkeys(inside, 0)
    rows = [(link[1], link[3]) for link in links if link[1] in inside and link[3] in inside]
    for _ in inside:
        for source, target in rows:
            depth[target] = max(depth[target], depth[source] + 1)
    columns = [
        [entry for entry in members.values() if depth[entry["id"]] == column]
        for column in range(max(depth.values()) + 1)
    ]
    heights = [[entry["size"][1] for entry in entries] for entries in columns]
    if len({len(entries) for entries in columns}) == 1:  # as many chains as rows: each keeps to its own
        heights = [[max(row) for row in zip(*heights, strict=True)]] * len(columns)
    x, bottom = left, top
    for entries, tall in zip(columns, heights, strict=True):
        y = top
        for entry, height in zip(entries, tall, strict=True):
            entry["pos"] = [x, y]
            y += height + _TITLE + _ROW_GAP
        bottom = max(bottom, y - _TITLE - _ROW_GAP)
        x += max(entry["size"][0] for entry in entries) + _COLUMN_GAP
    upper = top - _TITLE - _GROUP_TITLE
    return [left - _PAD, upper, x - _COLUMN_GAP - left + 2 * _PAD, bottom - upper + _PAD]


# Notes


def _notes(workflow: Workflow, graph: Graph, last: int, top: int) -> list[Json]:
    """What the workflow does and, for a model that must be downloaded, where its files go."""
    texts = [("What to look at", _words(workflow), 760)]
    if graph.files:
        texts.append(("Files", _file_table(graph), 640))
    height = max(
        60 + 21 * sum(bool(line) + len(line.split("](")[0]) // 125 for line in text.splitlines())
        for _, text, _ in texts
    )
    x, notes = 0, []
    for number, (title, text, width) in enumerate(texts, start=1):
        notes.append(
            {
                "id": last + number,
                "type": "MarkdownNote",
                "pos": [x, top - height - 40],
                "size": [width, height],
                "flags": {},
                "order": last + number - 1,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": title,
                "properties": {},
                "widgets_values": [text],
                **_NOTE,
            }
        )
        x += width + _COLUMN_GAP
    return notes


def _words(workflow: Workflow) -> str:
    lines = [f"## {workflow.title}", workflow.words]
    if not workflow.model.demo:
        lines.append(f"{workflow.source}; nothing was measured here on {workflow.model.title}.")
        lines.append(
            "Press **Run**, then **Ctrl-B** on a Stretto node (bypass) and run again to compare pictures and seconds; "
            "the report says what was computed and why, and *off* where a node could do nothing."
        )
        lines.append(
            f"No downloads wanted? **{workflow.twin}** shows the same at once, with a model that comes with the pack."
        )
    return "\n\n".join(lines)


def _file_table(graph: Graph) -> str:
    """One row a file."""
    files = {file.name: file for group in graph.files.values() for file in group}
    rows = [f"| [{file.name}]({file.url}) | ComfyUI/models/{file.folder} |" for file in files.values()]
    return "\n".join(
        [
            "## Files to download",
            "ComfyUI offers them when the workflow is opened; licences are those of their pages.",
            "",
            "| File | Folder |",
            "| --- | --- |",
            *rows,
        ]
    )


# Text


def dump(value: Any, indent: int = 0) -> str:
    """Return JSON with lists and objects of plain values on one line, one entry a line elsewhere."""
    flat = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
    if not isinstance(value, dict | list) or not value or flat:
        return json.dumps(value, ensure_ascii=False)
    pad, close = "  " * (indent + 1), "  " * indent
    if isinstance(value, list):
        rows = ",\n".join(pad + dump(item, indent + 1) for item in value)
        return f"[\n{rows}\n{close}]"
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + 2 * indent <= 110 and not any(isinstance(item, dict) and len(item) > 1 for item in value.values()):
        return line
    rows = ",\n".join(f"{pad}{json.dumps(name)}: {dump(item, indent + 1)}" for name, item in value.items())
    return f"{{\n{rows}\n{close}}}"
