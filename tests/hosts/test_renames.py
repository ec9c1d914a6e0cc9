"""Renamed nodes are told to a ComfyUI that can replace them, and to no other."""

import asyncio
from types import SimpleNamespace

import pytest
from comfy_api import latest

import stretto
from stretto.nodes.renames import RENAMES, Rename, declare_renames

MERGED = Rename(
    "StrettoTaylorCache",
    "StrettoCache",
    widgets=("every", "order"),
    inputs={"model": "model", "interval": "every", "order": "order"},
    values={"method": "Taylor"},
    outputs={0: 1},
)


@pytest.fixture
def newer():
    """A ComfyUI with node replacement, as its public interface states it."""
    told = []

    async def register(replacement):
        told.append(replacement)

    api = SimpleNamespace(
        ComfyAPI=lambda: SimpleNamespace(node_replacement=SimpleNamespace(register=register)),
        io=SimpleNamespace(NodeReplace=lambda **arguments: arguments),
        told=told,
    )
    return api


def test_a_rename_is_told_in_full(newer):
    assert asyncio.run(declare_renames([MERGED, Rename("StrettoOld", "StrettoReport")], newer)) == 2
    assert newer.told == [
        {
            "new_node_id": "StrettoCache",
            "old_node_id": "StrettoTaylorCache",
            "old_widget_ids": ["every", "order"],
            "input_mapping": [
                {"new_id": "model", "old_id": "model"}, {"new_id": "interval", "old_id": "every"},
                {"new_id": "order", "old_id": "order"}, {"new_id": "method", "set_value": "Taylor"},
            ],
            "output_mapping": [{"new_idx": 0, "old_idx": 1}],
        },
        {"new_node_id": "StrettoReport", "old_node_id": "StrettoOld"},
    ]  # fmt: skip


def test_an_older_comfyui_is_left_alone(newer):
    without_api = SimpleNamespace(ComfyAPI=lambda: SimpleNamespace(), io=newer.io)
    without_class = SimpleNamespace(ComfyAPI=newer.ComfyAPI, io=SimpleNamespace())
    assert asyncio.run(declare_renames([MERGED], without_api)) == 0
    assert asyncio.run(declare_renames([MERGED], without_class)) == 0
    assert asyncio.run(declare_renames([], newer)) == 0 and newer.told == []


def test_this_comfyui_takes_it_or_is_left_alone():
    able = hasattr(latest.io, "NodeReplace") and hasattr(latest.ComfyAPI(), "node_replacement")
    assert asyncio.run(declare_renames([Rename("StrettoNeverWas", "StrettoReport")])) == int(able)


def test_every_rename_leads_to_a_node_that_exists():
    extension = asyncio.run(stretto.comfy_entrypoint())
    asyncio.run(extension.on_load())
    nodes = {node.GET_SCHEMA().node_id: node.define_schema() for node in asyncio.run(extension.get_node_list())}
    for rename in RENAMES:
        assert rename.new in nodes
        assert rename.old not in nodes or nodes[rename.old].is_deprecated
        assert {*rename.inputs, *rename.values} <= {item.id for item in nodes[rename.new].inputs}
