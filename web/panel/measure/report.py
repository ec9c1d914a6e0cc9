"""The report of a comparison: report@1 as JSON, and one self-contained HTML page made from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .arms import Arm
from .errors import ReportError
from .files import write_whole
from .front import front_svg
from .gallery import gallery, is_clips
from .interleave import Cell, Measurement
from .perceptual import Perceptual
from .pictures import DIFFERENCE_GAIN
from .scores import score_pictures
from .summary import arm_row, by_arm
from .table import columns, format_bytes, format_count, format_decibel, format_ratio, format_seconds
from .timeline import timeline_svg

SCHEMA = "report@1"
TEMPLATES = Path(__file__).parent / "templates"
SLOW = ("ms_ssim", "flip", "st_lpips", "vmaf")
STYLE = TEMPLATES / "style.css"
Report = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything a report is made from; `folder` holds the pictures that the measurements name."""

    folder: Path
    arms: Sequence[Arm]
    cells: Sequence[Cell]
    measurements: Sequence[Measurement]
    server: dict[str, Any]
    settings: dict[str, Any]
    command: str
    notes: Sequence[str] = field(default_factory=tuple)


def build_report(results: Results, scoring: Callable[[str, str], bool] = lambda label, prompt: True) -> Report:
    """Results -> report@1 (acceleration/schemas/report.v1.json).

    `scoring` is told label and prompt before the pictures of an arm are scored; when it answers False the slow metrics are
    left out from there on.
    """
    runs = by_arm(results.measurements)
    perceptual = Perceptual()
    cells = [_cell_entry(results, cell, runs, perceptual, scoring) for cell in results.cells]
    if not any("change_psnr" in scores for cell in cells for scores in cell["pictures"].values()):
        perceptual.leave_out("vmaf", "there were no clips")
    plain = runs.get("plain", [])
    arms = [
        arm_row(
            arm,
            runs.get(arm.name, []),
            plain,
            [cell["pictures"][arm.name] for cell in cells if arm.name in cell["pictures"]],
        )
        for arm in results.arms
    ]
    report: Report = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "headline": headline(arms, bool(results.settings.get("frames"))),
        "command": results.command,
        "server": results.server,
        "settings": results.settings,
        "metrics": perceptual.facts(),
        "arms": arms,
        "cells": cells,
        "measurements": [_measurement_entry(m) for arm in results.arms for m in runs.get(arm.name, [])],
        "notes": list(results.notes),
    }
    return report


def _cell_entry(
    results: Results,
    cell: Cell,
    runs: dict[str, list[Measurement]],
    perceptual: Perceptual,
    scoring: Callable[[str, str], bool],
) -> dict[str, Any]:
    """Prompt, seed and the pictures of every arm with their scores."""
    shown = {
        name: next((m for m in found if m.cell == cell.index and m.pictures), None) for name, found in runs.items()
    }
    files = {name: run.pictures for name, run in shown.items() if run is not None}
    labels = {arm.name: arm.label for arm in results.arms}
    pictures = {}
    for name, found in files.items():
        slow = scoring(labels[name], cell.prompt)
        if not slow:
            for metric in SLOW:
                perceptual.leave_out(metric, "stopped before it was measured for every picture")
        # Pictures of a reference are another run's by intention: how far they are from the plain ones says nothing more.
        pictures[name] = score_pictures(
            results.folder,
            found,
            files.get("plain") if name != "plain" else None,
            files.get("reference") if name != "reference" else None,
            shown[name].frames,
            results.settings.get("frame_rate"),
            perceptual if slow and name != "reference" else None,
        )
    return {"index": cell.index, "prompt": cell.prompt, "seed": cell.seed, "pictures": pictures}


def _measurement_entry(measurement: Measurement) -> dict[str, Any]:
    """The numbers of one run, without its traces and pictures."""
    return {
        "arm": measurement.arm,
        "cell": measurement.cell,
        "repeat": measurement.repeat,
        "round": measurement.round,
        "position": measurement.position,
        "sampler_seconds": measurement.sampler_seconds,
        "total_seconds": measurement.seconds,
    }


def headline(arms: Sequence[dict[str, Any]], clips: bool = False) -> list[str]:
    """What a reader should know first: one sentence per arm that is not the baseline. `clips`: pictures are frames."""
    return [_sentence(arm, clips) for arm in arms if arm["role"] in ("accelerated", "fewer-steps") and arm["runs"]]


def _sentence(arm: dict[str, Any], clips: bool) -> str:
    """Speed and fidelity of one arm in words."""
    ratio, where = arm["ratio"]["sampler"], "in the sampler"
    if ratio is None:
        ratio, where = arm["ratio"]["total"], "in total time"
    if ratio is None:
        return f"{arm['label']}: not measured against the plain run."
    speed = f"{format_ratio(ratio['median'])} the speed of the plain run {where} ({arm['verdict']})"
    psnr = arm["quality"]["psnr"]
    if psnr is None:
        return f"{arm['label']}: {speed}."
    if psnr["identical"] == psnr["count"]:
        return f"{arm['label']}: {speed}, identical {'clips' if clips else 'pictures'}."
    closeness = f"{arm['label']}: {speed}, PSNR to plain {format_decibel(psnr['mean'])} on average"
    change = arm["quality"]["change_psnr"]
    if not clips or change is None:
        return f"{closeness}, {format_decibel(psnr['worst'])} at worst."
    return (
        f"{closeness}, {format_decibel(psnr['worst'])} in the worst frame, "
        f"{format_decibel(change['mean'])} for the changes from frame to frame."
    )


# The server and the machine


def server_facts(stats: dict[str, Any], url: str, with_pack: bool, loopback: bool) -> dict[str, Any]:
    """What a report tells about the machine, out of /system_stats. Arguments with paths stay out of it."""
    system = stats.get("system", {})
    facts: dict[str, Any] = {
        "url": url,
        "timing": "sampler" if with_pack else "total only",
        "comfyui": str(system.get("comfyui_version", "unknown")),
        "pytorch": str(system.get("pytorch_version", "unknown")),
        "python": str(system.get("python_version", "unknown")).split(" ")[0],
        "os": str(system.get("os", "unknown")),
        "ram_bytes": int(system.get("ram_total", 0)),
        "flags": [
            flag for flag in system.get("argv", []) if flag.startswith("--") and "/" not in flag and "\\" not in flag
        ],
        "devices": [
            {
                "name": str(device.get("name", "unknown")),
                "type": str(device.get("type", "unknown")),
                "memory_bytes": int(device.get("vram_total", 0)),
            }
            for device in stats.get("devices", [])
        ],
    }
    if loopback:
        facts["processor"] = _processor()
        facts["cores"] = os.cpu_count() or 0
    return facts


def _processor() -> str:
    """Name of this machine's processor as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Files


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.json and index.html into `folder`, whose pictures the page inlines; returns both paths."""
    data, page = folder / "report.json", folder / "index.html"
    write_json(report, data)
    write_whole(page, render_html(report, folder))
    return data, page


def write_json(report: Report, path: Path) -> None:
    """Write a report@1."""
    write_whole(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_report(path: Path) -> Report:
    """Read report.json; raises `ReportError` when it is unreadable or of an unknown major version."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not a JSON file.") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    name, _, version = str(schema).partition("@")
    if name != "report":
        raise ReportError(f"{path} is not a report of this pack.")
    if version.split(".")[0] != SCHEMA.partition("@")[2]:
        raise ReportError(f"{path} has the format {schema}; this version reads {SCHEMA}.")
    return report


# HTML


def render_html(report: Report, folder: Path) -> str:
    """The report as one page with everything inlined; pictures are read from `folder`."""
    environment = _environment()
    return environment.get_template("report.html.j2").render(
        report=report,
        columns=columns(report),
        style=Markup(STYLE.read_text(encoding="utf-8")),
        timeline=Markup(timeline_svg(timeline_rows(report))),
        front=Markup(front_svg(report)),
        clips=is_clips(report),
        gallery=gallery(report, folder),
        gain=DIFFERENCE_GAIN,
    )


def _stacked(text: str) -> Markup:
    """A cell in two lines: what stands in brackets or after a slash goes below, smaller, so that tables stay narrow."""
    for mark in (" [", " / ", " + "):
        head, found, tail = text.partition(mark)
        if found:
            return escape(head) + Markup("<small>{}</small>").format(
                mark.strip() + ("" if mark == " [" else " ") + tail
            )
    return escape(text)


def table_html(report: Report) -> str:
    """The table alone, as it stands in the page; needs the rules of `STYLE`."""
    return _environment().get_template("table.html.j2").render(report=report, columns=columns(report))


def timeline_rows(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """Label and trace of the first measured run of every arm, for `timeline_svg`."""
    return [(arm["label"], trace) for arm in report["arms"] if arm["role"] != "reference" for trace in arm["traces"]]


def clip_html(clip: dict[str, Any]) -> str:
    """One entry of `gallery.clip_view` as it stands in the page; needs the rules of `STYLE`."""
    return _environment().get_template("clip.html.j2").render(clip=clip, gain=DIFFERENCE_GAIN, unfolded=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        stacked=_stacked,
        seconds=format_seconds,
        ratio=format_ratio,
        decibel=format_decibel,
        bytes=format_bytes,
        count=format_count,
    )
    return environment
