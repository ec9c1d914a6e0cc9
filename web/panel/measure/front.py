"""Speed against quality: which arms no other one beats in both, and a drawing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .metrics import from_json_number
from .table import format_decibel, format_ratio

Report = dict[str, Any]
# Colour, shape and ink of the number of each role; the shape says the same as the colour.
LOOKS = {
    "plain": ("currentColor", "circle", None),
    "accelerated": ("#2E86C1", "circle", "#fff"),
    "fewer-steps": ("#E69F00", "square", "#000"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 64, 20, 16, 48
LEGEND_ROW = 20
IDENTICAL_BAND = 30  # above the scale, for pictures without any error
RADIUS = 9
INSET = 14  # between the ends of the axes and the first and last tick
TICKS = 5
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Point:
    """An arm: speed as a factor with its interval, quality in dB (infinite when identical) with the worst picture's."""

    label: str
    role: str
    speed: float
    low: float
    high: float
    quality: float
    worst: float


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates (more is better), by growing first coordinate.

    Of equal points all stay; a point with nan never does.
    """
    order = sorted(range(len(points)), key=lambda index: points[index], reverse=True)
    best, front, last = -math.inf, [], None
    for index in order:
        point = points[index]
        if any(math.isnan(value) for value in point):
            continue
        if point[1] > best or point == last:
            front.append(index)
            best, last = point[1], point
    return front[::-1]


def points_of(report: Report) -> tuple[list[Point], str]:
    """The arms that have both numbers, and what their quality is measured against.

    Against the reference where one was made, since only that says how good the plain run is; otherwise against the plain run.
    """
    against = "reference_psnr" if report["settings"]["reference_steps"] else "psnr"
    found = []
    for arm in report["arms"]:
        quality = arm["quality"].get(against)
        if arm["role"] == "reference" or not arm["runs"]:
            continue
        ratio = arm["ratio"]["sampler"] or arm["ratio"]["total"]
        if arm["role"] == "plain":
            ratio = {"median": 1.0, "low": 1.0, "high": 1.0}
            quality = quality or ({"mean": "inf", "worst": "inf"} if against == "psnr" else None)
        if ratio and quality:
            values = [float(from_json_number(quality[key])) for key in ("mean", "worst")]
            found.append(Point(arm["label"], arm["role"], ratio["median"], ratio["low"], ratio["high"], *values))
    steps = report["settings"]["reference_steps"]
    return found, f"PSNR to {steps} steps, dB" if steps else "PSNR to plain, dB"


def front_svg(report: Report) -> str:
    """The scatter of `points_of` with spreads and the Pareto front, for a page; a sentence when there is nothing to draw.

    Bars are the 95 % interval of the speed and the way down to the worst picture. Text follows the page's colour
    (`currentColor`), so one drawing serves light and dark.
    """
    points, title = points_of(report)
    if len(points) < 2:
        return "<p>Speed against quality needs at least two arms with pictures and times.</p>"
    scale = _Scale.of(points)
    front = pareto([(point.speed, point.quality) for point in points])
    height = HEIGHT + LEGEND_ROW * (len(points) + 1)
    parts = [*scale.axes(title), _line([points[index] for index in front], scale)]
    parts += [_mark(number, point, scale, number - 1 in front) for number, point in enumerate(points, start=1)]
    parts += _legend(points, front)
    label = escape("Speed against quality of " + ", ".join(point.label for point in points))
    return (
        f'<svg class="front" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{label}" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


@dataclass(frozen=True)
class _Scale:
    """From numbers to places; `ticks` are those of both axes."""

    ticks: tuple[list[float], list[float]]
    identical: bool  # whether a band above the scale is needed

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Scale:
        speeds = [value for point in points for value in (point.low, point.high, point.speed)]
        finite = [value for point in points for value in (point.quality, point.worst) if math.isfinite(value)]
        identical = any(math.isinf(point.quality) for point in points)
        return cls((_ticks(speeds), _ticks(finite or [30.0, 40.0])), identical)

    def x(self, speed: float) -> float:
        low, high = self.ticks[0][0], self.ticks[0][-1]
        return LEFT + INSET + (WIDTH - LEFT - RIGHT - 2 * INSET) * (speed - low) / (high - low)

    def y(self, quality: float) -> float:
        top = TOP + (IDENTICAL_BAND if self.identical else 0)
        if math.isinf(quality):
            return TOP + RADIUS + 2
        low, high = self.ticks[1][0], self.ticks[1][-1]
        floor = HEIGHT - BOTTOM - INSET
        return floor - (floor - top) * (quality - low) / (high - low)

    def axes(self, title: str) -> list[str]:
        right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value in self.ticks[1]:
            y = self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="currentColor" opacity="0.15"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="12">{value:g}</text>')
        if self.identical:
            y = self.y(math.inf)
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="12">identical</text>')
        for value in self.ticks[0]:
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {floor}v5" stroke="currentColor" opacity="0.5"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle" font-size="12">{value:g}×</text>')
        parts.append(f'<path d="M{LEFT} {floor}H{right}" stroke="currentColor" opacity="0.5"/>')
        middle = (LEFT + right) / 2
        text = f"Speed over plain; up: {title}"
        parts.append(f'<text x="{middle}" y="{floor + 38}" text-anchor="middle" font-size="12">{escape(text)}</text>')
        return parts


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, about `TICKS` of them."""
    low, high = min(values), max(values)
    span = max(high - low, abs(high) * 0.02, 1e-6)
    power = 10 ** math.floor(math.log10(span / TICKS))
    step = next(power * factor for factor in STEPS if power * factor * TICKS >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def _line(front: Sequence[Point], scale: _Scale) -> str:
    """The front as a line through its points."""
    path = "L".join(f"{scale.x(point.speed):.1f} {scale.y(point.quality):.1f}" for point in front)
    return f'<path class="pareto" d="M{path}" fill="none" stroke="currentColor" opacity="0.45" stroke-dasharray="5 4"/>'


def _mark(number: int, point: Point, scale: _Scale, on_front: bool) -> str:
    """Number and bars of one arm, with its figures as hover title; arms off the front, and the plain one, are hollow."""
    colour, shape, ink = LOOKS[point.role]
    x, y = scale.x(point.speed), scale.y(point.quality)
    # Bars end at the mark, since a hollow one would show them.
    ways = [f"M{scale.x(point.low):.1f} {y:.1f}H{x - RADIUS:.1f}" if scale.x(point.low) < x - RADIUS else "",
            f"M{x + RADIUS:.1f} {y:.1f}H{scale.x(point.high):.1f}" if scale.x(point.high) > x + RADIUS else ""]  # fmt: skip
    if math.isfinite(point.worst) and scale.y(point.worst) > y + RADIUS:
        ways.append(f"M{x:.1f} {y + RADIUS:.1f}V{scale.y(point.worst):.1f}")
    bars = f'<path d="{"".join(ways)}" stroke="{colour}" stroke-width="2"/>' if any(ways) else ""
    filled = on_front and ink is not None
    look = f'fill="{colour if filled else "none"}" stroke="{colour}" stroke-width="2"'
    if shape == "circle":
        mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" {look}/>'
    else:
        mark = f'<rect x="{x - RADIUS:.1f}" y="{y - RADIUS:.1f}" width="{2 * RADIUS}" height="{2 * RADIUS}" rx="2" {look}/>'
    text = (
        f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" font-size="11" font-weight="700" '
        f'fill="{ink if filled else "currentColor"}">{number}</text>'
    )
    return f"<g><title>{escape(_figures(point))}</title>{bars}{mark}{text}</g>"


def _figures(point: Point) -> str:
    interval = f" [{point.low:.2f}, {point.high:.2f}]" if point.high > point.low else ""
    worst = f", {format_decibel(point.worst)} at worst" if point.worst < point.quality else ""
    return f"{point.label}: {format_ratio(point.speed)}{interval}, {format_decibel(point.quality)}{worst}"


def _legend(points: Sequence[Point], front: Sequence[int]) -> list[str]:
    """One line per arm under the plot, and what the filled marks mean."""
    parts = []
    for number, point in enumerate(points, start=1):
        y = HEIGHT + LEGEND_ROW * number - 6
        weight = ' font-weight="600"' if number - 1 in front else ' opacity="0.75"'
        parts.append(f'<text x="{LEFT}" y="{y}" font-size="12"{weight}>{number} · {escape(_figures(point))}</text>')
    words = "Bold, joined by the dashed line: no other arm is both faster and closer."
    y = HEIGHT + LEGEND_ROW * (len(points) + 1) - 6
    return [*parts, f'<text x="{LEFT}" y="{y}" font-size="12" opacity="0.75">{words}</text>']
