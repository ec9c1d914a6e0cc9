#!/usr/bin/env python3
"""The test programme behind ./test.sh: bootstrap, lint, then the suites, each in the environment it belongs to.

    run_tests.py        everything
    run_tests.py fast   under two minutes: no server, no browser, nothing marked slow
    run_tests.py e2e    one of: lint, engine, panel, gpu, e2e

gpu compares kernels and runs on CUDA with the same on the CPU; without a CUDA device it skips, and says so.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.console import SetupError, clock, say
from launch.installation import Installation, Wishes, prepare
from launch.pins import ROOT

# Everything except these runs in ComfyUI's environment, in one pytest process.
SEPARATE = ("panel", "e2e", "gpu")
NOTHING_COLLECTED = 5


@dataclass(frozen=True)
class Suite:
    """A named command and the seconds it took."""

    name: str
    command: tuple[str, ...]


def _pytest(python: Path) -> str:
    """The pytest program beside an interpreter. (`python -m pytest` would put the checkout on the import path, where
    its `nodes` hides ComfyUI's.)"""
    return str(python.with_name("pytest.exe" if python.suffix == ".exe" else "pytest"))


def suites(installation: Installation, choice: str) -> list[Suite]:
    """Return what to run for 'all', 'fast' or the name of one suite."""
    python = str(installation.python)
    pytest, panel_pytest = _pytest(installation.python), _pytest(installation.panel_python)
    folders = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and path.name not in SEPARATE and any(path.rglob("test_*.py"))
    )
    quick = ("-m", "not slow and not e2e") if choice == "fast" else ()
    every = [
        Suite("lint", (python, "-m", "ruff", "check", ".")),
        Suite("engine", (pytest, "-q", *quick, *folders)),
        Suite("panel", (panel_pytest, "-q", *quick, "tests/panel")),
        Suite("gpu", (pytest, "-q", "-m", "gpu", "tests/engine", "tests/gpu")),
        Suite("e2e", (pytest, "-q", "tests/e2e")),
    ]
    if choice == "all":
        return every
    if choice == "fast":
        return [suite for suite in every if suite.name not in ("gpu", "e2e")]
    return [suite for suite in every if suite.name == choice]


def run(suite: Suite) -> tuple[bool, str]:
    """Run one suite with its output visible; return whether it passed, and pytest's own summary."""
    say(f"\n== {suite.name}: {' '.join((Path(suite.command[0]).name, *suite.command[1:]))}")
    # Threads that spin while they wait make two torch processes on two cores many times slower than one.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    process = subprocess.Popen(
        suite.command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = ""
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        if not line.startswith("[*]"):  # ruff's hint after its summary
            last = line.strip(" =\n") or last
    status = process.wait()
    return status == 0, last if status != NOTHING_COLLECTED else "no tests were found"


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog="test.sh", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="all", choices=["all", "fast", "lint", "engine", "panel", "gpu", "e2e"])
    arguments = parser.parse_args()
    started = time.monotonic()
    results: list[tuple[str, bool, str, float]] = []
    try:
        for suite in suites(prepare(Wishes(dev=True)), arguments.what):
            before = time.monotonic()
            passed, summary = run(suite)
            results.append((suite.name, passed, summary, time.monotonic() - before))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    say("")
    for name, passed, summary, seconds in results:
        say(f"{'passed' if passed else 'FAILED':7} {name:8} {clock(seconds):>12}  {summary}")
    failed = [name for name, passed, _, _ in results if not passed]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "All passed"
    say(f"{verdict} after {clock(time.monotonic() - started)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
