"""Talking to the person in front of the terminal, and running slow commands without falling silent."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

QUIET_INTERVAL = 15.0
"""Seconds between signs of life when the output is a file or a pipe."""


class SetupError(Exception):
    """Something a person has to decide or repair; its text is one clear sentence."""


def say(message: str) -> None:
    """Print one line at once, also through a pipe."""
    print(message, flush=True)


class Progress:
    """One line that keeps changing on a terminal; a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()
        self._live = sys.stdout.isatty()
        self._last = self.started
        self._width = 0

    @property
    def seconds(self) -> float:
        """Seconds since this progress line was made."""
        return time.monotonic() - self.started

    def update(self, detail: str) -> None:
        """Show what is going on right now."""
        text = f"  {self.label}: {detail} ({clock(self.seconds)})"
        if self._live:
            text = text[:118]
            sys.stdout.write("\r" + text.ljust(self._width))
            sys.stdout.flush()
            self._width = len(text)
        elif time.monotonic() - self._last >= QUIET_INTERVAL:
            self._last = time.monotonic()
            say(text)

    def close(self) -> None:
        """Leave the terminal on an empty line."""
        if self._live and self._width:
            sys.stdout.write("\r" + " " * self._width + "\r")
            sys.stdout.flush()
            self._width = 0


def clock(seconds: float) -> str:
    """Return '7 s' or '2 min 05 s'."""
    whole = int(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def run_logged(
    command: Sequence[str],
    log: Path,
    progress: Progress,
    summarize: Callable[[str], str | None],
    env: dict[str, str] | None = None,
) -> int:
    """Run `command`, write all it prints to `log`, show what `summarize` makes of it; return its exit status.

    `summarize` gets each line and returns a short text to show, or None to keep the last one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_forward_lines, args=(process, lines), daemon=True)
    reader.start()
    shown = "starting"
    try:
        with log.open("w", encoding="utf-8") as file:
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    progress.update(shown)
                    continue
                if line is None:
                    break
                file.write(line)
                shown = summarize(line.strip()) or shown
                progress.update(shown)
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        progress.close()


def _forward_lines(process: subprocess.Popen, lines: "queue.Queue[str | None]") -> None:
    """Put every line of the process into the queue, then None."""
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
