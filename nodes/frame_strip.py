"""A frame schedule as a picture: a strip of rates over thumbnails of the video."""

import torch
from PIL import Image, ImageDraw

from ..acceleration.frame_rate.schedule import FrameRateSchedule
from .charts import BLUE, GREEN, ORANGE, as_image

WIDTH, THUMBS, STRIP, LABELS, CURVE, MARGIN = 960, 12, 34, 22, 60, 10
BACKGROUND, INK = (250, 250, 250), (60, 60, 60)
COLOURS = {1: BLUE, 2: ORANGE, 4: GREEN}


def draw_schedule(schedule: FrameRateSchedule, frames: torch.Tensor, change: torch.Tensor | None = None) -> torch.Tensor:
    """Return a picture [1, H, W, 3] of ``schedule``.

    Args:
        schedule: what is kept.
        frames: [T, H, W, C] in 0..1, for the thumbnails.
        change: [T - 1], 1 - SSIM of neighbouring frames, drawn as bars; None for no bars.
    """
    side = (WIDTH - 2 * MARGIN) // THUMBS
    height = round(side * frames.shape[1] / frames.shape[2])
    bars = CURVE if change is not None and len(change) else 0
    picture = Image.new("RGB", (WIDTH, MARGIN * 4 + LABELS * 2 + bars + STRIP + height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), schedule.words(), fill=INK)
    top = MARGIN + LABELS
    if bars:
        _bars(draw, change, top, bars, schedule.padded_frames)
    top += bars + MARGIN
    _rates(draw, schedule, top)
    top += STRIP + MARGIN
    for i in range(THUMBS):
        frame = frames[min(round(i * (len(frames) - 1) / max(THUMBS - 1, 1)), len(frames) - 1)]
        pixels = (frame[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        picture.paste(Image.fromarray(pixels).resize((side - 2, height)), (MARGIN + i * side, top))
    _legend(draw, schedule, top + height + 4)
    return as_image(picture)


def _across(frame: float, frames: int) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * frame / frames


def _bars(draw: ImageDraw.ImageDraw, change: torch.Tensor, top: int, height: int, frames: int) -> None:
    """How much each frame differs from the one before it."""
    values = change.tolist()
    most = max(*values, 1e-6)
    for i, value in enumerate(values):
        left, right = _across(i + 1, frames), _across(i + 2, frames) - 1
        draw.rectangle((left, top + height * (1 - value / most), max(right, left), top + height), fill=(190, 190, 200))


def _rates(draw: ImageDraw.ImageDraw, schedule: FrameRateSchedule, top: int) -> None:
    """One box for every kept latent, as wide as the frames it stands for."""
    cuts, frames = schedule.legal_cuts(), schedule.padded_frames
    for first, end, rate in zip(cuts[:-1], cuts[1:], (1, *schedule.rates), strict=True):
        box = (_across(first, frames), top, _across(end, frames) - 1, top + STRIP)
        draw.rectangle(box, fill=COLOURS[rate])
        words = f"1/{rate}" if rate > 1 else "1"
        if box[2] - box[0] > draw.textlength(words) + 2:
            draw.text(((box[0] + box[2]) / 2, top + STRIP / 2), words, fill=(255, 255, 255), anchor="mm")


def _legend(draw: ImageDraw.ImageDraw, schedule: FrameRateSchedule, top: int) -> None:
    left = MARGIN
    for rate, colour in COLOURS.items():
        words = "full rate" if rate == 1 else f"1/{rate} of the rate"
        draw.rectangle((left, top + 3, left + 10, top + 13), fill=colour)
        draw.text((left + 14, top), words, fill=INK)
        left += 30 + draw.textlength(words)
    draw.text((left + 10, top), f"{schedule.frames} frames", fill=INK)
