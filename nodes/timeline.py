"""The picture of a run: which steps were computed, forecast or reused, per guidance branch."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

#: Okabe-Ito colours, distinguishable with every common colour vision; patterns repeat the message.
COLOURS = {"computed": "#0072B2", "forecast": "#E69F00", "reused": "#009E73"}
BACKGROUND, INK, FAINT = "#1e1e24", "#f2f2f2", "#8a8a94"
BRANCHES = ("cond", "uncond", "other")
WIDTH, MARGIN, ROW, LABEL, BAR = 960, 24, 34, 84, 96


def timeline(trace: dict[str, Any]) -> Image.Image:
    """Return the timeline of a ``trace@1`` document as an RGB picture, 960 pixels wide.

    One column an evaluation: a row per branch, then seconds as bars, then the noise level.
    """
    entries = trace["evaluations"]
    seen = {branch["branch"] for entry in entries for branch in entry["branches"]}
    names = [name for name in BRANCHES if name in seen] or ["all"]
    top = 84
    height = top + ROW * len(names) + BAR + 92
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    totals = trace["totals"]
    draw.text((MARGIN, 14), _title(trace), fill=INK, font=_font(18))
    _legend(draw, totals, 46)
    if not entries:
        draw.text((MARGIN, top), "no evaluation was made", fill=FAINT, font=_font(14))
        return image
    column = (WIDTH - 2 * MARGIN - LABEL) / len(entries)
    for row, name in enumerate(names):
        y = top + row * ROW
        draw.text((MARGIN, y + 6), name, fill=INK, font=_font(14))
        for i, entry in enumerate(entries):
            _cell(draw, MARGIN + LABEL + i * column, y, column, _decision(entry, name))
    _bars(draw, entries, top + ROW * len(names) + 8, column)
    _axis(draw, entries, top + ROW * len(names) + BAR + 16, column)
    reasons = "   ".join(f"{item['technique']}: {item['status']}" for item in trace["techniques"])
    draw.text((MARGIN, height - 30), reasons, fill=FAINT, font=_font(13))
    return image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _title(trace: dict[str, Any]) -> str:
    totals, steps = trace["totals"], max(len(trace["sigmas"]) - 1, 0)
    name = trace["model"]["family"] or trace["model"]["network"]
    return (
        f"{name} · {trace['sampler']['name']}, {steps} steps · {totals['computed']} of "
        f"{totals['evaluations']} evaluations computed · {trace['seconds']['sampler']:.3f} s"
    )


def _legend(draw: ImageDraw.ImageDraw, totals: dict[str, int], y: int) -> None:
    x = MARGIN
    for name, colour in COLOURS.items():
        _cell(draw, x, y, 20, name, height=18)
        label = f"{name} {totals[name]}"
        draw.text((x + 28, y), label, fill=INK if colour else FAINT, font=_font(14))
        x += 150


def _decision(entry: dict[str, Any], name: str) -> str | None:
    if not entry["branches"]:
        return entry["decision"] if entry["decision"] in COLOURS else "computed"
    return next((branch["decision"] for branch in entry["branches"] if branch["branch"] == name), None)


def _cell(
    draw: ImageDraw.ImageDraw, x: float, y: float, width: float, decision: str | None, height: int = ROW - 6
) -> None:
    if decision is None:
        return
    right = x + max(width - 2, 1)
    draw.rectangle((x, y, right, y + height), fill=COLOURS[decision])
    if decision == "forecast":  # a slanted line: extrapolation
        draw.line((x, y + height, right, y), fill=BACKGROUND, width=2)
    if decision == "reused":  # a level line: unchanged
        draw.line((x, y + height / 2, right, y + height / 2), fill=BACKGROUND, width=2)


def _bars(draw: ImageDraw.ImageDraw, entries: list[dict[str, Any]], y: int, column: float) -> None:
    seconds = [entry["seconds"] or 0.0 for entry in entries]
    longest = sorted(seconds)[int(0.95 * (len(seconds) - 1))] or max(seconds) or 1.0
    draw.text((MARGIN, y + BAR - 40), "seconds", fill=INK, font=_font(14))
    draw.text((MARGIN, y + BAR - 22), f"<= {longest * 1000:.1f} ms", fill=FAINT, font=_font(11))
    for i, value in enumerate(seconds):
        x = MARGIN + LABEL + i * column
        size = min(value / longest, 1.0) * (BAR - 12)
        draw.rectangle((x, y + BAR - size, x + max(column - 2, 1), y + BAR), fill=COLOURS.get(entries[i]["decision"], FAINT))


def _axis(draw: ImageDraw.ImageDraw, entries: list[dict[str, Any]], y: int, column: float) -> None:
    every = max(1, round(len(entries) / 14))
    for i in range(0, len(entries), every):
        x = MARGIN + LABEL + i * column
        draw.text((x, y), f"{entries[i]['sigma']:.2f}", fill=FAINT, font=_font(11))
    draw.text((MARGIN, y), "noise level", fill=INK, font=_font(14))
