"""Tiny random networks of real architectures, through ComfyUI's own model classes."""

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
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
}
#: Standard deviation of the random weights: large enough that blocks matter, small enough for a tame output.
SCALES = {"sd3": 0.06, "wan": 0.12, "flux": 0.12}
LATENTS = {"sd3": (16, 6, 8), "wan": (16, 3, 6, 4), "flux": (16, 6, 8)}


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
    if family == "flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []  # newer ComfyUI
    model_config = getattr(comfy.supported_models, name)(config)
    model_config.set_inference_dtype(torch.float32, None)
    base = model_config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * SCALES[family])
    base.eval()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def conditioning(seed: int, width: int = 20):
    """Return CONDITIONING of five random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, 5, width, generator=generator),
            {"pooled_output": torch.randn(1, 24, generator=generator), "guidance": 3.5},
        ]
    ]


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
        model, noise, steps, cfg, sampler, "simple", conditioning(3), conditioning(4), latent,
        denoise=denoise, disable_pbar=True, seed=seed, **options,
    )
