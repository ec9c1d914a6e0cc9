"""Saved guidance and smaller stages beside everything else that takes part in sampling: each runs, or says why not."""

import comfy.samplers
import pytest
import torch

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from . import tiny_models
from .test_guidance import PERIODIC, split_guidance
from .test_neighbours import Control
from .test_resolution import CLIP, CORRECTED, GROWING
from .tiny_models import conditioning, sample

WANTED = pytest.mark.parametrize("wanted", [PERIODIC, GROWING, CORRECTED], ids=["guidance", "coupled", "corrected"])


def trace():
    return host.TRACES.of_prompt(None)[-1]


def engaged():
    """Whether the last run saved something."""
    found = trace()
    if found["techniques"][0]["status"] == "off":
        return False
    tokens = {branch["tokens"] for entry in found["evaluations"] for branch in entry["branches"]}
    return len(tokens) == 2 or found.get("guidance", {}).get("saved", 0) > 0


def run(tiny, wanted, change=None, family="wan", **options):
    """Sample with and without a technique on a model that ``change`` has changed; return both latents."""
    model = tiny(family)
    model = change(model) if change else model
    options = {"steps": 10, "shape": CLIP if family == "wan" else None, **options}
    return sample(model, family, **options), sample(host.request(model, wanted), family, **options)


@WANTED
@pytest.mark.parametrize("options", [
    {"batch": 2}, {"denoise": 0.7}, {"steps": 20, "sampler": "euler_ancestral"},
], ids=["batch", "denoise", "ancestral"])  # fmt: skip
def test_batches_and_starting_from_a_picture(tiny, wanted, options):
    plain, fast = run(tiny, wanted, **options)
    assert engaged() and torch.isfinite(fast).all() and fast.shape == plain.shape and not torch.equal(plain, fast)


@WANTED
def test_branches_in_calls_of_their_own(tiny, wanted, monkeypatch):
    _, merged = run(tiny, wanted)
    split_guidance(monkeypatch)
    _, split = run(tiny, wanted)
    assert engaged()
    torch.testing.assert_close(merged, split, atol=1e-4, rtol=1e-4)


def lora(model):
    """Weights patched as a LoRA patches them."""
    name = next(key for key in model.model_state_dict() if key.endswith("weight") and "norm" not in key)
    clone = model.clone()
    clone.add_patches({name: (torch.full_like(clone.model_state_dict()[name], 0.02),)})
    return clone


def patched_attention(model):
    """Attention replaced by something of another pack's, as adapters do."""
    from comfy.ldm.modules.attention import optimized_attention

    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        lambda original, *args, **kwargs: 0.9 * (original or optimized_attention)(*args, **kwargs)
    )
    return clone


def windows(model):
    from comfy.context_windows import IndexListContextHandler, get_matching_context_schedule, get_matching_fuse_method

    clone = model.clone()
    clone.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule("standard_static"), get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=2,
    )  # fmt: skip
    return clone


@WANTED
@pytest.mark.parametrize("change", [lora, patched_attention, windows])
def test_changed_models(tiny, wanted, change):
    plain, fast = run(tiny, wanted, change)
    assert engaged() and torch.isfinite(fast).all() and not torch.equal(plain, fast)
    assert not torch.equal(fast, run(tiny, wanted)[1]), "the change has an effect"


@WANTED
def test_sparse_attention_in_the_same_run(tiny, wanted):
    sparse = Request("attention", {"method": "Diagonal", "keep": 0.5, "min_tokens": 1})
    _, fast = run(tiny, wanted, lambda model: host.request(model, sparse), shape=(16, 3, 24, 16))
    status = {item["technique"]: item["status"] for item in trace()["techniques"]}
    assert status[wanted.technique] == "active" and torch.isfinite(fast).all()


@WANTED
def test_controlnet_takes_part_at_every_size(tiny, wanted, monkeypatch):
    class Fitting(Control):
        def get_control(self, x, *args):
            return {"output": [torch.full((x.shape[0], x.shape[-2] * x.shape[-1] // 4, 192), 0.1)] * 3}

    extra = {"control": Fitting(), "control_apply_to_uncond": True}
    monkeypatch.setattr(
        tiny_models,
        "conditioning",
        lambda *args: [[words, {**rest, **extra}] for words, rest in conditioning(*args)],
    )
    _, fast = run(tiny, wanted, family="sd3", shape=(16, 12, 12))
    assert engaged() and torch.isfinite(fast).all()


@WANTED
@pytest.mark.parametrize("family", ["wan", "wan2.2_5b"])
def test_inpainting_and_frames_that_are_given(tiny, wanted, family):
    """Wan 2.2 5B has noise levels of its own for frames that are given."""
    shape = tiny_models.LATENTS[family]
    shape = (*shape[:-2], shape[-2] * 2, shape[-1] * 2)
    model = host.request(tiny(family), wanted)
    latent = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, shape[1], *shape[-2:])
    mask[:, :, 0] = 0.0
    noise = comfy.sample.prepare_noise(latent, 1)
    pair = conditioning(0, family), conditioning(1, family)
    result = comfy.sample.sample(
        model, noise, 10, 5.0, "euler", "simple", *pair, latent, noise_mask=mask, disable_pbar=True, seed=1
    )
    assert engaged() and (result[:, :, 0] - latent[:, :, 0]).abs().max() < 1e-3


@WANTED
def test_noise_levels_that_rise_again(tiny, wanted):
    """Guidance asks both branches anew; a run in stages has no such levels, and stays plain."""
    model, family = host.request(tiny("wan"), wanted), "wan"
    latent = torch.zeros(1, *CLIP)
    noise, levels = comfy.sample.prepare_noise(latent, 1), torch.tensor([1.0, 0.8, 0.6, 0.9, 0.5, 0.0])
    pair = conditioning(0, family), conditioning(1, family)
    euler = comfy.samplers.ksampler("euler")
    comfy.sample.sample_custom(model, noise, 5.0, euler, levels, *pair, latent, disable_pbar=True, seed=1)
    found = trace()["techniques"][0]
    assert found["status"] == "off" and "fall" in found["reason"]


@WANTED
def test_churn_and_skipped_layers(tiny, wanted):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def skipping(model):
        return SkipLayerGuidanceDiT.execute(
            model, double_layers="1", single_layers="", scale=3.0, start_percent=0.0, end_percent=0.9, rescaling_scale=0.0
        ).result[0]

    plain, fast = run(tiny, wanted, skipping, family="sd3", shape=(16, 12, 12))
    assert engaged() and torch.isfinite(fast).all() and not torch.equal(plain, fast)
    churned = comfy.samplers.ksampler("euler", {"s_churn": 5.0})
    latent = torch.zeros(1, *CLIP)
    noise, sigmas = comfy.sample.prepare_noise(latent, 1), comfy.samplers.calculate_sigmas(
        tiny("wan").get_model_object("model_sampling"), "simple", 10
    )
    pair = conditioning(0, "wan"), conditioning(1, "wan")
    model = host.request(tiny("wan"), wanted)
    result = comfy.sample.sample_custom(model, noise, 5.0, churned, sigmas, *pair, latent, disable_pbar=True, seed=1)
    assert torch.isfinite(result).all()
