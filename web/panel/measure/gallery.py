"""What a report shows of every prompt: pictures with their differences, or clips that move and their frames in rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MeasureError
from .metrics import from_json_number, read_rgb, to_json_number
from .pictures import (
    CLIP_SIDE,
    DIFFERENCE_GAIN,
    GUTTER,
    TINY,
    abreast,
    data_uri,
    difference,
    flip_map,
    motion_uris,
    sheet_uri,
    shrunk,
)

HEAT_MAPS = 4  # prompts whose pictures get one: FLIP takes two seconds for a million pixels
SHEET_FRAMES = 9  # of a clip, spread evenly from the first to the last
Report = dict[str, Any]
Entry = dict[str, Any]


def is_clips(report: Report) -> bool:
    """Whether the report's pictures are frames of clips."""
    return bool(report["settings"].get("frames"))


def gallery(report: Report, folder: Path) -> list[Entry]:
    """One entry per prompt and seed with a plain picture; what the page draws, files already as data addresses."""
    cells = [cell for cell in report["cells"] if "plain" in cell["pictures"]]
    if is_clips(report):
        return [clip_view(report, folder, cell) for cell in cells]
    return [_picture_view(report, folder, cell, number < HEAT_MAPS) for number, cell in enumerate(cells)]


def _picture_view(report: Report, folder: Path, cell: Entry, heat: bool) -> Entry:
    """The first picture of every arm, its scores, its difference to the plain one and, with `heat`, where that can be seen."""
    plain = _read(folder, cell["pictures"]["plain"]["files"][0])
    shots = []
    for arm, entry in _arms(report, cell):
        pixels = plain if arm["name"] == "plain" else _read(folder, entry["files"][0])
        other = arm["name"] != "plain" and pixels.shape == plain.shape
        shots.append(
            {
                "label": arm["label"],
                "role": arm["role"],
                "name": arm["name"],
                "picture": data_uri(pixels),
                "difference": data_uri(difference(pixels, plain)) if other else None,
                "heat": _heat(pixels, plain) if other and heat and arm["role"] != "reference" else None,
                "psnr": entry.get("psnr", [None])[0],
                "ssim": entry.get("ssim", [None])[0],
                "width": pixels.shape[1],
                "height": pixels.shape[0],
            }
        )
    return {
        "prompt": cell["prompt"],
        "seed": cell["seed"],
        "shots": shots,
        "batch": len(cell["pictures"]["plain"]["files"]),
        "tiny": max(plain.shape[:2]) <= TINY,
    }


def _heat(pixels: np.ndarray, plain: np.ndarray) -> str | None:
    """The FLIP heat map; None without the library for it."""
    try:
        return data_uri(flip_map(plain, pixels))
    except MeasureError:
        return None


def clip_view(report: Report, folder: Path, cell: Entry, names: Sequence[str] | None = None) -> Entry:
    """The first clip of every arm (or of the arms `names`): all side by side and moving, and each as a row of frames.

    An arm whose clip has another size or length than the plain one is left out, since nothing could be compared. Frames are
    shrunk as they are read, so that long clips fit into memory.
    """
    own = cell["pictures"]["plain"]
    count = own.get("frames", 1)
    picked = np.unique(np.linspace(0, count - 1, SHEET_FRAMES).round().astype(int))
    plain, plain_sheet, size = _clip(folder, own, picked)
    shots, clips, rival = [], [], None
    for arm, entry in _arms(report, cell):
        if names is not None and arm["name"] not in names:
            continue
        itself = arm["name"] == "plain"
        frames, sheet, other_size = (plain, plain_sheet, size) if itself else _clip(folder, entry, picked)
        if (len(frames), other_size) != (count, size):
            continue
        rival = rival if itself else entry
        clips.append(frames)
        shots.append(
            {
                "label": arm["label"],
                "sheet": sheet_uri(sheet),
                "difference": None if itself else sheet_uri(difference(sheet, plain_sheet)),
                "scores": _scores(entry, count),
            }
        )
    if len(clips) == 2 and rival is not None:
        # Two leave room for their difference to move beside them.
        pairs = zip(_frames(folder, own), _frames(folder, rival))
        clips.append(np.stack([shrunk(difference(a, b), CLIP_SIDE) for a, b in pairs]))
        label = f"Difference, {DIFFERENCE_GAIN} times brighter"
        shots.append({"label": label, "sheet": None, "difference": None, "scores": None})
    canvas = abreast(clips)
    motion, still = motion_uris(canvas, report["settings"]["frame_rate"])
    return {
        "prompt": cell["prompt"],
        "seed": cell["seed"],
        "shots": shots,
        "batch": len(own["files"]) // count,
        "tiny": max(size) <= TINY,
        "motion": motion,
        "still": still,
        "width": canvas.shape[2],
        "height": canvas.shape[1],
        "gutter": 100 * GUTTER / canvas.shape[2],
        "numbers": [int(index) + 1 for index in picked],
    }


def _scores(entry: Entry, frames: int) -> Entry | None:
    """Scores of the first clip of an entry: PSNR and SSIM as mean and worst frame (with its number), and of changes."""
    if "psnr" not in entry or "change_psnr" not in entry:
        return None
    psnr = [from_json_number(value) for value in entry["psnr"][:frames]]
    ssim = entry["ssim"][:frames]
    finite = [value for value in psnr if np.isfinite(value)]
    return {
        "psnr": to_json_number(float(np.mean(finite)) if finite else np.inf),
        "worst": to_json_number(min(psnr)),
        "worst_frame": int(np.argmin(psnr)) + 1,
        "ssim": float(np.mean(ssim)),
        "worst_ssim": min(ssim),
        "change_psnr": entry["change_psnr"][0],
    }


def _arms(report: Report, cell: Entry) -> list[tuple[Entry, Entry]]:
    """The arms that have pictures for this cell, with what the cell says about them."""
    return [(arm, cell["pictures"][arm["name"]]) for arm in report["arms"] if arm["name"] in cell["pictures"]]


def _frames(folder: Path, entry: Entry) -> Iterator[np.ndarray]:
    """The frames of the first clip of an entry, uint8 [H, W, 3], one at a time."""
    return (_read(folder, name) for name in entry["files"][: entry.get("frames", 1)])


def _clip(folder: Path, entry: Entry, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The first clip of an entry: shrunk frames uint8 [F, H, W, 3], those with the numbers `picked` whole, and the size."""
    small, whole, size = [], [], (0, 0)
    wanted = set(picked.tolist())
    for number, frame in enumerate(_frames(folder, entry)):
        size = (frame.shape[0], frame.shape[1])
        small.append(shrunk(frame, CLIP_SIDE))
        if number in wanted:
            whole.append(frame)
    return np.stack(small), np.stack(whole), size


def _read(folder: Path, name: str) -> np.ndarray:
    return read_rgb((folder / name).read_bytes())
