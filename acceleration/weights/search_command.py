"""The search for coefficients on the command line: every point is a file that the user's own command measures."""

import argparse
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import StrettoError
from .combining import Combination, Progress, open_combination, write_combination
from .search import Search, SearchSettings, usual_starts

FILE = "{file}"
CANCELLED = 130
_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 320, 70, 40


def run_search(args: argparse.Namespace, say: Callable[[str], None], progress: Progress) -> int:
    """Handle `combine-search`."""
    out, keep = args.out, args.keep or args.out.with_suffix(".search.json")
    if out.exists() and not args.replace:
        raise StrettoError(f"{out}: exists already; name another file, or say --replace")
    scratch = args.scratch or out.parent
    if not scratch.is_dir():
        raise StrettoError(f"{scratch}: there is no such folder")
    command = _command(args.metric)
    count = len(args.files)
    if count < 2:
        raise StrettoError(f"{args.files[0]}: one file has nothing to be combined with; name at least two")
    settings = SearchSettings(args.generations, args.population, spread=args.spread, seed=args.seed)
    sign, starts = (-1.0 if args.maximize else 1.0), usual_starts(count)
    with open_combination(args.files, [1 / count] * count) as group:
        subject = [*(f"{path.name} {path.stat().st_size}" for path in args.files), args.metric, str(bool(args.maximize))]
        search = Search.open(count, settings, keep, subject)
        total, known = search.total(starts), len(search.points)
        say(f"{count} {'LoRAs' if group.lora else 'checkpoints'}, {total} evaluations" + (f", {known} known" if known else ""))
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".combine-search-") as folder:

            def evaluate(point: tuple[float, ...]) -> float:
                metric = sign * measure(group, point, Path(folder), command, progress)
                number = len(search.points) + 1
                best = min([metric, *(value for _, value in search.points)])
                left = (time.monotonic() - begun) / (number - known) * (total - number)
                say(f"evaluation {number} of {total}: {sign * metric:.6g}, best {sign * best:.6g}, {_minutes(left)} left")
                return metric

            try:
                point, metric = search.run(evaluate, starts)
            except KeyboardInterrupt:
                say(f"stopped; {len(search.points)} evaluations are kept in {keep}, the same command goes on from there")
                return CANCELLED
        target = write_combination(replace(group, coefficients=point), out, args.replace, progress)
    if args.curve:
        args.curve.write_text(curve_picture([sign * value for value in search.curve], count), encoding="utf-8")
        say(f"{args.curve}: the curve")
    single = min(metric for _, metric in search.points[:count])
    say(f"best {sign * metric:.6g}; the best single file has {sign * single:.6g}")
    say("weights " + " ".join(f"{value:.6g}" for value in point))
    say(f"{target}: {target.stat().st_size / 1e6:,.1f} MB written; all evaluations are in {keep}")
    return 0


def measure(
    group: Combination, point: tuple[float, ...], folder: Path, command: Sequence[str], progress: Progress
) -> float:
    """Write a combination into ``folder``, run the command on it, and return the last number that it printed.

    Raises:
        StrettoError: the command cannot be run, fails, or prints no number.
    """
    path = write_combination(replace(group, coefficients=point), folder / "candidate.safetensors", True, progress)
    words = [word.replace(FILE, str(path)) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise StrettoError(f"the metric command {words[0]!r:.200} cannot be run ({error.strerror})") from None
    finally:
        path.unlink(missing_ok=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise StrettoError(
            f"the metric command ended with status {done.returncode}{': ' + said[0][:200] if said else ''}; what was evaluated "
            "is kept"
        )
    try:
        return float(lines[-1].split()[-1])
    except (IndexError, ValueError):
        shown = repr(lines[-1][:80]) if lines else "nothing"
        raise StrettoError(f"the metric command must print a number as its last word; it printed {shown}") from None


def _command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        raise StrettoError(f"--metric {text!r:.200}: a quotation mark is open") from None
    if not words:
        raise StrettoError("--metric is empty; name a command that prints a number for a file")
    return words if any(FILE in word for word in words) else [*words, FILE]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def curve_picture(curve: Sequence[float], singles: int) -> str:
    """Return the best metric after each evaluation as an SVG document; the first ``singles`` points are files alone."""
    low, high = min(curve), max(curve)
    span = high - low or 1.0
    width, height = _WIDTH - _LEFT - 20, _HEIGHT - _TOP - 50

    def place(index: int, value: float) -> str:
        x = _LEFT + width * index / max(len(curve) - 1, 1)
        return f"{x:.1f},{_TOP + height * (high - value) / span:.1f}"

    steps = [place(0, curve[0])]
    for index in range(1, len(curve)):
        steps += [place(index, curve[index - 1]), place(index, curve[index])]
    border = float(place(singles - 1, low).partition(",")[0])
    text = 'font-family="sans-serif" font-size="13" fill="#dddddd"'
    words = [
        (_LEFT, 24, "start", f"Best metric, {len(curve)} evaluations"),
        (_LEFT - 8, _TOP + 5, "end", f"{high:.5g}"),
        (_LEFT - 8, _TOP + height + 5, "end", f"{low:.5g}"),
        (border, _TOP + height + 22, "middle", f"{singles} files alone"),
        (_LEFT + width, _TOP + height + 22, "end", f"{len(curve)}"),
    ]
    body = "".join(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" {text}>{line}</text>' for x, y, anchor, line in words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<rect width="100%" height="100%" fill="#1b1b1f"/>'
        f'<path d="M{border:.1f},{_TOP} v{height}" stroke="#55556a" stroke-dasharray="4 4"/>'
        f'<path d="M{_LEFT},{_TOP} v{height} h{width}" stroke="#888899" fill="none"/>'
        f'<polyline points="{" ".join(steps)}" fill="none" stroke="#e69f00" stroke-width="2"/>{body}</svg>\n'
    )
