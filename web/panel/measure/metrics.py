"""Picture metrics and robust statistics."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

INFINITE = "inf"  # JSON has no infinity; reports write this word
SSIM_WINDOW = 7  # scikit-image's default, shrunk for smaller pictures
CONFIDENCE = 0.95


# Pictures


def read_rgb(data: bytes) -> np.ndarray:
    """A picture file -> uint8 [H, W, 3]; raises `ValueError` when it is not one."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("The server returned a file that is not a picture.") from error


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3]; infinite when they are identical."""
    _same_shape(first, second)
    if np.array_equal(first, second):
        return math.inf
    from skimage.metrics import peak_signal_noise_ratio  # a second to import, so only when it is needed

    return float(peak_signal_noise_ratio(first, second, data_range=255))


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3] of at least 3 x 3 pixels."""
    _same_shape(first, second)
    side = min(first.shape[:2])
    if side < 3:
        raise ValueError(f"SSIM needs pictures of at least 3 x 3 pixels, not {first.shape[1]} x {first.shape[0]}.")
    window = min(SSIM_WINDOW, side if side % 2 else side - 1)
    from skimage.metrics import structural_similarity  # see psnr

    return float(structural_similarity(first, second, data_range=255, channel_axis=2, win_size=window))


class ChangeError:
    """PSNR of how frames of two clips change, frame by frame, since long clips do not fit into memory twice.

    A change is a frame minus the one before it, the peak is 255, and the error is averaged over all changes: low where frames
    are alike one by one but flicker or move differently. Infinite when all changes are the same.
    """

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._errors: list[float] = []

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """The next frame of both clips, uint8 [H, W, 3]."""
        _same_shape(first, second)
        # The difference of two changes is the change of the difference.
        now = first.astype(np.int16) - second
        if self._before is not None:
            self._errors.append(float(np.mean((now - self._before).astype(np.float64) ** 2)))
        self._before = now

    @property
    def psnr(self) -> float:
        """In dB, over the frames so far, two at least."""
        if not self._errors:
            raise ValueError("Changes between frames need at least 2 frames.")
        error = float(np.mean(self._errors))
        return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _same_shape(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Pictures of different sizes cannot be compared: {first.shape} and {second.shape}.")


def to_json_number(value: float | None) -> float | str | None:
    """A number for a report: infinity becomes the word "inf"."""
    return INFINITE if value is not None and math.isinf(value) else value


def from_json_number(value: float | str | None) -> float | None:
    """The reverse of `to_json_number`."""
    return math.inf if value == INFINITE else value


# Statistics


@dataclass(frozen=True)
class Spread:
    """A sample in seven numbers: count, median, quartiles, extremes, and the interval of the median.

    `low` and `high` bound the median with 95 % confidence (order statistics, exact for any distribution);
    with fewer than six values no such interval exists, and they are the extremes.
    """

    count: int
    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread | None:
    """Median, quartiles, extremes and the confidence interval of the median; None for no values."""
    if len(values) == 0:
        return None
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    q1, median, q3 = (float(v) for v in np.quantile(ordered, [0.25, 0.5, 0.75]))
    rank = _median_rank(len(ordered))
    return Spread(
        len(ordered),
        median,
        q1,
        q3,
        float(ordered[0]),
        float(ordered[-1]),
        float(ordered[rank]),
        float(ordered[-1 - rank]),
    )


def _median_rank(count: int) -> int:
    """Largest r with P(Binomial(count, 1/2) <= r) <= 2.5 %, as 0-based index of the lower bound (0 when there is none)."""
    tail, rank = 0.0, 0
    for index in range(count // 2):
        tail += math.comb(count, index) / 2.0**count
        if tail > (1 - CONFIDENCE) / 2:
            break
        rank = index
    return rank


def paired_ratios(reference: Sequence[float], other: Sequence[float]) -> list[float]:
    """reference / other for values measured in the same round: above 1 means the other is faster."""
    if len(reference) != len(other):
        raise ValueError("Paired ratios need equally many values.")
    return [first / second for first, second in zip(reference, other) if second > 0]


@dataclass(frozen=True)
class Quality:
    """A metric over many pictures. `mean` is over those that differ (inf if none does); `worst` is the least close one."""

    mean: float
    worst: float
    count: int
    identical: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object with infinity written as a word."""
        return {
            "mean": to_json_number(self.mean),
            "worst": to_json_number(self.worst),
            "count": self.count,
            "identical": self.identical,
        }


def quality(values: Sequence[float], perfect: float, lower_is_better: bool = False) -> Quality | None:
    """Summarise a metric whose value for identical pictures is `perfect`; None for no values."""
    if not values:
        return None
    finite = [value for value in values if not math.isinf(value)]
    mean = float(np.mean(finite)) if finite else perfect
    worst = float(max(values) if lower_is_better else min(values))
    return Quality(mean, worst, len(values), sum(value == perfect for value in values))
