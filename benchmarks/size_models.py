"""Transformers of real sizes with random weights, through ComfyUI's own model classes; text encoder and decoder beside them."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Small random weights keep the output tame in bf16.
SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """A model as people run it.

    Attributes:
        name: what it is called in results.
        title: for people.
        model: class of ``comfy.supported_models``.
        config: of its network.
        latent: of one picture or clip.
        small_latent: the same in a few tokens, for a run of the code on a processor.
        steps: of a usual run.
        cfg: guidance scale; 1 where the model was distilled to need one branch.
        text: (tokens, width) of the prompt.
        pooled: width of the pooled prompt, 0 for none.
        frames: pictures of a clip, 1 for a picture.
        decoder: kind of VAE.
        keep: share of key blocks that sparse attention keeps.
    """

    name: str
    title: str
    model: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    small_latent: tuple[int, ...]
    steps: int
    cfg: float
    text: tuple[int, int]
    pooled: int = 0
    frames: int = 1
    decoder: str = "image"
    keep: float = 0.25
    depths: tuple[str, ...] = field(default=())

    @property
    def blocks(self) -> int:
        """Blocks of the whole network."""
        return sum(self.config[name] for name in self.depths)


def _wan(**changes: Any) -> dict[str, Any]:
    return {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 4096,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "out_dim": 16, **changes,
    }  # fmt: skip


def _flux(**changes: Any) -> dict[str, Any]:
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True, **changes,
    }  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "flux-dev", "FLUX-dev shape, 1024 x 1024", "Flux", _flux(), (16, 128, 128), (16, 16, 16), 28, 1.0, (512, 4096), 768,
            depths=("depth", "depth_single_blocks"),
        ),
        Shape(
            "qwen-image", "Qwen-Image shape, 1024 x 1024", "QwenImage",
            {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "attention_head_dim": 128,
             "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56)},
            (16, 1, 128, 128), (16, 1, 16, 16), 28, 4.0, (256, 3584), decoder="wan", depths=("num_layers",),
        ),
        Shape(
            "wan-1.3b", "Wan 2.1 1.3B shape, 832 x 480, 81 frames", "WAN21_T2V",
            _wan(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), (16, 21, 60, 104), (16, 3, 12, 16), 50, 5.0, (512, 4096),
            frames=81, decoder="wan", depths=("num_layers",),
        ),
        Shape(
            "wan-14b", "Wan 2.1 14B shape, 1280 x 720, 81 frames", "WAN21_T2V",
            _wan(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), (16, 21, 90, 160), (16, 3, 12, 16), 50, 5.0, (512, 4096),
            frames=81, decoder="wan", keep=0.2, depths=("num_layers",),
        ),
        Shape(
            "hunyuan-video", "HunyuanVideo shape, 1280 x 720, 129 frames", "HunyuanVideo",
            _flux(image_model="hunyuan_video", patch_size=[1, 2, 2], depth=20, depth_single_blocks=40, theta=256, byt5=False,
                  meanflow=False, use_cond_type_embedding=False, vision_in_dim=None),
            (16, 33, 90, 160), (16, 3, 12, 16), 50, 1.0, (256, 4096), 768, frames=129, decoder="wan", keep=0.2,
            depths=("depth", "depth_single_blocks"),
        ),
    )
}  # fmt: skip


def prepare(comfyui: Path, device: str) -> None:
    """Make ComfyUI and the pack importable; models stay on the device."""
    sys.path.insert(0, str(ROOT))
    from load_pack import load_pack

    sys.path.remove(str(ROOT))
    load_pack()
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    comfy.cli_args.args.gpu_only = device != "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True


def reduced(shape: Shape, depth: int, width: float) -> dict[str, Any]:
    """Return the network's configuration with at most ``depth`` blocks of each kind, and ``width`` of its heads."""
    config = dict(shape.config)
    for name in shape.depths:
        config[name] = min(config[name], depth) if depth else config[name]
    for name in ("num_heads", "num_attention_heads"):
        if name in config and width < 1:
            heads, config[name] = config[name], max(1, round(config[name] * width))
            for size in ("hidden_size", "dim", "ffn_dim"):
                if size in config:
                    config[size] = config[size] // heads * config[name]
    return config


def build(shape: Shape, device: str, depth: int = 0, width: float = 1.0) -> Any:
    """Return a MODEL around a random network, made where it will run, in bf16 (fp32 on a processor).

    Args:
        shape: what to build.
        device: ``"cuda"`` or ``"cpu"``.
        depth: at most so many blocks of each kind; 0 for all.
        width: share of the heads, and of the channels with them.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    from comfy.ldm.flux.model import FluxParams

    from stretto.acceleration.hosts.comfy_quantization import quantized_operations

    config = reduced(shape, depth, width)
    if shape.model == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    model_config = getattr(comfy.supported_models, shape.model)(config)
    model_config.set_inference_dtype(torch.float32 if device == "cpu" else torch.bfloat16, None)
    model_config.custom_operations = quantized_operations({})
    base = model_config.get_model({}, "", device=device)
    base.diffusion_model.to(device)
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for name, tensor in base.diffusion_model.named_parameters():
            if tensor.ndim > 1 or name.endswith("bias"):
                tensor.normal_(0.0, SCALE, generator=generator)
            else:
                tensor.fill_(1.0)  # norms
    base.eval().requires_grad_(False)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    where = comfy.model_management.get_torch_device()
    return patcher(base, load_device=where, offload_device=where)


def quantize(model: Any, form: str) -> int:
    """Quantize every layer that the family's recipe frees, in place, and return how many."""
    import torch

    from stretto.acceleration.quantization.architectures import find_architecture
    from stretto.acceleration.quantization.arena import LayerState
    from stretto.acceleration.quantization.recipes import choose, preset_for

    network, count = model.model.diffusion_model, 0
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    architecture = find_architecture(shapes)
    recipe = preset_for(architecture).changed(form)
    with torch.no_grad():
        for choice in choose(recipe, architecture, shapes):
            if choice.layout is None:
                continue
            module = network.get_submodule(choice.layer)
            packed = choice.layout.quantize(module.weight.detach())
            module.stretto_state = LayerState(packed.layout, packed.shape, False)
            module.weight = torch.nn.Parameter(packed.arena().to(module.weight.device), requires_grad=False)
            count += 1
    return count


def conditioning(shape: Shape, seed: int, small: bool) -> list:
    """Return CONDITIONING of a random prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens, width = shape.text
    options: dict[str, Any] = {"guidance": 3.5}
    if shape.pooled:
        options["pooled_output"] = torch.randn(1, shape.pooled, generator=generator)
    return [[torch.randn(1, 16 if small else tokens, width, generator=generator), options]]


def decoder(shape: Shape, device: str, small: bool) -> tuple[Any, tuple[int, ...]]:
    """Return a random VAE decoder of the model's kind as a callable, and the latent's shape with its batch."""
    import comfy.ldm.wan.vae
    import torch
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    latent = shape.small_latent if small else shape.latent
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        if shape.decoder == "wan":
            vae = comfy.ldm.wan.vae.WanVAE(
                dim=16 if small else 96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                temperal_downsample=[False, True, True], dropout=0.0,
            )  # fmt: skip
        else:
            config = {
                "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": 32 if small else 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
            }  # fmt: skip
            vae = AutoencodingEngine(
                regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
                encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": config},
                decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": config},
            )
    vae = vae.to(device, dtype).eval()
    _fill(vae)
    return vae.decode, (1, *latent)


def text_encoder(shape: Shape, device: str, small: bool) -> tuple[Any, tuple[int, int]]:
    """Return a random T5-XXL-sized encoder as a callable of embeddings [1, tokens, width], and (tokens, width)."""
    import comfy.ops
    import comfy.text_encoders.t5
    import torch

    path = Path(comfy.text_encoders.t5.__file__).with_name("t5_config_xxl.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if small:
        config |= {"num_layers": 2, "d_ff": 512, "d_model": 256, "num_heads": 4, "vocab_size": 100}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = comfy.text_encoders.t5.T5(config, dtype, torch.device(device), comfy.ops.disable_weight_init)
    _fill(encoder)
    tokens = 16 if small else shape.text[0]

    def encode(embeddings: Any) -> Any:
        return encoder(None, None, embeds=embeddings)

    return encode, (tokens, config["d_model"])


def _fill(module: Any) -> None:
    import torch

    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_(0.0, SCALE)
    module.eval().requires_grad_(False)
