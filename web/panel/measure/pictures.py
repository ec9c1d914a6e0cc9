"""Pictures for people: upscaling without smoothing, differences, clips that move, data addresses for one-file pages."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .errors import MeasureError
from .perceptual import NotMeasured, flip_error

DIFFERENCE_GAIN = 4  # how much brighter a difference picture is than the difference
TINY = 160  # below this many pixels a picture is enlarged pixel by pixel
INLINE_SIDE = 640  # larger pictures are shrunk before they are put into a page
JPEG_QUALITY = 88
CLIP_SIDE = 320  # the same for every frame of a clip that moves
SHEET_SIDE = 160  # and for every frame of a contact sheet
GUTTER = 2  # pixels between neighbours


def difference(first: np.ndarray, second: np.ndarray, gain: int = DIFFERENCE_GAIN) -> np.ndarray:
    """|first - second| times `gain`, clipped; uint8 RGB [H, W, 3], or clips [F, H, W, 3]."""
    apart = np.abs(first.astype(np.int16) - second.astype(np.int16))
    return np.clip(apart * gain, 0, 255).astype(np.uint8)


def flip_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where two uint8 sRGB pictures [H, W, 3] look different: FLIP in the colours of magma, uint8 [H, W, 3], black is equal.

    Raises `MeasureError` where the library for it is not installed.
    """
    try:
        colours = flip_error(first, second, colours=True)
    except NotMeasured as error:
        raise MeasureError(f"There is no FLIP heat map: {error}.") from error
    return np.clip(colours * 255 + 0.5, 0, 255).astype(np.uint8)


def enlarge(pixels: np.ndarray, side: int = 512) -> np.ndarray:
    """Repeat pixels a whole number of times until the longer side is about `side`; larger pictures stay as they are."""
    factor = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] -> PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def webp_bytes(frames: Sequence[np.ndarray], rate: float, lossless: bool = True) -> bytes:
    """Frames, uint8 RGB or RGBA [H, W, C] -> animated WebP file that runs for ever; `rate` in frames per second."""
    images = [Image.fromarray(frame) for frame in frames]
    # WebP counts whole milliseconds: rounding the moments instead of the durations keeps the speed right.
    moments = [round(1000 * index / rate) for index in range(len(images) + 1)]
    durations = [max(after - before, 1) for before, after in itertools.pairwise(moments)]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0,
        lossless=lossless, quality=JPEG_QUALITY,
    )  # fmt: skip
    return buffer.getvalue()


def data_uri(pixels: np.ndarray) -> str:
    """A picture as data address: PNG pixel for pixel, or a JPEG of at most `INLINE_SIDE` pixels when it is larger."""
    if max(pixels.shape[:2]) <= INLINE_SIDE // 2:
        return _address("png", png_bytes(pixels))
    image = Image.fromarray(pixels)
    image.thumbnail((INLINE_SIDE, INLINE_SIDE), Image.Resampling.LANCZOS)
    return _address("jpeg", _jpeg_bytes(image))


def abreast(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Clips uint8 [F, H, W, 3] of one size -> one [F, H, W', 4] with all side by side, so that they stay in step."""
    frames, height, width = clips[0].shape[:3]
    # Transparent between neighbours, since the page may be light or dark.
    canvas = np.zeros((frames, height, len(clips) * (width + GUTTER) - GUTTER, 4), np.uint8)
    for place, clip in enumerate(clips):
        left = place * (width + GUTTER)
        canvas[:, :, left : left + width, :3] = clip
        canvas[:, :, left : left + width, 3] = 255
    return canvas


def motion_uris(frames: np.ndarray, rate: float) -> tuple[str, str]:
    """Frames uint8 [F, H, W, C] as data addresses: an animated WebP, and its middle frame for who wants no motion."""
    lossless = frames.shape[1] <= TINY
    still = webp_bytes(frames[len(frames) // 2 :][:1], rate, lossless)
    return _address("webp", webp_bytes(frames, rate, lossless)), _address("webp", still)


def sheet_uri(frames: np.ndarray) -> str:
    """Frames uint8 [F, H, W, 3] in one row as data address: PNG pixel for pixel, or a JPEG of smaller frames."""
    tiny = max(frames.shape[1:3]) <= TINY
    row = np.concatenate([shrunk(frame, SHEET_SIDE) for frame in frames], axis=1)
    return _address("png", png_bytes(row)) if tiny else _address("jpeg", _jpeg_bytes(Image.fromarray(row)))


def shrunk(frame: np.ndarray, side: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] with a longer side of at most `side`; a smaller one stays as it is."""
    height, width = frame.shape[:2]
    if max(height, width) <= side:
        return frame
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
