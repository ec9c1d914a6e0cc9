"""Runs suites one after the other, each script in a process of its own with a time limit, and remembers how each ended."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import ROOT
from .machine import load, machine, now
from .suites import Job, Suite

FINISHED, FAILED, TIMED_OUT, INTERRUPTED, ABSENT = "finished", "failed", "timed out", "interrupted", "absent"
STATE = "run.json"
#: Lines of a script's output that are shown where it failed.
SHOWN = 15


class Runner:
    """One run of the lab in one folder: `NAME.json` and `NAME.log` per job, and `run.json`, which knows how each suite ended.

    Args:
        folder: where everything is written.
        size: "quick", "usual" or "full".
        seconds: the most that all suites together may take.
        tell: takes a line for whoever watches.
    """

    def __init__(self, folder: Path, size: str, seconds: float, tell: Callable[[str], None] = print):
        self.folder, self.size, self.tell = folder, size, tell
        self.ends = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.state = self._read() or {"size": size, "started": now(), "machine": machine(), "suites": {}}
        if self.state["size"] != size:
            raise ValueError(f"{folder} holds a {self.state['size']} run; it cannot go on as a {size} one")
        self._save()

    def run(self, suites: list[Suite]) -> bool:
        """Run what has not finished in this folder yet; return whether every suite that is there finished.

        Raises:
            KeyboardInterrupt: after what was running has been ended and noted.
        """
        self.state["wanted"] = [suite.name for suite in suites]
        self._save()
        todo = [suite for suite in suites if self.status(suite) != FINISHED]
        for suite in suites:
            if suite not in todo:
                self.tell(f"{suite.name}: finished before")
        for place, suite in enumerate(todo):
            left = min(sum(one.limit(self.size) for one in todo[place:]), self.ends - time.monotonic())
            self.tell(f"\n[{place + 1} of {len(todo)}] {suite.title} (at most {_clock(suite.limit(self.size))}; "
                      f"all that is left: at most {_clock(left)})")  # fmt: skip
            self._suite(suite)
        return all(self.status(suite) in (FINISHED, ABSENT) for suite in suites)

    def status(self, suite: Suite) -> str | None:
        """Return how a suite ended, None where it never ran."""
        return self.state["suites"].get(suite.name, {}).get("status")

    def ended(self) -> str:
        """Return one line per suite."""
        lines = []
        for name, entry in self.state["suites"].items():
            words = f"  {entry['reason']}" if entry.get("reason") else ""
            lines.append(f"{entry['status']:12} {name:14} {_clock(entry['seconds']):>8}{words}")
        return "\n".join(lines)

    def _suite(self, suite: Suite) -> None:
        started = time.monotonic()
        jobs = [job for job in suite.jobs if job.arguments(self.size) is not None]
        there = [job for job in jobs if job.is_there()]
        status, reason = FINISHED, ""
        if not jobs:
            reason = f"the {self.size} size leaves it out"
        elif not there:
            status, reason = ABSENT, f"benchmarks/{jobs[0].script}.py is not there"
        limit = min(started + suite.limit(self.size), self.ends)
        for job in there:
            try:
                status, reason = self._job(suite, job, limit - time.monotonic())
            except KeyboardInterrupt:
                self._note(suite, INTERRUPTED, f"in {job.script}", started)
                raise
            if status != FINISHED:
                break
        self._note(suite, status, reason, started)
        self.tell(f"{suite.name}: {status} after {_clock(time.monotonic() - started)}" + (f", {reason}" if reason else ""))

    def _job(self, suite: Suite, job: Job, seconds: float) -> tuple[str, str]:
        """Run one script; return how it ended and why."""
        if seconds <= 0:
            return TIMED_OUT, f"no time was left for {job.script}"
        result = self.folder / f"{job.result}.json"
        result.unlink(missing_ok=True)  # what a broken attempt left would count as this one's
        words = [f"benchmarks/{job.script}.py", *job.arguments(self.size)]
        command = [sys.executable, *words, job.out, str(result)]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        began, busy, before = time.monotonic(), load(), os.times()
        log = self.folder / f"{job.result}.log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = self._wait(process, job, began + seconds)
        taken, after = time.monotonic() - began, os.times()
        stamp = {
            "suite": suite.name, "size": self.size, "command": shlex.join([".venv/bin/python", *words]), "date": now(),
            "seconds": round(taken, 1), "load_before": busy,
            "processor_seconds": round(sum(after[2:4]) - sum(before[2:4]), 1), "seeds": suite.seeds,
            "complete": code == 0,
            "machine": self.state["machine"],
        }  # fmt: skip
        written = _stamp(result, stamp)
        if code is None:
            return TIMED_OUT, f"{job.script} had {_clock(seconds)}" + ("; what it had written is kept" if written else "")
        if code != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
            self.tell("\n".join(f"    {line}" for line in tail))
            return FAILED, f"{job.script} ended with {code}; see {log}"
        return (FINISHED, "") if written else (FAILED, f"{job.script} wrote no {result.name}")

    def _wait(self, process: subprocess.Popen, job: Job, until: float) -> int | None:
        """Wait and tell now and then; return the exit status, None where the time was up."""
        begun = told = time.monotonic()
        try:
            while process.poll() is None:
                current = time.monotonic()
                if current > until:
                    return None
                if current - told > 30:
                    told = current
                    self.tell(f"    {job.script}: {_clock(current - begun)}, at most {_clock(until - current)} more")
                time.sleep(0.2)
            return process.returncode
        finally:
            if process.poll() is None:
                _end(process)

    def _note(self, suite: Suite, status: str, reason: str, started: float) -> None:
        self.state["suites"][suite.name] = {
            "status": status, "reason": reason, "seconds": round(time.monotonic() - started, 1), "date": now(),
        }  # fmt: skip
        self._save()

    def _read(self) -> dict | None:
        file = self.folder / STATE
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _save(self) -> None:
        write_json(self.folder / STATE, self.state)


def write_json(path: Path, document: dict) -> None:
    """Write through a file beside it, so that nothing is lost in between."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def _stamp(path: Path, stamp: dict) -> bool:
    """Put into a result what it was measured with; return whether there was a result."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        path.unlink(missing_ok=True)  # half a file is no result
        return False
    write_json(path, {**document, "lab": stamp})
    return True


def _end(process: subprocess.Popen) -> None:
    """End a script and everything it started, gently first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=10)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"
