"""The left side of the page: a workflow, what to compare in it, and with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from . import views
from .measure.compare import REFERENCE_STEPS
from .measure.errors import MeasureError, WorkflowError
from .measure.variants import StrettoNode, Variant, sweep
from .session import Look, Request, Session, to_api

CARRIERS = [".json", ".png", ".webp", ".mp4", ".webm", ".mkv", ".mov"]
TICKED = ("drawn", "fewer-steps")  # kinds of variants that are ticked at first
MOST_SEEDS = 64
LARGEST_FILE = 512 * 2**20  # bytes of a dropped file: clips are large, and the workflow may stand at their end
NO_NODE = ""


@dataclass(frozen=True)
class Controls:
    """What the person fills in."""

    workflow: gr.Dropdown
    drop: gr.File
    found: gr.HTML
    variants: gr.CheckboxGroup
    node: gr.Dropdown
    setting: gr.Dropdown
    values: gr.Textbox
    second: gr.Dropdown
    prompts: gr.Textbox
    seeds: gr.Textbox
    steps: gr.Number
    repeats: gr.Slider
    reference: gr.Checkbox

    def inputs(self) -> list[Any]:
        """The components that a run reads, in the order of `request_of`."""
        return [
            self.workflow, self.variants, self.node, self.setting, self.values, self.second, self.prompts, self.seeds,
            self.steps, self.repeats, self.reference,
        ]  # fmt: skip

    def filled(self) -> list[Any]:
        """The components that a workflow fills, in the order of `defaults`."""
        return [self.found, self.variants, self.node, self.setting, self.values, self.prompts, self.seeds, self.steps]


def build(session: Session, chosen: str | None) -> Controls:
    """Lay the components out; `chosen` is the file that is chosen at first, if it is there."""
    choices = session.shelf.choices()
    keys = [key for _, key in choices]
    workflow = gr.Dropdown(
        choices, value=chosen if chosen in keys else next(iter(keys), None), label="Workflow", elem_id="workflow",
        info="Its Stretto nodes are bypassed for the plain arm.",
    )  # fmt: skip
    drop = gr.File(
        label="Drop a workflow here: JSON, or a PNG, WebP or MP4 that carries one", file_types=CARRIERS, height=104,
        elem_id="drop", elem_classes="drop",
    )  # fmt: skip
    found = gr.HTML(elem_id="found")
    variants = gr.CheckboxGroup([], label="Compare with the plain workflow", elem_id="variants")
    with gr.Accordion("Sweep one setting", open=False, elem_id="sweep"):
        with gr.Row():
            node = gr.Dropdown([], label="Node", min_width=130)
            setting = gr.Dropdown([], label="Setting", min_width=130)
        values = gr.Textbox(label="Values", placeholder="2, 3, 4", info="One arm for each.")
    with gr.Accordion("A second workflow", open=False, elem_id="second"):
        second = gr.Dropdown(
            [("None", NO_NODE), *choices], value=NO_NODE, label="Second workflow",
            info="Dropped workflows are listed too; choose the first one again afterwards.",
        )  # fmt: skip
    prompts = gr.Textbox(
        label="Prompts", lines=2, max_lines=8, info="One per line; empty takes the workflow's own.", elem_id="prompts"
    )
    with gr.Row():
        seeds = gr.Textbox(label="Seeds", placeholder="1, 2, 3", min_width=100, elem_id="seeds")
        steps = gr.Number(label="Steps", precision=0, minimum=1, maximum=1000, min_width=100)
    with gr.Accordion("Rounds and reference", open=False, elem_id="rounds"):
        repeats = gr.Slider(
            1, 10, value=Request.repeats, step=1, label="Repeats",
            info="Rounds per prompt and seed: six in all for a sure verdict.",
        )  # fmt: skip
        reference = gr.Checkbox(
            value=False, label=f"Also a {REFERENCE_STEPS}-step reference", info="Shows which result is nearer the exact one."
        )
    return Controls(
        workflow, drop, found, variants, node, setting, values, second, prompts, seeds, steps, repeats, reference
    )  # fmt: skip


# What a workflow fills in


def defaults(session: Session, key: str | None) -> list[Any]:
    """Updates of `Controls.filled` for a workflow; a sentence, and nothing to tick, when it cannot be used."""
    try:
        look = session.look(session.shelf.get(key))
    except MeasureError as error:
        return [views.trouble(str(error)), gr.update(choices=[], value=[]), *[gr.skip()] * 6]
    nodes = [(node.title, node.id) for node in look.nodes if node.settings]
    first = next((node for node in look.nodes if node.settings), None)
    ticked = [variant_key(variant) for variant in look.variants if variant.kind in TICKED]
    return [
        views.found(look),
        gr.update(choices=[(variant.label, variant_key(variant)) for variant in look.variants], value=ticked),
        gr.update(choices=nodes, value=first.id if first else None),
        setting_choices(first),
        gr.update(value="", info="One arm for each."),
        look.prompt,
        "" if look.seed is None else str(look.seed),
        look.steps,
    ]


def variant_key(variant: Variant) -> str:
    """What identifies an offered variant on the page."""
    return f"{variant.kind}:{variant.node or ''}"


def setting_choices(node: StrettoNode | None) -> Any:
    """The settings of a node as an update of the dropdown; none is chosen."""
    return gr.update(choices=list(node.settings) if node else [], value=None)


def node_of(look: Look, node_id: str | None) -> StrettoNode | None:
    """The node of that id in a workflow."""
    return next((node for node in look.nodes if node.id == node_id), None)


# From the page to a request


def request_of(
    session: Session,
    key: str | None,
    ticked: list[str],
    node_id: str | None,
    setting: str | None,
    values: str,
    second: str | None,
    prompts: str,
    seeds: str,
    steps: float | None,
    repeats: float,
    reference: bool,
) -> Request:
    """Read the fields of the page; raises `MeasureError` for what cannot be run."""
    source = session.shelf.get(key)
    look = session.look(source)
    variants = [variant for variant in look.variants if variant_key(variant) in (ticked or [])]
    if (values or "").strip():
        node = node_of(look, node_id)
        if node is None or setting not in node.settings:
            raise WorkflowError("Choose the node and the setting that the values belong to.")
        variants += sweep(node, setting, [part.strip() for part in values.split(",") if part.strip()])
    if second:
        other = session.shelf.get(second)
        variants.append(Variant("second", Path(other.name).stem, workflow=to_api(other.document, session.object_info())))
    if not variants:
        raise WorkflowError("Tick at least one variant to compare with the plain workflow.")
    if steps is not None and steps < 1:
        raise WorkflowError("The number of steps must be at least 1.")
    lines = tuple(line.strip() for line in (prompts or "").splitlines() if line.strip())
    count = None if steps is None else int(steps)
    return Request(
        source.name, source.document, tuple(variants), lines, seeds_of(seeds), count, int(repeats), bool(reference)
    )


def seeds_of(text: str | None) -> tuple[int, ...]:
    """"1, 2 3" -> (1, 2, 3); raises `WorkflowError`."""
    words = (text or "").replace(",", " ").split()
    seeds = [int(word) if word.isdecimal() and len(word) <= 20 else -1 for word in words]
    wrong = next((word for word, seed in zip(words, seeds) if not 0 <= seed < 2**64), None)
    if wrong is not None:
        raise WorkflowError(f"{wrong[:40]!r} is no seed; write whole numbers from 0 with commas between.")
    if len(seeds) > MOST_SEEDS:
        raise WorkflowError(f"{len(seeds)} seeds are too many; take {MOST_SEEDS} at most.")
    return tuple(dict.fromkeys(seeds))


# Events


def wire(session: Session, controls: Controls) -> None:
    """Connect what belongs to the left side alone."""

    def fill(key: str | None) -> list[Any]:
        return defaults(session, key)

    def dropped(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        try:
            token = session.shelf.drop(Path(path).read_bytes(), Path(path).name)
        except MeasureError as error:
            return [gr.skip(), gr.skip(), None, views.trouble(str(error))]
        choices = session.shelf.choices()
        return [gr.update(choices=choices, value=token), gr.update(choices=[("None", NO_NODE), *choices]), None, gr.skip()]

    def settings(key: str | None, node_id: str | None) -> Any:
        return _quietly(lambda: setting_choices(node_of(session.look(session.shelf.get(key)), node_id)))

    def explain(key: str | None, node_id: str | None, name: str | None) -> Any:
        def words() -> Any:
            node = node_of(session.look(session.shelf.get(key)), node_id)
            known = node is not None and name in node.settings
            return gr.update(info=views.allowed(node.settings[name]) if known else "One arm for each.")

        return _quietly(words)

    quiet = {"show_progress": "hidden"}
    controls.workflow.change(fill, controls.workflow, controls.filled(), **quiet)
    controls.drop.upload(dropped, controls.drop, [controls.workflow, controls.second, controls.drop, controls.found], **quiet)
    controls.node.input(settings, [controls.workflow, controls.node], controls.setting, **quiet)
    controls.setting.input(explain, [controls.workflow, controls.node, controls.setting], controls.values, **quiet)


def _quietly(ask: Callable[[], Any]) -> Any:
    """An update, or none where the workflow or the server cannot be read: the page says so elsewhere."""
    try:
        return ask()
    except MeasureError:
        return gr.skip()
