"""What the page shows: pure functions from the session's state to HTML and component updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .measure.compare import Progress
from .measure.gallery import clip_view, is_clips
from .measure.metrics import read_rgb
from .measure.pictures import TINY, enlarge
from .measure.report import Report, clip_html, table_html, timeline_rows
from .measure.table import format_seconds
from .measure.timeline import timeline_svg
from .session import State, export_path


@dataclass(frozen=True)
class Page:
    """Updates of the right column; whatever is not given stays as it is."""

    progress: Any = field(default_factory=gr.skip)
    picture: Any = field(default_factory=gr.skip)
    slider: Any = field(default_factory=gr.skip)
    clip: Any = field(default_factory=gr.skip)
    table: Any = field(default_factory=gr.skip)
    timeline: Any = field(default_factory=gr.skip)
    export: Any = field(default_factory=gr.skip)

    def updates(self) -> list[Any]:
        """In the order of the page's outputs."""
        return [self.progress, self.picture, self.slider, self.clip, self.table, self.timeline, self.export]


def page_of(state: State) -> Page:
    """The page for a look at the session."""
    if state.running:
        return Page(progress=running(state.progress))
    if state.error:
        return Page(progress=failure(state.error))
    if state.report is None or state.folder is None:
        return Page(progress=idle())
    choices = choices_of(state.report)
    return Page(
        progress=finished(state.report),
        picture=gr.Dropdown(
            choices=choices,
            value=choices[0] if choices else None,
            visible=len(choices) > 1,
            label="Clip" if is_clips(state.report) else "Picture",
        ),
        slider=slider_of(state.report, state.folder, choices[0] if choices else ""),
        clip=clip_of(state.report, state.folder, choices[0] if choices else ""),
        table=f'<div class="stretto embedded">{table_html(state.report)}</div>',
        timeline=f'<div class="stretto embedded"><div class="scroll">{timeline_svg(timeline_rows(state.report))}</div></div>',
        export=gr.DownloadButton(value=str(export_path(state.folder)), visible=True),
    )


def status(server: str, facts: dict[str, Any] | None, problem: str | None) -> str:
    """The line about the server."""
    if facts is None:
        return f'<p><span class="dot bad"></span>{escape(problem or "")}</p>'
    device = facts["devices"][0]["name"] if facts["devices"] else "unknown device"
    pack = "" if facts["timing"] == "sampler" else " · without the Stretto nodes: total time only"
    return (
        f'<p><span class="dot good"></span>{escape(server)} · ComfyUI {escape(facts["comfyui"])} · '
        f"{escape(device)}{pack}</p>"
    )


def idle() -> str:
    """Before the first run."""
    return '<p class="line">Press Run: both ways run in turn, the first round is discarded, and the results appear here.</p>'


def stopping() -> str:
    """Between the stop and the last run's end."""
    return '<p class="line">Stopping…</p>'


def failure(message: str) -> str:
    """One sentence about what went wrong."""
    return f'<p class="line bad" role="alert">{escape(message)}</p>'


def running(progress: Progress | None) -> str:
    """A bar and a line about the run in progress."""
    if progress is None:
        return '<p class="line">Starting…</p>'
    share = progress.step / progress.steps if progress.steps else 0.0
    percent = 100 * min(1.0, (progress.done + (share if progress.finished is None else 0.0)) / max(progress.total, 1))
    step = f", step {progress.step} of {progress.steps}" if progress.steps else ""
    last = ""
    if progress.finished is not None:
        seconds = progress.finished.sampler_seconds or progress.finished.seconds
        last = f", {format_seconds(seconds)} s"
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<i style="width:{percent:.1f}%"></i></div><p class="line">Run {min(progress.done + 1, progress.total)} of '
        f"{progress.total} ({escape(progress.phase)}): {escape(progress.arm)}{step}{last} · “{escape(progress.prompt)}”</p>"
    )


def finished(report: Report) -> str:
    """The headline, and whatever the reader has to know about it."""
    first = "".join(f"<p>{escape(sentence)}</p>" for sentence in report["headline"])
    notes = "".join(
        f'<p class="note">{escape(note)}</p>'
        for note in [*report["notes"], *(note for arm in report["arms"] for note in arm["notes"])]
    )
    return f'<div class="headline">{first}{notes}</div>'


# Pictures and clips


def choices_of(report: Report) -> list[str]:
    """One choice per prompt and seed that has both pictures or clips."""
    return [_choice(cell) for cell in report["cells"] if _pair(report, cell) is not None]


def _choice(cell: dict[str, Any]) -> str:
    return f"{cell['prompt']} (seed {cell['seed']})"


def _rival(report: Report) -> str | None:
    """Name of the arm that is shown beside the plain one."""
    return next((arm["name"] for arm in report["arms"] if arm["role"] == "accelerated"), None)


def _pair(report: Report, cell: dict[str, Any]) -> tuple[str, str] | None:
    """Files of the plain and the first accelerated picture of a cell."""
    rival, pictures = _rival(report), cell["pictures"]
    if rival not in pictures or "plain" not in pictures:
        return None
    return pictures["plain"]["files"][0], pictures[rival]["files"][0]


def slider_of(report: Report, folder: Path, choice: str) -> Any:
    """The slider for a choice; it cannot show anything that moves, so it hides for clips."""
    clips = is_clips(report)
    return gr.update(value=None if clips else slider_pair(report, folder, choice), visible=not clips)


def clip_of(report: Report, folder: Path, choice: str) -> Any:
    """Both clips of a choice and their difference, moving side by side; hidden where there are only pictures."""
    for cell in report["cells"] if is_clips(report) else []:
        if _pair(report, cell) is not None and _choice(cell) == choice:
            view = clip_view(report, folder, cell, ("plain", _rival(report)))
            return gr.update(value=f'<div class="stretto embedded">{clip_html(view)}</div>', visible=True)
    return gr.update(visible=False)


def slider_pair(report: Report | None, folder: Path | None, choice: str) -> tuple[Image.Image, Image.Image] | None:
    """Both pictures of a choice, enlarged pixel by pixel when they are tiny."""
    if report is None or folder is None:
        return None
    for cell in report["cells"]:
        pair = _pair(report, cell)
        if pair is not None and _choice(cell) == choice:
            first, second = (_shown(read_rgb((folder / name).read_bytes())) for name in pair)
            return first, second
    return None


def _shown(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(enlarge(pixels) if max(pixels.shape[:2]) <= TINY else pixels)
