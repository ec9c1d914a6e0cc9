"""What the workflows load: files, addresses and folders as ComfyUI's own templates state them, and how models are sampled."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

_HUGGING_FACE = "https://huggingface.co/"


@dataclass(frozen=True)
class File:
    """A file to download. `folder` is one of ComfyUI's model folders."""

    name: str
    url: str
    folder: str


def _file(folder: str, repository: str, path: str) -> File:
    return File(path.rsplit("/", 1)[-1], f"{_HUGGING_FACE}{repository}/resolve/main/{path}", folder)


def _split(folder: str, repository: str, name: str) -> File:
    """A file of Comfy-Org's repackaged models, which lie in folders named like ComfyUI's."""
    return _file(folder, f"Comfy-Org/{repository}", f"split_files/{folder}/{name}")


_FLUX_TEXT = "comfyanonymous/flux_text_encoders"
CLIP_L = _file("text_encoders", _FLUX_TEXT, "clip_l.safetensors")
T5 = _file("text_encoders", _FLUX_TEXT, "t5xxl_fp16.safetensors")
UMT5 = _split("text_encoders", "Wan_2.1_ComfyUI_repackaged", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
LLAVA = _split("text_encoders", "HunyuanVideo_repackaged", "llava_llama3_fp8_scaled.safetensors")
QWEN_VL = _split("text_encoders", "Qwen-Image_ComfyUI", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
QWEN_3 = _split("text_encoders", "z_image_turbo", "qwen_3_4b.safetensors")

FLUX_DEV = _file("diffusion_models", "Comfy-Org/flux1-dev", "flux1-dev.safetensors")
SD35_LARGE = _file("checkpoints", "Comfy-Org/stable-diffusion-3.5-fp8", "sd3.5_large_fp8_scaled.safetensors")
QWEN_IMAGE = _split("diffusion_models", "Qwen-Image_ComfyUI", "qwen_image_fp8_e4m3fn.safetensors")
Z_IMAGE = _split("diffusion_models", "z_image_turbo", "z_image_turbo_bf16.safetensors")
WAN21 = _split("diffusion_models", "Wan_2.1_ComfyUI_repackaged", "wan2.1_t2v_1.3B_fp16.safetensors")
WAN22_HIGH = _split("diffusion_models", "Wan_2.2_ComfyUI_Repackaged", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
WAN22_LOW = _split("diffusion_models", "Wan_2.2_ComfyUI_Repackaged", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
HUNYUAN = _split("diffusion_models", "HunyuanVideo_repackaged", "hunyuan_video_t2v_720p_bf16.safetensors")
LTX = _file("checkpoints", "Lightricks/LTX-Video", "ltx-video-2b-v0.9.safetensors")

AE = _split("vae", "Lumina_Image_2.0_Repackaged", "ae.safetensors")
QWEN_VAE = _split("vae", "Qwen-Image_ComfyUI", "qwen_image_vae.safetensors")
WAN_VAE = _split("vae", "Wan_2.1_ComfyUI_repackaged", "wan_2.1_vae.safetensors")
HUNYUAN_VAE = _split("vae", "HunyuanVideo_repackaged", "hunyuan_video_vae_bf16.safetensors")

#: Every file that a workflow may load, by name.
FILES = {value.name: value for value in list(globals().values()) if isinstance(value, File)}


@dataclass(frozen=True)
class Family:
    """A model and how it is sampled, as ComfyUI's own template of it does.

    `model` in the folder "checkpoints" brings its own VAE, and its text encoder where `text` is empty. `shift` is the
    node that moves the noise levels, and by how much. `size` is width, height and, for videos, frames. `guidance` is
    the number of a model that was taught its guidance (FLUX, HunyuanVideo). Where `cfg` is 1 nothing asks the negative
    prompt. `demo` marks the models that come with the pack: they need no downloads and have a text encoder of their own.
    """

    title: str
    models: tuple[File, ...]
    text: tuple[File, ...]
    text_type: str
    vae: File | None
    size: tuple[int, ...]
    steps: int
    cfg: float
    sampler: str = "euler"
    scheduler: str = "simple"
    shift: tuple[str, float] | None = None
    guidance: float | None = None
    fps: float = 0.0
    latent: str = "EmptySD3LatentImage"
    prompt: str = ""
    negative: str = ""
    demo: str = ""

    @property
    def is_video(self) -> bool:
        """Whether it makes clips."""
        return len(self.size) == 3

    def changed(self, **values: Any) -> Family:
        """Return this family with other values."""
        return replace(self, **values)


_PICTURE = "a lighthouse on a cliff in the rain at dusk, warm light in its windows, long exposure of the sea, photograph"
_CLIP = (
    "A lighthouse on a cliff in heavy rain at dusk. Waves break on the rocks, the beam turns slowly, gulls cross the "
    "frame. The camera moves along the coast."
)
_BAD = "blurred, overexposed, static, distorted, watermark, subtitles, worst quality"
_VIDEO = "EmptyHunyuanLatentVideo"

FAMILIES = {
    "flux": Family(
        "FLUX.1 [dev]", (FLUX_DEV,), (CLIP_L, T5), "flux", AE, (1024, 1024), 28, 1.0, guidance=3.5, prompt=_PICTURE,
    ),
    "sd35": Family(
        "Stable Diffusion 3.5 Large", (SD35_LARGE,), (), "sd3", None, (1024, 1024), 28, 4.0, scheduler="sgm_uniform",
        prompt=_PICTURE, negative="",
    ),
    "qwen-image": Family(
        "Qwen-Image", (QWEN_IMAGE,), (QWEN_VL,), "qwen_image", QWEN_VAE, (1328, 1328), 20, 2.5,
        shift=("ModelSamplingAuraFlow", 3.1), prompt=f"{_PICTURE}, a sign that says \"Stretto\"",
    ),
    "z-image": Family(
        "Z-Image Turbo", (Z_IMAGE,), (QWEN_3,), "lumina2", AE, (1024, 1024), 9, 1.0, sampler="res_multistep",
        shift=("ModelSamplingAuraFlow", 3.0), prompt=_PICTURE,
    ),
    "wan21": Family(
        "Wan 2.1 text to video, 1.3B", (WAN21,), (UMT5,), "wan", WAN_VAE, (832, 480, 81), 30, 6.0, sampler="uni_pc",
        shift=("ModelSamplingSD3", 8.0), fps=16.0, latent=_VIDEO, prompt=_CLIP, negative=_BAD,
    ),
    "wan22": Family(
        "Wan 2.2 text to video, 14B, two experts", (WAN22_HIGH, WAN22_LOW), (UMT5,), "wan", WAN_VAE, (640, 640, 81), 20, 3.5,
        shift=("ModelSamplingSD3", 8.0), fps=16.0, latent=_VIDEO, prompt=_CLIP, negative=_BAD,
    ),
    "hunyuan-video": Family(
        "HunyuanVideo, text to video", (HUNYUAN,), (CLIP_L, LLAVA), "hunyuan_video", HUNYUAN_VAE, (848, 480, 73), 20, 1.0,
        shift=("ModelSamplingSD3", 7.0), guidance=6.0, fps=24.0, latent=_VIDEO, prompt=_CLIP,
    ),
    "ltx": Family(
        "LTX-Video 2B", (LTX,), (T5,), "ltxv", None, (768, 512, 97), 30, 3.0, fps=24.0, latent="EmptyLTXVLatentVideo",
        prompt=_CLIP, negative=_BAD,
    ),
    "demo-image": Family(
        "the demo image model", (), (), "", None, (64, 64), 28, 5.0, prompt="fluent red heart", demo="image",
    ),
    "demo-video": Family(
        "the demo video model", (), (), "", None, (64, 64, 17), 28, 5.0, shift=("ModelSamplingSD3", 3.0), fps=8.0,
        latent=_VIDEO, prompt="fluent blue heart", demo="video",
    ),
}
