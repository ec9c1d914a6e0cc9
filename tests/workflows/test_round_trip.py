"""API -> UI -> API is the identity, for any graph of the real nodes."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Nodes that between them have every kind of widget, seeds with control values, uploads and optional sockets.
CLASSES = (
    "UNETLoader", "VAELoader", "KSampler", "KSamplerAdvanced", "EmptySD3LatentImage", "VAEDecode", "SaveImage",
    "LoadImage", "ModelSamplingSD3", "CLIPTextEncode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString",
    "ImageBlend", "LatentComposite", "RandomNoise", "BasicScheduler", "StrettoCache", "StrettoMeasure",
    "StrettoReport", "StrettoDemoText", "EmptyHunyuanLatentVideo", "CreateVideo", "SaveVideo",
)


def literal(widget: Any) -> st.SearchStrategy:
    """Values that a widget may hold."""
    if widget.kind == "INT":
        return st.integers(-(2**53), 2**53)
    if widget.kind == "FLOAT":
        return st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: not math.isinf(value))
    if widget.kind == "BOOLEAN":
        return st.booleans()
    if widget.kind == "COMBO":
        return st.sampled_from(widget.choices) if widget.choices else st.just("none.safetensors")
    return st.text(max_size=20) | st.sampled_from(["fixed", "randomize", "image"])


@st.composite
def graphs(draw: st.DrawFn, object_info: dict[str, Any], workflow: Any) -> dict[str, Any]:
    """A random acyclic API workflow in which every required input is given."""
    api: dict[str, Any] = {}
    producers: dict[str, list[tuple[str, int]]] = {}
    for number in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(CLASSES))
        schema = workflow.node_schema(name, object_info)
        inputs: dict[str, Any] = {}
        possible = True
        for socket in schema.sockets:
            sources = producers.get(socket.kind, [])
            if not sources and socket.required:
                possible = False
            elif sources and (socket.required or draw(st.booleans())):
                inputs[socket.name] = list(draw(st.sampled_from(sources)))
        if not possible:
            continue
        for widget in schema.widgets:
            sources = producers.get(widget.kind, [])
            if sources and draw(st.integers(0, 3)) == 0:
                inputs[widget.name] = list(draw(st.sampled_from(sources)))
            else:
                inputs[widget.name] = draw(literal(widget))
        key = str(draw(st.integers(0, 3)) * 100 + number + 1)
        key = f"{key}:{number}" if draw(st.integers(0, 9)) == 0 else key
        api[key] = {"class_type": name, "inputs": inputs}
        if draw(st.booleans()):
            api[key]["_meta"] = {"title": draw(st.text(max_size=8))}
        for slot, (_, kind) in enumerate(schema.outputs):
            producers.setdefault(kind, []).append((key, slot))
    return api


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_api_to_ui_to_api_is_the_identity(data, object_info, workflow):
    api = data.draw(graphs(object_info, workflow).filter(bool))
    ui = workflow.api_to_ui(api, object_info)
    assert workflow.is_ui_workflow(ui)
    assert workflow.ui_to_api(ui, object_info) == api


def test_every_node_of_comfyui_is_either_understood_or_refused_clearly(object_info, workflow):
    refused = []
    for name in object_info:
        try:
            schema = workflow.node_schema(name, object_info)
        except workflow.WorkflowError as error:
            refused.append(str(error))
            continue
        inputs = {widget.name: widget.placeholder() for widget in schema.widgets}
        api = {"1": {"class_type": name, "inputs": inputs}}
        ui = workflow.api_to_ui(api, object_info)
        assert len(ui["nodes"]) == 1
    assert len(refused) <= 20, refused


def test_shipped_files_survive_the_way_there_and_back(shipped, object_info, workflow):
    api = workflow.ui_to_api(shipped, object_info)
    assert workflow.ui_to_api(workflow.api_to_ui(api, object_info), object_info) == api


def test_links_run_from_left_to_right(shipped, object_info, workflow):
    ui = workflow.api_to_ui(workflow.ui_to_api(shipped, object_info), object_info)
    left = {node["id"]: node["pos"][0] for node in ui["nodes"]}
    right = {node["id"]: node["pos"][0] + node["size"][0] for node in ui["nodes"]}
    assert all(right[source] < left[target] for _, source, _, target, _, _ in ui["links"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_type": "Nowhere", "inputs": {}}, "Node 5: this ComfyUI has no node 'Nowhere'"),
        ({"class_type": "VAEDecode", "inputs": {"nothing": 1}}, r"Node 5 \(VAEDecode\): it has no input 'nothing'"),
        ({"class_type": "VAEDecode", "inputs": {"vae": "x"}}, r"Node 5 \(VAEDecode\): input 'vae' takes a link"),
        ({"class_type": "VAEDecode", "inputs": {"vae": ["9", 0]}}, "linked to output 0 of node 9, which does not"),
    ],
)
def test_errors_name_node_and_field(change, message, object_info, workflow):
    with pytest.raises(workflow.WorkflowError, match=message):
        workflow.api_to_ui({"5": change}, object_info)


@pytest.mark.parametrize("data", [{}, {"nodes": []}, {"1": {"inputs": {}}}])
def test_the_other_form_is_refused(data, object_info, workflow):
    with pytest.raises(workflow.WorkflowError, match="API format"):
        workflow.api_to_ui(data, object_info)
