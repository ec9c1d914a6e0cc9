"""Workflow files in both forms: what ComfyUI's editor saves (UI, schema 0.4) and what its server runs (API).

The file in the UI form is the truth; the API form is derived from it with the server's own node schemas
(`/object_info`). Widget values are stored by position there, so every rule about positions lives in this module:
inputs in schema order, required before optional, a control value after each seed, one value more after an upload.

Not supported, and refused with a sentence: subgraphs, and inputs whose number depends on a choice.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import WorkflowError
from .workflow_layout import place

Json = dict[str, Any]
ObjectInfo = dict[str, Json]

MUTED, BYPASSED = 2, 4
CONTROL_MODES = ("fixed", "increment", "decrement", "randomize")

_WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN")
_SEED_NAMES = ("seed", "noise_seed")
_UPLOADS = ("image_upload", "video_upload", "animated_image_upload", "audio_upload", "mesh_upload")
_DYNAMIC_TYPES = ("COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3", "COMFY_DYNAMICSLOT_V3")
_COMMENTS = ("Note", "MarkdownNote")
_EDITOR_ONLY = (*_COMMENTS, "Reroute", "PrimitiveNode")


@dataclass(frozen=True)
class Widget:
    """An input with a value of its own; `kind` is one of the widget types."""

    name: str
    kind: str
    default: Any
    has_control: bool
    choices: tuple[Any, ...] = ()

    def placeholder(self) -> Any:
        """What the editor shows before anybody sets a value."""
        if self.default is not None:
            return self.default
        if self.choices:
            return self.choices[0]
        return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(self.kind, "")


@dataclass(frozen=True)
class Socket:
    """An input that only takes a link."""

    name: str
    kind: str
    required: bool


@dataclass(frozen=True)
class NodeSchema:
    """The inputs and outputs of a node class. `upload_after` counts the widgets before an upload button's value."""

    widgets: tuple[Widget, ...]
    sockets: tuple[Socket, ...]
    outputs: tuple[tuple[str, str], ...]
    upload_after: int | None
    is_output: bool


def is_ui_workflow(data: Any) -> bool:
    """Whether parsed JSON is what the editor saves, rather than the API form."""
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def node_schema(class_type: str, object_info: ObjectInfo, node_id: Any = "?") -> NodeSchema:
    """Read one class of `/object_info`; raises `WorkflowError` for classes that are unknown or have dynamic inputs."""
    info = object_info.get(class_type)
    if info is None:
        raise WorkflowError(f"Node {node_id}: this ComfyUI has no node {class_type!r}; install the pack it comes from.")
    widgets: list[Widget] = []
    sockets: list[Socket] = []
    upload_after = None
    for section in ("required", "optional"):
        upload = False
        for name, kind, options in _inputs(info, section):
            if kind in _DYNAMIC_TYPES:
                raise WorkflowError(f"Node {node_id} ({class_type}): input {name!r} depends on a choice, "
                                    "which is not supported here; save the workflow in the API format instead.")
            upload = upload or any(options.get(flag) for flag in _UPLOADS)
            widget = _widget(name, kind, options)
            if widget is None:
                sockets.append(Socket(name, kind, section == "required"))
            else:
                widgets.append(widget)
        if upload:
            upload_after = len(widgets)
    types = info.get("output", [])
    names = info.get("output_name") or types
    outputs = tuple((str(name), _type_name(kind)) for name, kind in zip(names, types, strict=True))
    return NodeSchema(tuple(widgets), tuple(sockets), outputs, upload_after, bool(info.get("output_node")))


def _inputs(info: Json, section: str) -> Iterator[tuple[str, str, Json]]:
    """Yield name, type and options of the inputs of a section, in schema order."""
    specs = info.get("input", {}).get(section) or {}
    order = (info.get("input_order") or {}).get(section) or list(specs)
    for name in order:
        spec = specs[name]
        options = dict(spec[1]) if len(spec) > 1 and isinstance(spec[1], dict) else {}
        if isinstance(spec[0], list):
            options.setdefault("options", spec[0])
        yield name, _type_name(spec[0]), options


def _type_name(kind: Any) -> str:
    """The type as the editor writes it: a list of choices is called COMBO."""
    return "COMBO" if isinstance(kind, list) else str(kind)


def _widget(name: str, kind: str, options: Json) -> Widget | None:
    """The widget of an input, or None when it is a socket."""
    kind = options.get("widgetType", kind)
    if kind not in _WIDGET_TYPES or options.get("forceInput"):
        return None
    control = options.get("control_after_generate")
    if control is None:
        control = kind == "INT" and name in _SEED_NAMES
    return Widget(name, kind, options.get("default"), bool(control), tuple(options.get("options") or ()))


# From the editor's form to the server's


@dataclass(frozen=True)
class _Link:
    """One connection of the editor's form."""

    source: Any
    source_slot: int
    kind: str


class _Graph:
    """The editor's form, indexed; answers where a link really comes from."""

    def __init__(self, ui: Json):
        self.nodes: dict[Any, Json] = {}
        for node in ui["nodes"]:
            if not isinstance(node, dict) or "id" not in node or "type" not in node:
                raise WorkflowError("The workflow holds a node without an id or a type.")
            self.nodes[node["id"]] = node
        self.links = dict(_read_link(entry) for entry in ui.get("links") or [])

    def origin(self, link_id: Any) -> tuple[str, Any, int] | None:
        """Follow a link to ('node', id, slot) or ('value', value, 0); None where something muted interrupts it."""
        seen: set[Any] = set()
        while link_id is not None:
            if link_id in seen:
                raise WorkflowError(f"Link {link_id} of the workflow leads in a circle.")
            seen.add(link_id)
            link = self.links.get(link_id)
            source = self.nodes.get(link.source) if link else None
            if source is None:
                raise WorkflowError(f"Link {link_id} of the workflow comes from nowhere: the file is damaged.")
            if source.get("mode") == MUTED:
                return None
            if source["type"] == "PrimitiveNode":
                values = source.get("widgets_values") or [None]
                return ("value", values[0], 0)
            if source["type"] == "Reroute":
                link_id = next((entry.get("link") for entry in source.get("inputs") or []), None)
            elif source.get("mode") == BYPASSED:
                link_id = _bypass(source, link.source_slot)
            else:
                return ("node", source["id"], link.source_slot)
        return None


def _read_link(entry: Any) -> tuple[Any, _Link]:
    """Read a link of schema 0.4 (a list) or 1 (an object)."""
    try:
        if isinstance(entry, dict):
            return entry["id"], _Link(entry["origin_id"], entry["origin_slot"], str(entry["type"]))
        return entry[0], _Link(entry[1], entry[2], str(entry[5]))
    except (KeyError, IndexError, TypeError) as error:
        raise WorkflowError(f"The workflow holds a damaged link: {entry!r}.") from error


def _bypass(node: Json, slot: int) -> Any:
    """The link that a bypassed node hands through at an output: same place first, then the first of the same type."""
    inputs, outputs = node.get("inputs") or [], node.get("outputs") or []
    if slot >= len(outputs):
        return None
    kind = outputs[slot].get("type")
    if slot < len(inputs) and inputs[slot].get("type") == kind:
        return inputs[slot].get("link")
    return next((entry.get("link") for entry in inputs if entry.get("type") == kind), None)


def ui_to_api(ui: Json, object_info: ObjectInfo) -> Json:
    """Return the API form of a workflow in the UI form.

    `object_info` is the server's answer to `/object_info`. Muted nodes are dropped, bypassed ones hand their input
    of the same type through; a node that loses a required input that way is dropped too, just as ComfyUI runs the
    other outputs only. Raises `WorkflowError` that names the node and the field.
    """
    if not is_ui_workflow(ui):
        raise WorkflowError("This is no workflow as ComfyUI's editor saves it: it has no list of nodes.")
    _refuse_subgraphs(ui)
    graph = _Graph(ui)
    api: Json = {}
    schemas: dict[str, NodeSchema] = {}
    lost: set[str] = set()
    for node in ui["nodes"]:
        if node["type"] in _EDITOR_ONLY or node.get("mode") in (MUTED, BYPASSED):
            continue
        key = str(node["id"])
        schemas[key] = node_schema(node["type"], object_info, key)
        inputs, interrupted = _api_inputs(node, schemas[key], graph)
        api[key] = {"class_type": node["type"], "inputs": inputs}
        if node.get("title") is not None:
            api[key]["_meta"] = {"title": node["title"]}
        if interrupted:
            lost.add(key)
    _drop(api, schemas, lost)
    if not api:
        raise WorkflowError("Nothing is left to run: every node is muted, bypassed or a comment.")
    _require_links(api, schemas)
    return api


def _refuse_subgraphs(ui: Json) -> None:
    """Subgraphs would have to be unfolded; say so instead of guessing."""
    subgraphs = {entry.get("id"): entry.get("name") for entry in (ui.get("definitions") or {}).get("subgraphs") or []}
    for node in ui["nodes"]:
        if isinstance(node, dict) and node.get("type") in subgraphs:
            raise WorkflowError(f"Node {node.get('id')} is the subgraph {subgraphs[node['type']]!r}, and subgraphs are "
                                "not supported here: unpack it in ComfyUI and save the workflow again.")


def _api_inputs(node: Json, schema: NodeSchema, graph: _Graph) -> tuple[Json, bool]:
    """The API inputs of a node, and whether a required one was lost to something muted or bypassed."""
    inputs = _widget_inputs(node, schema)
    sockets = {socket.name: socket for socket in schema.sockets}
    widgets = {widget.name: widget for widget in schema.widgets}
    lost = False
    for entry in node.get("inputs") or []:
        name, link_id = entry.get("name"), entry.get("link")
        if link_id is None:
            continue
        if name not in sockets and name not in widgets:
            raise WorkflowError(f"{_where(node)}: it has no input {name!r} in this version of ComfyUI or of its pack.")
        origin = graph.origin(link_id)
        if origin is None:
            lost = lost or (name in sockets and sockets[name].required)
        elif origin[0] == "value":
            inputs[name] = _checked(node, widgets[name], origin[1]) if name in widgets else origin[1]
        else:
            inputs[name] = [str(origin[1]), origin[2]]
    return inputs, lost


def _widget_inputs(node: Json, schema: NodeSchema) -> Json:
    """Name the stored widget values of a node."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return {w.name: _checked(node, w, values.get(w.name, w.placeholder())) for w in schema.widgets}
    values = list(values or [])
    # Inputs are only ever appended, so an older file simply ends early.
    return {widget.name: _checked(node, widget, values[place] if place < len(values) else widget.placeholder())
            for widget, place in widget_places(values, schema)}


def widget_places(values: list[Any], schema: NodeSchema) -> Iterator[tuple[Widget, int]]:
    """Each widget with its place in a node's list of stored values; the list may end before it."""
    position = 0
    for index, widget in enumerate(schema.widgets):
        if index == schema.upload_after and len(values) - position > len(schema.widgets) - index:
            position += 1
        yield widget, position
        position += 1
        if widget.has_control and position < len(values) and values[position] in CONTROL_MODES:
            position += 1
            if widget.kind == "COMBO" and len(values) - position > len(schema.widgets) - index - 1:
                position += 1  # a choice with a control value also stores the text of its filter


def _checked(node: Json, widget: Widget, value: Any) -> Any:
    """Return the value for the API form; raise when its type shows that the positions do not fit."""
    if value is None:
        value = widget.placeholder()
    if isinstance(value, list):
        return {"__value__": value}  # a bare list would be read as a link
    number = isinstance(value, int | float) and not isinstance(value, bool)
    expected = {"INT": (number and float(value).is_integer(), "a whole number"), "FLOAT": (number, "a number"),
                "BOOLEAN": (isinstance(value, bool), "true or false"), "STRING": (isinstance(value, str), "a text")}
    fits, wanted = expected.get(widget.kind, (True, ""))
    if not fits:
        raise WorkflowError(f"{_where(node)}: field {widget.name!r} should be {wanted}, but the file has {value!r}; "
                            "it was probably saved with another version of the node.")
    return value


def _drop(api: Json, schemas: dict[str, NodeSchema], lost: set[str]) -> None:
    """Remove the nodes in `lost` and, in turn, whatever requires them."""
    while lost:
        for key in lost:
            del api[key]
        gone, lost = lost, set()
        for key, node in api.items():
            required = {socket.name for socket in schemas[key].sockets if socket.required}
            for name, value in list(node["inputs"].items()):
                if _is_link(value) and value[0] in gone:
                    del node["inputs"][name]
                    if name in required:
                        lost.add(key)


def _require_links(api: Json, schemas: dict[str, NodeSchema]) -> None:
    """Refuse an unconnected required input of any node that an output depends on (loose ends elsewhere do no harm)."""
    pending = [key for key in api if schemas[key].is_output]
    seen: set[str] = set()
    while pending:
        key = pending.pop()
        if key in seen or key not in api:
            continue
        seen.add(key)
        inputs = api[key]["inputs"]
        for socket in schemas[key].sockets:
            if socket.required and socket.name not in inputs:
                raise WorkflowError(f"Node {key} ({api[key]['class_type']}): input {socket.name!r} is not connected.")
        pending += [value[0] for value in inputs.values() if _is_link(value)]


def _is_link(value: Any) -> bool:
    """Whether an API input is a link: [node id, output index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _where(node: Json) -> str:
    """How messages name a node."""
    return f"Node {node['id']} ({node['type']})"


# From the server's form to the editor's


def api_to_ui(api: Json, object_info: ObjectInfo) -> Json:
    """Return the UI form (schema 0.4) of an API workflow, laid out in columns by depth.

    Converting the result back gives `api` again; widgets that `api` leaves out come back with their default.
    Raises `WorkflowError` that names the node and the field.
    """
    if not api or not all(isinstance(node, dict) and "class_type" in node for node in api.values()):
        raise WorkflowError("This is no workflow in the API format: every entry needs a class_type.")
    schemas = {key: node_schema(node["class_type"], object_info, key) for key, node in api.items()}
    links: list[list[Any]] = []
    nodes = {key: _ui_node(key, order, node, schemas[key]) for order, (key, node) in enumerate(api.items())}
    for key, node in api.items():
        for name, value in (node.get("inputs") or {}).items():
            if _is_link(value):
                links.append(_connect(nodes, schemas, len(links) + 1, value, (key, name)))
    place(list(nodes.values()), links)
    numbers = [node["id"] for node in nodes.values() if isinstance(node["id"], int)]
    return {
        "last_node_id": max(numbers, default=0), "last_link_id": len(links), "nodes": list(nodes.values()),
        "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }


def _ui_id(key: str) -> int | str:
    """Plain numbers become numbers; anything else, such as '12:3' from a subgraph, stays a text."""
    return int(key) if key.isdecimal() and str(int(key)) == key else key


def _ui_node(key: str, order: int, node: Json, schema: NodeSchema) -> Json:
    """A node of the UI form, not yet placed or connected."""
    class_type, inputs = node["class_type"], node.get("inputs") or {}
    known = {entry.name for entry in (*schema.widgets, *schema.sockets)}
    for name in inputs:
        if name not in known:
            raise WorkflowError(f"Node {key} ({class_type}): it has no input {name!r}.")
    entries: list[Json] = []
    for socket in schema.sockets:
        if socket.name in inputs and not _is_link(inputs[socket.name]):
            raise WorkflowError(f"Node {key} ({class_type}): input {socket.name!r} takes a link, not a value.")
        entries.append({"name": socket.name, "type": socket.kind, "link": None})
        if not socket.required:
            entries[-1]["shape"] = 7  # how the editor draws an input that may stay empty
    for widget in schema.widgets:
        entries.append({"name": widget.name, "type": widget.kind, "widget": {"name": widget.name}, "link": None})
    result = {
        "id": _ui_id(key), "type": class_type, "pos": [0, 0], "size": [0, 0], "flags": {}, "order": order, "mode": 0,
        "inputs": entries,
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in schema.outputs],
        "properties": {"Node name for S&R": class_type},
        "widgets_values": _widgets_values(inputs, schema),
    }
    title = (node.get("_meta") or {}).get("title")
    if title is not None:
        result["title"] = title
    return result


def _widgets_values(inputs: Json, schema: NodeSchema) -> list[Any]:
    """The widget values by position; linked widgets keep a placeholder in their place."""
    values: list[Any] = []
    for index, widget in enumerate(schema.widgets):
        if index == schema.upload_after:
            values.append("image")
        value = inputs.get(widget.name, widget.placeholder())
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
        values.append(widget.placeholder() if _is_link(inputs.get(widget.name)) else copy.deepcopy(value))
        if widget.has_control:
            values.append("fixed")
            values.extend([""] if widget.kind == "COMBO" else [])
    if schema.upload_after == len(schema.widgets):
        values.append("image")
    return values


def _connect(nodes: dict[str, Json], schemas: dict[str, NodeSchema], link_id: int, value: list[Any],
             target: tuple[str, str]) -> list[Any]:
    """Enter one link at both of its ends and return its row for the list of links."""
    source, slot = value
    key, name = target
    if source not in nodes or not 0 <= slot < len(schemas[source].outputs):
        raise WorkflowError(f"Node {key} ({nodes[key]['type']}): input {name!r} is linked to output {slot} of "
                            f"node {source}, which does not exist.")
    entries = nodes[key]["inputs"]
    index = next(i for i, entry in enumerate(entries) if entry["name"] == name)
    entries[index]["link"] = link_id
    output = nodes[source]["outputs"][slot]
    output["links"].append(link_id)
    return [link_id, nodes[source]["id"], slot, nodes[key]["id"], index, output["type"]]
