"""The picture of region-adaptive sampling: where the model worked, at each step and over the whole run."""

from typing import Any

import torch
from PIL import Image, ImageDraw

from .attention_map import _colour, _rgb
from .timeline import BACKGROUND, FAINT, INK, MARGIN, WIDTH, _font

TOP, THUMB, GAP, CAPTION, LARGE = 74, 104, 12, 18, 296
ACROSS = (WIDTH - 2 * MARGIN + GAP) // (THUMB + GAP)
#: Side of the moving picture's frames, and how strongly regions that rest are darkened.
MOVING, REST = 384, 0.28


def region_map(trace: dict[str, Any]) -> Image.Image | None:
    """Return where a ``trace@1`` document's run worked as an RGB picture, 960 pixels wide: a map a step, brighter is active.

    Returns:
        None where no region was left out.
    """
    found = trace.get("region")
    if not found or not found["often"]:
        return None
    steps = found["steps"]
    lines = -(-len(steps) // ACROSS)
    thumb_height = round(THUMB * _aspect(found))
    image, draw = _page(_title(found), TOP + lines * (thumb_height + CAPTION + GAP) + 8)
    _scale(draw, 44, "of the frames active at a step; full cells where every region was computed")
    for place, step in enumerate(steps):
        x, y = MARGIN + place % ACROSS * (THUMB + GAP), TOP + place // ACROSS * (thumb_height + CAPTION + GAP)
        image.paste(_cells(step["rows"]).resize((THUMB, thumb_height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + thumb_height + 2), _caption(step), fill=FAINT, font=_font(12))
    return image


def region_sheet(trace: dict[str, Any], images: torch.Tensor) -> Image.Image:
    """Return a picture, how often the model worked where, and the picture at each step with resting regions darkened.

    Args:
        trace: a ``trace@1`` document with a region section.
        images: decoded picture or frames, [N, H, W, 3] in 0..1; the middle one is shown.
    """
    found, picture = trace["region"], _middle(images)
    steps = found["steps"]
    height = round(LARGE * picture.height / picture.width)
    thumb_height = round(THUMB * picture.height / picture.width)
    lines = -(-len(steps) // ACROSS)
    image, draw = _page(_title(found), TOP + height + 40 + lines * (thumb_height + CAPTION + GAP) + 8)
    _scale(draw, 44, "of the steps that left something out worked here")
    large = picture.resize((LARGE, height), Image.Resampling.LANCZOS)
    heat = _cells(found["often"] or steps[-1]["rows"]).resize((LARGE, height), Image.Resampling.BICUBIC)
    image.paste(large, (MARGIN, TOP))
    image.paste(heat, (MARGIN + LARGE + GAP, TOP))
    image.paste(Image.blend(large, heat, 0.5), (MARGIN + 2 * (LARGE + GAP), TOP))
    for place, words in enumerate(("the picture", "where the model worked", "both")):
        draw.text((MARGIN + place * (LARGE + GAP), TOP + height + 4), words, fill=INK, font=_font(13))
    top = TOP + height + 40
    for place, step in enumerate(steps):
        x, y = MARGIN + place % ACROSS * (THUMB + GAP), top + place // ACROSS * (thumb_height + CAPTION + GAP)
        image.paste(_lit(picture, step["rows"], (THUMB, thumb_height)), (x, y))
        draw.text((x, y + thumb_height + 2), _caption(step), fill=FAINT, font=_font(12))
    return image


def frames_over(trace: dict[str, Any], images: torch.Tensor) -> list[Image.Image]:
    """Return a picture per step with resting regions darkened, for a moving picture; sides as in :func:`region_sheet`."""
    picture = _middle(images)
    height = round(MOVING * picture.height / picture.width)
    frames = []
    for step in trace["region"]["steps"]:
        frame = Image.new("RGB", (MOVING, height + 28), BACKGROUND)
        frame.paste(_lit(picture, step["rows"], (MOVING, height)), (0, 0))
        ImageDraw.Draw(frame).text((8, height + 5), _caption(step), fill=INK, font=_font(14))
        frames.append(frame)
    return frames


def _page(title: str, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), title, fill=INK, font=_font(18))
    return image, draw


def _title(found: dict[str, Any]) -> str:
    t, h, w = found["grid"]
    part = [step["share"] for step in found["steps"] if step["share"] < 1.0]
    every = sum(step["share"] for step in found["steps"]) / len(found["steps"])
    frames = f"{t} x " if t > 1 else ""
    return (
        f"Regions · {frames}{h} x {w} tokens · some at {len(part)} of {len(found['steps'])} steps · "
        f"{every:.0%} of the tokens computed in all"
    )


def _caption(step: dict[str, Any]) -> str:
    return f"step {step['step'] + 1} · {step['share']:.0%}"


def _scale(draw: ImageDraw.ImageDraw, y: int, words: str) -> None:
    for step in range(101):
        x = MARGIN + step * 1.6
        draw.rectangle((x, y + 2, x + 2, y + 14), fill=_colour(step / 100))
    draw.text((MARGIN + 172, y), f"0 to 100 % {words}", fill=FAINT, font=_font(13))


def _aspect(found: dict[str, Any]) -> float:
    return found["grid"][1] / found["grid"][2]


def _cells(rows: list[str]) -> Image.Image:
    small = Image.new("RGB", (len(rows[0]), len(rows)))
    small.putdata([_rgb(_colour(int(cell) / 9)) for row in rows for cell in row])
    return small


def _lit(picture: Image.Image, rows: list[str], size: tuple[int, int]) -> Image.Image:
    """Return the picture with each cell as bright as it was active."""
    light = Image.new("L", (len(rows[0]), len(rows)))
    light.putdata([round(255 * (REST + (1 - REST) * int(cell) / 9)) for row in rows for cell in row])
    dark = Image.new("RGB", size, BACKGROUND)
    return Image.composite(
        picture.resize(size, Image.Resampling.LANCZOS), dark, light.resize(size, Image.Resampling.NEAREST)
    )


def _middle(images: torch.Tensor) -> Image.Image:
    array = (images[len(images) // 2].detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array[..., :3], "RGB")
