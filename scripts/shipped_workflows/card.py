"""The picture of a workflow whose model is not here: its name, its nodes, and the graph itself. No made-up results."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .graphs import Node, Workflow

SIDE, MARGIN = 480, 22
BACKGROUND, TEXT, QUIET, NODE, OURS = (27, 27, 31), (236, 236, 240), (150, 152, 160), (74, 76, 84), (86, 180, 233)
LINKS = {
    "MODEL": (179, 157, 219),
    "CONDITIONING": (255, 169, 49),
    "LATENT": (255, 156, 249),
    "VAE": (255, 110, 110),
    "CLIP": (255, 213, 0),
    "IMAGE": (100, 181, 246),
}
_SCALE = 2  # drawn larger and reduced: smooth lines


def draw_card(workflow: Workflow, ui: dict[str, Any]) -> Image.Image:
    """Return a square picture: title, the pack's nodes in words, and the graph of the file as it stands on the canvas."""
    sheet = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    y = MARGIN * _SCALE
    for line in _wrapped(canvas, workflow.model.title, _font(30)):
        canvas.text((MARGIN * _SCALE, y), line, TEXT, _font(30))
        y += 36 * _SCALE
    y += 6 * _SCALE
    for words in _labels(workflow)[:6]:
        canvas.text((MARGIN * _SCALE, y), words, OURS, _font(22))
        y += 29 * _SCALE
    _graph(canvas, ui, (MARGIN * _SCALE, y + 16 * _SCALE, (SIDE - MARGIN) * _SCALE, (SIDE - 50) * _SCALE))
    canvas.text((MARGIN * _SCALE, (SIDE - 38) * _SCALE), "Graph; its model is to be downloaded", QUIET, _font(17))
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _font(size: int) -> Any:
    return ImageFont.load_default(size * _SCALE)


def _wrapped(canvas: ImageDraw.ImageDraw, text: str, font: Any) -> list[str]:
    """Break a title into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if canvas.textlength(longer, font) > (SIDE - 2 * MARGIN) * _SCALE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _labels(workflow: Workflow) -> list[str]:
    """The pack's nodes, each with its method where it has one; a model of two experts has every node twice, shown once."""
    found = [_label(entry) for chain in workflow.chains for entry in chain]
    shown = {entry.kind for chain in workflow.chains for entry in chain}
    found += [_words(kind) for kind in workflow.techniques if kind not in shown]
    if workflow.loader is not None:
        found.append("Load Diffusion Model: " + ", ".join(str(value) for value in workflow.loader.values()))
    if workflow.encoder is not None:
        found.append("Load Text Encoder: " + ", ".join(str(value) for value in workflow.encoder.values()))
    return list(dict.fromkeys(found))


def _words(kind: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", kind.removeprefix("Stretto"))


def _label(entry: Node) -> str:
    method = entry.settings.get("method", entry.settings.get("plan"))
    published = " as published" if entry.settings.get("preset") == "published" else ""
    return _words(entry.kind) + (f": {method}{published}" if method else "")


def _graph(canvas: ImageDraw.ImageDraw, ui: dict[str, Any], box: tuple[int, int, int, int]) -> None:
    """Draw nodes and links in ``box``, in proportion."""
    nodes = {node["id"]: node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    left, top = (min(node["pos"][axis] for node in nodes.values()) for axis in (0, 1))
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in nodes.values()) for axis in (0, 1))
    across = (box[2] - box[0]) / (right - left)
    down = min(
        (box[3] - box[1]) / (bottom - top), 1.8 * across
    )  # flat graphs are drawn taller, so that nodes can be told apart
    above = box[1] + ((box[3] - box[1]) - down * (bottom - top)) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return box[0] + (x - left) * across, above + (y - top) * down

    for _, source, slot, target, entry, kind in ui["links"]:
        first, last = nodes[source], nodes[target]
        start = at(first["pos"][0] + first["size"][0], first["pos"][1] + 14 + 20 * slot)
        sockets = [index for index, item in enumerate(last["inputs"]) if "widget" not in item]
        end = at(
            last["pos"][0], last["pos"][1] + 14 + 20 * (sockets.index(entry) if entry in sockets else len(sockets))
        )
        canvas.line(_curve(start, end), LINKS.get(kind, QUIET), 2 * _SCALE)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        colour = OURS if node["type"].startswith("Stretto") else NODE
        canvas.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 4 * _SCALE, colour)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A cubic curve that leaves and arrives level."""
    reach = max(abs(end[0] - start[0]) / 2, 8.0)
    points = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    result = []
    for step in range(25):
        t = step / 24
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        result.append(
            tuple(sum(weight * point[axis] for weight, point in zip(weights, points, strict=True)) for axis in (0, 1))
        )
    return result
