"""What the page shows, as pure functions from what is known to HTML."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from .measure.compare import Progress
from .measure.history import FINISHED, Entry
from .measure.report import Report
from .measure.table import format_seconds
from .measure.variants import Setting, StrettoNode
from .session import Look

MOST_SETTINGS = 4  # of a node, shown beside its name
LONGEST_HINT = 160  # characters of what a setting allows
JPEG, PNG, WEBP = b"\xff\xd8", b"\x89PNG", b"RIFF"


def status(server: str, facts: dict[str, Any] | None, problem: str | None) -> str:
    """The line about the server."""
    if facts is None:
        return f'<p><span class="dot bad"></span>{escape(problem or "")}</p>'
    device = facts["devices"][0]["name"] if facts["devices"] else "unknown device"
    pack = "" if facts["timing"] == "sampler" else " · without the Stretto nodes: total time only"
    return (
        f'<p><span class="dot good"></span>{escape(server)} · ComfyUI {escape(facts["comfyui"])} · '
        f"{escape(device)}{pack}</p>"
    )


# The workflow


def found(look: Look) -> str:
    """The nodes of this pack in a workflow, each with what is set."""
    if not look.nodes:
        return '<p class="note">No Stretto node in this workflow: add one, or compare with a second workflow.</p>'
    rows = "".join(f"<li><b>{escape(node.title)}</b> {_settings(node)}</li>" for node in look.nodes)
    return f'<ul class="found">{rows}</ul>'


def _settings(node: StrettoNode) -> str:
    shown = [f"{name} {_value(setting.value)}" for name, setting in list(node.settings.items())[:MOST_SETTINGS]]
    return f"<span>{escape(', '.join(shown))}</span>" if shown else ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed(setting: Setting) -> str:
    """What values a setting takes, in words."""
    words = setting.allowed
    return f"Now {_value(setting.value)}. Commas between; {words if len(words) < LONGEST_HINT else words[:LONGEST_HINT] + '…'}."


def trouble(message: str) -> str:
    """One sentence about a workflow that cannot be used."""
    return f'<p class="line bad" role="alert">{escape(message)}</p>'


def notice(message: str) -> str:
    """One sentence that is no error."""
    return f'<p class="line notice">{escape(message)}</p>'


# The run


def idle() -> str:
    """Before the first run."""
    return (
        '<p class="line">Press Run: all arms run in turn with the same seed, the first round is discarded, and the '
        "results appear here.</p>"
    )


def stopping() -> str:
    """Between the stop and the last run's end."""
    return '<p class="line">Stopping…</p>'


def running(progress: Progress | None, picture: bytes | None = None) -> str:
    """A bar, a line about the run in progress, and the latest picture."""
    if progress is None:
        return '<p class="line">Starting…</p>'
    share = progress.step / progress.steps if progress.steps else 0.0
    percent = 100 * min(1.0, (progress.done + (share if progress.finished is None else 0.0)) / max(progress.total, 1))
    step = f", step {progress.step} of {progress.steps}" if progress.steps else ""
    last = ""
    if progress.finished is not None:
        seconds = progress.finished.sampler_seconds or progress.finished.seconds
        last = f", {format_seconds(seconds)} s"
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<i style="width:{percent:.1f}%"></i></div><div class="now">{_glimpse(picture)}'
        f'<p class="line">Run {min(progress.done + 1, progress.total)} of '
        f"{progress.total} ({escape(progress.phase)}): {escape(progress.arm)}{step}{last}"
        f"<br><small>“{escape(progress.prompt)}”</small></p></div>"
    )


def _glimpse(picture: bytes | None) -> str:
    """The latest picture of the run; anything that is no picture is left out."""
    if not picture:
        return ""
    kinds = {JPEG: "jpeg", PNG: "png", WEBP: "webp"}
    kind = next((name for start, name in kinds.items() if picture.startswith(start)), None)
    if kind is None:
        return ""
    data = base64.b64encode(picture).decode()
    return f'<img class="glimpse" alt="What the run in progress looks like" src="data:image/{kind};base64,{data}">'


def headline(report: Report) -> str:
    """The verdict in words, and whatever the reader has to know about it."""
    first = "".join(f"<p>{escape(sentence)}</p>" for sentence in report["headline"])
    notes = "".join(
        f'<p class="note">{escape(note)}</p>'
        for note in [*report["notes"], *(note for arm in report["arms"] for note in arm["notes"])]
    )
    server = report["server"]
    device = server["devices"][0]["name"] if server["devices"] else "unknown device"
    moment = report["created"][:16].replace("T", " ") + " UTC"
    place = " · ".join((moment, server.get("processor") or device, settings_of(report)))
    return f'<div class="headline">{first}{notes}<p class="note place">{escape(place)}</p></div>'


def missing(report: Report) -> str:
    """Why metrics have no value."""
    said = [about["reason"] for about in (report.get("metrics") or {}).values() if about.get("reason")]
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in said)


def settings_of(report: Report) -> str:
    """What was run, in a few words."""
    settings = report["settings"]
    counted = [(len(settings["prompts"]), "prompt"), (len(settings["seeds"]), "seed"), (settings["repeats"], "repeat")]
    words = " × ".join(f"{count} {noun}{'s' if count != 1 else ''}" for count, noun in counted)
    return f"{words}, {settings['steps'] or '?'} steps"


# The history


def entry_label(entry: Entry) -> str:
    """One line of the history."""
    state = "" if entry.state == FINISHED else entry.state
    parts = [entry.started[:16].replace("T", " "), entry.workflow, state, figures(entry) or entry.summary, entry.machine]
    return " · ".join(part for part in parts if part)


def figures(entry: Entry) -> str:
    """Speed and closeness of the first accelerated arm, as far as they are known."""
    ratio = f"{entry.ratio:.2f}×" if isinstance(entry.ratio, int | float) else ""
    psnr = f"{entry.psnr:.1f} dB" if isinstance(entry.psnr, int | float) else ""
    return ", ".join(part for part in (ratio, psnr) if part)


def across(rows: Sequence[dict[str, Any]]) -> str:
    """Several comparisons as one table, with what keeps them from being compared."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in ACROSS)
    body, last = "", None
    for row in rows:
        fresh, last = row["id"] != last, row["id"]
        body += f'<tr class="first">{_across(row)}</tr>' if fresh else f"<tr>{_across(row)}</tr>"
    notes = list(dict.fromkeys(f"{row['started'][:10]} {row['workflow']}: {row['note']}." for row in rows if row["note"]))
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<div class="stretto embedded"><div class="scroll"><table class="arms across"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>{said}"
    )


def _across(row: dict[str, Any]) -> str:
    return "".join(f"<td>{escape(_cell(write(row)))}</td>" for write in ACROSS.values())


def _spread(row: dict[str, Any]) -> str | None:
    if not isinstance(row.get("ratio"), int | float):
        return None
    low, high = row.get("low"), row.get("high")
    span = f" [{low:.2f}, {high:.2f}]" if isinstance(low, int | float) and isinstance(high, int | float) and low != high else ""
    return f"{row['ratio']:.2f}×{span}"


ACROSS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Day": lambda row: row["started"][:16].replace("T", " "),
    "Workflow": lambda row: row["workflow"],
    "Arm": lambda row: row["arm"],
    "Seconds": lambda row: row["seconds"],
    "Speed": _spread,
    "Verdict": lambda row: row["verdict"],
    "PSNR, dB": lambda row: row.get("psnr"),
    "SSIM": lambda row: row.get("ssim"),
    "Machine": lambda row: row["machine"],
}


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
