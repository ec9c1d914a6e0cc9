"""Tiny random networks of real architectures, through ComfyUI's own model classes."""

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams

CONFIGS = {
    "sd3": (
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "input_size": None,
            "adm_in_channels": 24,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 20, "out_features": 192},
            },
            "depth": 3,
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "context_processor_layers": None,
        },
    ),
    "wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 24,
            "num_heads": 2,
            "ffn_dim": 32,
            "num_layers": 3,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "text_dim": 20,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
            "out_dim": 16,
        },
    ),
    "flux": (
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 24,
            "context_in_dim": 20,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        },
    ),
    "flux2": (
        "Flux2",
        {
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "context_in_dim": 20,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 4, 4, 4],
            "theta": 2000,
            "qkv_bias": False,
            "guidance_embed": True,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
        },
    ),
    "chroma": (
        "Chroma",
        {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": 2,
            "context_in_dim": 20,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideo",
        {
            "image_model": "hunyuan_video",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
            "vec_in_dim": 24,
            "context_in_dim": 20,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 6, 6],
            "theta": 256,
            "qkv_bias": True,
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
        },
    ),
    "ltxv": (
        "LTXV",
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": 20,
            "num_layers": 3,
        },
    ),
    "qwen_image": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "auraflow": (
        "AuraFlow",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 4,
            "n_double_layers": 2,
            "n_heads": 2,
            "global_conddim": 32,
            "cond_seq_dim": 20,
            "max_seq": 64,
        },
    ),
    "mochi": (
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 3,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 32,
            "hidden_size_y": 16,
            "mlp_ratio_x": 384.0,  # the network insists on 1536 * 8 hidden units
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 24,
            "t5_token_length": 256,
            "rope_theta": 10000.0,
        },
    ),
    "lumina2": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 48,
            "cap_feat_dim": 20,
            "n_layers": 2,
            "qk_norm": True,
            "n_heads": 4,
            "n_kv_heads": 2,
            "axes_dims": [4, 4, 4],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
    ),
    "pixart": (
        "PixArtSigma",
        {
            "image_model": "pixart_sigma",
            "num_heads": 4,
            "patch_size": 2,
            "hidden_size": 48,
            "in_channels": 4,
            "depth": 2,
            "caption_channels": 20,
            "model_max_length": 30,
            "micro_condition": False,
        },
    ),
    "cosmos_predict2": (
        "CosmosT2IPredict2",
        {
            "image_model": "cosmos_predict2",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 48,
            "concat_padding_mask": True,
            "crossattn_emb_channels": 20,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "use_adaln_lora": True,
            "adaln_lora_dim": 8,
            "num_blocks": 2,
            "num_heads": 4,
            "extra_per_block_abs_pos_emb": False,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_enable_fps_modulation": False,
        },
    ),
    "hidream": (
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "axes_dims_rope": [8, 4, 4],
            "caption_channels": [20, 24],
            "max_resolution": [32, 32],
            "in_channels": 16,
            "out_channels": 16,
            "llama_layers": [0, 1, 1, 1],
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 2,
            "text_emb_dim": 24,
        },
    ),
}


def derive(base: str, name: str | None = None, **changes):
    """Return the configuration of a relative of ``base``, perhaps of another model class."""
    return name or CONFIGS[base][0], {**CONFIGS[base][1], **changes}


CONFIGS["sd3.5"] = derive("sd3", x_block_self_attn_layers=[0, 1])
CONFIGS["kontext"] = CONFIGS["flux"]
CONFIGS["flux_fill"] = derive("flux", "FluxInpaint", in_channels=96)
CONFIGS["qwen_image_edit"] = CONFIGS["qwen_image"]
CONFIGS["wan_i2v"] = derive("wan", "WAN21_I2V", model_type="i2v", in_dim=36)
CONFIGS["wan2.2_i2v"] = derive("wan", in_dim=36)
CONFIGS["wan2.2_5b"] = derive("wan", "WAN22_T2V", in_dim=48, out_dim=48)
CONFIGS["wan_reference"] = derive("wan", in_dim_ref_conv=16)
CONFIGS["wan_phantom"] = CONFIGS["wan"]
CONFIGS["wan_vace"] = derive("wan", "WAN21_Vace", model_type="vace", num_layers=4, vace_layers=2, vace_in_dim=96)
CONFIGS["hunyuan_reference"] = CONFIGS["hunyuan_video"]
CONFIGS["hunyuan_i2v"] = derive("hunyuan_video", "HunyuanVideoI2V", in_channels=33)
CONFIGS["hunyuan_video_1.5"] = derive(
    "hunyuan_video", "HunyuanVideo15",
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, guidance_embed=False,
    depth=3, depth_single_blocks=0, byt5=True, use_cond_type_embedding=True, vision_in_dim=24,
)  # fmt: skip
CONFIGS["hunyuan_image"] = derive(
    "hunyuan_video", "HunyuanImage21",
    in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[8, 8],
)  # fmt: skip
CONFIGS["z_image"] = derive(
    "lumina2", "ZImage",
    dim=256, n_heads=16, n_kv_heads=16, axes_dims=[4, 6, 6], ffn_dim_multiplier=8.0 / 3.0,
    z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip

#: Standard deviation of the random weights: large enough that blocks matter, small enough for a tame output.
SCALES = {"sd3": 0.06, "sd3.5": 0.06, "z_image": 0.06, "mochi": 0.06}
DEFAULT_SCALE = 0.12
IMAGE, VIDEO = (16, 6, 8), (16, 3, 6, 4)
LATENTS = {
    "sd3": IMAGE,
    "sd3.5": IMAGE,
    "flux": IMAGE,
    "kontext": IMAGE,
    "flux_fill": IMAGE,
    "flux2": (128, 3, 4),
    "chroma": IMAGE,
    "wan": VIDEO,
    "wan_i2v": VIDEO,
    "wan2.2_i2v": VIDEO,
    "wan2.2_5b": (48, 3, 6, 4),
    "wan_reference": VIDEO,
    "wan_phantom": VIDEO,
    "wan_vace": VIDEO,
    "hunyuan_video": VIDEO,
    "hunyuan_reference": VIDEO,
    "hunyuan_i2v": VIDEO,
    "hunyuan_video_1.5": (32, 3, 3, 4),
    "hunyuan_image": (64, 3, 4),
    "ltxv": (128, 3, 3, 4),
    "qwen_image": (16, 1, 6, 8),
    "qwen_image_edit": (16, 1, 6, 8),
    "auraflow": (4, 6, 8),
    "mochi": (12, 3, 6, 4),
    "lumina2": IMAGE,
    "z_image": IMAGE,
    "pixart": (4, 32, 36),  # no smaller: its position embedding divides by a rounded size
    "cosmos_predict2": (16, 1, 6, 8),
    "hidream": IMAGE,
}
#: Text width where it is not 20.
TEXT_WIDTHS = {"mochi": 24}
#: Tensors that a family's conditioning holds beside text, pooled text and guidance: name -> shape.
EXTRAS = {
    "kontext": {"reference_latents": [(1, 16, 4, 4), (1, 16, 6, 2)]},
    "qwen_image_edit": {"reference_latents": [(1, 16, 1, 4, 4)]},
    "wan_reference": {"reference_latents": [(1, 16, 1, 6, 4)]},
    "wan_phantom": {"time_dim_concat": (1, 16, 2, 6, 4)},
    "hunyuan_reference": {"ref_latent": (1, 16, 1, 6, 4)},
    "hunyuan_i2v": {"guiding_frame_index": 0},
    "hunyuan_video_1.5": {"conditioning_byt5small": (1, 3, 1472)},
    "hidream": {"conditioning_llama3": (1, 2, 6, 24)},
}
#: Families that need to be told which text tokens are real.
MASKED = {"ltxv", "mochi", "lumina2", "z_image"}
#: ComfyUI 0.3.76 can run these with a single row only: no guidance, no batch.
ONE_ROW = {"hunyuan_reference", "hunyuan_i2v"}


class TinyModels:
    """Builds each family once; every call hands out a fresh clone."""

    def __init__(self) -> None:
        self._made = {}

    def __call__(self, family: str):
        if family not in self._made:
            self._made[family] = build(family)
        return self._made[family].clone()


def build(family: str):
    """Return a ModelPatcher around a randomised tiny network."""
    name, config = CONFIGS[family]
    config = dict(config)
    if name.startswith("Flux") and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # newer ComfyUI
        config["txt_ids_dims"] = [3] if family == "flux2" else []
    if name == "Chroma" and "vec_in_dim" in ChromaParams.__dataclass_fields__:
        config["vec_in_dim"] = None
    model_config = getattr(comfy.supported_models, name)(config)
    model_config.set_inference_dtype(torch.float32, None)
    base = model_config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * SCALES.get(family, DEFAULT_SCALE))
    base.eval()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def conditioning(seed: int, family: str = ""):
    """Return CONDITIONING of five random tokens and whatever else ``family`` expects."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape):
        if isinstance(shape, list):
            return [make(item) for item in shape]
        return torch.randn(shape, generator=generator) if isinstance(shape, tuple) else shape

    tokens = make((1, 5, TEXT_WIDTHS.get(family, 20)))
    options = {"pooled_output": make((1, 24)), "guidance": 3.5}
    if family in MASKED:
        options["attention_mask"] = torch.ones(1, 5, dtype=torch.int64)
    options.update({name: make(shape) for name, shape in EXTRAS.get(family, {}).items()})
    return [[tokens, options]]


def sample(
    model, family: str, *, sampler="euler", steps=8, cfg=5.0, batch=1, denoise=1.0, seed=1, shape=None, **options
):
    """Sample with ComfyUI's own sampler and return the latent."""
    shape = shape or LATENTS[family]
    latent = torch.zeros(batch, *shape)
    if denoise < 1.0:
        latent = torch.randn(latent.shape, generator=torch.Generator().manual_seed(99))
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", conditioning(3, family), conditioning(4, family),
        latent, denoise=denoise, disable_pbar=True, seed=seed, **options,
    )
