"""Two models by noise level (Wan's experts, FlowBlending): what one run keeps never reaches the other."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import LATENTS, build, conditioning

STEPS, SWITCH = 12, 6
CACHES = {
    "Taylor": {"interval": 2, "warmup": 2, "tail": 1},
    "EasyCache": {"threshold": 0.8, "warmup": 2, "tail": 1},
    "FBCache": {"threshold": 0.8, "warmup": 2, "tail": 1},
}
SAVER = Request("guidance", {"interval": 2, "warmup": 1, "tail": 1})


def accelerated(model, method="Taylor"):
    return host.request(host.request(model, Request("cache", {"method": method, **CACHES[method]})), SAVER)


def another():
    """A network of the same family with weights of its own."""
    model = build("wan")
    with torch.no_grad():
        for tensor in model.model.diffusion_model.parameters():
            tensor.mul_(0.9)
    return model


def other(model):
    """A clone that shares the network, and whose weights differ while it runs, as with a LoRA of its own."""
    clone = model.clone()
    name = next(key for key in clone.model_state_dict() if key.endswith("weight") and "norm" not in key)
    clone.add_patches({name: (torch.full_like(clone.model_state_dict()[name], 0.05),)})
    return clone


def part(model, latent, first, last, noise=True):
    """Sample as KSamplerAdvanced does: some of the steps, with or without noise at the start."""
    empty = torch.zeros(1, *LATENTS["wan"])
    given = comfy.sample.prepare_noise(empty, 1) if noise else torch.zeros_like(empty)
    pair = conditioning(0, "wan"), conditioning(1, "wan")
    return comfy.sample.sample(
        model, given, STEPS, 5.0, "euler", "simple", *pair, latent, disable_noise=not noise, start_step=first,
        last_step=last, force_full_denoise=last == STEPS, disable_pbar=True, seed=1,
    )  # fmt: skip


def early(model):
    return part(model, torch.zeros(1, *LATENTS["wan"]), 0, SWITCH)


def late(model, latent):
    return part(model, latent, SWITCH, STEPS, noise=False)


def decisions():
    return [entry["decision"] for entry in host.TRACES.of_prompt(None)[-1]["evaluations"]]


@pytest.mark.parametrize("method", CACHES)
def test_nothing_crosses_from_one_expert_to_the_other(tiny, method):
    """The second model's part is what it is without the first one's run: to the bit, also where both share a network."""
    first = accelerated(tiny("wan"), method)
    for second in (accelerated(another(), method), other(first)):
        handed_on = early(first)
        assert any(decision != "computed" for decision in decisions())
        result = late(second, handed_on)
        assert decisions()[:2] == ["computed"] * 2, "each expert begins with steps of its own"
        assert any(decision != "computed" for decision in decisions())
        assert torch.equal(result, late(second, handed_on)), "nothing of the first run was there"
        assert not torch.equal(result, late(first, handed_on))
        assert torch.equal(handed_on, early(first)), "and nothing of the second went back"


def test_split_runs_whose_steps_are_all_computed_are_the_whole_one(tiny):
    """The same model twice, hooks on and nothing skipped, is one plain run in two halves."""
    forced = host.request(tiny("wan"), Request("cache", {"method": "Taylor", "interval": 1}, force=True))
    plain = part(tiny("wan"), torch.zeros(1, *LATENTS["wan"]), 0, STEPS)
    halves = late(tiny("wan"), early(tiny("wan")))
    assert torch.equal(late(forced, early(forced)), halves)
    assert (halves - plain).norm() <= 1e-5 * plain.norm()


def test_split_sigmas_gives_each_expert_a_run_of_its_own(tiny):
    """SamplerCustom with SplitSigmas: positions and warm-up count within each part."""
    model = accelerated(tiny("wan"))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    latent = torch.zeros(1, *LATENTS["wan"])
    noise, euler = comfy.sample.prepare_noise(latent, 1), comfy.samplers.ksampler("euler")
    pair = conditioning(0, "wan"), conditioning(1, "wan")
    for levels, given in ((sigmas[: SWITCH + 1], noise), (sigmas[SWITCH:], torch.zeros_like(noise))):
        latent = comfy.sample.sample_custom(model, given, 5.0, euler, levels, *pair, latent, disable_pbar=True, seed=1)
        entries = host.TRACES.of_prompt(None)[-1]["evaluations"]
        assert [entry["position"] for entry in entries] == pytest.approx(range(SWITCH))
        assert decisions()[:2] == ["computed"] * 2 and decisions()[2] != "computed"
    assert torch.isfinite(latent).all()


def test_a_late_expert_has_no_small_stage_and_an_early_one_may_end_in_the_middle_of_it(tiny):
    """Progressive resolution belongs to the early expert: its part ends at full size, whatever the switch."""
    grown = host.request(tiny("wan"), Request("resolution", {"stages": [0.5, 1.0], "switches": [0.5], "min_side": 2}))
    handed_on = part(grown, torch.zeros(1, *LATENTS["wan"]), 0, SWITCH)
    trace = host.TRACES.of_prompt(None)[-1]
    assert handed_on.shape[-2:] == LATENTS["wan"][-2:] and trace["resolution"]["stages"][-1]["size"] == list(LATENTS["wan"][-2:])
    chosen = host.request(tiny("wan"), Request("resolution", {"min_side": 2, "spectrum": "Wan"}))
    late(chosen, handed_on)
    assert "nothing to gain" in host.TRACES.of_prompt(None)[-1]["techniques"][0]["reason"]
