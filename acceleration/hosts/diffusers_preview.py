"""Previews of a diffusers run in ComfyUI: the latent so far, through the previewers that ComfyUI has for its families."""

from typing import Any

import comfy.latent_formats
import torch

from ..models.diffusers import PACKED, Transformer, transformer_of
from .diffusers_levels import FLOW, Levels, levels_of

#: Family -> ComfyUI's latent format of the same VAE, by channels.
_FORMATS = {
    "sd3": {16: "SD3"},
    "flux": {16: "Flux"},
    "lumina2": {16: "Flux"},
    "qwen_image": {16: "Wan21"},
    "wan": {16: "Wan21", 48: "Wan22"},
    "hunyuan_video": {16: "HunyuanVideo"},
    "ltxv": {128: "LTXV"},
    "pixart": {4: "SDXL"},
    "dit": {4: "SD15"},
}
#: Pixels of a packed token per side, in latent pixels; LTX-Video's tokens are latent pixels themselves.
_PATCHES = {"flux": 2, "qwen_image": 2, "ltxv": 1}


class Preview:
    """Turns the latents that a pipeline reports into pictures for ComfyUI; None where there is no previewer."""

    def __init__(self, pipeline: Any, height: int, width: int, device: torch.device) -> None:
        self._known: Transformer | None = transformer_of(pipeline.transformer)
        self._pipeline, self._sides = pipeline, (height, width)
        self._device, self._previewer, self._looked = device, None, False
        self._before: torch.Tensor | None = None

    def picture(self, index: int, latents: Any) -> Any:
        """Return what ComfyUI's progress bar takes for step ``index``, which has just ended with ``latents``."""
        if self._known is None or not isinstance(latents, torch.Tensor):
            return None
        levels = levels_of(self._pipeline.scheduler)
        clean = _denoised(latents, self._before, levels, index)
        self._before = latents
        planes = self._planes(clean)
        previewer = None if planes is None else self._found(planes.shape[1])
        return previewer.decode_latent_to_preview_image("JPEG", planes[:1]) if previewer is not None else None

    def _planes(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Return latents as [B, C, (T,) H, W]."""
        if self._known.descriptor.latents != PACKED:
            return latents if self._known.channel_dim == 1 else latents.movedim(2, 1)
        patch = _PATCHES.get(self._known.descriptor.family)
        scale = getattr(self._pipeline, "vae_spatial_compression_ratio", None) or getattr(
            self._pipeline, "vae_scale_factor", 8
        )
        rows, columns = (side // (scale * (patch or 1)) for side in self._sides)
        batch, tokens, channels = latents.shape
        if patch is None or not rows * columns or tokens % (rows * columns):
            return None
        inner = latents.view(batch, tokens // (rows * columns), rows, columns, channels // patch**2, patch, patch)
        planes = inner[:, 0].permute(0, 3, 1, 4, 2, 5)
        return planes.reshape(batch, channels // patch**2, rows * patch, columns * patch)

    def _found(self, channels: int) -> Any:
        if not self._looked:
            self._looked = True
            name = _FORMATS.get(self._known.descriptor.family, {}).get(channels)
            kind = getattr(comfy.latent_formats, name, None) if name else None
            if kind is not None:
                from latent_preview import get_previewer

                self._previewer = get_previewer(self._device, kind())
        return self._previewer


def _denoised(latents: torch.Tensor, before: torch.Tensor | None, levels: Levels | None, index: int) -> torch.Tensor:
    """Return where the last step was heading: along a flow, its line goes on to noise level 0."""
    if before is None or before.shape != latents.shape or levels is None or levels.kind != FLOW:
        return latents
    if index + 1 >= len(levels.sigmas) or levels.sigmas[index] == levels.sigmas[index + 1]:
        return latents
    here, there = levels.sigmas[index], levels.sigmas[index + 1]
    return latents - there * (latents - before) / (there - here)
