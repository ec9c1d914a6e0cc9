"""Whole runs on CUDA: as plain where everything is computed, as on the CPU elsewhere, and no waiting inside a step."""

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from ..hosts import tiny_models

FAMILIES = ("wan", "flux", "sd3")
SHAPES = {"wan": (16, 3, 12, 8), "flux": (16, 12, 16), "sd3": (16, 12, 12)}
#: Techniques that decide by a schedule: the same on every device, whatever a sum rounds to.
SCHEDULED = {
    "Taylor": Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1}),
    "TaylorSeer": Request("cache", {"method": "TaylorSeer", "interval": 3, "order": 2, "warmup": 2, "tail": 1}),
    "FORA": Request("cache", {"method": "FORA", "interval": 2, "warmup": 2, "tail": 1}),
    "FORA modules": Request("cache", {"method": "FORA modules", "interval": 2, "warmup": 2, "tail": 1}),
    "Output": Request("cache", {"method": "Output", "interval": 2, "warmup": 2, "tail": 1}),
    "guidance": Request("guidance", {"method": "Periodic", "interval": 3, "warmup": 2, "tail": 1}),
    "resolution": Request("resolution", {"stages": [0.5, 1.0], "switches": [0.4], "min_side": 2}),
    "sparse attention": Request(
        "attention", {"method": "Diagonal", "keep": 0.5, "min_tokens": 0, "block": 16, "dense_until": 0.0}
    ),
    "feature tables": Request("temporal_features", {"mode": "exact", "prompt": True}),
}
#: Techniques that look at numbers; what they decide may differ where two of them nearly tie.
MEASURING = {
    "TeaCache": Request("cache", {"method": "TeaCache", "threshold": 0.95, "max_skips": 3, "warmup": 2, "tail": 1}),
    "FBCache": Request("cache", {"method": "FBCache", "threshold": 1.0, "max_skips": 3, "warmup": 2, "tail": 1}),
    "EasyCache": Request("cache", {"method": "EasyCache", "threshold": 0.6, "warmup": 2, "tail": 1}),
    "region": Request("region", {"ratio": 0.5, "start": 2, "tail": 0, "refresh_every": 3, "min_tokens": 0}),
}
#: Hooks in place and nothing saved.
ENGAGED = {
    "Taylor": Request("cache", {"method": "Taylor", "interval": 1}, force=True),
    "FBCache": Request("cache", {"method": "FBCache", "threshold": 0.0}, force=True),
    "TeaCache": Request("cache", {"method": "TeaCache", "threshold": 0.0}, force=True),
    "region": Request("region", {"ratio": 1.0, "start": 2, "tail": 0, "refresh_every": 0, "min_tokens": 0}, force=True),
}
STEPS = 10


@pytest.fixture(scope="module")
def made():
    """Return ``made(family, device)``: a tiny MODEL whose device is ``"cpu"`` or ``"cuda"``."""
    models = {}

    def make(family, device):
        if (family, device) not in models:  # a network for each: they would take turns in moving one
            built = tiny_models.build(family)
            models[family, device] = type(built)(
                built.model, load_device=torch.device(device), offload_device=torch.device("cpu")
            )
        return models[family, device].clone()

    yield make
    comfy.model_management.unload_all_models()


def run(model, family, **options):
    return tiny_models.sample(model, family, steps=STEPS, shape=SHAPES[family], **options)


def decisions():
    return [entry["decision"] for entry in host.TRACES.of_prompt(None)[-1]["evaluations"]]


def run_and_decisions(model, family):
    return run(model, family), decisions()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_run_equals_the_same_run_on_the_cpu(made, family, name):
    right, expected = run_and_decisions(host.request(made(family, "cpu"), SCHEDULED[name]), family)
    ours, found = run_and_decisions(host.request(made(family, "cuda"), SCHEDULED[name]), family)
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["model"]["device"].startswith("cuda") and found == expected
    assert float((ours.cpu() - right).norm() / right.norm()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MEASURING)
def test_measuring_techniques_save_on_the_device_too(made, family, name):
    out = run(host.request(made(family, "cuda"), MEASURING[name]), family)
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["techniques"][0]["status"] == "active" and torch.isfinite(out).all()
    saved = any(e["decision"] != "computed" or (e.get("active_share") or 1) < 1 for e in trace["evaluations"])
    assert saved and trace["memory"].get("peak_bytes", 1) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ENGAGED)
def test_engaged_and_everything_computed_is_equal_to_the_bit(made, family, name):
    plain = run(made(family, "cuda"), family)
    assert torch.equal(plain, run(host.request(made(family, "cuda"), ENGAGED[name]), family))


def guarded(model):
    """Return a clone that raises where the host waits for the device inside a network call, ours included."""

    def apply_model(executor, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return executor(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "guard", apply_model)
    return clone


#: What needs to know a number before it can go on: an indicator against its threshold.
WAITLESS = ("Taylor", "TaylorSeer", "FORA", "FORA modules", "Output", "guidance", "sparse attention")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WAITLESS)
def test_nothing_waits_for_the_device_inside_a_step(made, family, name):
    model = made(family, "cuda")
    run(host.request(model, SCHEDULED[name]), family)  # kernels compile, and are tried, the first time
    try:
        run(guarded(model), family)
    except RuntimeError as error:
        pytest.skip(f"ComfyUI itself waits inside this network: {str(error).splitlines()[0]}")
    run(host.request(guarded(model), SCHEDULED[name]), family)
