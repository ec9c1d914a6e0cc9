"""Scores of the pictures of one arm and prompt against those of another: pictures one by one, clips frame by frame.

At most two frames are in memory at a time, whatever a clip's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import INFINITE, ChangeError, psnr, read_rgb, ssim, to_json_number
from .perceptual import METRICS, Perceptual

SAMPLED_FRAMES = 9  # of a clip, spread evenly: what takes seconds a frame is measured on these
PER_PICTURE = ("ms_ssim", "flip", "st_lpips")
PictureScores = dict[str, Any]


def score_pictures(
    folder: Path,
    files: Sequence[str],
    plain: Sequence[str] | None,
    reference: Sequence[str] | None,
    frames: int = 1,
    rate: float | None = None,
    perceptual: Perceptual | None = None,
) -> PictureScores:
    """Scores against the plain arm's pictures and the reference's (files in `folder`); without `perceptual` only the quick ones.

    With `frames` above 1 the files are frames of clips, that many to a clip, `rate` to a second. PSNR and SSIM have one value
    per file, `change_psnr` and VMAF one per clip, the others one per picture or sampled frame. Pictures that cannot be compared
    (other size, other count) get no score.
    """
    scores: PictureScores = {"files": list(files)}
    if frames > 1:
        scores["frames"] = frames
    if plain is not None and len(plain) == len(files):
        scores |= _against_plain(folder, files, plain, frames, rate, perceptual)
    if reference is not None and len(reference) == len(files):
        pairs = [psnr(a, b) if a.shape == b.shape else None for a, b in _pairs(folder, files, reference)]
        if None not in pairs:
            scores["reference_psnr"] = [to_json_number(value) for value in pairs]
    return scores


def sampled(frames: int) -> list[int]:
    """Numbers of the frames of a clip that slow metrics look at."""
    return np.unique(np.linspace(0, frames - 1, SAMPLED_FRAMES).round().astype(int)).tolist()


def _pairs(folder: Path, files: Sequence[str], others: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for one, other in zip(files, others):
        yield read_rgb((folder / one).read_bytes()), read_rgb((folder / other).read_bytes())


def _against_plain(
    folder: Path, files: Sequence[str], plain: Sequence[str], frames: int, rate: float | None, perceptual: Perceptual | None
) -> PictureScores:
    """All scores to the plain pictures; none where the sizes differ."""
    scores: PictureScores = {"psnr": [], "ssim": []}
    picked, changes = sampled(frames), ChangeError()
    for index, (first, second) in enumerate(_pairs(folder, files, plain)):
        if first.shape != second.shape:
            return {}
        same = np.array_equal(first, second)
        scores["psnr"].append(to_json_number(psnr(first, second)))
        scores["ssim"].append(1.0 if same else _imperfect("ssim", ssim(first, second)))
        if perceptual is not None and index % frames in picked:
            for name in PER_PICTURE:
                value = perceptual.measure(name, first, second)
                if value is not None:
                    perfect = METRICS[name].perfect
                    scores.setdefault(name, []).append(perfect if same else _imperfect(name, value))
        if frames > 1:
            changes.add(first, second)
            if index % frames == frames - 1:
                scores.setdefault("change_psnr", []).append(to_json_number(changes.psnr))
                changes = ChangeError()
    if frames > 1 and perceptual is not None:
        for start in range(0, len(files), frames):
            clip = slice(start, start + frames)
            value = perceptual.vmaf(folder, files[clip], plain[clip], rate or frames)
            if value is not None:
                same = all(score == INFINITE for score in scores["psnr"][clip])
                scores.setdefault("vmaf", []).append(METRICS["vmaf"].perfect if same else _imperfect("vmaf", value))
    return scores


def _imperfect(name: str, value: float) -> float:
    """A value of pictures that differ, never the very one that stands for identical ones: metrics round."""
    metric = METRICS[name]
    return value if value != metric.perfect else float(np.nextafter(metric.perfect, 0.5))
