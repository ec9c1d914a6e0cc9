"""The history of comparisons: one SQLite file, one row each, also for those that run, were stopped or broke off.

What a list shows stands in the row, so no report is read for it. A comparison whose process is gone shows as interrupted: while
one runs it holds a lock on its folder (`lock.folder_lock`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import ReportError, Stopped
from .lock import is_locked
from .metrics import from_json_number
from .report import Report, read_report

VERSION = 1
GRACE_SECONDS = 10.0  # between the row and the lock a comparison looks at its server
BUSY_SECONDS = 10.0
BUSY, FINISHED, STOPPED, FAILED, INTERRUPTED = "running", "finished", "stopped", "failed", "interrupted"
STATES = (BUSY, FINISHED, STOPPED, FAILED, INTERRUPTED)
COLUMNS = "id, started, state, workflow, summary, machine, ratio, psnr, folder, began"
_TABLE = """
CREATE TABLE IF NOT EXISTS comparisons (
    id INTEGER PRIMARY KEY AUTOINCREMENT, folder TEXT NOT NULL, started TEXT NOT NULL, began REAL NOT NULL,
    state TEXT NOT NULL, workflow TEXT NOT NULL, summary TEXT NOT NULL DEFAULT '', machine TEXT NOT NULL DEFAULT '',
    ratio REAL, psnr REAL, request TEXT NOT NULL, digest TEXT NOT NULL DEFAULT '{}', words TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS by_folder ON comparisons (folder);
"""


@dataclass(frozen=True)
class Entry:
    """One comparison. `started` is ISO 8601 in UTC, `ratio` and `psnr` (dB) are those of the first accelerated arm.

    `state` is one of `STATES`; interrupted ones can be resumed in `folder`. `summary` is the first line of the headline, or what
    went wrong.
    """

    id: int
    started: str
    state: str
    workflow: str
    summary: str
    machine: str
    ratio: float | None
    psnr: float | None
    folder: Path


class History:
    """Comparisons of all days, also of several processes at once. Raises `ReportError` where the file cannot be used."""

    def __init__(self, path: Path):
        """`path` of the SQLite file, made if it is not there; folders below its own are kept relative, so both can move."""
        self.path = Path(path).absolute()
        with self._words():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as base:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise ReportError(f"{self.path} is a history of a newer version of this pack; this one reads version {VERSION}.")
            base.execute("PRAGMA journal_mode=WAL")
            base.executescript(_TABLE)
            base.execute(f"PRAGMA user_version = {VERSION}")

    # Writing

    def begin(self, folder: Path, request: dict[str, Any]) -> int:
        """Enter a comparison that starts now; `request` is whatever is needed to run it again (JSON), with `workflow` its name.

        A folder has one row: one that is resumed goes on in the row it had.
        """
        row = {
            "started": _now(), "began": time.time(), "state": BUSY, "workflow": _workflow_name(request),
            "summary": "", "ratio": None, "psnr": None, "request": json.dumps(request), "words": _words_of(request),
        }  # fmt: skip
        return self._enter(Path(folder), row)

    def finish(self, number: int, report: Report) -> None:
        """Enter the result; a report of complete rounds only, after a stop, counts as stopped."""
        state = FINISHED if report["settings"].get("complete", True) else STOPPED
        self._change(number, {"state": state, **_facts(report)})

    def fail(self, number: int, message: str) -> None:
        """Enter that a comparison broke off, with the sentence that says why; what was measured stays in its folder."""
        self._change(number, {"state": FAILED, "summary": message})

    def stopped(self, number: int, message: str = "Stopped before a round was complete.") -> None:
        """Enter that somebody stopped a comparison before there was anything to report."""
        self._change(number, {"state": STOPPED, "summary": message})

    def forget(self, number: int) -> None:
        """Take a comparison off the list. Its folder stays where it is."""
        with self._open() as base:
            base.execute("DELETE FROM comparisons WHERE id = ?", (number,))

    def adopt(self, folder: Path) -> int:
        """Enter a finished comparison made elsewhere, such as by the command line; again if it is there already."""
        folder = Path(folder)
        report = read_report(folder / "report.json")
        created = datetime.fromisoformat(report["created"])
        request = {"workflow": folder.name, "command": report["command"], "prompts": report["settings"]["prompts"]}
        row = {
            "started": created.isoformat(timespec="seconds"), "began": created.timestamp(), "workflow": folder.name,
            "request": json.dumps(request), "words": _words_of(request), "state": BUSY,
        }  # fmt: skip
        number = self._enter(folder, row)
        self.finish(number, report)
        return number

    # Reading

    def list(self, limit: int = 200, search: str = "") -> list[Entry]:
        """The newest first; `search` is looked for in workflow, prompts, summary, machine and day."""
        places = " || ' ' || ".join(("workflow", "words", "summary", "machine", "started", "state"))
        clauses, values = [], []
        for word in search.split():
            clauses.append(f"{places} LIKE ? ESCAPE '\\'")
            escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            values.append(f"%{escaped}%")
        where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
        query = f"SELECT {COLUMNS} FROM comparisons {where} ORDER BY began DESC, id DESC LIMIT ?"
        with self._open() as base:
            rows = base.execute(query, (*values, limit)).fetchall()
        return [self._entry(row) for row in rows]

    def entry(self, number: int) -> Entry:
        """One comparison by its number."""
        return self._entry(self._row(number, COLUMNS))

    def open(self, number: int) -> tuple[Report, Path]:
        """Report and folder of a comparison; raises `ReportError` when it has none or the folder is gone."""
        folder = self._path(self._row(number, "folder")[0])
        if not (folder / "report.json").exists():
            why = "it has no report yet" if folder.is_dir() else f"its folder {folder} is gone"
            raise ReportError(f"Comparison {number} cannot be opened: {why}.")
        return read_report(folder / "report.json"), folder

    def request(self, number: int) -> dict[str, Any]:
        """What was asked for."""
        return json.loads(self._row(number, "request")[0])

    def across(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """One row per comparison and arm, for comparing days and machines.

        Speed-ups of different machines stand side by side as they are; seconds do not, so `note` says where the machine or its
        software is another one than that of the first comparison, and where the plain arms did not do the same work.
        """
        rows, first = [], None
        for number in numbers:
            started, workflow, machine, digest = self._row(number, "started, workflow, machine, digest")
            known = json.loads(digest)
            first = first or known
            for arm in known.get("arms", []):
                same = known.get("machine") == first.get("machine")
                rows.append(
                    {"id": number, "started": started, "workflow": workflow, "machine": machine, "same_machine": same,
                     "software": known.get("software", ""), "note": _note(known, first), **arm}
                )  # fmt: skip
        return rows

    # The file

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own per use, committed at the end: pages and comparisons live in different threads."""
        with self._words(), closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as base, base:
            yield base

    @contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ReportError(
                f"The history {self.path} cannot be used ({error}). Reports are not touched by that; move the file away to begin "
                "a new history."
            ) from error

    def _enter(self, folder: Path, row: dict[str, Any]) -> int:
        """A new row, or the one this folder has."""
        row = {"folder": self._stored(folder), **row}
        with self._open() as base:
            base.execute("BEGIN IMMEDIATE")
            known = base.execute("SELECT id FROM comparisons WHERE folder = ?", (row["folder"],)).fetchone()
            if known is not None:
                sets = ", ".join(f"{name} = ?" for name in row)
                base.execute(f"UPDATE comparisons SET {sets} WHERE id = ?", (*row.values(), known[0]))
                return int(known[0])
            marks = ", ".join("?" * len(row))
            cursor = base.execute(f"INSERT INTO comparisons ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
            return int(cursor.lastrowid or 0)

    def _change(self, number: int, row: dict[str, Any]) -> None:
        sets = ", ".join(f"{name} = ?" for name in row)
        with self._open() as base:
            base.execute(f"UPDATE comparisons SET {sets} WHERE id = ?", (*row.values(), number))

    def _row(self, number: int, columns: str) -> tuple[Any, ...]:
        with self._open() as base:
            row = base.execute(f"SELECT {columns} FROM comparisons WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise ReportError(f"There is no comparison {number} in the history.")
        return row

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        number, started, state, workflow, summary, machine, ratio, psnr, folder, began = row
        path = self._path(folder)
        if state == BUSY and time.time() - began > GRACE_SECONDS and not is_locked(path):
            state, summary = INTERRUPTED, summary or "Broke off; the finished measurements are kept and can be continued."
        return Entry(number, started, state, workflow, summary, machine, ratio, psnr, path)

    def _stored(self, folder: Path) -> str:
        folder = folder.absolute()
        return str(folder.relative_to(self.path.parent)) if folder.is_relative_to(self.path.parent) else str(folder)

    def _path(self, stored: str) -> Path:
        return Path(os.path.normpath(self.path.parent / stored))


@contextmanager
def entered(path: Path | None, folder: Path, request: dict[str, Any]) -> Iterator[Callable[[Report], None]]:
    """A comparison in the history `path` from beginning to end, however it ends; None leaves it out.

    Yields what takes the report. Whoever cancels leaves the comparison stopped, and it can be continued.
    """
    if path is None:
        yield lambda report: None
        return
    history = History(path)
    number = history.begin(folder, request)
    try:
        yield lambda report: history.finish(number, report)
    except (Stopped, KeyboardInterrupt):
        history.stopped(number)
        raise
    except Exception as error:
        history.fail(number, str(error) or error.__class__.__name__)
        raise


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _workflow_name(request: dict[str, Any]) -> str:
    return str(request.get("workflow") or "workflow")[:200]


def _words_of(request: dict[str, Any]) -> str:
    """What can be searched for beside the columns: the prompts."""
    prompts = request.get("prompts") or []
    return " ".join(str(prompt) for prompt in prompts)[:10_000] if isinstance(prompts, list | tuple) else ""


def _facts(report: Report) -> dict[str, Any]:
    """The columns that come out of a report."""
    lead = next((arm for arm in report["arms"] if arm["role"] == "accelerated"), None)
    lead = lead or next((arm for arm in report["arms"] if arm["role"] == "fewer-steps"), None)
    numbers = _arm_facts(lead) if lead else {"ratio": None, "psnr": None}
    machine = machine_of(report)
    digest = {
        "machine": machine, "software": software_of(report), "work": _work(report["settings"]),
        "arms": [_arm_facts(arm) for arm in report["arms"] if arm["runs"]],
    }  # fmt: skip
    return {
        "summary": (report["headline"] or [""])[0], "machine": machine, "ratio": numbers["ratio"],
        "psnr": from_json_number(numbers["psnr"]), "digest": json.dumps(digest),
    }  # fmt: skip


def machine_of(report: Report) -> str:
    """Device and, where known, processor of a report in one line."""
    server = report["server"]
    devices = " + ".join(device["name"] for device in server["devices"] if device["type"] != "cpu")
    processor = server.get("processor") or ("" if devices else "processor")
    return ", ".join(part for part in (devices, processor) if part)


def software_of(report: Report) -> str:
    """Versions of a report in one line."""
    return f"ComfyUI {report['server']['comfyui']}, PyTorch {report['server']['pytorch']}"


def _work(settings: dict[str, Any]) -> list[Any]:
    """What the plain arm does, as far as it decides about seconds."""
    return [settings.get(name) for name in ("steps", "batch", "frames", "sampler", "scheduler", "cfg")]


def _arm_facts(arm: dict[str, Any]) -> dict[str, Any]:
    where = "sampler" if arm["seconds"]["sampler"] else "total"
    seconds, ratio = arm["seconds"][where], arm["ratio"][where]
    quality = {name: found and found["mean"] for name, found in arm["quality"].items()}
    return {
        "arm": arm["label"], "role": arm["role"], "timing": where, "verdict": arm["verdict"],
        "seconds": seconds and seconds["median"], "ratio": ratio and ratio["median"],
        "low": ratio and ratio["low"], "high": ratio and ratio["high"], **quality,
    }  # fmt: skip


def _note(known: dict[str, Any], first: dict[str, Any]) -> str:
    """How a comparison differs from the first one."""
    differences = []
    if known.get("machine") != first.get("machine"):
        differences.append("another machine: compare speeds, not seconds")
    elif known.get("software") != first.get("software"):
        differences.append("other software")
    if known.get("work") != first.get("work"):
        differences.append("other steps, batch or sampler")
    return "; ".join(differences)
