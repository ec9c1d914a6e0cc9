"""Region-adaptive sampling inside ComfyUI: exact where every token is active, honest everywhere else."""

import comfy.model_base
import comfy.model_management
import pytest
import torch

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample

FAMILIES = [
    "sd3",
    "sd3.5",
    "wan",
    "flux",
    "kontext",
    "chroma",
    "flux2",
    "qwen_image",
    "qwen_image_edit",
    "lumina2",
    "z_image",
]
EVERY = {"ratio": 1.0, "start": 2, "refresh_every": 0, "min_tokens": 0}
HALF = {"ratio": 0.5, "start": 2, "refresh_every": 3, "min_tokens": 0}


def region(model, settings, **more):
    return host.request(model, Request("region", settings, **more))


def trace():
    return host.TRACES.of_prompt(None)[-1]


def status():
    return next(item for item in trace()["techniques"] if item["technique"] == "region")


def shares():
    return [entry["active_share"] for entry in trace()["evaluations"]]


def split_guidance(monkeypatch):
    """Make ComfyUI believe that cond and uncond do not fit into one batch."""
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)


CASES = [(1.0, 1, False, "euler"), (5.0, 1, False, "dpmpp_2m"), (5.0, 2, False, "euler"), (5.0, 2, True, "euler")]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"cfg{case[0]:g}-batch{case[1]}-{'split' if case[2] else 'merged'}"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_off_and_every_token_active_are_bit_exact(tiny, family, case, monkeypatch):
    """Ratio 1 is off; forced, every step takes tokens, kept keys and stale velocities through the whole machinery."""
    cfg, batch, split, sampler = case
    if split:
        split_guidance(monkeypatch)
    options = {"cfg": cfg, "batch": batch, "sampler": sampler, "steps": 5}
    plain = sample(tiny(family), family, **options)
    assert torch.equal(plain, sample(region(tiny(family), EVERY), family, **options))
    assert status()["status"] == "off"
    for stale in ("repeat", "line", "hidden state"):
        result = sample(region(tiny(family), {**EVERY, "stale": stale}, force=True), family, **options)
        assert status()["status"] != "off", status()
        assert shares() == [None, None, 1.0, 1.0, 1.0]
        assert trace()["memory"]["store_peak_bytes"] > 0
        assert torch.equal(plain, result), stale


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_tokens(tiny, family, monkeypatch):
    def run(stale, **more):
        options = {"cfg": 5.0, "batch": 2, "steps": 9, **more}
        return sample(region(tiny(family), {**HALF, "stale": stale}), family, **options)

    plain = sample(tiny(family), family, batch=2, steps=9)
    for stale in ("repeat", "line", "hidden state"):
        merged = run(stale)
        found = shares()
        assert [share is None for share in found] == [True, True, False, False, True, False, False, True, False]
        assert not torch.equal(merged, plain) and (merged - plain).norm() < 0.5 * plain.norm(), stale
