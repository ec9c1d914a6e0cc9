"""The editor's form to the server's: positions of widget values, and everything that only the editor knows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


@pytest.fixture
def info() -> dict[str, Any]:
    """Node classes made for these tests: small enough to see every position at a glance."""
    return {
        "Load": _node({"name": [["a", "b"]]}, ["MODEL"]),
        "Patch": _node({"model": ["MODEL"], "strength": ["FLOAT", {"default": 1.0}]}, ["MODEL"]),
        "Sample": _node(
            {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "name": ["COMBO", {"options": ["euler", "heun"]}],
            },
            ["LATENT"],
            optional={"note": ["STRING", {"default": "later"}], "mask": ["MASK"]},
        ),
        "Image": _node({"image": [["x.png"], {"image_upload": True}]}, ["IMAGE"], optional={"alpha": ["BOOLEAN"]}),
        "Pick": _node({"which": ["COMBO", {"options": ["p", "q"], "control_after_generate": True}],
                       "count": ["INT", {"default": 3}]}, ["INT"]),
        "Show": _node({"samples": ["LATENT"]}, [], output_node=True),
    }


def _node(required, output, optional=None, output_node=False) -> dict[str, Any]:
    inputs = {"required": required, **({"optional": optional} if optional else {})}
    order = {section: list(entries) for section, entries in inputs.items()}
    return {"input": inputs, "input_order": order, "output": output, "output_name": output, "output_node": output_node}


def _ui(api: dict[str, Any], info: dict[str, Any], workflow) -> dict[str, Any]:
    """The editor's form of a small API workflow, to be changed by a test."""
    return workflow.api_to_ui(api, info)


@pytest.fixture
def chain(info, workflow) -> dict[str, Any]:
    """Load -> Patch -> Sample -> Show, as the editor saves it."""
    return _ui(
        {
            "1": {"class_type": "Load", "inputs": {"name": "a"}},
            "2": {"class_type": "Patch", "inputs": {"model": ["1", 0], "strength": 0.5}},
            "3": {"class_type": "Sample",
                  "inputs": {"model": ["2", 0], "seed": 7, "steps": 28, "name": "heun", "note": "n"}},
            "4": {"class_type": "Show", "inputs": {"samples": ["3", 0]}},
        },
        info,
        workflow,
    )


def node_of(ui: dict[str, Any], node_id: int) -> dict[str, Any]:
    """The node with an id."""
    return next(node for node in ui["nodes"] if node["id"] == node_id)


def link_into(ui: dict[str, Any], node_id: int, name: str) -> list[Any]:
    """The row of the link that arrives at an input."""
    link_id = next(entry["link"] for entry in node_of(ui, node_id)["inputs"] if entry["name"] == name)
    return next(row for row in ui["links"] if row[0] == link_id)


def test_the_control_value_after_a_seed_is_skipped(chain, info, workflow):
    assert node_of(chain, 3)["widgets_values"] == [7, "fixed", 28, "heun", "n"]
    inputs = workflow.ui_to_api(chain, info)["3"]["inputs"]
    assert inputs == {"model": ["2", 0], "seed": 7, "steps": 28, "name": "heun", "note": "n"}


def test_a_file_without_control_values_is_read_too(chain, info, workflow):
    node_of(chain, 3)["widgets_values"] = [7, 28, "heun", "n"]
    assert workflow.ui_to_api(chain, info)["3"]["inputs"]["steps"] == 28


def test_inputs_appended_since_the_file_was_saved_get_their_default(chain, info, workflow):
    node_of(chain, 3)["widgets_values"] = [7, "fixed", 28, "heun"]
    assert workflow.ui_to_api(chain, info)["3"]["inputs"]["note"] == "later"


def test_widget_values_by_name(chain, info, workflow):
    node_of(chain, 3)["widgets_values"] = {"seed": 9, "steps": 4, "name": "euler"}
    inputs = workflow.ui_to_api(chain, info)["3"]["inputs"]
    assert (inputs["seed"], inputs["steps"], inputs["note"]) == (9, 4, "later")


@pytest.mark.parametrize(("values", "alpha"), [(["x.png", "image", True], True), (["x.png", True], True)])
def test_the_upload_button_stores_a_value_of_its_own(values, alpha, info, workflow):
    ui = _ui({"1": {"class_type": "Image", "inputs": {"image": "x.png", "alpha": False}}}, info, workflow)
    node_of(ui, 1)["widgets_values"] = values
    assert workflow.ui_to_api(ui, info)["1"]["inputs"] == {"image": "x.png", "alpha": alpha}


@pytest.mark.parametrize("values", [["q", "fixed", "", 5], ["q", "fixed", 5], ["q", 5]])
def test_a_choice_with_a_control_value_and_a_filter(values, info, workflow):
    ui = _ui({"1": {"class_type": "Pick", "inputs": {"which": "p", "count": 1}}}, info, workflow)
    node_of(ui, 1)["widgets_values"] = values
    assert workflow.ui_to_api(ui, info)["1"]["inputs"] == {"which": "q", "count": 5}


def test_a_bypassed_node_hands_its_model_through(chain, info, workflow):
    node_of(chain, 2)["mode"] = workflow.BYPASSED
    api = workflow.ui_to_api(chain, info)
    assert "2" not in api
    assert api["3"]["inputs"]["model"] == ["1", 0]


def test_two_bypassed_nodes_in_a_row(info, workflow):
    ui = _ui(
        {
            "1": {"class_type": "Load", "inputs": {"name": "a"}},
            "2": {"class_type": "Patch", "inputs": {"model": ["1", 0], "strength": 1.0}},
            "3": {"class_type": "Patch", "inputs": {"model": ["2", 0], "strength": 1.0}},
            "4": {"class_type": "Patch", "inputs": {"model": ["3", 0], "strength": 1.0}},
        },
        info,
        workflow,
    )
    node_of(ui, 2)["mode"] = node_of(ui, 3)["mode"] = workflow.BYPASSED
    assert workflow.ui_to_api(ui, info)["4"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_takes_along_what_requires_it(chain, info, workflow):
    node_of(chain, 3)["mode"] = workflow.MUTED
    assert set(workflow.ui_to_api(chain, info)) == {"1", "2"}


def test_bypassing_a_node_without_a_matching_input_takes_along_what_requires_it(chain, info, workflow):
    node_of(chain, 3)["mode"] = workflow.BYPASSED
    assert set(workflow.ui_to_api(chain, info)) == {"1", "2"}


def test_everything_muted_is_an_error(chain, info, workflow):
    for node in chain["nodes"]:
        node["mode"] = workflow.MUTED
    with pytest.raises(workflow.WorkflowError, match="Nothing is left to run"):
        workflow.ui_to_api(chain, info)


def test_reroutes_are_followed(chain, info, workflow):
    row = link_into(chain, 3, "model")
    chain["nodes"].append({"id": 9, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 50}],
                           "outputs": [{"name": "", "type": "MODEL", "links": [row[0]]}]})
    chain["links"].append([50, row[1], row[2], 9, 0, "MODEL"])
    row[1], row[2] = 9, 0
    api = workflow.ui_to_api(chain, info)
    assert api["3"]["inputs"]["model"] == ["2", 0]
    assert "9" not in api


def test_reroutes_in_a_circle_are_an_error(chain, info, workflow):
    row = link_into(chain, 3, "model")
    chain["nodes"].append({"id": 9, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 50}]})
    chain["links"].append([50, 9, 0, 9, 0, "MODEL"])
    row[1], row[2] = 9, 0
    with pytest.raises(workflow.WorkflowError, match="circle"):
        workflow.ui_to_api(chain, info)


def test_a_primitive_becomes_its_value(chain, info, workflow):
    steps = next(entry for entry in node_of(chain, 3)["inputs"] if entry["name"] == "steps")
    steps["link"] = 60
    chain["nodes"].append({"id": 9, "type": "PrimitiveNode", "widgets_values": [12, "fixed"]})
    chain["links"].append([60, 9, 0, 3, 2, "INT"])
    assert workflow.ui_to_api(chain, info)["3"]["inputs"]["steps"] == 12


def test_a_widget_turned_into_an_input_keeps_its_place(chain, info, workflow):
    steps = next(entry for entry in node_of(chain, 3)["inputs"] if entry["name"] == "steps")
    steps["link"] = 60
    chain["nodes"].append({"id": 9, "type": "Pick", "widgets_values": ["p", "fixed", "", 5],
                           "outputs": [{"name": "INT", "type": "INT", "links": [60]}]})
    chain["links"].append([60, 9, 0, 3, 2, "INT"])
    inputs = workflow.ui_to_api(chain, info)["3"]["inputs"]
    assert inputs["steps"] == ["9", 0]
    assert inputs["name"] == "heun"


def test_notes_are_skipped(chain, info, workflow):
    before = workflow.ui_to_api(chain, info)
    chain["nodes"] += [{"id": 20, "type": "Note", "widgets_values": ["x"]},
                       {"id": 21, "type": "MarkdownNote", "widgets_values": ["y"]}]
    assert workflow.ui_to_api(chain, info) == before


def test_links_as_objects(chain, info, workflow):
    before = workflow.ui_to_api(copy.deepcopy(chain), info)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    chain["links"] = [dict(zip(names, row, strict=True)) for row in chain["links"]]
    assert workflow.ui_to_api(chain, info) == before


def test_subgraphs_are_refused_by_name(chain, info, workflow):
    chain["definitions"] = {"subgraphs": [{"id": "u-1", "name": "My group"}]}
    chain["nodes"].append({"id": 30, "type": "u-1"})
    with pytest.raises(workflow.WorkflowError, match="30 is the subgraph 'My group'.*unpack"):
        workflow.ui_to_api(chain, info)


def test_an_unknown_node_is_named(chain, info, workflow):
    node_of(chain, 2)["type"] = "Missing"
    with pytest.raises(workflow.WorkflowError, match="Node 2.*'Missing'"):
        workflow.ui_to_api(chain, info)


def test_values_in_the_wrong_place_name_node_and_field(chain, info, workflow):
    node_of(chain, 3)["widgets_values"] = [7, "fixed", "heun", 28]
    with pytest.raises(workflow.WorkflowError, match=r"Node 3 \(Sample\): field 'steps' should be a whole number"):
        workflow.ui_to_api(chain, info)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "7"])
def test_odd_numbers_are_refused(value, chain, info, workflow):
    node_of(chain, 3)["widgets_values"][2] = value
    with pytest.raises(workflow.WorkflowError, match="'steps'"):
        workflow.ui_to_api(chain, info)


def test_an_unconnected_required_input_is_named(chain, info, workflow):
    for entry in node_of(chain, 3)["inputs"]:
        if entry["name"] == "model":
            entry["link"] = None
    with pytest.raises(workflow.WorkflowError, match=r"Node 3 \(Sample\): input 'model' is not connected"):
        workflow.ui_to_api(chain, info)


def test_loose_ends_that_no_output_needs_do_no_harm(chain, info, workflow):
    chain["nodes"].append({"id": 40, "type": "Patch", "inputs": [], "widgets_values": [1.0]})
    assert "3" in workflow.ui_to_api(chain, info)


def test_a_damaged_link_is_named(chain, info, workflow):
    chain["links"].append([99, 1])
    with pytest.raises(workflow.WorkflowError, match=r"damaged link: \[99, 1\]"):
        workflow.ui_to_api(chain, info)


def test_a_link_from_nowhere_is_named(chain, info, workflow):
    link_into(chain, 3, "model")[1] = 77
    with pytest.raises(workflow.WorkflowError, match="comes from nowhere"):
        workflow.ui_to_api(chain, info)


@pytest.mark.parametrize("data", [{}, [], {"1": {"class_type": "Load"}}, None, {"nodes": 3}])
def test_the_other_form_is_recognised(data, info, workflow):
    assert not workflow.is_ui_workflow(data)
    with pytest.raises(workflow.WorkflowError, match="no workflow"):
        workflow.ui_to_api(data, info)


def test_the_file_is_not_changed(chain, info, workflow):
    before = json.dumps(chain)
    workflow.ui_to_api(chain, info)
    assert json.dumps(chain) == before
