"""Two arms beside each other: which there are, the slider, what differs between them, and clips in step."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .measure.errors import MeasureError
from .measure.gallery import clip_view, is_clips
from .measure.metrics import read_rgb
from .measure.pictures import DIFFERENCE_GAIN, TINY, data_uri, difference, enlarge, flip_map
from .measure.report import Report, clip_html
from .measure.table import format_decibel

Pair = tuple[str, str]


def cells_of(report: Report) -> list[tuple[str, int]]:
    """Label and index of every prompt and seed that has pictures of two arms at least."""
    found = [cell for cell in report["cells"] if len(cell["pictures"]) > 1]
    return [(f"{cell['prompt']} (seed {cell['seed']})", cell["index"]) for cell in found]


def arms_of(report: Report) -> list[tuple[str, str]]:
    """Label and name of every arm that has pictures."""
    shown = {name for cell in report["cells"] for name in cell["pictures"]}
    return [(arm["label"], arm["name"]) for arm in report["arms"] if arm["name"] in shown]


def first_pair(report: Report) -> Pair:
    """Plain and the first accelerated arm that has pictures, or whatever comes nearest."""
    names = [name for _, name in arms_of(report)] or ["plain"]
    fast = next((arm["name"] for arm in report["arms"] if arm["role"] == "accelerated" and arm["name"] in names), names[-1])
    return ("plain" if "plain" in names else names[0]), fast


def _files(report: Report, cell_index: int | None, pair: Pair) -> list[str] | None:
    """The first picture of both arms of a cell, or None where one is missing."""
    cell = next((cell for cell in report["cells"] if cell["index"] == cell_index), None)
    if cell is None or not all(name in cell["pictures"] for name in pair):
        return None
    return [cell["pictures"][name]["files"][0] for name in pair]


def slider(report: Report, folder: Path, cell_index: int | None, pair: Pair) -> tuple[Any, Any] | None:
    """Both pictures for the slider: files as they are, or enlarged pixel by pixel when they are tiny."""
    files = _files(report, cell_index, pair)
    if files is None or is_clips(report):
        return None
    pixels = [read_rgb((folder / name).read_bytes()) for name in files]
    if max(pixels[0].shape[:2]) <= TINY:
        return tuple(Image.fromarray(enlarge(one)) for one in pixels)
    return tuple(str(folder / name) for name in files)


def maps(report: Report, folder: Path, cell_index: int | None, pair: Pair) -> str:
    """The difference of both pictures and its FLIP heat map, with the scores where one of them is the plain one."""
    files = _files(report, cell_index, pair)
    if files is None or is_clips(report) or pair[0] == pair[1]:
        return ""
    first, second = (read_rgb((folder / name).read_bytes()) for name in files)
    if first.shape != second.shape:
        return '<p class="note">These two have different sizes, so nothing can be subtracted.</p>'
    if np.array_equal(first, second):
        return '<p class="same">Identical, pixel for pixel.</p>'
    pictures = [(f"Difference, {DIFFERENCE_GAIN} times brighter", difference(first, second))]
    missing = ""
    try:
        pictures.append(("FLIP: where an eye sees it when the two alternate", flip_map(first, second)))
    except MeasureError as error:
        missing = f'<p class="note">{escape(str(error))}</p>'
    tiny = " tiny" if max(first.shape[:2]) <= TINY else ""
    figures = "".join(
        f'<figure><img src="{data_uri(pixels)}" alt="{escape(words)}"><figcaption>{escape(words)}</figcaption></figure>'
        for words, pixels in pictures
    )
    return f'<div class="maps{tiny}">{figures}</div>{missing}{_scores(report, cell_index, pair)}'


def _scores(report: Report, cell_index: int | None, pair: Pair) -> str:
    """Scores of the pair as one line; only scores to the plain arm are in a report."""
    other = next((name for name in pair if name != "plain"), None)
    if other is None or "plain" not in pair:
        return ""
    cell = next(cell for cell in report["cells"] if cell["index"] == cell_index)
    entry = cell["pictures"][other]
    words = []
    for key, name in METRICS.items():
        values = entry.get(key)
        if values and values[0] is not None:
            words.append(f"{name} {format_decibel(values[0]) if key == 'psnr' else format(float(values[0]), '.3f')}")
    return f'<p class="note">{escape(", ".join(words))}</p>' if words else ""


METRICS = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "flip": "FLIP", "st_lpips": "ST-LPIPS", "vmaf": "VMAF"}


def clips(report: Report, folder: Path, cell_index: int | None, pair: Pair) -> str:
    """Both clips and their difference, moving in step; empty where the pictures are pictures."""
    cell = next((cell for cell in report["cells"] if cell["index"] == cell_index), None)
    if cell is None or not is_clips(report) or not all(name in cell["pictures"] for name in pair):
        return ""
    view = clip_view(report, folder, cell, pair)
    return f'<div class="stretto embedded">{clip_html(view)}</div>'
