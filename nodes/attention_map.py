"""The picture of sparse attention: what each head of each layer kept, and how far off it was."""

from typing import Any

from PIL import Image, ImageDraw

from ..acceleration.figures import kept_by_layer, worst_layers
from .timeline import BACKGROUND, FAINT, INK, LIMIT, MARGIN, WIDTH, _font

#: From nothing to everything, brighter all the way.
RAMP = ("#26263a", "#22577a", "#38a3a5", "#80ed99", "#f9f871")
LABEL, TOP, CELL_HEIGHT, ERROR = 84, 74, 16, 190
THUMB, GAP, CAPTION = 100, 16, 16
ACROSS = (WIDTH - 2 * MARGIN + GAP) // (THUMB + GAP)
#: Errors are drawn on a scale that reaches at least so far.
LEAST_ERROR = 0.01
#: Rows of the heat map: networks with more layers show every other, every third, ...
MOST_ROWS = 40


def attention_map(trace: dict[str, Any]) -> Image.Image | None:
    """Return what sparse attention kept in a ``trace@1`` document as an RGB picture, 960 pixels wide.

    A heat map with a row a layer and a column a head, brighter where more was kept, beside it the error of each layer
    against full attention; below it masks of some, queries down, keys across.

    Returns:
        None where no attention was sparse.
    """
    found = trace.get("attention")
    if not found or not found["layers"]:
        return None
    layers = found["layers"][:: -(-len(found["layers"]) // MOST_ROWS)]
    lines = -(-len(found["pictures"]) // ACROSS)
    height = TOP + CELL_HEIGHT * len(layers) + 40 + lines * (THUMB + 2 * CAPTION + GAP)
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), _title(found), fill=INK, font=_font(18))
    _scale(draw, 44)
    _heat(draw, layers, dict(worst_layers(trace)), TOP)
    _thumbs(image, draw, found, TOP + CELL_HEIGHT * len(layers) + 30)
    return image


def _title(found: dict[str, Any]) -> str:
    kept = list(kept_by_layer(found).values())
    size = found["layers"][0]
    return (
        f"Sparse attention · {found['method']} · {sum(kept) / len(kept):.0%} of the key blocks kept · {size['tokens']:,} tokens, "
        f"{size['blocks'][0]} x {size['blocks'][1]} blocks"
    )


def _scale(draw: ImageDraw.ImageDraw, y: int) -> None:
    draw.text((MARGIN, y), "kept", fill=INK, font=_font(13))
    for step in range(101):
        x = MARGIN + LABEL + step * 1.6
        draw.rectangle((x, y + 2, x + 2, y + 14), fill=_colour(step / 100))
    draw.text((MARGIN + LABEL + 172, y), "0 to 100 %, by layer (down) and head (across)", fill=FAINT, font=_font(13))
    draw.text((WIDTH - MARGIN - ERROR, y), "off from full attention", fill=INK, font=_font(13))


def _heat(draw: ImageDraw.ImageDraw, layers: list[dict[str, Any]], errors: dict[int, float], y: int) -> None:
    room = WIDTH - 2 * MARGIN - LABEL - ERROR - 16
    most = max(*errors.values(), LEAST_ERROR) if errors else LEAST_ERROR
    for item in layers:
        draw.text((MARGIN, y), f"layer {item['layer']}", fill=FAINT, font=_font(12))
        width = room / len(item["kept"])
        for head, share in enumerate(item["kept"]):
            x = MARGIN + LABEL + head * width
            draw.rectangle((x, y, x + max(width - 1, 1), y + CELL_HEIGHT - 2), fill=_colour(share))
        error = errors.get(item["layer"])
        if error is not None:
            left = WIDTH - MARGIN - ERROR
            draw.rectangle((left, y + 2, left + error / most * (ERROR - 60), y + CELL_HEIGHT - 4), fill=LIMIT)
            draw.text((left + error / most * (ERROR - 60) + 6, y), f"{error:.1%}", fill=INK, font=_font(12))
        y += CELL_HEIGHT


def _thumbs(image: Image.Image, draw: ImageDraw.ImageDraw, found: dict[str, Any], top: int) -> None:
    kept = {item["layer"]: item["kept"] for item in found["layers"]}
    for place, picture in enumerate(found["pictures"]):
        x = MARGIN + place % ACROSS * (THUMB + GAP)
        y = top + place // ACROSS * (THUMB + 2 * CAPTION + GAP)
        rows, layer, head = picture["rows"], picture["layer"], picture["head"]
        small = Image.new("RGB", (len(rows[0]), len(rows)))
        small.putdata([_rgb(_colour(int(cell) / 9)) for row in rows for cell in row])
        image.paste(small.resize((THUMB, THUMB), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + THUMB + 3), f"layer {layer}, head {head}", fill=FAINT, font=_font(12))
        draw.text((x, y + THUMB + 3 + CAPTION), f"{kept[layer][head]:.0%} kept", fill=FAINT, font=_font(12))


def _colour(share: float) -> str:
    """Return the colour of a share, linear between the stops of the ramp."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    pair = zip(_rgb(RAMP[low]), _rgb(RAMP[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pair)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
