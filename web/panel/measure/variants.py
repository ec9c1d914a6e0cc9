"""What a comparison of one workflow can consist of: its Stretto nodes, and the variants they make."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import arms as edit
from .arms import Api, Arm
from .errors import WorkflowError
from .labels import label_of
from .workflow import BYPASSED, MUTED, NodeSchema, api_to_ui, node_schema, ui_to_api, widget_places

KINDS = ("plain", "drawn", "alone", "sweep", "fewer-steps", "second")
SETTING_KINDS = {"INT": "int", "FLOAT": "float", "BOOLEAN": "bool", "COMBO": "choice", "STRING": "text"}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
MOST_VALUES = 24  # of a sweep; each is an arm that every round runs
RESERVED = ("plain", "reference", "fewer-steps")  # names of arms that comparisons give
Ui = dict[str, Any]
ObjectInfo = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One setting of a node; `kind` is one of the values of `SETTING_KINDS`. `value` None: it comes from another node."""

    name: str
    kind: str
    value: Any
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices is not None:
            return ", ".join(str(choice) for choice in self.choices)
        if self.kind in ("bool", "text"):
            return "true, false" if self.kind == "bool" else "any text"
        noun = "whole numbers" if self.kind == "int" else "numbers"
        if self.minimum is None or self.maximum is None:
            return noun
        return f"{noun} from {self.minimum:g} to {self.maximum:g}"

    def convert(self, value: Any) -> Any:
        """The value in the setting's type, text as typed included; raises `WorkflowError` that names what is allowed."""
        text = str(value).strip()
        try:
            if self.choices is not None:
                return next(choice for choice in self.choices if str(choice) == text)
            if self.kind == "text":
                return str(value)
            if self.kind == "bool":
                return {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}[text.lower()]
            number = int(text) if self.kind == "int" and text.lstrip("+-").isdecimal() else float(text)
            low, high = (bound if bound is not None else number for bound in (self.minimum, self.maximum))
            if not math.isfinite(number) or not low <= number <= high or (self.kind == "int" and number % 1):
                raise ValueError
            return int(number) if self.kind == "int" else number
        except (ValueError, KeyError, StopIteration):
            raise WorkflowError(f"{self.name} cannot be {text!r}; allowed are {self.allowed}.") from None


@dataclass(frozen=True)
class StrettoNode:
    """A node of this pack that changes how a model runs."""

    id: str
    class_type: str
    title: str
    technique: str
    settings: dict[str, Setting]


@dataclass(frozen=True)
class Variant:
    """One way of running a workflow; `kind` is one of `KINDS`.

    "plain": every Stretto node bypassed; "drawn": as it stands; "alone": only the node `node` is on; "sweep": `setting` of
    `node` is `value`; "fewer-steps": the plain one with `steps` steps, None for as many as the first accelerated arm computes;
    "second": another workflow, `workflow`.
    """

    kind: str
    label: str
    node: str | None = None
    setting: str | None = None
    value: Any = None
    steps: int | None = None
    workflow: Api | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")


def stretto_nodes(api: Api, object_info: ObjectInfo) -> list[StrettoNode]:
    """The nodes of this pack that can be on or off, in the order of the file, with their settings as they stand."""
    return [_node(key, api[key], object_info) for key in edit.accelerator_ids(api) if _passes_model(api[key], object_info)]


def _passes_model(node: dict[str, Any], object_info: ObjectInfo) -> bool:
    """Whether a node stands on a MODEL's way or samples itself; helpers, such as those that calibrate, do neither."""
    info = object_info.get(node["class_type"])
    return info is None or node["class_type"] in edit.SWITCHED_OFF or "MODEL" in info.get("output", ["MODEL"])


def _node(key: str, node: dict[str, Any], object_info: ObjectInfo) -> StrettoNode:
    info = object_info.get(node["class_type"], {})
    name = info.get("display_name") or node["class_type"]
    title = (node.get("_meta") or {}).get("title") or name
    technique = str(name).removeprefix(edit.PREFIX).strip() or node["class_type"]
    return StrettoNode(key, node["class_type"], str(title), technique, _settings(node, object_info))


def _settings(node: dict[str, Any], object_info: ObjectInfo) -> dict[str, Setting]:
    info = object_info.get(node["class_type"])
    if info is None:
        return {}
    specs = {**(info.get("input", {}).get("required") or {}), **(info.get("input", {}).get("optional") or {})}
    settings = {}
    for widget in node_schema(node["class_type"], object_info).widgets:
        if widget.kind not in SETTING_KINDS:
            continue
        spec = specs[widget.name]
        options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
        value = node["inputs"].get(widget.name, widget.placeholder())
        settings[widget.name] = Setting(
            widget.name,
            SETTING_KINDS[widget.kind],
            None if edit.is_link(value) else value,
            widget.choices if widget.kind == "COMBO" else None,
            options.get("min"),
            options.get("max"),
        )
    return settings


# Variants


def offered(api: Api, object_info: ObjectInfo) -> list[Variant]:
    """What can be ticked: as drawn, each Stretto node alone where there are several, and the same sampler with fewer steps."""
    nodes = stretto_nodes(api, object_info)
    if not nodes:
        try:
            steps = edit.get_steps(edit.plain(api))
        except WorkflowError:
            return []  # nothing is sampled, or only what a node makes that examines the model
        if not isinstance(steps, int) or steps < 2:
            return []
        return [Variant("fewer-steps", f"Same sampler, {steps // 2} steps", steps=steps // 2)]
    found = [Variant("drawn", label_of(api, "As drawn"))]
    if len(nodes) > 1:
        labels = [label_of({node.id: api[node.id]}, node.title) for node in nodes]
        for node, label in zip(nodes, labels):
            which = f" (node {node.id})" if labels.count(label) > 1 else ""
            found.append(Variant("alone", f"{label}{which} alone", node=node.id))
    return [*found, Variant("fewer-steps", "Same sampler, fewer steps")]


def sweep(node: StrettoNode, setting: str, values: Sequence[Any]) -> list[Variant]:
    """One variant per value; raises `WorkflowError` for settings and values that the node does not have or allow."""
    found = node.settings.get(setting)
    if found is None:
        names = ", ".join(node.settings) or "none: this server does not know the node"
        raise WorkflowError(f"{node.title} has no setting {setting!r}; it has {names}.")
    converted = list(dict.fromkeys(found.convert(value) for value in values))
    if not converted:
        raise WorkflowError(f"A sweep of {setting} needs at least one value; allowed are {found.allowed}.")
    if len(converted) > MOST_VALUES:
        raise WorkflowError(f"A sweep may have {MOST_VALUES} values at most, not {len(converted)}: each is run in every round.")
    return [
        Variant("sweep", f"{node.technique}, {setting} {_written(value)}", node=node.id, setting=setting, value=value)
        for value in converted
    ]


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def arm_of(variant: Variant, api: Api, object_info: ObjectInfo) -> Arm:
    """The arm of a variant of `api`. Raises `WorkflowError`, also for fewer steps whose number only a run will tell."""
    return _arm(variant, api, ())


def arms_from(variants: Iterable[Variant], api: Api, object_info: ObjectInfo) -> tuple[Api, list[Arm], bool]:
    """The plain workflow, one arm per variant with names of their own, and whether `compare` shall add the competitor.

    What runs as the plain arm anyway makes no second one. Raises `WorkflowError` when nothing is left to compare.
    """
    baseline, taken, arms, competitor = edit.plain(api), list(RESERVED), [], False
    for variant in variants:
        if variant.kind == "fewer-steps" and variant.steps is None:
            competitor = True
            continue
        arm = _arm(variant, api, taken)
        if variant.kind == "plain" or edit.shape(arm.workflow) == edit.shape(baseline):
            continue
        arms.append(arm)
        taken.append(arm.name)
    if not arms:
        raise WorkflowError("Nothing differs from the plain workflow, so there is nothing to compare.")
    return baseline, arms, competitor


def _arm(variant: Variant, api: Api, taken: Iterable[str]) -> Arm:
    role = variant.kind if variant.kind in ("plain", "fewer-steps") else "accelerated"
    return Arm(edit.name_of(variant.label, taken), variant.label, _workflow(variant, api), role)


def _workflow(variant: Variant, api: Api) -> Api:
    if variant.node is not None and variant.node not in api:
        raise WorkflowError(f"The workflow has no node {variant.node}, which {variant.label!r} is about.")
    match variant.kind:
        case "drawn":
            return copy.deepcopy(api)
        case "alone" if variant.node is not None:
            return edit.plain(api, keep=[variant.node])
        case "sweep" if variant.node is not None and variant.setting is not None:
            edited = copy.deepcopy(api)
            edited[variant.node]["inputs"][variant.setting] = variant.value
            return edited
        case "fewer-steps":
            if variant.steps is None:
                raise WorkflowError("How many steps the plain sampler gets is only known when an accelerated arm has run.")
            return edit.fewer_steps(edit.plain(api), variant.steps)
        case "second" if variant.workflow is not None:
            return copy.deepcopy(variant.workflow)
        case "plain":
            return edit.plain(api)
    raise WorkflowError(f"The variant {variant.label!r} does not say what it is about.")


def requested(api: Api, object_info: ObjectInfo, each: bool, sweeps: Iterable[str]) -> list[Variant]:
    """Variants as the command line asks for them: every node alone, and sweeps written NODE.SETTING=value,value,...

    NODE is a node's id, class or title, with or without "Stretto" in front. Raises `WorkflowError`.
    """
    nodes = stretto_nodes(api, object_info)
    found = [variant for variant in offered(api, object_info) if variant.kind == "alone"] if each else []
    for text in sweeps:
        place, equals, values = text.partition("=")
        name, _, setting = place.rpartition(".")
        if not (equals and name and setting):
            raise WorkflowError(f"{text!r} is no sweep; write NODE.SETTING=value,value,... such as Cache.interval=2,3,4.")
        found += sweep(_named(nodes, name), setting.strip(), [value.strip() for value in values.split(",") if value.strip()])
    return found


def _named(nodes: Sequence[StrettoNode], name: str) -> StrettoNode:
    """The one node that is called so."""
    wanted = _bare_name(name)
    fitting = [node for node in nodes if wanted in map(_bare_name, (node.id, node.class_type, node.title, node.technique))]
    if len(fitting) != 1:
        there = ", ".join(f"{node.technique} (node {node.id})" for node in nodes) or "none"
        raise WorkflowError(f"{'Several nodes are' if fitting else 'No node is'} called {name!r}; Stretto nodes here: {there}.")
    return fitting[0]


def _bare_name(name: str) -> str:
    return name.lower().replace(" ", "").removeprefix(edit.PREFIX.lower())


def arms_beside(arms: Sequence[Arm], variants: Iterable[Variant], api: Api) -> list[Arm]:
    """`arms` and one for each variant that runs something else than they do, with names of their own."""
    found, shapes = list(arms), [edit.shape(arm.workflow) for arm in arms]
    for variant in variants:
        arm = _arm(variant, api, [*RESERVED, *(other.name for other in found)])
        if edit.shape(arm.workflow) not in shapes:
            found.append(arm)
            shapes.append(edit.shape(arm.workflow))
    return found


# Variants as drawings


def ui_of(variant: Variant, ui: Ui | None, api: Api, object_info: ObjectInfo) -> Ui:
    """The editor's form of a variant: the drawing `ui` of `api` with nodes bypassed and settings changed.

    Without a drawing, or where it cannot express the variant, the nodes are laid out afresh. Raises `WorkflowError`.
    """
    wanted = _workflow(variant, api)
    if ui is not None:
        drawn = _redrawn(ui, api, wanted, object_info)
        if drawn is not None:
            return drawn
    return api_to_ui(wanted, object_info)


def _redrawn(ui: Ui, api: Api, wanted: Api, object_info: ObjectInfo) -> Ui | None:
    """A copy of the drawing that runs as `wanted`; None when the copy turns out to run as something else."""
    drawing = copy.deepcopy(ui)
    accelerators = edit.accelerator_ids(api)
    try:
        for node in drawing["nodes"]:
            key = str(node.get("id"))
            if key in api and key not in wanted:
                node["mode"] = BYPASSED if key in accelerators else MUTED
            elif key in api:
                before = api[key]["inputs"]
                after = {name: value for name, value in wanted[key]["inputs"].items() if not edit.is_link(value)}
                changed = {name: value for name, value in after.items() if value != before.get(name)}
                if changed:
                    _set_widgets(node, changed, node_schema(node["type"], object_info, key))
        runs_as = ui_to_api(drawing, object_info)
    except (WorkflowError, KeyError, IndexError, TypeError, AttributeError):
        return None  # laying the workflow out afresh says what is wrong, if anything is
    return drawing if _bare(runs_as) == _bare(wanted) else None


def _set_widgets(node: dict[str, Any], changed: dict[str, Any], schema: NodeSchema) -> None:
    """Write settings to the places where the editor keeps them."""
    stored = node.get("widgets_values")
    if isinstance(stored, dict):
        stored.update(changed)
        return
    values = list(stored or [])
    for widget, place in list(widget_places(values, schema)):
        if place == len(values):
            values.append(widget.placeholder())  # an older file ends before inputs that were added since
        if widget.name in changed:
            values[place] = changed[widget.name]
    node["widgets_values"] = values


def _bare(api: Api) -> Api:
    """Without titles, which change nothing."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}
