"""Every technique of a plan: those that claim to work on transformers of diffusers run, the others say why they do not."""

from dataclasses import replace

import pytest
import torch

from stretto.acceleration.compatibility import TECHNIQUES
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.frame_rate.schedule import FrameRateSchedule
from stretto.acceleration.hosts.diffusers import accelerate
from stretto.acceleration.hosts.diffusers_plan import ELSEWHERE, RECORDS, SUPPORTED
from stretto.acceleration.models.diffusers import transformer_of
from stretto.acceleration.plan import Request

from .tiny import FAMILIES, loop

every_family = pytest.mark.parametrize("name", FAMILIES)
REFUSED = {
    "resolution": {},
    "frame_rate": {"schedule": FrameRateSchedule(33, (2, 1, 1, 4)).to_json()},
    "region": {},
    "temporal_features": {},
    "profile": {"token": "t"},
    "module_profile": {"token": "t"},
    "attention_probe": {"token": "t", "order": "rows", "block": 16},
    "attention_greedy": {"token": "t", "theta": 0.1, "guided": False},
    "block_probe": {"probes": 1, "token": "t", "cfg": 4.0},
}


def test_every_technique_is_tested():
    assert {*SUPPORTED, *REFUSED} == set(TECHNIQUES)


@pytest.mark.parametrize("technique", REFUSED)
def test_the_others_are_off_with_the_reason(technique):
    pipe = loop("WanTransformer3DModel")
    plain, wanted = pipe(), Request(technique, REFUSED[technique])
    with accelerate(pipe, wanted) as run:
        assert torch.equal(plain, pipe())
    (outcome,) = run.trace["techniques"]
    assert outcome["status"] == "off" and ELSEWHERE.get(technique, RECORDS) in outcome["reason"]
    with pytest.raises(StrettoError, match="marked as required"), accelerate(pipe, replace(wanted, required=True)):
        pipe()
    assert torch.equal(plain, pipe())


@every_family
def test_a_table_of_blocks(name):
    pipe = loop(name)
    count = len(transformer_of(pipe.transformer).descriptor.sites(pipe.transformer))
    plain = pipe(steps=6)
    with accelerate(pipe, Request("table", {"rows": "/".join(["#" * count] * 6)}, force=True)) as run:
        assert torch.equal(plain, pipe(steps=6))
    assert run.trace["techniques"][0]["status"] == "active"
    rows = "/".join("#" * count if step in (0, 1, 3, 5) else "#" + "." * (count - 1) for step in range(6))
    with accelerate(pipe, Request("table", {"rows": rows}, required=True)) as run:
        result = pipe(steps=6)
        assert torch.equal(result, pipe(steps=6))
    assert bool(result.isfinite().all()) and not torch.equal(result, plain)
    blocks = [sum(branch["blocks_computed"] for branch in entry["branches"]) for entry in run.trace["evaluations"]]
    assert blocks[2] == blocks[4] < blocks[3] == blocks[0]
    assert torch.equal(plain, pipe(steps=6))


def test_a_table_of_modules_is_out_of_reach():
    pipe = loop("WanTransformer3DModel")
    table = Request("table", {"rows": "/".join(["#,#,#,#", "#,.,.,."] * 2), "modules": "attn"}, required=True)
    with pytest.raises(StrettoError, match="module level is out of reach"), accelerate(pipe, table):
        pipe(steps=4)
