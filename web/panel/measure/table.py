"""The table of a report: its columns and how numbers are written. Page, panel and terminal share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .metrics import from_json_number
from .perceptual import METRICS

NOTHING = "–"
# Metrics that not every report has, and how their numbers are written.
PERCEPTUAL: dict[str, Callable[[float], str]] = {
    "ms_ssim": lambda value: f"{value:.3f}",
    "flip": lambda value: f"{value:.3f}",
    "st_lpips": lambda value: f"{value:.3f}",
    "vmaf": lambda value: f"{value:.1f}",
}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
ArmRow = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its title, an explanation, and how an arm of a report is written in it."""

    title: str
    meaning: str
    cell: Callable[[ArmRow], str]


def columns(report: dict[str, Any]) -> list[Column]:
    """The columns of this report's table; those about clips and a reference run only where there were any."""
    clips = bool(report["settings"].get("frames"))
    worst = "mean / worst frame" if clips else "mean / worst picture"
    found = [
        Column("Arm", "what was run", lambda arm: arm["label"]),
        Column(
            "Sampler, s",
            "seconds inside the sampler: median [quartiles]",
            lambda arm: _seconds(arm["seconds"]["sampler"]),
        ),
        Column("Speed", "plain seconds / this arm's, per round: median [95 % interval]", _ratio),
        Column(
            "Verdict",
            "from the 95 % interval of the speed; below six rounds a t test at 99 % must agree",
            lambda arm: arm["verdict"],
        ),
        Column(
            "Total, s",
            "seconds of the whole run with text, VAE and picture: median [quartiles]",
            lambda arm: _seconds(arm["seconds"]["total"]),
        ),
        Column("Model calls", "model evaluations computed + skipped, median of the runs", _calls),
        Column(
            "Ceiling",
            "best speed this many skipped evaluations allow: evaluations / (computed + share × skipped)",
            _ceiling,
        ),
        Column("PSNR to plain", worst, lambda arm: _quality(arm["quality"]["psnr"], format_decibel)),
        Column("SSIM to plain", worst, lambda arm: _quality(arm["quality"]["ssim"], lambda v: f"{v:.3f}")),
    ]
    found += [_metric(name, write, clips) for name, write in PERCEPTUAL.items() if _measured(report, name)]
    if clips:
        found.append(
            Column(
                "PSNR of changes",
                "PSNR of the frame-to-frame changes to the plain clip's: mean / worst clip",
                lambda arm: _quality(arm["quality"]["change_psnr"], format_decibel),
            )
        )
    steps = report["settings"]["reference_steps"]
    if steps:
        found.append(
            Column(
                f"PSNR to {steps} steps",
                f"{worst} against the plain workflow with {steps} steps",
                lambda arm: _quality(arm["quality"]["reference_psnr"], format_decibel),
            )
        )
    found += [
        Column("Peak memory", "highest over all runs", _peak),
        Column("Store", "highest number of bytes kept to skip evaluations", _store),
    ]
    return found


def _metric(name: str, write: Callable[[float], str], clips: bool) -> Column:
    """A column of a metric that is only there when it was measured."""
    metric, thing = METRICS[name], "clip" if name == "vmaf" else "frame" if clips else "picture"
    closer = "0 is identical" if metric.lower_is_better else f"{metric.perfect:g} is identical"
    meaning = f"mean / worst {thing}; {closer} ({metric.source})"
    return Column(f"{metric.title} to plain", meaning, lambda arm: _quality(arm["quality"].get(name), write))


def _measured(report: dict[str, Any], name: str) -> bool:
    return any(arm["quality"].get(name) for arm in report["arms"])


def _seconds(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return NOTHING
    middle = format_seconds(spread["median"])
    return (
        middle if spread["count"] == 1 else f"{middle} [{format_seconds(spread['q1'])}, {format_seconds(spread['q3'])}]"
    )


def _ratio(arm: ArmRow) -> str:
    if arm["role"] in ("plain", "reference"):
        return NOTHING if arm["role"] == "reference" else format_ratio(1.0)
    spread = arm["ratio"]["sampler"] or arm["ratio"]["total"]
    if spread is None:
        return NOTHING
    suffix = "" if arm["ratio"]["sampler"] else " (total)"
    if spread["count"] == 1:
        return format_ratio(spread["median"]) + suffix
    return f"{format_ratio(spread['median'])} [{spread['low']:.2f}, {spread['high']:.2f}]{suffix}"


def _calls(arm: ArmRow) -> str:
    calls = arm["calls"]
    return NOTHING if calls is None else f"{format_count(calls['computed'])} + {format_count(calls['skipped'])}"


def _ceiling(arm: ArmRow) -> str:
    return NOTHING if arm["ceiling"] is None else format_ratio(arm["ceiling"]["ratio"])


def _quality(quality: dict[str, Any] | None, write: Callable[[Any], str]) -> str:
    if quality is None:
        return NOTHING
    if quality["identical"] == quality["count"]:
        return "identical"
    return f"{write(quality['mean'])} / {write(quality['worst'])}"


def _peak(arm: ArmRow) -> str:
    memory = arm["memory"]
    return NOTHING if memory is None else f"{format_bytes(memory['peak_bytes'])} {memory['kind'].upper()}".strip()


def _store(arm: ArmRow) -> str:
    return NOTHING if arm["memory"] is None else format_bytes(arm["memory"]["store_peak_bytes"])


def format_seconds(value: float) -> str:
    """Seconds with three significant digits."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def format_ratio(value: float) -> str:
    """1.6234 -> 1.62×."""
    return f"{value:.2f}×"


def format_decibel(value: float | str | None) -> str:
    """Decibels, or "identical" for infinity."""
    number = from_json_number(value)
    if number is None:
        return NOTHING
    return "identical" if math.isinf(number) else f"{number:.1f} dB"


def format_bytes(value: float) -> str:
    """Bytes in binary units with three significant digits."""
    power = min(int(math.log(value, 1000)), len(UNITS) - 1) if value >= 1 else 0
    number = value / 1024**power
    return f"{number:.3g} {UNITS[power]}"


def format_count(value: float) -> str:
    """A count that may be a median of whole numbers: 16 or 16.5."""
    return f"{value:g}"
