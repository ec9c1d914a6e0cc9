"""What a report shows of every prompt: pictures with their differences, or clips that move and their frames in rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import from_json_number, read_rgb, to_json_number
from .pictures import DIFFERENCE_GAIN, GUTTER, TINY, abreast, data_uri, difference, motion_uris, sheet_uri

SHEET_FRAMES = 9  # of a clip, spread evenly from the first to the last
Report = dict[str, Any]
Entry = dict[str, Any]


def is_clips(report: Report) -> bool:
    """Whether the report's pictures are frames of clips."""
    return bool(report["settings"].get("frames"))


def gallery(report: Report, folder: Path) -> list[Entry]:
    """One entry per prompt and seed with a plain picture; what the page draws, files already as data addresses."""
    view = clip_view if is_clips(report) else _picture_view
    return [view(report, folder, cell) for cell in report["cells"] if "plain" in cell["pictures"]]


def _picture_view(report: Report, folder: Path, cell: Entry) -> Entry:
    """The first picture of every arm, its scores, and its difference to the plain one."""
    plain = _read(folder, cell["pictures"]["plain"]["files"][0])
    shots = []
    for arm, entry in _arms(report, cell):
        pixels = plain if arm["name"] == "plain" else _read(folder, entry["files"][0])
        apart = data_uri(difference(pixels, plain)) if arm["name"] != "plain" and pixels.shape == plain.shape else None
        shots.append(
            {
                "label": arm["label"],
                "role": arm["role"],
                "name": arm["name"],
                "picture": data_uri(pixels),
                "difference": apart,
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


def clip_view(report: Report, folder: Path, cell: Entry, names: Sequence[str] | None = None) -> Entry:
    """The first clip of every arm (or of the arms `names`): all side by side and moving, and each as a row of frames.

    An arm whose clip has another size or length than the plain one is left out, since nothing could be compared.
    """
    own = cell["pictures"]["plain"]
    plain = _clip(folder, own)
    picked = np.unique(np.linspace(0, len(plain) - 1, SHEET_FRAMES).round().astype(int))
    shots, clips = [], []
    for arm, entry in _arms(report, cell):
        if names is not None and arm["name"] not in names:
            continue
        frames = plain if arm["name"] == "plain" else _clip(folder, entry)
        if frames.shape != plain.shape:
            continue
        apart = difference(frames[picked], plain[picked]) if arm["name"] != "plain" else None
        clips.append(frames)
        shots.append(
            {
                "label": arm["label"],
                "sheet": sheet_uri(frames[picked]),
                "difference": None if apart is None else sheet_uri(apart),
                "scores": _scores(entry, len(frames)),
            }
        )
    if len(clips) == 2:
        # Two leave room for their difference to move beside them.
        clips.append(difference(*clips))
        label = f"Difference, {DIFFERENCE_GAIN} times brighter"
        shots.append({"label": label, "sheet": None, "difference": None, "scores": None})
    canvas = abreast(clips)
    motion, still = motion_uris(canvas, report["settings"]["frame_rate"])
    return {
        "prompt": cell["prompt"],
        "seed": cell["seed"],
        "shots": shots,
        "batch": len(own["files"]) // len(plain),
        "tiny": max(plain.shape[1:3]) <= TINY,
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


def _clip(folder: Path, entry: Entry) -> np.ndarray:
    """The first clip of an entry, uint8 [F, H, W, 3]."""
    return np.stack([_read(folder, name) for name in entry["files"][: entry.get("frames", 1)]])


def _read(folder: Path, name: str) -> np.ndarray:
    return read_rgb((folder / name).read_bytes())
