"""Metrics that other libraries measure: MS-SSIM, FLIP, ST-LPIPS and VMAF; what is missing says why.

MS-SSIM is computed here, FLIP comes with the panel's requirements. ST-LPIPS needs torch and VMAF an ffmpeg with libvmaf: both
are used where they are installed (requirements-panel-metrics.txt) and left out with the reason where not.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

EXTRAS = "pip install -r requirements-panel-metrics.txt adds it"
MS_SSIM_SIDE = 176  # five scales of an 11 pixel window
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003, section 3.2
ST_LPIPS_SIDE = 32  # AlexNet's last feature maps have a pixel left
VMAF_SECONDS = 900.0
VMAF_GRAPH = "[0:v]format=yuv420p[d];[1:v]format=yuv420p[r];[d][r]libvmaf=n_threads=2"


class NotMeasured(Exception):
    """Why a metric has no value for a pair; a sentence without a full stop."""


@dataclass(frozen=True)
class Metric:
    """A metric as reports know it: its title, the value for identical pictures, and where it comes from."""

    name: str
    title: str
    perfect: float
    lower_is_better: bool
    source: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", np.inf, False, "scikit-image; dB, peak 255, RGB"),
        Metric("ssim", "SSIM", 1.0, False, "scikit-image; Wang et al. 2004, window 7, mean over RGB"),
        Metric("ms_ssim", "MS-SSIM", 1.0, False, "Wang et al. 2003, five scales, mean over RGB, as in pytorch-msssim"),
        Metric("flip", "FLIP", 0.0, True, "flip-evaluator; Andersson et al. 2020, LDR, 67 pixels per degree, mean error"),
        Metric("st_lpips", "ST-LPIPS", 0.0, True, "stlpips_pytorch; Ghildyal and Liu 2022, AlexNet"),
        Metric("vmaf", "VMAF", 100.0, False, "libvmaf in ffmpeg; vmaf_v0.6.1, yuv420p, mean over frames, 100 where identical"),
    )
}


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def ms_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Multi-scale structural similarity of two uint8 pictures [H, W, 3] (Wang, Simoncelli, Bovik 2003, equation 7).

    Per colour, negative means as 0, then the mean over colours: the numbers of pytorch-msssim, without torch. (scikit-image has
    none, and keeps the contrast and structure in its SSIM to itself.) Raises `NotMeasured` below 176 pixels.
    """
    height, width = first.shape[:2]
    if min(height, width) < MS_SSIM_SIDE:
        raise NotMeasured(f"its five scales need {MS_SSIM_SIDE} x {MS_SSIM_SIDE} pixels, these have {width} x {height}")
    from scipy.ndimage import correlate1d  # slow to import, so only when it is needed

    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    steady, structural = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        """Weighted mean over the window, where it lies inside the picture."""
        rows = correlate1d(values, window, axis=0)[5:-5]
        return correlate1d(rows, window, axis=1)[:, 5:-5]

    a, b = first.astype(np.float64), second.astype(np.float64)
    result = np.ones(3)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        mean_a, mean_b = mean(a), mean(b)
        variances = mean(a * a + b * b) - mean_a**2 - mean_b**2
        similarity = (2 * (mean(a * b) - mean_a * mean_b) + structural) / (variances + structural)
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            similarity *= (2 * mean_a * mean_b + steady) / (mean_a**2 + mean_b**2 + steady)
        result *= np.maximum(similarity.mean((0, 1)), 0.0) ** weight
        a, b = _halved(a), _halved(b)
    return float(result.mean())


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Means of two by two pixels; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    return pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3))


def flip_error(first: np.ndarray, second: np.ndarray, colours: bool = False) -> np.ndarray:
    """FLIP per pixel of two uint8 sRGB pictures [H, W, 3]: float32 [H, W, 1] in 0..1, or with `colours` [H, W, 3] in magma."""
    if not _has("flip_evaluator"):
        raise NotMeasured("flip-evaluator is not installed, which has no wheel for every system")
    import flip_evaluator

    pair = (pixels.astype(np.float32) / 255 for pixels in (first, second))
    return flip_evaluator.evaluate(*pair, "LDR", applyMagma=colours, computeMeanError=False)[0]


def flip(first: np.ndarray, second: np.ndarray) -> float:
    """Mean FLIP error of two uint8 sRGB pictures [H, W, 3]: 0 is identical, 1 as far apart as can be seen."""
    return float(flip_error(first, second).mean(dtype=np.float64))


class Perceptual:
    """All metrics of this module for one report; remembers why what is missing is missing."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._measured: set[str] = set()

    def measure(self, name: str, first: np.ndarray, second: np.ndarray) -> float | None:
        """The metric `name` of two uint8 pictures [H, W, 3], None where it cannot be had."""
        measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "ms_ssim": ms_ssim, "flip": flip, "st_lpips": self._st_lpips,
        }  # fmt: skip
        return self._kept(name, lambda: measures[name](first, second))

    def vmaf(self, folder: Path, files: Sequence[str], plain: Sequence[str], rate: float) -> float | None:
        """VMAF of a clip against the plain one, both as numbered PNG files in `folder`; `rate` in frames per second."""
        return self._kept("vmaf", lambda: self._vmaf(folder, files, plain, rate))

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a metric was not even tried; `reason` begins small and ends without a full stop."""
        self._reasons.setdefault(name, f"{METRICS[name].title}: {reason}.")

    def facts(self) -> dict[str, dict[str, Any]]:
        """What a report says about its metrics: whether each was measured, why not, and where it comes from."""
        return {
            name: {
                "available": name in ("psnr", "ssim") or name in self._measured,
                "reason": self._reasons.get(name, ""),
                "source": metric.source,
            }
            for name, metric in METRICS.items()
        }

    def _kept(self, name: str, measure: Callable[[], float]) -> float | None:
        try:
            value = measure()
        except NotMeasured as error:
            self.leave_out(name, str(error))
            return None
        self._measured.add(name)
        return value

    # ST-LPIPS

    @cached_property
    def _network(self) -> Any:
        missing = [name for name in ("torch", "stlpips_pytorch") if not _has(name)]
        if missing:
            raise NotMeasured(f"{' and '.join(missing)} not installed; {EXTRAS}")
        try:
            from stlpips_pytorch import stlpips
        except ImportError as error:  # it asks for packages that it does not name
            raise NotMeasured(f"stlpips_pytorch cannot be loaded ({error}); {EXTRAS}") from error
        return stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)

    def _st_lpips(self, first: np.ndarray, second: np.ndarray) -> float:
        """Shift-tolerant LPIPS of two uint8 pictures [H, W, 3]."""
        network = self._network
        if min(first.shape[:2]) < ST_LPIPS_SIDE:
            raise NotMeasured(f"its network needs {ST_LPIPS_SIDE} x {ST_LPIPS_SIDE} pixels")
        import torch

        pair = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1 for pixels in (first, second))
        with torch.no_grad():
            return float(network(*pair))

    # VMAF

    @cached_property
    def _ffmpeg(self) -> str:
        """An ffmpeg that knows libvmaf: the system's, or the one inside the package imageio-ffmpeg."""
        candidates = [shutil.which("ffmpeg")]
        if _has("imageio_ffmpeg"):
            import imageio_ffmpeg

            with suppress(RuntimeError):  # a wheel without the program
                candidates.append(imageio_ffmpeg.get_ffmpeg_exe())
        for program in candidates:
            if program and " libvmaf " in _output([program, "-hide_banner", "-filters"], Path.cwd()):
                return program
        raise NotMeasured(f"no ffmpeg with libvmaf is installed; {EXTRAS}")

    def _vmaf(self, folder: Path, files: Sequence[str], plain: Sequence[str], rate: float) -> float:
        program = self._ffmpeg
        inputs: list[str] = []
        for names in (files, plain):
            pattern, first = _pattern(names)
            inputs += ["-f", "image2", "-framerate", f"{rate:g}", "-start_number", str(first), "-i", pattern]
        # Names are relative to the folder, since a % in its path would be taken for a number's place.
        where = (folder / files[0]).parent
        frames = ["-frames:v", str(len(files))]
        text = _output([program, "-hide_banner", "-nostdin", *inputs, "-lavfi", VMAF_GRAPH, *frames, "-f", "null", "-"], where)
        found = re.search(r"VMAF score: ([\d.]+)", text)
        if found is None:
            raise NotMeasured("ffmpeg could not measure these clips")
        return float(found[1])


def _pattern(files: Sequence[str]) -> tuple[str, int]:
    """The name with a number's place that numbered files follow, and the first number."""
    stem, _, number = files[0].rpartition("/")[2].removesuffix(".png").rpartition("-")
    first = int(number)
    expected = [f"{stem}-{first + place:0{len(number)}d}.png" for place in range(len(files))]
    if [name.rpartition("/")[2] for name in files] != expected:
        raise NotMeasured("the frames have no numbers in a row")
    return f"{stem}-%0{len(number)}d.png", first


def _output(command: Sequence[str], folder: Path) -> str:
    """What a program writes, both streams."""
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, timeout=VMAF_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotMeasured(f"ffmpeg did not run ({error.__class__.__name__})") from error
    return (found.stdout + found.stderr).decode("utf-8", "replace")
