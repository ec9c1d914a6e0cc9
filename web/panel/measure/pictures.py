"""Pictures for people: upscaling without smoothing, difference pictures, and data addresses for one-file pages."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

DIFFERENCE_GAIN = 4  # how much brighter a difference picture is than the difference
TINY = 160  # below this many pixels a picture is enlarged pixel by pixel
INLINE_SIDE = 640  # larger pictures are shrunk before they are put into a page
JPEG_QUALITY = 88


def difference(first: np.ndarray, second: np.ndarray, gain: int = DIFFERENCE_GAIN) -> np.ndarray:
    """|first - second| times `gain`, clipped; uint8 RGB [H, W, 3]."""
    apart = np.abs(first.astype(np.int16) - second.astype(np.int16))
    return np.clip(apart * gain, 0, 255).astype(np.uint8)


def enlarge(pixels: np.ndarray, side: int = 512) -> np.ndarray:
    """Repeat pixels a whole number of times until the longer side is about `side`; larger pictures stay as they are."""
    factor = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] -> PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(pixels: np.ndarray) -> str:
    """A picture as data address: PNG pixel for pixel, or a JPEG of at most `INLINE_SIDE` pixels when it is larger."""
    if max(pixels.shape[:2]) <= INLINE_SIDE // 2:
        return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()
    image = Image.fromarray(pixels)
    image.thumbnail((INLINE_SIDE, INLINE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
