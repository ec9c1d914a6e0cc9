"""Beside other people's patches: ControlNet, guidance that calls twice, block replacements of other packs."""

import pytest
import torch

from stretto.acceleration.caching import store as store_module
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from . import tiny_models
from .tiny_models import sample

TAYLOR = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
ENGAGED = Request("cache", {"method": "Taylor", "interval": 1}, force=True)


class Control:
    """As much of a ControlNet as ComfyUI asks for: adds to the output of every block, in place, outside the block."""

    previous_controlnet = None
    extra_hooks = None

    def __init__(self):
        generator = torch.Generator().manual_seed(11)
        self.add = torch.randn(1, 12, 192, generator=generator) * 0.3

    def get_control(self, x, *args):
        return {"output": [self.add.expand(x.shape[0], -1, -1)] * 3}

    def get_models(self):
        return []

    get_extra_hooks = get_models

    def inference_memory_requirements(self, dtype):
        return 0

    def pre_run(self, *args):
        pass

    cleanup = pre_run


@pytest.fixture
def controlled(monkeypatch):
    """Give every conditioning a ControlNet."""
    original = tiny_models.conditioning

    def with_control(*args):
        ((tokens, options),) = original(*args)
        return [[tokens, {**options, "control": Control(), "control_apply_to_uncond": True}]]

    monkeypatch.setattr(tiny_models, "conditioning", with_control)


def test_controlnet_stays_exact_when_engaged_and_never_touches_the_store(tiny, controlled, monkeypatch):
    plain = sample(tiny("sd3"), "sd3")
    assert torch.equal(plain, sample(host.request(tiny("sd3"), ENGAGED), "sd3"))
    kept = []
    push = store_module.SnapshotStore.push

    def spy(self, key, position, tensor, **options):
        result = push(self, key, position, tensor, **options)
        stored = self.histories[key].tensors[0]
        kept.append((stored, stored.clone()))
        return result

    monkeypatch.setattr(store_module.SnapshotStore, "push", spy)
    fast = sample(host.request(tiny("sd3"), TAYLOR), "sd3")
    assert kept and all(torch.equal(now, then) for now, then in kept)
    assert torch.isfinite(fast).all() and not torch.equal(fast, plain)


def test_controlnet_matters_on_skipped_steps_too(tiny, controlled, monkeypatch):
    fast = sample(host.request(tiny("sd3"), TAYLOR), "sd3")
    monkeypatch.undo()
    assert (fast - sample(host.request(tiny("sd3"), TAYLOR), "sd3")).norm() > 1e-3 * fast.norm()


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_block_replacement_of_another_pack_is_chained(tiny, first):
    seen = []

    def theirs(args, extra):
        seen.append(1)
        return extra["original_block"](args)

    model = tiny("flux")
    if first == "theirs":
        model.set_model_patch_replace(theirs, "dit", "single_block", 1)
    model = host.request(model, TAYLOR)
    if first == "ours":
        model.set_model_patch_replace(theirs, "dit", "single_block", 1)
    result = sample(model, "flux")
    computed = host.TRACES.of_prompt(None)[-1]["totals"]["computed"]
    assert len(seen) == computed < 8
    assert torch.equal(result, sample(host.request(tiny("flux"), TAYLOR), "flux"))


def test_a_second_guidance_pass_with_other_patches_has_features_of_its_own(tiny):
    """Skip-layer guidance: the same conditioning again in the same step, with one block replaced."""
    import comfy.samplers

    def skip_layer(args):
        options = args["model_options"].copy()
        to = options["transformer_options"] = options["transformer_options"].copy()
        replaces = to["patches_replace"] = {**to.get("patches_replace", {})}
        replaces["dit"] = {**replaces.get("dit", {}), ("double_block", 1): lambda a, extra: a}
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 0.5 * (args["cond_denoised"] - weak)

    def guided(request=None):
        model = tiny("sd3")
        model.set_model_sampler_post_cfg_function(skip_layer)
        return sample(host.request(model, request) if request else model, "sd3")

    plain = guided()
    assert torch.equal(plain, guided(ENGAGED))
    guided(TAYLOR)
    decisions = [[b["decision"] for b in e["branches"]] for e in host.TRACES.of_prompt(None)[-1]["evaluations"]]
    assert decisions[2] == ["forecast", "forecast", "computed"]  # the extra pass cannot be skipped: it computes
