"""A report for other programs: CSV for spreadsheets, JSON for scripts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from .report import Report

ArmRow = dict[str, Any]
SPREAD = ("median", "q1", "q3", "low", "high", "count")
CALLS = ("evaluations", "computed", "forecast", "reused")
MEMORY = ("kind", "peak_bytes", "store_peak_bytes")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would run


def json_of(report: Report) -> str:
    """The report as it stands in report.json."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def csv_of(report: Report) -> str:
    """One line per arm with every number of the report; seconds, bytes, decibels; infinity is the word "inf"."""
    columns = _columns(report)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(name for name, _ in columns)
    for arm in report["arms"]:
        writer.writerow(_cell(read(arm)) for _, read in columns)
    return buffer.getvalue()


def _columns(report: Report) -> list[tuple[str, Callable[[ArmRow], Any]]]:
    """Names of the columns, and how each is read out of an arm."""
    found: list[tuple[str, Callable[[ArmRow], Any]]] = [
        ("created", lambda arm: report["created"]),
        *((name, lambda arm, name=name: arm[name]) for name in ("label", "role", "verdict", "steps", "runs")),
    ]
    for group in ("seconds", "ratio"):
        for where in ("sampler", "total"):
            found += [
                (f"{group}_{where}_{key}", lambda arm, at=(group, where, key): _at(arm, *at)) for key in SPREAD
            ]
    found += [(f"calls_{key}", lambda arm, key=key: _at(arm, "calls", key)) for key in CALLS]
    found.append(("ceiling", lambda arm: _at(arm, "ceiling", "ratio")))
    metrics = dict.fromkeys(name for arm in report["arms"] for name in arm["quality"])
    for name in metrics:
        for key in ("mean", "worst", "count", "identical"):
            found.append((f"{name}_{key}", lambda arm, at=("quality", name, key): _at(arm, *at)))
    found += [(f"memory_{key}", lambda arm, key=key: _at(arm, "memory", key)) for key in MEMORY]
    return found


def _at(value: Any, *path: str) -> Any:
    """What stands at a path; None where it ends before."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
