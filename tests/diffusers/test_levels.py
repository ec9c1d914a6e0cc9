"""Schedulers of diffusers: noise levels, what predictions mean, and which call belongs to a run."""

import diffusers
import pytest
import torch

from stretto.acceleration.hosts.diffusers_levels import given_levels, levels_of, place, scheduler_traits
from stretto.acceleration.sampling import schedule_of

SCHEDULERS = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "wan": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim, v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "ddim, sample": lambda: diffusers.DDIMScheduler(prediction_type="sample"),
    "cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_fall_and_traits_are_known(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    levels = levels_of(scheduler)
    assert schedule_of(levels.falling).falling and len(levels.falling) == 11
    traits = scheduler_traits(scheduler, levels)
    assert traits.known
    assert traits.stochastic == (name in ("flow, stochastic", "ancestral", "sde"))
    assert traits.single_call == (name != "flow heun")


@pytest.mark.parametrize("name", ["flow", "euler", "ddim", "ddim, v", "ddim, sample"])
def test_denoised_is_what_the_scheduler_makes_of_a_prediction(name):
    """Checked against the scheduler's own estimate; a flow's against x - sigma v."""
    generator = torch.Generator().manual_seed(1)
    for index in (0, 4, 9):
        scheduler = SCHEDULERS[name]()
        scheduler.register_to_config(clip_sample=False)
        scheduler.set_timesteps(10)
        x, prediction = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
        if name == "flow":
            given, expected = x, x - scheduler.sigmas[index] * prediction
        else:
            given = scheduler.scale_model_input(x, scheduler.timesteps[index])
            expected = scheduler.step(prediction, scheduler.timesteps[index], x).pred_original_sample
        scale, gain = levels_of(scheduler).affine(index)
        assert torch.allclose(scale * given + gain * prediction, expected, rtol=1e-4, atol=1e-4)


def test_calls_are_placed_by_the_schedulers_count():
    scheduler = SCHEDULERS["flow"]()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(3)  # image to image
    levels = levels_of(scheduler)
    at = [float(t) for t in scheduler.timesteps]
    assert place(scheduler, levels, at[3], torch.float32, -1) == 3
    assert place(scheduler, levels, at[4], torch.float32, 3) is None  # nobody has stepped: another pipeline's call
    scheduler.step(torch.zeros(1), scheduler.timesteps[3], torch.zeros(1))
    assert place(scheduler, levels, at[4], torch.float32, 3) == 4
    assert place(scheduler, levels, float(torch.tensor(at[4]).bfloat16()), torch.bfloat16, 3) == 4
    assert place(scheduler, levels, float(torch.tensor(at[4]).bfloat16()) + 20, torch.bfloat16, 3) is None


def test_a_scheduler_that_was_not_told_where_it_begins_is_told_by_the_first_call():
    scheduler = SCHEDULERS["flow"]()
    scheduler.set_timesteps(10)
    levels, at = levels_of(scheduler), [float(t) for t in scheduler.timesteps]
    assert place(scheduler, levels, at[5], torch.float32, -1) == 5
    assert place(scheduler, levels, at[6], torch.float32, 5) is None


def test_given_levels_need_no_scheduler():
    levels = given_levels([1.0, 0.6, 0.3, 0.0])
    assert [place(None, levels, t, torch.float32, -1) for t in (1000.0, 600.0, 300.0, 450.0)] == [0, 1, 2, None]
    assert levels.affine(1) == (1.0, -0.6)


def test_schedulers_that_are_not_understood_are_not_known():
    scheduler = diffusers.EDMEulerScheduler() if hasattr(diffusers, "EDMEulerScheduler") else diffusers.PNDMScheduler()
    scheduler.set_timesteps(10)
    assert not scheduler_traits(scheduler, levels_of(scheduler)).known
