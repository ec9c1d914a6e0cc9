"""Line charts drawn with Pillow alone: what a profile saw, and what a calibration chose."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .timeline import BACKGROUND, FAINT, INK

#: Okabe-Ito colours, distinguishable with every common colour vision; marks repeat the message.
BLUE, ORANGE, GREEN, PINK, RED = "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
WIDTH, MARGIN, LEFT, HEADER, LEGEND, FOOTER, PLOT = 960, 24, 72, 52, 26, 46, 220

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One row of points.

    Attributes:
        name: for the legend.
        points: (x, y); None where a value is unknown, which breaks the line.
        colour: of line and marks.
        mark: ``"line"``, ``"dot"`` or ``"ring"``.
    """

    name: str
    points: Sequence[Point | None]
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Chart:
    """One plot with its axes.

    Attributes:
        title: what is shown.
        x_name: of the horizontal axis.
        series: what is drawn, last on top.
        x_line: place of a vertical target line.
        y_line: place of a horizontal target line.
        zero: whether the vertical axis begins at zero.
    """

    title: str
    x_name: str
    series: Sequence[Series]
    x_line: float | None = None
    y_line: float | None = None
    zero: bool = False


def draw_charts(title: str, charts: Sequence[Chart]) -> Image.Image:
    """Return charts below each other as an RGB picture, 960 pixels wide."""
    each = LEGEND + PLOT + FOOTER + 26
    image = Image.new("RGB", (WIDTH, HEADER + each * len(charts)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 14), title, fill=INK, font=_font(18))
    for index, chart in enumerate(charts):
        _draw(draw, chart, HEADER + index * each)
    return image


def as_image(picture: Image.Image) -> torch.Tensor:
    """Return a picture as an IMAGE: fp32 [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None]


def ticks(low: float, high: float, about: int = 8) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw(draw: ImageDraw.ImageDraw, chart: Chart, y: int) -> None:
    draw.text((MARGIN, y), chart.title, fill=INK, font=_font(14))
    x = MARGIN
    for series in chart.series:
        _mark(draw, (x + 8, y + 32), series)
        draw.text((x + 22, y + 24), series.name, fill=FAINT, font=_font(13))
        x += 40 + int(draw.textlength(series.name, font=_font(13)))
    points = [point for series in chart.series for point in series.points if point is not None]
    box = (MARGIN + LEFT, y + LEGEND + 24, WIDTH - MARGIN, y + LEGEND + 24 + PLOT)
    if not points:
        draw.text((box[0], box[1]), "nothing to draw", fill=FAINT, font=_font(14))
        return
    x_range = _range([p[0] for p in points], chart.x_line)
    y_range = _range([p[1] for p in points] + ([0.0] if chart.zero else []), chart.y_line)

    def place(point: Point) -> Point:
        return (
            box[0] + (point[0] - x_range[0]) / (x_range[1] - x_range[0]) * (box[2] - box[0]),
            box[3] - (point[1] - y_range[0]) / (y_range[1] - y_range[0]) * (box[3] - box[1]),
        )

    _axes(draw, chart, box, x_range, y_range, place)
    for series in chart.series:
        _series(draw, series, [None if point is None else place(point) for point in series.points])


def _axes(
    draw: ImageDraw.ImageDraw,
    chart: Chart,
    box: tuple[int, int, int, int],
    x_range: Point,
    y_range: Point,
    place: Callable[[Point], Point],
) -> None:
    """Draw frame, ticks and target lines."""
    draw.rectangle(box, outline=FAINT)
    for value in ticks(*y_range):
        at = place((x_range[0], value))[1]
        draw.line((box[0] - 4, at, box[0], at), fill=FAINT)
        draw.text((MARGIN, at - 7), f"{value:.4g}", fill=FAINT, font=_font(12))
    for value in ticks(*x_range, 10):
        at = place((value, y_range[0]))[0]
        draw.line((at, box[3], at, box[3] + 4), fill=FAINT)
        draw.text((at - 8, box[3] + 6), f"{value:.4g}", fill=FAINT, font=_font(12))
    right = box[2] - int(draw.textlength(chart.x_name, font=_font(12)))
    draw.text((right, box[3] + 22), chart.x_name, fill=FAINT, font=_font(12))
    if chart.x_line is not None:
        at = place((chart.x_line, y_range[0]))[0]
        draw.line((at, box[1], at, box[3]), fill=RED, width=2)
    if chart.y_line is not None:
        at = place((x_range[0], chart.y_line))[1]
        draw.line((box[0], at, box[2], at), fill=RED, width=2)


def _series(draw: ImageDraw.ImageDraw, series: Series, places: list[Point | None]) -> None:
    if series.mark != "line":
        for point in places:
            if point is not None:
                _mark(draw, point, series)
        return
    for a, b in pairwise(places):
        if a is not None and b is not None:
            draw.line((*a, *b), fill=series.colour, width=2)


def _mark(draw: ImageDraw.ImageDraw, at: Point, series: Series) -> None:
    x, y = at
    if series.mark == "line":
        draw.line((x - 8, y, x + 8, y), fill=series.colour, width=3)
    elif series.mark == "dot":
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=series.colour)
    else:
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=series.colour, width=3)


def _range(values: list[float], line: float | None) -> tuple[float, float]:
    """Return the limits of an axis, with a little room; equal values get room of their own."""
    values = values if line is None else [*values, line]
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or max(abs(high), 1e-6) * 0.05
    return low - (room if low != 0.0 else 0.0), high + room
