"""The picture of weights that tables stand for."""

import copy

import numpy as np

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .test_nodes import nodes  # noqa: F401  (a fixture)
from .tiny_models import sample

SECTION = {
    "mode": "exact", "table_bytes": 59 << 20, "entries": 56, "saved": "",
    "components": [
        {"name": "modulation", "layers": 76, "weight_bytes": 6460 << 20, "loaded_bytes": 0, "computed": 2128, "reused": 2128,
         "left": 0, "exact": True},
        {"name": "prompt", "layers": 80, "weight_bytes": 4190 << 20, "loaded_bytes": 4190 << 20, "computed": 80, "reused": 2160,
         "left": 3, "exact": True},
    ],
}  # fmt: skip


def widths(picture, colour):
    """Pixels of a bar's colour per row of the picture, below the legend."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.asarray(picture)[70:] == wanted).all(-1).sum(1)


def test_bars_are_as_long_as_there_are_bytes(nodes):  # noqa: F811
    from stretto.nodes import feature_bytes as drawing

    picture = drawing.feature_bytes({"features": SECTION})
    full = picture.width - 2 * drawing.MARGIN - drawing.LABEL
    before, loaded, tables = (widths(picture, colour) for colour in (drawing.BEFORE, drawing.LOADED, drawing.TABLES))
    assert before.max() == full + 1
    share = SECTION["components"][1]["weight_bytes"] / SECTION["components"][0]["weight_bytes"]
    assert abs(loaded.max() - share * full) <= 2
    assert abs(tables.max() - full * 59 / 6460) <= 2
    less = copy.deepcopy(SECTION)
    less["components"][1]["loaded_bytes"] = 0
    assert widths(drawing.feature_bytes({"features": less}), drawing.LOADED).max() == 0


def test_runs_without_tables_have_no_such_picture(nodes, tiny):  # noqa: F811
    from stretto.nodes.feature_bytes import feature_bytes

    sample(host.request(tiny("flux"), Request("temporal_features", {})), "flux", steps=2)
    assert feature_bytes(host.TRACES.of_prompt(None)[-1]).width == 960
    assert feature_bytes({}) is None and feature_bytes({"features": {**SECTION, "components": []}}) is None
