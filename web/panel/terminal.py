"""Reports and progress in a terminal, or as lines in a log where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .measure.compare import Progress, ProgressCallback
from .measure.report import Report
from .measure.table import columns, format_ratio, format_seconds

LOG_WIDTH = 120
VERDICT_STYLES = {"faster": "bold green", "slower": "bold red"}


def print_report(report: Report, console: Console) -> None:
    """The table of a report with one column per arm, the ceilings, and every note."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    rows = columns(report)
    table.add_column("", no_wrap=True)
    for arm in report["arms"]:
        table.add_column(rows[0].cell(arm))
    for row in rows[1:]:
        cells = [row.cell(arm) for arm in report["arms"]]
        style = (lambda arm: VERDICT_STYLES.get(arm["verdict"], "")) if row.title == "Verdict" else (lambda arm: "")
        table.add_row(
            row.title,
            *(
                f"[{style(arm)}]{_plain(cell)}[/]" if style(arm) else _plain(cell)
                for arm, cell in zip(report["arms"], cells)
            ),
        )
    console.print(table)
    for arm in report["arms"]:
        if arm["ceiling"]:
            console.print(
                f"{_plain(arm['label'])}: a skipped evaluation takes {100 * arm['ceiling']['share_of_skipped']:.1f} % "
                f"of a computed one; the ceiling is {format_ratio(arm['ceiling']['ratio'])}.",
                highlight=False,
            )
        for note in arm["notes"]:
            console.print(_plain(note), highlight=False)
    for sentence in [*report["headline"], *report["notes"]]:
        console.print(_plain(sentence), highlight=False)


def print_paths(folder: Path, console: Console) -> None:
    """Where the report lies."""
    for name in ("index.html", "report.json"):
        console.print(f"wrote {_plain(str(folder / name))}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """Keep rich from reading square brackets as markup."""
    return text.replace("[", r"\[")


def output_console(stderr: bool = False) -> Console:
    """A console of the terminal's width, or wide enough for the table where the output goes to a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=LOG_WIDTH)


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressCallback]:
    """A live bar in a terminal; elsewhere one line per finished run."""
    if not console.is_terminal:
        yield lambda progress: _log(progress, console)
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=None)
        yield lambda progress: bar.update(
            task, total=progress.total, completed=progress.done, description=_describe(progress)
        )


def _describe(progress: Progress) -> str:
    """Phase, arm and step of the run in progress."""
    step = f", step {progress.step} of {progress.steps}" if progress.steps else ""
    return _plain(f"{progress.phase}: {progress.arm}{step}")


def _log(progress: Progress, console: Console) -> None:
    """One line for a finished run; nothing for a step."""
    run = progress.finished
    if run is None:
        return
    seconds = run.sampler_seconds if run.sampler_seconds is not None else run.seconds
    console.print(
        _plain(
            f"{progress.phase} {progress.done}/{progress.total}: {progress.arm}, “{run.prompt}”, "
            f"{format_seconds(seconds)} s"
        ),
        highlight=False,
        soft_wrap=True,
    )
