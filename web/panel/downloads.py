"""Files that people take away: the report as one page, as JSON, as CSV, and an arm as a workflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measure.exports import csv_of, json_of
from .measure.report import Report, render_html

KINDS = ("html", "json", "csv")


def path_of(folder: Path, kind: str) -> Path:
    """Where a download lies; browsers keep the name, and "index" would say nothing."""
    return folder / f"stretto-{folder.name}.{kind}"


def write(report: Report, folder: Path) -> list[Path]:
    """The files of `KINDS` in the folder of a report, made where they are missing; raises `OSError`."""
    makers: dict[str, Callable[[], str]] = {
        "html": lambda: render_html(report, folder),
        "json": lambda: json_of(report),
        "csv": lambda: csv_of(report),
    }
    made = []
    for kind in KINDS:
        path = path_of(folder, kind)
        if not path.is_file():
            page = folder / "index.html"
            if kind == "html" and page.is_file():
                _replace(path, lambda fresh, page=page: shutil.copyfile(page, fresh))
            else:
                _replace(path, lambda fresh, kind=kind: fresh.write_text(makers[kind](), encoding="utf-8"))
        made.append(path)
    return made


def forget(folder: Path) -> None:
    """Remove the downloads of a folder, so that a resumed comparison makes them anew."""
    for kind in KINDS:
        path_of(folder, kind).unlink(missing_ok=True)


def write_drawing(drawing: dict[str, Any], folder: Path, arm: str) -> Path:
    """A workflow for the editor, beside the report it belongs to; raises `OSError`."""
    path = folder / f"stretto-{arm}.json"
    _replace(path, lambda fresh: fresh.write_text(json.dumps(drawing, indent=1), encoding="utf-8"))
    return path


def _replace(path: Path, write_to: Callable[[Path], Any]) -> None:
    fresh = path.with_name(path.name + ".tmp")
    try:
        write_to(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
