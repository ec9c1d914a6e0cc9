"""The picture of a run on a shortened video: which latent frames it had, and what each stood for."""

from typing import Any

from PIL import Image, ImageDraw

from ..acceleration.frame_rate.schedule import RATES, FrameRateSchedule
from ..acceleration.summary import between_passes
from .timeline import BACKGROUND, FAINT, INK, LABEL, MARGIN, WIDTH, _font

#: A kept latent frame by its rate, brighter where it stands for more; those that were dropped are hollow.
COLOURS = {1: "#0072B2", 2: "#E69F00", 4: "#F0E442"}
TOP, STRIP = 74, 36


def frame_rate_map(trace: dict[str, Any]) -> Image.Image | None:
    """Return the latent frames of a ``trace@1`` document's run as an RGB picture, 960 pixels wide.

    A cell a latent frame of the full video, in order of time: filled where the run had it, hollow where it was dropped. A
    filled cell and the hollow ones after it are one latent frame at half or a quarter of the rate.

    Returns:
        None where the video was not shortened.
    """
    found = trace.get("frame_rate")
    if not found:
        return None
    schedule, told = FrameRateSchedule.from_json(found["schedule"]), between_passes(trace)
    image = Image.new("RGB", (WIDTH, TOP + STRIP + (60 if told else 36)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    title = f"{schedule.latents} of {schedule.full_latents} latent frames ({schedule.ratio:.0%}) for {schedule.frames} frames"
    draw.text((MARGIN, 12), f"Frame rate · {title}", fill=INK, font=_font(18))
    _legend(draw, schedule)
    draw.text((MARGIN, TOP + 9), "latents", fill=INK, font=_font(14))
    width = (WIDTH - 2 * MARGIN - LABEL) / schedule.full_latents
    gap = 2 if width >= 5 else 0
    for first, rate in zip(schedule.kept, (1, *schedule.rates), strict=True):
        for place in range(first, first + rate):
            x = MARGIN + LABEL + place * width
            box = (x, TOP, x + max(width - gap, 1), TOP + STRIP)
            if place == first:
                draw.rectangle(box, fill=COLOURS[rate])
            elif width >= 3:
                draw.rectangle(box, outline=COLOURS[rate])
    below = TOP + STRIP + 4
    draw.text((MARGIN + LABEL, below), "first frame", fill=FAINT, font=_font(12))
    draw.text((WIDTH - MARGIN, below), f"frame {schedule.frames}", fill=FAINT, font=_font(12), anchor="ra")
    if told:
        draw.text((MARGIN, below + 24), told, fill=FAINT, font=_font(13))
    return image


def _legend(draw: ImageDraw.ImageDraw, schedule: FrameRateSchedule) -> None:
    x = MARGIN + LABEL
    for rate in RATES:
        if rate in (1, *schedule.rates):
            words = "full rate" if rate == 1 else f"stands for {rate}"
            draw.rectangle((x, 46, x + 14, 58), fill=COLOURS[rate])
            draw.text((x + 20, 44), words, fill=INK, font=_font(13))
            x += 36 + draw.textlength(words, font=_font(13))
    draw.rectangle((x, 46, x + 14, 58), outline=FAINT)
    draw.text((x + 20, 44), "dropped", fill=INK, font=_font(13))
