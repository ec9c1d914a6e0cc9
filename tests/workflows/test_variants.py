"""Variants of every shipped workflow: each can be run, and each can be saved as the drawing with nodes bypassed."""

import pytest

from stretto.web.panel.measure import arms as edit
from stretto.web.panel.measure.errors import WorkflowError
from stretto.web.panel.measure.variants import Variant, arm_of, offered, stretto_nodes, sweep, ui_of
from stretto.web.panel.measure.workflow import ui_to_api


def test_variants_of_shipped_workflows(shipped, object_info):
    api = ui_to_api(shipped, object_info)
    places = {node["id"]: node["pos"] for node in shipped["nodes"]}
    variants = [variant for variant in offered(api, object_info) if (variant.kind, variant.steps) != ("fewer-steps", None)]
    for node in stretto_nodes(api, object_info):
        for setting in list(node.settings.values())[:2]:
            value = setting.choices[-1] if setting.choices else setting.minimum
            if setting.value is not None and value is not None:
                variants += sweep(node, setting.name, [value])
    for variant in [Variant("plain", "Plain"), *variants]:
        if edit.SECOND_PASS in edit.accelerators(api) and variant.kind in ("plain", "alone"):
            with pytest.raises(WorkflowError, match="between two samplers"):
                arm_of(variant, api, object_info)
            continue
        wanted = arm_of(variant, api, object_info).workflow
        ui = ui_of(variant, shipped, api, object_info)
        runs_as = ui_to_api(ui, object_info)
        assert {key: node["inputs"] for key, node in runs_as.items()} == {key: n["inputs"] for key, n in wanted.items()}
        assert {node["id"]: node["pos"] for node in ui["nodes"]} == places, f"{variant.label}: the drawing is kept"
