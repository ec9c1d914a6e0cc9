"""Tiny random pipelines of diffusers: of each, the transformer's kind, a VAE, and no text encoder."""

import diffusers
import torch

TEXT, WIDTH = 6, 16
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
_FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def _vae(**more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, norm_num_groups=4, sample_size=64, **more,
    )  # fmt: skip


def _flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 4), guidance_embeds=True, **_HEADS,
    )  # fmt: skip
    return diffusers.FluxPipeline(_FLOW(), _vae(scaling_factor=1.0, shift_factor=0.1), None, None, None, None, transformer)


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=24, sample_size=32, caption_channels=WIDTH,
        use_additional_conditions=False, **_HEADS,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(None, None, _vae(), transformer, diffusers.DPMSolverMultistepScheduler())


def _dit():
    transformer = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=3, sample_size=8, **_HEADS)
    names = {str(index): f"cat {index}, beast {index}" for index in range(1000)}
    return diffusers.DiTPipeline(transformer, _vae(), diffusers.DDIMScheduler(), id2label=names)


def _cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH,
        num_layers=3, sample_width=6, sample_height=8, sample_frames=9, max_text_seq_length=TEXT,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64, sample_width=48
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return diffusers.CogVideoXPipeline(None, None, vae, transformer, scheduler)


def _qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=3, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4), **_HEADS
    )
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16)
    return diffusers.QwenImagePipeline(_FLOW(), vae, None, None, transformer)


def _ltxv():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_layers=3, cross_attention_dim=24, caption_channels=WIDTH, **_HEADS
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    return diffusers.LTXPipeline(_FLOW(), vae, None, None, transformer)


def _lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 160, 160), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(transformer, _FLOW(), _vae(scaling_factor=1.0, shift_factor=0.1), None, None)


def _hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(4, 4, 4), guidance_embeds=True, **_HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(None, None, transformer, vae, _FLOW(), None, None)


#: Family -> (how to make one, pictures that a run of batch 2, 64 x 64 and 9 frames returns).
PIPELINES = {
    "flux": (_flux, 2),
    "pixart": (_pixart, 2),
    "dit": (_dit, 4),
    "cogvideox": (_cogvideox, 18),
    "qwen_image": (_qwen_image, 2),
    "ltxv": (_ltxv, 18),
    "lumina2": (_lumina2, 2),
    "hunyuan_video": (_hunyuan_video, 18),
}


def pipeline_of(name: str) -> diffusers.DiffusionPipeline:
    """Return the tiny pipeline in evaluation mode; weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = PIPELINES[name][0]()
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return made


def conditioning(seed: int = 3) -> list:
    """Return a CONDITIONING of random text."""
    generator = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(1, TEXT, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator)
    return [[text, {"pooled_output": pooled}]]
