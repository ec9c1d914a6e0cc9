"""The picture of weights that need not be there: bytes before and after, by component, and what was exact."""

from typing import Any

from PIL import Image, ImageDraw

from ..acceleration.figures import mebibytes
from .timeline import BACKGROUND, COLOURS, FAINT, INK, MARGIN, WIDTH, _font

BEFORE, LOADED, TABLES = "#5c5c6b", COLOURS["computed"], COLOURS["forecast"]
LABEL, TOP, BAR, GROUP = 110, 76, 16, 52


def feature_bytes(trace: dict[str, Any]) -> Image.Image | None:
    """Return the bytes of a run's feature layers in a ``trace@1`` document as an RGB picture, 960 pixels wide.

    Two bars a component, all on one scale: its weights, and what is loaded of them. Below, the tables that stand for them.

    Returns:
        None where no features were kept.
    """
    section = trace.get("features")
    if not section or not section["components"]:
        return None
    items = section["components"]
    most = max(section["table_bytes"], *(item["weight_bytes"] for item in items), 1)
    image = Image.new("RGB", (WIDTH, TOP + GROUP * len(items) + BAR + 24), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), f"Weights that tables stand for · {section['mode']}", fill=INK, font=_font(18))
    _legend(draw)
    y = TOP
    for item in items:
        draw.text((MARGIN, y), item["name"], fill=INK, font=_font(14))
        draw.text((MARGIN, y + BAR), f"{item['layers']} layers", fill=FAINT, font=_font(12))
        left = f", {item['left']} calls left alone" if item["left"] else ""
        exact = "equal to the bit" if item["exact"] else "rounded as one product"
        _bar(draw, y, item["weight_bytes"] / most, BEFORE, mebibytes(item["weight_bytes"]))
        _bar(draw, y + BAR + 2, item["loaded_bytes"] / most, LOADED, f"{mebibytes(item['loaded_bytes'])} · {exact}{left}")
        y += GROUP
    draw.text((MARGIN, y), "tables", fill=INK, font=_font(14))
    entries = f"{mebibytes(section['table_bytes'])} · {section['entries']} timesteps and prompts"
    _bar(draw, y, section["table_bytes"] / most, TABLES, entries)
    return image


def _bar(draw: ImageDraw.ImageDraw, y: float, share: float, colour: str, words: str) -> None:
    """A bar with words behind it, or in it where there is no room behind."""
    start, font = MARGIN + LABEL, _font(13)
    end = start + share * (WIDTH - 2 * MARGIN - LABEL)
    if share:
        draw.rectangle((start, y + 1, max(end, start + 1), y + BAR), fill=colour)
    behind = end + 8 + draw.textlength(words, font=font) <= WIDTH - MARGIN
    draw.text((end + 8 if behind else start + 8, y), words, fill=INK, font=font)


def _legend(draw: ImageDraw.ImageDraw) -> None:
    x = MARGIN + LABEL
    for colour, words in ((BEFORE, "weights"), (LOADED, "loaded of them"), (TABLES, "kept instead")):
        draw.rectangle((x, 46, x + 14, 58), fill=colour)
        draw.text((x + 20, 44), words, fill=INK, font=_font(13))
        x += 36 + draw.textlength(words, font=_font(13))
