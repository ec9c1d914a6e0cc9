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
from starlette.middleware import Middleware
from starlette.routing import Route

from . import controls, past, results, views
from .controls import Controls
from .door import ROUTE, Door, workflow_route
from .measure.errors import MeasureError
from .measure.report import STYLE
from .past import Past
from .results import Results
from .session import Session

FONTS = ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"]
CSS = Path(__file__).with_name("panel.css")
STATUS_SECONDS = 15.0
# In a frame (`?embed=1`) the page leaves its masthead out; the class is set before anything is drawn.
HEAD = (
    '<script>if (new URLSearchParams(location.search).get("embed") === "1") '
    'document.documentElement.classList.add("embed");</script>'
    # Gradio takes rules of a page's own style sheet into its container, and this one is about the container.
    "<style>@media (max-width: 640px) { .gradio-container .main { padding: 8px 12px 84px !important; } }</style>"
)


@dataclass(frozen=True)
class PanelConfig:
    """Where ComfyUI answers, where workflows and reports lie, where the page listens, and what it begins with.

    `chosen` is the name of a workflow file; None, or a name that is not in the folder, takes the first. `history` is the
    file of past comparisons; None puts it into `out`.
    """

    server: str
    workflows: Path
    out: Path
    host: str = "127.0.0.1"
    port: int = 7860
    chosen: str | None = None
    history: Path | None = None

    def session(self) -> Session:
        """The session that a page of this configuration runs."""
        return Session(self.server, self.workflows, self.out, self.history)


@dataclass(frozen=True)
class Page:
    """The parts of the page that events connect."""

    blocks: gr.Blocks
    status: gr.HTML
    tabs: gr.Tabs
    controls: Controls
    offer: gr.Column
    offered: gr.HTML
    again: gr.Button
    results: Results
    past: Past


def build_app(config: PanelConfig, session: Session | None = None) -> gr.Blocks:
    """The page, not yet served."""
    session = session or config.session()
    with gr.Blocks(title="Stretto", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_classes="masthead"):
            gr.HTML("<h1>Stretto</h1><p>One workflow, plain and accelerated, with the same seed.</p>", elem_classes="title")
            status = gr.HTML(elem_classes="status")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Compare", id="compare"), gr.Row(elem_classes="halves"):
                with gr.Column(scale=1, min_width=300, elem_classes="left"):
                    left = controls.build(session, config.chosen)
                with gr.Column(scale=3, min_width=320, elem_classes="right"):
                    with gr.Column(visible=False, elem_classes="offer") as offer:
                        offered = gr.HTML()
                        again = gr.Button("Resume", variant="primary", size="md", min_width=80, elem_id="resume")
                    right = results.build()
            with gr.Tab("History", id="history") as tab:
                old = past.build()
        page = Page(blocks, status, tabs, left, offer, offered, again, right, old)
        controls.wire(session, left)
        results.wire(session, right)
        past.wire(session, old)
        _wire(config, session, page)
        tab.select(lambda: past.listed(session), outputs=old.entries, show_progress="hidden")
    return blocks


def _wire(config: PanelConfig, session: Session, page: Page) -> None:
    """Connect what crosses from one part of the page to another."""
    outputs, offer = page.results.outputs(), [page.offer, page.offered]
    quiet: dict[str, Any] = {"show_progress": "hidden"}

    def check() -> str:
        return views.status(config.server, *session.check_server())

    def begin(request: gr.Request) -> list[Any]:
        return [*_beginning(config, session, request.query_params.get("workflow")), *_offer(session)]

    def running(go: Callable[[], None]) -> Iterator[list[Any]]:
        try:
            go()
        except MeasureError as error:
            yield results.update(progress=views.trouble(str(error)))
            return
        yield from results.watch(session)

    def start(*values: Any) -> Iterator[list[Any]]:
        yield from running(lambda: session.start(controls.request_of(session, *values)))

    def resume() -> Iterator[list[Any]]:
        entry = past.unfinished(session)
        if entry is not None:
            yield from running(lambda: session.resume(entry.id))

    def resume_ticked(ids: list[int]) -> Iterator[list[Any]]:
        def go() -> None:
            if len(ids) != 1:
                raise MeasureError("Tick one interrupted comparison to resume it.")
            session.resume(ids[0])

        yield from running(go)

    def open_ticked(ids: list[int]) -> list[Any]:
        if len(ids) != 1:
            return [views.trouble("Tick one comparison to open it."), gr.skip(), *results.update()]
        return ["", gr.Tabs(selected="compare"), *results.opened(session, ids[0])]

    def stop() -> str:
        session.stop()
        return views.stopping() if session.running else views.idle()

    first = [page.controls.workflow, page.controls.second, *page.controls.filled(), *offer]
    page.blocks.load(check, outputs=page.status, **quiet)
    page.blocks.load(begin, outputs=first, **quiet)
    page.blocks.load(lambda: (yield from results.watch(session)), outputs=outputs, concurrency_limit=None, **quiet)
    gr.Timer(STATUS_SECONDS).tick(check, outputs=page.status, **quiet)
    hide, busy = {"fn": lambda: gr.update(visible=False), "outputs": page.offer, **quiet}, {"concurrency_limit": None, **quiet}
    page.results.run.click(**hide).then(start, page.controls.inputs(), outputs, **busy)
    page.results.stop.click(stop, outputs=page.results.progress, **quiet)
    page.again.click(**hide).then(resume, None, outputs, **busy)
    to_front = {"fn": lambda: gr.Tabs(selected="compare"), "outputs": page.tabs, **quiet}
    page.past.resume.click(**to_front).then(resume_ticked, page.past.entries, outputs, **busy)
    page.past.open.click(open_ticked, page.past.entries, [page.past.table, page.tabs, *outputs], **quiet)


def _beginning(config: PanelConfig, session: Session, token: str | None) -> list[Any]:
    """Which workflow a page begins with, the choices, and what that workflow fills in."""
    choices = session.shelf.choices()
    keys = [key for _, key in choices]
    key = token if token in keys else config.chosen if config.chosen in keys else next(iter(session.shelf.files()), None)
    filled = controls.defaults(session, key)
    if token and token not in keys:
        filled[0] = views.trouble("The workflow that was handed over is no longer here; hand it over again.") + str(filled[0])
    second = gr.update(choices=[("None", controls.NO_NODE), *choices])
    return [gr.update(choices=choices, value=key), second, *filled]


def _offer(session: Session) -> list[Any]:
    """The line that offers to resume what a crash interrupted."""
    entry = past.unfinished(session)
    if entry is None:
        return [gr.update(visible=False), gr.skip()]
    words = f"The comparison of {entry.workflow} was interrupted; its finished measurements are kept."
    return [gr.update(visible=True), views.notice(words)]


def launch_options(config: PanelConfig, session: Session) -> dict[str, Any]:
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
        "head": HEAD,
        "footer_links": [],
        "allowed_paths": [str(config.out.resolve())],
        "ssr_mode": False,
        "enable_monitoring": False,
        "max_file_size": controls.LARGEST_FILE,
        "app_kwargs": {
            "routes": [Route(ROUTE, workflow_route(session.shelf), methods=["POST"])],
            "middleware": [Middleware(Door, listen=config.host, server=config.server)],
        },
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
    session = config.session()
    page = build_app(config, session)
    page.queue(default_concurrency_limit=None)
    page.launch(prevent_thread_lock=True, **launch_options(config, session))
    announce(
        f"Stretto's page is open at http://{config.host}:{config.port} (ComfyUI: {config.server}); Ctrl+C closes it."
    )
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
