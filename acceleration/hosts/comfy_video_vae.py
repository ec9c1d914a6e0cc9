"""Any of ComfyUI's video VAEs at a frame rate that changes within the video (DLFR-VAE, arXiv 2502.11897).

The VAE itself is never changed: a dynamic one is a copy of ComfyUI's object whose network is driven segment by
segment. Its sizes, memory estimates and tiling are those of the schedule, so ComfyUI's own code paths, the tiled
fallback when memory runs out among them, keep working.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import StrettoError
from ..frame_rate.restoration import fill_last_latent, keep_frames, restore_frames
from ..frame_rate.schedule import FEATURES, FrameRateSchedule
from .comfy_vae_adapters import Adapter, adapter_for


def stride_of(vae: Any) -> int:
    """Return how many frames a latent of ``vae`` stands for, the first one being alone.

    Raises:
        StrettoError: the VAE codes pictures one by one, or does not code the first frame alone.
    """
    up = vae.upscale_ratio[0] if isinstance(vae.upscale_ratio, tuple | list) else None
    if vae.latent_dim != 3 or not callable(up) or getattr(vae, "not_video", False):
        raise StrettoError("this VAE codes pictures one by one, so there is no frame rate in it; load a video VAE")
    stride = round(up(2) - up(1))
    if up(1) != 1 or up(9) != 1 + 8 * stride or stride < 2:
        raise StrettoError(
            f"this VAE turns 1 and 9 latent frames into {up(1)} and {up(9)} frames; only VAEs that code the first frame "
            "alone and then a fixed number of frames a latent have an adapter"
        )
    return stride


def feature_obstacle(vae: Any) -> str | None:
    """Return why the frame rate cannot change inside ``vae``, so that frames must be dropped before it; None if it can."""
    found = adapter_for(vae.first_stage_model)
    return found if isinstance(found, str) else None


class DynamicRateVAE:
    """A VAE for one schedule; stands wherever ComfyUI's object can.

    Args:
        vae: ComfyUI's object; not changed.
        schedule: what every latent stands for.

    Raises:
        StrettoError: the VAE has another stride than the schedule, or no adapter for its coding.
    """

    def __init__(self, vae: Any, schedule: FrameRateSchedule):
        if stride_of(vae) != schedule.stride:
            raise StrettoError(
                f"the frame-rate schedule is for {schedule.stride} frames a latent; this VAE has {stride_of(vae)}"
            )
        self.base, self.schedule = vae, schedule
        self.adapter: Adapter | None = None
        self._vae = vae
        if schedule.coding == FEATURES:
            self._vae, self.adapter = _driven(vae, schedule)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_vae", "schedule"):
            raise AttributeError(name)
        return getattr(self._vae, name)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the latents [1, C, L', h, w] of a video [T, H, W, C] in 0..1."""
        return self._vae.encode(self._entering(pixels))

    def encode_tiled(self, pixels: torch.Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As :meth:`encode`, in tiles of ``tile_x`` x ``tile_y`` pixels; time is not cut, see :meth:`legal_cuts`."""
        return self._vae.encode_tiled(self._entering(pixels), tile_x=tile_x, tile_y=tile_y, overlap=overlap or 64)

    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Return the video [1, T, H, W, C] of latents [1, C, L', h, w], with every frame that the schedule has."""
        options = {"vae_options": vae_options} if vae_options else {}
        return self._leaving(self._vae.decode(self._checked(samples), **options))

    def decode_tiled(self, samples: torch.Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As :meth:`decode`, in tiles of ``tile_x`` x ``tile_y`` latent pixels; time is not cut."""
        tiled = self._vae.decode_tiled(self._checked(samples), tile_x=tile_x, tile_y=tile_y, overlap=overlap or 16)
        return self._leaving(tiled)

    def legal_cuts(self) -> tuple[int, ...]:
        """Return the frames between which a clip may be cut for tiles in time: where segments meet."""
        return self.schedule.legal_cuts()

    def _entering(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) != self.schedule.frames:
            raise StrettoError(
                f"the frame-rate schedule is for {self.schedule.frames} frames ({self.schedule.check}); this video has "
                f"{len(pixels)}"
            )
        if self.adapter is not None:
            return fill_last_latent(pixels, self.schedule.stride)
        return keep_frames(pixels, self.schedule)

    def _checked(self, samples: torch.Tensor) -> torch.Tensor:
        if samples.ndim != 5 or samples.shape[2] != self.schedule.latents:
            raise StrettoError(
                f"the frame-rate schedule ({self.schedule.check}) describes {self.schedule.latents} latent frames; the "
                f"latent has the shape {tuple(samples.shape)}"
            )
        return samples

    def _leaving(self, videos: torch.Tensor) -> torch.Tensor:
        if self.adapter is not None:
            return videos[:, : self.schedule.frames]
        return torch.stack([restore_frames(video[: self.schedule.short_frames], self.schedule) for video in videos])


def _driven(vae: Any, schedule: FrameRateSchedule) -> tuple[Any, Adapter]:
    """Return a copy of ``vae`` whose network runs at the rates of ``schedule``, and what drives it."""
    adapter = adapter_for(vae.first_stage_model)
    if isinstance(adapter, str):
        raise StrettoError(f"the frame rate cannot change inside this VAE: {adapter}. Use the coding 'frames'")
    driven = copy.copy(vae)
    driven.patcher = vae.patcher.clone()
    driven.first_stage_model = adapter(vae.first_stage_model, driven.patcher, schedule)
    space_down, space_up = tuple(vae.downscale_ratio[1:]), tuple(vae.upscale_ratio[1:])
    driven.upscale_ratio = (schedule.until, *space_up)
    driven.downscale_ratio = (lambda frames: _latents_until(schedule, frames), *space_down)
    longest = max(schedule.rates, default=1)
    driven.memory_used_encode = _scaled(vae.memory_used_encode, driven.first_stage_model.encode_memory(longest))
    driven.memory_used_decode = _scaled(vae.memory_used_decode, driven.first_stage_model.decode_memory(longest))
    return driven, driven.first_stage_model


def _latents_until(schedule: FrameRateSchedule, frames: int) -> int:
    """Return the latents of the first ``frames`` frames, the last one perhaps partly empty."""
    return next(n for n in range(math.ceil(frames) + 1) if schedule.until(n) >= frames)


def _scaled(estimate: Callable, factor: float) -> Callable:
    return lambda shape, dtype: estimate(shape, dtype) * factor
