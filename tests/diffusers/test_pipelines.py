"""Pipelines of diffusers themselves, on tiny networks: what the other tests know of their calls is so."""

import diffusers
import pytest
import torch

from stretto.acceleration.hosts.diffusers import accelerate
from stretto.acceleration.plan import Request

from .tiny import TEXT, WIDTH, network_of

ATTENTION = Request("attention", {"min_tokens": 0, "block": 16, "dense_until": 0.0, "keep": 0.4}, required=True)
GUIDANCE = Request("guidance", {"interval": 2, "warmup": 2, "tail": 1}, required=True)
PLAN = [ATTENTION, GUIDANCE]


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, TEXT, WIDTH, generator=generator) for _ in range(2)]


def wan():
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
    pipe, (text, other) = diffusers.WanPipeline(transformer=network_of("WanTransformer3DModel"), **parts), texts()
    shape = {"height": 128, "width": 128, "num_frames": 9}
    return pipe, lambda scale: pipe(
        prompt_embeds=text, negative_prompt_embeds=other, guidance_scale=scale, num_inference_steps=8, output_type="latent",
        generator=torch.Generator().manual_seed(1), **shape,
    ).frames  # fmt: skip


def flux():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(latent_channels=2, block_out_channels=(8, 8, 8, 8), norm_num_groups=2, **blocks)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.FluxPipeline(scheduler, vae, transformer=network_of("FluxTransformer2DModel"), **absent)
    text, other = texts()
    return pipe, lambda scale: pipe(
        prompt_embeds=text, pooled_prompt_embeds=text[:, 0], negative_prompt_embeds=other, true_cfg_scale=scale,
        negative_pooled_prompt_embeds=other[:, 0], height=128, width=160, num_inference_steps=8, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


@pytest.mark.parametrize("make", [wan, flux])
def test_attention_and_guidance_in_a_pipeline(make):
    pipe, sample = make()
    pipe.set_progress_bar_config(disable=True)
    plain = sample(4.0)
    with accelerate(pipe, PLAN) as run:
        result = sample(4.0)
        assert torch.equal(result, sample(4.0))
    trace = run.trace
    assert (trace["guidance"]["asked"], trace["guidance"]["saved"], trace["guidance"]["left"]) == (5, 3, {})
    assert all(0 < entry["attention_kept"] < 1 for entry in trace["evaluations"]) and not trace["attention"]["dense"]
    assert bool(result.isfinite().all()) and not torch.equal(result, plain)
    assert torch.equal(plain, sample(4.0))


def test_a_pipeline_that_does_not_guide_and_does_not_say_so():
    pipe, sample = flux()
    pipe.set_progress_bar_config(disable=True)
    plain = sample(1.0)
    with accelerate(pipe, GUIDANCE) as run:
        assert torch.equal(plain, sample(1.0))
    assert (run.trace["guidance"]["asked"], run.trace["guidance"]["saved"]) == (0, 0)
    assert "does not say beforehand" in run.trace["techniques"][0]["reason"]
