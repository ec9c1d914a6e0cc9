"""Where the nodes of a generated workflow stand on the canvas: columns by depth, so that links run left to right."""
from __future__ import annotations

from typing import Any

Json = dict[str, Any]

COLUMN_GAP, ROW_GAP = 70, 60     # canvas units; the title bar stands above a node's own position
TITLE, SLOT, WIDGET, TEXT, PICTURE = 30, 20, 24, 110, 260
_PICTURE_NODES = ("SaveImage", "PreviewImage", "StrettoReport")


def place(nodes: list[Json], links: list[list[Any]]) -> None:
    """Set `pos` and `size` of every node. `links` are rows [id, source, slot, target, slot, type]."""
    columns: dict[int, list[Json]] = {}
    for node, depth in zip(nodes, _depths(nodes, links), strict=True):
        node["size"] = _size(node)
        columns.setdefault(depth, []).append(node)
    x = 0
    for depth in sorted(columns):
        y = 0
        for node in columns[depth]:
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE + ROW_GAP
        x += max(node["size"][0] for node in columns[depth]) + COLUMN_GAP


def _depths(nodes: list[Json], links: list[list[Any]]) -> list[int]:
    """Longest way from any source to each node; a circle, which ComfyUI refuses anyway, only stops the count."""
    depth = {node["id"]: 0 for node in nodes}
    for _ in nodes:
        changed = False
        for _, source, _, target, _, _ in links:
            if depth[target] <= depth[source] < len(nodes):
                depth[target], changed = depth[source] + 1, True
        if not changed:
            break
    return [depth[node["id"]] for node in nodes]


def _size(node: Json) -> list[int]:
    """A size that shows all of a node's inputs, outputs and widgets."""
    widgets = [entry for entry in node["inputs"] if "widget" in entry]
    sockets = len(node["inputs"]) - len(widgets)
    texts = sum(isinstance(value, str) and entry["type"] == "STRING"
                for entry, value in zip(widgets, node["widgets_values"], strict=False))
    height = SLOT * max(sockets, len(node["outputs"]), 1) + WIDGET * len(node["widgets_values"]) + TEXT * texts + 10
    picture = node["type"] in _PICTURE_NODES
    return [320 if widgets or picture else 220, height + (PICTURE if picture else 0)]
