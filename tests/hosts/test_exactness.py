"""Off is off to the bit; engaged but computing everything is, too. Over samplers, guidance, batches, families."""

from dataclasses import replace

import comfy.model_base
import pytest
import torch

from stretto.acceleration.caching.methods import METHODS
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample

FAMILIES = ["sd3", "wan", "flux"]
SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral"]
#: (cfg, batch, split, denoise): every value of every axis, against every family and sampler.
CASES = [
    (1.0, 1, False, 1.0),
    (5.0, 1, False, 1.0),
    (5.0, 2, False, 0.5),
    (5.0, 2, True, 1.0),
    (1.0, 2, True, 0.5),
]
#: Settings with which a method computes every step; forced on, its hooks see everything and must change nothing.
NEVER = {
    "interval": {"interval": 1},
    "growing": {"warmup": 100},
    "mask": {"warmup": 100, "mask": "#"},
    "magnitude": {"warmup": 100},
    "accumulate": {"threshold": 0.0},
    "threshold": {"threshold": 0.0},
    "decaying": {"threshold": 0.0},
    "codebook": {"interval": 1},
}
#: Beside them, what a method cannot be without.
NEEDED = {"Fitted": {"mask": "##.#", "weights": "2: 2 -1", "sigmas": "1 0.7 0.5 0.2 0"}}
ENGAGED = {
    name: Request("cache", {"method": name, **NEVER[method.policy], **NEEDED.get(name, {})}, force=True)
    for name, method in METHODS.items()
    if method.policy
    != "magnitude"  # no curve is published for a random network: tests/hosts/test_methods.py gives it one
}
OFF = {
    **{name: replace(request, force=False) for name, request in ENGAGED.items()},
    "measure": Request("measure", {"nonce": 1}),
}


def split_guidance(monkeypatch):
    """Make ComfyUI believe that cond and uncond do not fit into one batch."""
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)


@pytest.fixture(
    params=CASES, ids=lambda case: f"cfg{case[0]:g}-batch{case[1]}-{'split' if case[2] else 'merged'}-d{case[3]}"
)
def case(request, monkeypatch):
    """One point of the matrix."""
    cfg, batch, split, denoise = request.param
    if split:
        split_guidance(monkeypatch)
    return {"cfg": cfg, "batch": batch, "denoise": denoise, "steps": 5}


#: One method per way of hooking in: at the last block, outside the network, with a probe and text of its own.
WAYS = ("Taylor", "EasyCache", "DBCache")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_off_and_engaged_are_bit_exact(tiny, family, sampler, case):
    plain = sample(tiny(family), family, sampler=sampler, **case)
    for name in ("Taylor", "measure"):
        result = sample(host.request(tiny(family), OFF[name]), family, sampler=sampler, **case)
        assert torch.equal(plain, result), f"off: {name}"
    for name in WAYS:
        check_engaged(plain, tiny, family, name, sampler=sampler, **case)


@pytest.mark.parametrize("name", [name for name in ENGAGED if name not in WAYS])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_off_and_engaged_is_bit_exact(tiny, family, name):
    plain = sample(tiny(family), family, batch=2, steps=4)
    assert torch.equal(plain, sample(host.request(tiny(family), OFF[name]), family, batch=2, steps=4))
    assert host.TRACES.of_prompt(None)[-1]["techniques"][-1]["status"] == "off"
    check_engaged(plain, tiny, family, name, batch=2, steps=4)


def check_engaged(plain, tiny, family, name, **options):
    """Compare with plain sampling, and make sure that the method was not simply off."""
    result = sample(host.request(tiny(family), ENGAGED[name]), family, **options)
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["techniques"][-1]["status"] != "off", name
    assert all(b["blocks_computed"] == b["blocks_total"] for e in trace["evaluations"] for b in e["branches"])
    assert trace["memory"]["store_peak_bytes"] > 0
    assert torch.equal(plain, result), f"engaged: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_engaged_hooks_really_see_every_block(tiny, family):
    """A short-circuit that never engages would prove nothing: the store must have been written."""
    sample(host.request(tiny(family), ENGAGED["Taylor"]), family, steps=4)
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["memory"]["store_peak_bytes"] > 0
    assert trace["totals"] == {"evaluations": 4, "computed": 4, "forecast": 0, "reused": 0, "mixed": 0}


@pytest.mark.parametrize("method", [{"method": "Taylor"}, {"method": "EasyCache", "threshold": 1.0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_split_guidance_skip_the_same_steps(tiny, family, method, monkeypatch):
    def run():
        model = host.request(tiny(family), Request("cache", {**method, "interval": 2, "warmup": 2, "tail": 1}))
        result = sample(model, family, batch=2, steps=24)
        return result, [e["decision"] for e in host.TRACES.of_prompt(None)[-1]["evaluations"]]

    merged, decisions = run()
    split_guidance(monkeypatch)
    split, split_decisions = run()
    assert "computed" in decisions and len(set(decisions)) > 1
    assert decisions == split_decisions
    # Batching changes matmul rounding, which the sampler amplifies; nothing else may differ.
    assert (merged - split).norm() < 1e-3 * merged.norm()


def test_measuring_beside_a_cache_changes_nothing(tiny):
    cached = host.request(tiny("sd3"), Request("cache", {"method": "Taylor", "interval": 2, "tail": 1}))
    alone = sample(cached, "sd3")
    both = sample(host.request(cached, Request("measure", {"nonce": 5})), "sd3")
    assert torch.equal(alone, both)
