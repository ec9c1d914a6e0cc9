"""The right side of the page: how a run goes, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from . import downloads, pairs, views
from .measure.errors import MeasureError
from .measure.front import front_svg
from .measure.gallery import is_clips
from .measure.report import table_html, timeline_rows
from .measure.timeline import timeline_svg
from .session import Session, Shown, State

SLIDER_HEIGHT = 560


@dataclass(frozen=True)
class Results:
    """What the page shows; the order of the fields is the order of updates. `entry` says which comparison it is."""

    entry: gr.State
    run: gr.Button
    stop: gr.Button
    progress: gr.HTML
    outcome: gr.Column
    headline: gr.HTML
    picture: gr.Dropdown
    left: gr.Dropdown
    right: gr.Dropdown
    slider: gr.ImageSlider
    clip: gr.HTML
    beside: gr.Column
    maps: gr.HTML
    table: gr.HTML
    front: gr.HTML
    timeline: gr.HTML
    html: gr.DownloadButton
    json: gr.DownloadButton
    csv: gr.DownloadButton
    arm: gr.Dropdown
    drawing: gr.DownloadButton

    def outputs(self) -> list[Any]:
        """All components, in order."""
        return [getattr(self, field.name) for field in fields(self)]


def update(**values: Any) -> list[Any]:
    """Updates in the order of `Results.outputs`; what is not named stays as it is."""
    return [values.get(field.name, gr.skip()) for field in fields(Results)]


def build() -> Results:
    """Lay the components out; everything below the progress hides until there is something to show."""
    entry = gr.State(None)
    with gr.Row(elem_classes="go"):
        run = gr.Button("Run", variant="primary", elem_id="run", min_width=100)
        stop = gr.Button("Stop", variant="secondary", elem_id="stop", min_width=100)
    progress = gr.HTML(views.idle(), elem_id="progress")
    with gr.Column(visible=False, elem_classes="outcome") as outcome:
        headline = gr.HTML(elem_id="headline")
        with gr.Row(elem_classes="take"):
            html = gr.DownloadButton("Report (HTML)", variant="primary", size="md", min_width=90, elem_id="export")
            json = gr.DownloadButton("JSON", size="md", min_width=60, elem_id="export-json")
            csv = gr.DownloadButton("CSV", size="md", min_width=60, elem_id="export-csv")
        with gr.Group(elem_classes="choose"), gr.Row():
            left = gr.Dropdown([], label="Left", min_width=120, elem_id="left")
            right = gr.Dropdown([], label="Right", min_width=120, elem_id="right")
            picture = gr.Dropdown([], label="Picture", min_width=160, elem_id="picture")
        with gr.Row(elem_classes="pictures"):
            with gr.Column(scale=3, min_width=300):
                slider = gr.ImageSlider(
                    show_label=False, interactive=False, format="png", type="pil", max_height=SLIDER_HEIGHT,
                    elem_id="slider", buttons=["fullscreen"],
                )  # fmt: skip
                clip = gr.HTML(visible=False, elem_id="clip")
            with gr.Column(scale=2, min_width=260) as beside:
                maps = gr.HTML(elem_id="maps")
        table = gr.HTML(elem_id="table")
        front = gr.HTML(elem_id="front")
        timeline = gr.HTML(elem_id="timeline")
        with gr.Row(elem_classes="save"):
            arm = gr.Dropdown([], label="Save a variant as workflow", min_width=160, elem_id="arm", scale=3)
            drawing = gr.DownloadButton("Save", size="md", min_width=80, elem_id="drawing", scale=1)
    return Results(
        entry, run, stop, progress, outcome, headline, picture, left, right, slider, clip, beside, maps, table, front, timeline,
        html, json, csv, arm, drawing,
    )  # fmt: skip


# What is shown


def page_of(session: Session, state: State) -> list[Any]:
    """Updates for a look at the session."""
    if state.running:
        return update(progress=views.running(state.progress, state.picture))
    if state.error:
        return update(progress=views.trouble(state.error))
    if state.entry is None:
        return update(progress=views.idle())
    return opened(session, state.entry)


def opened(session: Session, entry: int) -> list[Any]:
    """Updates that show a comparison of the history; a sentence when it cannot be read."""
    try:
        return _opened(session, session.shown(entry))
    except MeasureError as error:
        return update(progress=views.trouble(str(error)))
    except OSError as error:
        return update(progress=views.trouble(f"That comparison cannot be read: {error.strerror or error}."))


def _opened(session: Session, shown: Shown) -> list[Any]:
    report, folder = shown.report, shown.folder
    cells, arms, (left, right) = pairs.cells_of(report), pairs.arms_of(report), pairs.first_pair(report)
    cell = cells[0][1] if cells else None
    html, json, csv = downloads.write(report, folder)
    saved = [(row["label"], row["name"]) for row in report["arms"] if row["role"] != "reference"]
    saveable = next((name for _, name in saved if name != "plain"), None)
    return update(
        entry=shown.entry,
        progress="",
        headline=views.headline(report),
        outcome=gr.update(visible=True),
        picture=gr.update(choices=cells, value=cell, label="Clip" if is_clips(report) else "Picture"),
        left=gr.update(choices=arms, value=left),
        right=gr.update(choices=arms, value=right),
        **_pair(shown, cell, (left, right)),
        table=f'<div class="stretto embedded">{table_html(report)}</div>{views.missing(report)}',
        front=_drawn("Speed against closeness", front_svg(report)),
        timeline=_drawn("Steps", timeline_svg(timeline_rows(report))),
        html=gr.update(value=str(html)),
        json=gr.update(value=str(json)),
        csv=gr.update(value=str(csv)),
        arm=gr.update(choices=saved, value=saveable),
        drawing=_saved(session, shown, saveable),
    )


def _drawn(title: str, svg: str) -> str:
    return f'<div class="stretto embedded"><h3>{title}</h3><div class="scroll">{svg}</div></div>'


def _pair(shown: Shown, cell: int | None, pair: pairs.Pair) -> dict[str, Any]:
    """Updates of everything that shows two arms of one cell."""
    report, folder = shown.report, shown.folder
    moving = is_clips(report)
    return {
        "slider": gr.update(value=pairs.slider(report, folder, cell, pair), visible=not moving),
        "clip": gr.update(value=pairs.clips(report, folder, cell, pair), visible=moving),
        "beside": gr.update(visible=not moving),
        "maps": pairs.maps(report, folder, cell, pair),
    }


def _saved(session: Session, shown: Shown, arm: str | None) -> Any:
    """The button that saves an arm as workflow; it says why when it cannot."""
    if arm is None:
        return gr.update(interactive=False, value=None)
    try:
        path = downloads.write_drawing(session.drawing(shown, arm), shown.folder, arm)
    except (MeasureError, OSError) as error:
        gr.Info(f"This variant cannot be saved now. {error}")
        return gr.update(interactive=False, value=None)
    return gr.update(interactive=True, value=str(path))


def wire(session: Session, results: Results) -> None:
    """Connect what belongs to the right side alone."""

    def choose(entry: int | None, cell: int | None, left: str, right: str) -> list[Any]:
        if entry is None:
            return [gr.skip()] * 3
        try:
            shown = _pair(session.shown(entry), cell, (left, right))
        except (MeasureError, OSError) as error:
            gr.Warning(str(error))
            return [gr.skip()] * 3
        return [shown["slider"], shown["clip"], shown["maps"]]

    def save(entry: int | None, arm: str | None) -> Any:
        return gr.skip() if entry is None else _saved(session, session.shown(entry), arm)

    quiet = {"show_progress": "hidden"}
    for chosen in (results.picture, results.left, results.right):
        chosen.input(
            choose,
            [results.entry, results.picture, results.left, results.right],
            [results.slider, results.clip, results.maps],
            **quiet,
        )
    # The page may be long, and what happens shows at its right side or further down.
    results.run.click(None, js="() => document.getElementById('progress').scrollIntoView({block: 'nearest'})")
    results.arm.input(save, [results.entry, results.arm], results.drawing, **quiet)


def watch(session: Session) -> Iterator[list[Any]]:
    """Updates until the comparison in progress, if there is one, has ended."""
    for state in session.watch():
        yield page_of(session, state)
