"""The A/B page: one workflow, plain and accelerated, side by side. Listens on loopback unless told otherwise."""

from __future__ import annotations

import os

# Gradio reads this when it is imported; the page must not call anybody.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from . import views
from .measure import arms as edit
from .measure.client import ComfyClient
from .measure.compare import read_workflow
from .measure.errors import MeasureError
from .measure.report import STYLE
from .session import Request, Session

FONTS = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"]
CSS = Path(__file__).with_name("panel.css")
STATUS_SECONDS = 15.0


@dataclass(frozen=True)
class PanelConfig:
    """Where ComfyUI answers, where workflows and reports lie, where the page listens, and what it begins with.

    `chosen` is the name of a workflow file; None, or a name that is not in the folder, takes the first.
    """

    server: str
    workflows: Path
    out: Path
    host: str = "127.0.0.1"
    port: int = 7860
    chosen: str | None = None


@dataclass(frozen=True)
class Controls:
    """What the person fills in."""

    workflow: gr.Dropdown
    prompts: gr.Textbox
    seed: gr.Number
    steps: gr.Number
    repeats: gr.Slider
    fewer: gr.Checkbox
    reference: gr.Checkbox
    run: gr.Button
    stop: gr.Button

    def inputs(self) -> list[Any]:
        """The components that a run reads, in the order of `Request.from_page`."""
        return [self.workflow, self.prompts, self.seed, self.steps, self.repeats, self.fewer, self.reference]


@dataclass(frozen=True)
class Output:
    """What the page shows; `outputs` is the order in which `views.Page` fills it."""

    progress: gr.HTML
    picture: gr.Dropdown
    slider: gr.ImageSlider
    clip: gr.HTML
    table: gr.HTML
    timeline: gr.HTML
    export: gr.DownloadButton

    def outputs(self) -> list[Any]:
        """The components in the order of `views.Page.updates`."""
        return [self.progress, self.picture, self.slider, self.clip, self.table, self.timeline, self.export]


def workflow_files(folder: Path) -> list[str]:
    """Names of the workflow files to choose from; the pack's default method comes first and the plain one last."""
    names = sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []
    return sorted(names, key=lambda name: ("plain" in name, "taylor" not in name))


def build_app(config: PanelConfig) -> gr.Blocks:
    """The page, not yet served."""
    session = Session(config.server, config.workflows, config.out)
    with gr.Blocks(title="Stretto", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_classes="masthead"):
            gr.HTML(
                "<h1>Stretto</h1><p>One workflow, plain and accelerated, with the same seed.</p>", elem_classes="title"
            )
            status = gr.HTML(elem_classes="status")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = _controls(config)
            with gr.Column(scale=3, min_width=320):
                output = _output()
        _wire(page, config, session, controls, output, status)
    return page


def _controls(config: PanelConfig) -> Controls:
    """The left column."""
    names = workflow_files(config.workflows)
    workflow = gr.Dropdown(
        names,
        value=config.chosen if config.chosen in names else next(iter(names), None),
        label="Workflow",
        info="Its Stretto nodes are bypassed for the plain picture or clip.",
    )
    prompts = gr.Textbox(label="Prompts", lines=3, max_lines=8, info="One per line; empty takes the workflow's own.")
    with gr.Row():
        seed = gr.Number(label="Seed", precision=0, minimum=0, min_width=100)
        steps = gr.Number(label="Steps", precision=0, minimum=1, maximum=1000, min_width=100)
    repeats = gr.Slider(
        1, 10, value=3, step=1, label="Repeats", info="Rounds per prompt; a verdict needs three in all."
    )
    fewer = gr.Checkbox(value=True, label="Also fewer steps", info="The competitor that costs nothing.")
    reference = gr.Checkbox(
        value=False, label="Also a 200-step reference", info="Shows which result is nearer the exact one."
    )
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run", min_width=100)
        stop = gr.Button("Stop", variant="secondary", elem_id="stop", min_width=100)
    return Controls(workflow, prompts, seed, steps, repeats, fewer, reference, run, stop)


def _output() -> Output:
    """The right column."""
    progress = gr.HTML(views.idle(), elem_id="progress")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            slider = gr.ImageSlider(
                label="Plain | accelerated",
                show_label=True,
                interactive=False,
                format="png",
                type="pil",
                max_height=512,
                elem_id="slider",
                buttons=["fullscreen"],
            )
            clip = gr.HTML(visible=False, elem_id="clip")
        with gr.Column(scale=1, min_width=220):
            picture = gr.Dropdown([], label="Picture", interactive=True, visible=False, elem_id="picture")
            export = gr.DownloadButton("Export report (HTML)", visible=False, elem_id="export")
    table = gr.HTML(elem_id="table")
    timeline = gr.HTML(elem_id="timeline")
    return Output(progress, picture, slider, clip, table, timeline, export)


def _wire(
    page: gr.Blocks, config: PanelConfig, session: Session, controls: Controls, output: Output, status: gr.HTML
) -> None:
    """Connect events."""

    def check() -> str:
        return views.status(config.server, *session.check_server())

    def defaults(name: str | None) -> list[Any]:
        return workflow_defaults(config, name)

    def start(*values: Any) -> Iterator[list[Any]]:
        try:
            session.start(Request.from_page(*values))
        except MeasureError as error:
            yield views.Page(progress=views.failure(str(error))).updates()
            return
        yield from watch()

    def watch() -> Iterator[list[Any]]:
        for state in session.watch():
            yield views.page_of(state).updates()

    def choose(choice: str) -> list[Any]:
        if session.report is None or session.folder is None:
            return [gr.skip(), gr.skip()]
        return [view(session.report, session.folder, choice) for view in (views.slider_of, views.clip_of)]

    def stop() -> str:
        session.stop()
        return views.stopping() if session.running else views.idle()

    settings = [controls.prompts, controls.seed, controls.steps]
    page.load(check, outputs=status, show_progress="hidden")
    page.load(defaults, controls.workflow, settings, show_progress="hidden")
    page.load(watch, outputs=output.outputs(), show_progress="hidden")
    gr.Timer(STATUS_SECONDS).tick(check, outputs=status, show_progress="hidden")
    controls.workflow.change(defaults, controls.workflow, settings, show_progress="hidden")
    controls.run.click(start, controls.inputs(), output.outputs(), show_progress="hidden", concurrency_limit=None)
    controls.stop.click(stop, outputs=output.progress, show_progress="hidden")
    output.picture.input(choose, output.picture, [output.slider, output.clip], show_progress="hidden")


def workflow_defaults(config: PanelConfig, name: str | None) -> list[Any]:
    """Prompt, seed and steps of a workflow file; unchanged fields when it or the server cannot be read."""
    if not name or name not in workflow_files(config.workflows):
        return [gr.skip(), gr.skip(), gr.skip()]
    try:
        with ComfyClient(config.server) as client:
            workflow = read_workflow(config.workflows / name, client)
        return [edit.get_prompt(workflow) or "", edit.get_seed(workflow), edit.get_steps(workflow)]
    except MeasureError:
        return [gr.skip(), gr.skip(), gr.skip()]  # the status line already says what is wrong


def launch_options(config: PanelConfig) -> dict[str, Any]:
    """Arguments of `Blocks.launch`: nothing is loaded from, or told to, any other machine."""
    theme = gr.themes.Default(
        primary_hue=gr.themes.colors.sky, neutral_hue=gr.themes.colors.slate, font=FONTS, font_mono=MONO_FONTS
    )
    return {
        "server_name": config.host,
        "server_port": config.port,
        "share": False,
        "quiet": True,
        "theme": theme,
        "css": STYLE.read_text(encoding="utf-8") + CSS.read_text(encoding="utf-8"),
        "footer_links": [],
        "allowed_paths": [str(config.out.resolve())],
        "ssr_mode": False,
        "enable_monitoring": False,
    }


def port_problem(host: str, port: int) -> str | None:
    """Why the page cannot listen there, as a sentence, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            return f"{host!r} is not an address of this machine."
        except OSError as error:
            return f"The page cannot listen on {host}:{port} ({error.strerror}); choose another with --port."
    return None


def serve(config: PanelConfig, announce: Callable[[str], None]) -> None:
    """Serve the page until interrupted; `announce` gets the address. Raises `MeasureError` when the port is taken."""
    problem = port_problem(config.host, config.port)
    if problem:
        raise MeasureError(problem)
    page = build_app(config)
    page.queue(default_concurrency_limit=None)
    page.launch(prevent_thread_lock=True, **launch_options(config))
    announce(
        f"Stretto's page is open at http://{config.host}:{config.port} (ComfyUI: {config.server}); Ctrl+C closes it."
    )
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
