"""The picture of a run: which steps were computed, forecast or reused, per guidance branch, and what decided it."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..acceleration.figures import WORDS, Compared, comparisons, counts, decision_of, rows, run_level, sizes, steps_of
from ..acceleration.summary import gain, storage

#: Okabe-Ito colours, distinguishable with every common colour vision; patterns repeat the message.
COLOURS = {"computed": "#0072B2", "forecast": "#E69F00", "reused": "#009E73", "mixed": "#CC79A7"}
#: Bars of sparse attention, of active tokens and of smaller latents.
SPARSE = "#56B4E9"
#: Shares that an evaluation may have computed: field of the trace -> name of the row.
PARTIAL = {"active_share": "tokens", "attention_kept": "attention"}
BACKGROUND, INK, FAINT, LIMIT = "#1e1e24", "#f2f2f2", "#8a8a94", "#D55E00"
WIDTH, MARGIN, ROW, LABEL, BAR = 960, 24, 34, 84, 96
TOP, SIGNAL, FOOTER = 84, 100, 92
#: Changes beyond this multiple of the threshold are cut off: how far above it they lie decides nothing.
MOST_SHOWN = 2.5


def timeline(trace: dict[str, Any], plain: dict[str, Any] | None = None) -> Image.Image:
    """Return the timeline of a ``trace@1`` document as an RGB picture, 960 pixels wide.

    One column an evaluation: a row per branch, one for all where they agree; the size of the latent, where it changed; the
    share of tokens that were active and of attention that was kept, where not all was; what was compared with the threshold,
    where there was one; then seconds as bars, and the noise level.

    Args:
        trace: the run.
        plain: a plain run of the same work, for the measured speed-up; None where none is known.
    """
    entries, strips, seen = trace["evaluations"], rows(trace), comparisons(trace)
    partial = [name for name in PARTIAL if any(entry.get(name) is not None for entry in entries)]
    small = sizes(trace)
    height = TOP + ROW * (len(strips) + len(partial) + (small is not None)) + (SIGNAL if seen else 0) + BAR + FOOTER
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 14), _title(trace), fill=INK, font=_font(18))
    _legend(draw, counts(trace), 46)
    if not entries:
        draw.text((MARGIN, TOP), "no evaluation was made", fill=FAINT, font=_font(14))
        return image
    column, y = (WIDTH - 2 * MARGIN - LABEL) / len(entries), TOP
    for name, row in strips.items():
        draw.text((MARGIN, y + 6), name, fill=INK, font=_font(14))
        for i, decision in enumerate(row):
            _cell(draw, MARGIN + LABEL + i * column, y, column, decision)
        y += ROW
    if small is not None:
        _shares(draw, "size", small, y, column)
        y += ROW
    for name in partial:
        shares = [
            (1.0 if entry.get(name) is None else entry[name]) if entry["decision"] in ("computed", "mixed") else None
            for entry in entries
        ]
        _shares(draw, PARTIAL[name], shares, y, column)
        y += ROW
    if seen:
        _signal(draw, entries, seen, y, column)
        y += SIGNAL
    _bars(draw, entries, y + 8, column)
    _axis(draw, [run_level(trace, entry) for entry in entries], y + BAR + 16, column)
    _footer(draw, trace, plain, height)
    return image


def stacked(*pictures: Image.Image | None) -> Image.Image:
    """Return pictures of one width below each other; None stands for none."""
    there = [picture for picture in pictures if picture is not None]
    image = Image.new("RGB", (WIDTH, sum(picture.height for picture in there)), BACKGROUND)
    y = 0
    for picture in there:
        image.paste(picture, (0, y))
        y += picture.height
    return image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _title(trace: dict[str, Any]) -> str:
    totals, name = trace["totals"], trace["model"]["family"] or trace["model"]["network"]
    return (
        f"{name} · {trace['sampler']['name']}, {steps_of(trace)} steps · {totals['computed']} of "
        f"{totals['evaluations']} evaluations computed · {trace['seconds']['sampler']:.3f} s"
    )


def _legend(draw: ImageDraw.ImageDraw, number: dict[str, int], y: int) -> None:
    x = MARGIN
    for decision, count in number.items():
        if decision == "mixed" and not count:
            continue
        _cell(draw, x, y, 20, decision, height=18)
        draw.text((x + 28, y), f"{WORDS[decision]} {count}", fill=INK, font=_font(14))
        x += 150


def _cell(
    draw: ImageDraw.ImageDraw, x: float, y: float, width: float, decision: str | None, height: int = ROW - 6
) -> None:
    if decision is None:
        return
    right = x + max(width - 2, 1)
    draw.rectangle((x, y, right, y + height), fill=COLOURS[decision])
    if decision == "forecast":  # a slanted line: extrapolation
        draw.line((x, y + height, right, y), fill=BACKGROUND, width=2)
    if decision in ("reused", "mixed"):  # a level line: unchanged
        draw.line((x, y + height / 2, right, y + height / 2), fill=BACKGROUND, width=2)
    if decision == "mixed":  # crossed: in part
        middle = (x + right) / 2
        draw.line((middle, y, middle, y + height), fill=BACKGROUND, width=2)


def _shares(draw: ImageDraw.ImageDraw, label: str, shares: list[float | None], y: int, column: float) -> None:
    """Draw a share of each evaluation: full cells for 1, bars in a frame for less, nothing for None."""
    draw.text((MARGIN, y + 6), label, fill=INK, font=_font(14))
    for i, share in enumerate(shares):
        if share is None:
            continue
        x = MARGIN + LABEL + i * column
        box = (x, y, x + max(column - 2, 1), y + ROW - 6)
        if share == 1.0:
            draw.rectangle(box, fill=COLOURS["computed"])
        else:
            draw.rectangle(box, outline=FAINT)
            draw.rectangle((box[0], box[3] - share * (ROW - 6), *box[2:]), fill=SPARSE)


def _signal(
    draw: ImageDraw.ImageDraw, entries: list[dict[str, Any]], seen: list[Compared], y: int, column: float
) -> None:
    """Draw the compared values as bars against the threshold: full where they decided, hollow where rails did."""
    room, bottom = SIGNAL - 20, y + SIGNAL - 8
    highest = max(item.threshold for item in seen)
    top = min(max(max(item.value for item in seen), 1.25 * highest), MOST_SHOWN * highest) or 1.0
    draw.text((MARGIN, bottom - 40), "change", fill=INK, font=_font(14))
    draw.text((MARGIN, bottom - 22), f"threshold {highest:.2g}", fill=LIMIT, font=_font(11))
    for item in seen:
        left, size = MARGIN + LABEL + item.place * column, min(item.value / top, 1.0) * room
        box = (left, bottom - size, left + max(column - 2, 1), bottom)
        if item.free:
            draw.rectangle(box, fill=COLOURS[decision_of(entries[item.place])])
        else:
            draw.rectangle(box, outline=FAINT)
        if item.skipped:
            draw.ellipse((left + column / 2 - 4, bottom - size - 9, left + column / 2 + 2, bottom - size - 3), fill=INK)
        if item.value > top:  # torn off: it goes on beyond the plot
            draw.line((left - 1, bottom - room + 12, left + column, bottom - room + 6), fill=BACKGROUND, width=4)
        at = bottom - item.threshold / top * room
        draw.line((left, at, left + column, at), fill=LIMIT, width=2)


def _bars(draw: ImageDraw.ImageDraw, entries: list[dict[str, Any]], y: int, column: float) -> None:
    seconds = [entry["seconds"] or 0.0 for entry in entries]
    longest = sorted(seconds)[int(0.95 * (len(seconds) - 1))] or max(seconds) or 1.0
    draw.text((MARGIN, y + BAR - 40), "seconds", fill=INK, font=_font(14))
    draw.text((MARGIN, y + BAR - 22), f"<= {longest * 1000:.1f} ms", fill=FAINT, font=_font(11))
    for i, value in enumerate(seconds):
        x = MARGIN + LABEL + i * column
        size = min(value / longest, 1.0) * (BAR - 12)
        draw.rectangle((x, y + BAR - size, x + max(column - 2, 1), y + BAR), fill=COLOURS[decision_of(entries[i])])


def _axis(draw: ImageDraw.ImageDraw, levels: list[float], y: int, column: float) -> None:
    every = max(1, round(len(levels) / 14))
    for i in range(0, len(levels), every):
        x = MARGIN + LABEL + i * column
        draw.text((x, y), f"{levels[i]:.2f}", fill=FAINT, font=_font(11))
    draw.text((MARGIN, y), "noise level", fill=INK, font=_font(14))


def _footer(draw: ImageDraw.ImageDraw, trace: dict[str, Any], plain: dict[str, Any] | None, height: int) -> None:
    """Write the gain and the memory, and what became of each technique."""
    figures = "   ".join(filter(None, (gain(trace, plain), storage(trace))))
    draw.text((MARGIN, height - 50), figures, fill=INK, font=_font(13))
    states = "   ".join(f"{item['technique']}: {item['status']}" for item in trace["techniques"])
    draw.text((MARGIN, height - 28), states, fill=FAINT, font=_font(13))
