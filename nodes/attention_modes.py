"""The picture of a plan at work: what every head of every layer did at every step."""

from typing import Any

from PIL import Image, ImageDraw

from .timeline import BACKGROUND, FAINT, INK, MARGIN, WIDTH, _font

#: Colour and words of every mode; what costs most is brightest.
MODES = {
    "F": ("#f9f871", "full"),
    "L": ("#38a3a5", "lists"),
    "B": ("#57cc99", "blended"),
    "M": ("#80b918", "mean"),
    "H": ("#4895ef", "rho"),
    "R": ("#7b6fd0", "residual"),
    "S": ("#b5179e", "shared"),
    "Z": ("#d00000", "nothing"),
    ".": ("#26263a", "not asked"),
}
LABEL, TOP, MOST = 84, 74, 480


def attention_modes(trace: dict[str, Any]) -> Image.Image | None:
    """Return what heads did in a ``trace@1`` document as an RGB picture, 960 pixels wide.

    A column a step, a band a layer, in it a row a head.

    Returns:
        None where no plan was followed.
    """
    modes = (trace.get("attention") or {}).get("modes")
    if not modes:
        return None
    layers, heads = len(modes[0]), len(modes[0][0])
    every = -(-layers * heads // MOST)  # of so many heads only one is drawn
    shown = range(0, heads, every)
    row = max(1, min(6, MOST // (layers * len(shown))))
    band = row * len(shown) + 3
    image = Image.new("RGB", (WIDTH, TOP + band * layers + 24), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), f"What heads did · {trace['attention']['method']}", fill=INK, font=_font(18))
    _legend(draw, {letter for step in modes for layer in step for letter in layer})
    width = (WIDTH - 2 * MARGIN - LABEL) / len(modes)
    for layer in range(layers):
        y = TOP + layer * band
        if layer % max(1, 14 // band) == 0:
            draw.text((MARGIN, y + band / 2 - 8), f"layer {layer}", fill=FAINT, font=_font(12))
        for step, found in enumerate(modes):
            x = MARGIN + LABEL + step * width
            for place, head in enumerate(shown):
                colour = MODES[found[layer][head]][0]
                top = y + place * row
                draw.rectangle((x, top, x + max(width - 2, 1), top + row - 1), fill=colour)
    draw.text((MARGIN + LABEL, TOP + band * layers + 2), f"step 1 to {len(modes)}, a row a head", fill=FAINT, font=_font(12))
    return image


def _legend(draw: ImageDraw.ImageDraw, letters: set[str]) -> None:
    x = MARGIN + LABEL
    for letter, (colour, words) in MODES.items():
        if letter in letters:
            draw.rectangle((x, 46, x + 14, 58), fill=colour)
            draw.text((x + 20, 44), words, fill=INK, font=_font(13))
            x += 36 + draw.textlength(words, font=_font(13))
