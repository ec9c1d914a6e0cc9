"""Speed against quality, single techniques and stacks, with the Pareto front: an SVG made from the results alone."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from .tables import SAME

#: Groups of arms: words for the legend, how names begin, colour (Okabe-Ito), mark.
GROUPS = (
    ("fewer steps", re.compile(r"\d+ steps$"), "#000000", "cross"),
    ("dpmpp_2m, fewer steps", re.compile("dpmpp"), "#999999", "cross"),
    ("ComfyUI's caches", re.compile("core "), "#D55E00", "cross"),
    ("stacks", re.compile(r"stack|.* \+ "), "#CC79A7", "square"),
    ("Guidance Saver", re.compile("guidance", re.IGNORECASE), "#8B4513", "dot"),
    ("smaller stages", re.compile("progressive", re.IGNORECASE), "#56B4E9", "dot"),
    ("regions", re.compile("ratio|region"), "#F0E442", "dot"),
    ("attention", re.compile("attention|block mass", re.IGNORECASE), "#117733", "square"),
    ("quantized weights", re.compile("int8"), "#882255", "square"),
    ("fitted caches", re.compile("(cache: )?Fitted"), "#E69F00", "dot"),
    ("Taylor caches", re.compile("(cache: )?Taylor"), "#0072B2", "dot"),
    ("other caches", re.compile("."), "#009E73", "dot"),
)
WIDTH, PANEL, LEFT, TOP, LEGEND = 980, 330, 56, 34, 26
#: Parts of stacks.py in words.
STACKS = {
    "image": "image model, one picture", "batch": "image model, 8 pictures at once", "video": "video model, 80 tokens",
    "wide": "video model, 1,280 tokens", "large": "video model, 4,205 tokens",
}  # fmt: skip
#: Arms that are hardly closer to the plain run than another picture are left out, in dB.
LEAST = 20.0
#: Closer ones are drawn at this height, in dB: nobody sees a difference.
MOST = 80.0


@dataclass(frozen=True)
class Point:
    """An arm: its name, the factor by which it is faster, and its PSNR to the plain run in dB."""

    name: str
    speed: float
    quality: float

    @property
    def group(self) -> int:
        """Return its place in :data:`GROUPS`."""
        return next(place for place, (_, pattern, *_) in enumerate(GROUPS) if pattern.match(self.name))


def points(rows: dict[str, dict]) -> list[Point]:
    """Return the arms of a table of results that have both figures and change the picture."""
    found = []
    for name, row in rows.items():
        speed = next((row[key] for key in ("speedup_processor", "speedup", "speed") if row.get(key)), None)
        if speed is not None and LEAST <= row.get("psnr_mean", 0.0) < SAME:
            found.append(Point(name, speed, min(row["psnr_mean"], MOST)))
    return found


def front(found: list[Point]) -> list[Point]:
    """Return the points that no other one beats in both, from slow to fast."""
    best, quality = [], -math.inf
    for point in sorted(found, key=lambda p: (-p.speed, -p.quality)):
        if point.quality > quality:
            best.append(point)
            quality = point.quality
    return best[::-1]


def panels(results: dict[str, dict]) -> list[tuple[str, list[Point]]]:
    """Return the panels that the results can fill: title and points."""
    guidance = {k: v["rows"] for k, v in results.get("guidance-resolution", {}).items() if isinstance(v, dict) and "rows" in v}
    own = {name: row for name, row in guidance.get("image, batch 1", {}).items() if not name.endswith(" steps")}
    found = [
        ("image model, 64 x 64, 28 steps", points(results.get("caching-image", {}).get("28 steps", {})) + points(own)),
        ("video model, 17 frames of 64 x 64, 28 steps", points(results.get("caching-video", {}).get("28 steps", {}))),
        ("image model, 64 x 64, 8 at once", points(guidance.get("image, batch 8", {}))),
        ("image model, 256 x 256", points(guidance.get("wide, batch 1", {}))),
    ]
    found += [(f"stacks: {STACKS.get(title, title)}", points(rows)) for title, rows in tables_in(results.get("stacks", {}))]
    return [(title, arms) for title, arms in found if arms]


def tables_in(document: dict, title: str = "") -> Iterator[tuple[str, dict]]:
    """Find dictionaries of arms anywhere in a result: title and rows."""
    rows = {name: row for name, row in document.items() if isinstance(row, dict) and "psnr_mean" in row}
    if rows:
        yield title, rows
    for name, part in document.items():
        if isinstance(part, dict) and name not in rows and name != "lab":
            yield from tables_in(part, name if name not in ("rows", "arms") else title)


def chart(results: dict[str, dict]) -> str:
    """Return the SVG; two panels a row, below them the legend."""
    found = panels(results)
    lines, height = [], TOP
    used = sorted({point.group for _, arms in found for point in arms})
    for place, (title, arms) in enumerate(found):
        column, row = place % 2, place // 2
        lines += _panel(title, arms, column * WIDTH / 2, TOP + row * PANEL)
        height = TOP + (row + 1) * PANEL
    for place, group in enumerate(used):
        x, y = 20 + (place % 5) * 190, height + 16 + (place // 5) * LEGEND
        lines += [_mark(GROUPS[group], x, y), _text(x + 12, y + 4, GROUPS[group][0])]
    height += 16 + LEGEND * (1 + (len(used) - 1) // 5)
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">'
    )
    head = "PSNR to the plain run, dB, over speed: mean of held-out prompts. The line joins what nothing else beats in both."
    paper = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([start, paper, _text(20, 20, head), *lines, "</svg>", ""])


def _panel(title: str, arms: list[Point], left: float, top: float) -> list[str]:
    inner, tall = WIDTH / 2 - LEFT - 16, PANEL - 74
    most = max(2.0, math.ceil(2 * max(arm.speed for arm in arms)) / 2)
    least = min(1.0, math.floor(2 * min(arm.speed for arm in arms)) / 2)
    high = 10 * math.ceil(max(arm.quality for arm in arms) / 10)
    x = lambda speed: left + LEFT + inner * (speed - least) / (most - least)  # noqa: E731
    y = lambda quality: top + 28 + tall * (high - quality) / (high - LEAST)  # noqa: E731
    lines = [_text(left + LEFT, top + 16, title, weight="bold")]
    for quality in range(int(LEAST), high + 1, 10):
        lines += [_line(x(least), y(quality), x(most), y(quality)), _text(left + LEFT - 6, y(quality) + 4, str(quality), "end")]
    count = round((most - least) / 0.5)
    for step in range(count + 1):
        speed = least + 0.5 * step
        lines += [_line(x(speed), y(LEAST), x(speed), y(high)), _text(x(speed), y(LEAST) + 18, f"{speed:g}x", "middle")]
    best = " ".join(f"{x(arm.speed):.1f},{y(arm.quality):.1f}" for arm in front(arms))
    lines.append(f'<polyline points="{best}" fill="none" stroke="#888888" stroke-width="1.5" stroke-dasharray="5 3"/>')
    lines += [_mark(GROUPS[arm.group], x(arm.speed), y(arm.quality), _words(arm)) for arm in sorted(arms, key=lambda a: -a.group)]
    return lines


def _words(arm: Point) -> str:
    return f"{arm.name}: {arm.speed:.2f}x, {arm.quality:.1f} dB"


def _mark(group: tuple, x: float, y: float, words: str = "") -> str:
    _, _, colour, kind = group
    title = f"<title>{escape(words)}</title>" if words else ""
    if kind == "cross":
        path = f"M{x - 4:.1f} {y - 4:.1f}L{x + 4:.1f} {y + 4:.1f}M{x - 4:.1f} {y + 4:.1f}L{x + 4:.1f} {y - 4:.1f}"
        return f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none">{title}</path>'
    if kind == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}" stroke="#333333">{title}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="#333333" stroke-width="0.6">{title}</circle>'


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#333333">{escape(words)}</text>'
