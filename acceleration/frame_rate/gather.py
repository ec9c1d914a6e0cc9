"""Latents, noise, masks and conditioning of a full-length video, gathered along time for a shorter one."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StrettoError
from .schedule import FrameRateSchedule

#: What stands beside the video, at a length of its own.
BESIDE = ("reference_latents", "reference_latent", "ref_latent", "time_dim_concat")
#: Masks: where a latent stands for several, it is masked if one of them is.
MASKS = ("concat_mask", "vace_mask", "mask", "denoise_mask", "noise_mask")
#: Things of a conditioning entry that are tied to frames in ways that cannot be gathered.
REFUSED = {
    "gligen": "GLIGEN boxes",
    "control": "a ControlNet, whose video is cut to length instead of gathered",
    "audio_embed": "sound that is tied to frames",
    "pose_video_latent": "a pose video, which the network is given apart",
    "face_video_pixels": "a video of a face, which the network is given apart",
}


def gather_latents(latents: torch.Tensor, schedule: FrameRateSchedule) -> torch.Tensor:
    """Return the latent frames [B, C, L', h, w] of [B, C, L, h, w] at their schedule's :attr:`kept` places."""
    _check(latents, schedule, "a latent")
    return latents[:, :, list(schedule.kept)]


def gather_mask(mask: torch.Tensor, schedule: FrameRateSchedule) -> torch.Tensor:
    """Return a mask [B, C, L', h, w] that is the largest of those [B, C, L, h, w] that each latent stands for."""
    _check(mask, schedule, "a mask")
    shape = (*mask.shape[:2], schedule.latents, *mask.shape[3:])
    index = torch.tensor(schedule.owner, device=mask.device).reshape(1, 1, -1, 1, 1).expand(mask.shape)
    return mask.new_zeros(shape).scatter_reduce(2, index, mask, "amax", include_self=False)


def noise_mask_for(mask: torch.Tensor | None, schedule: FrameRateSchedule) -> torch.Tensor | None:
    """Return a LATENT's noise mask for the short video; one without a time axis of its own is itself."""
    if mask is None or mask.ndim < 5 or mask.shape[2] == 1:
        return mask
    return gather_mask(mask, schedule)


def pinned_latents(conditioning: list, mask: torch.Tensor | None, latents: int) -> set[int]:
    """Return the latents that must keep rate 1: those whose content is given, other than by text.

    Image-to-video fixes the first latent, first-last-frame the last ones, VACE and inpainting any. Where a mask tells
    nothing apart (all of one value), nothing is pinned.
    """
    pinned: set[int] = set()
    for found in (mask, *_masks_in(conditioning)):
        if not isinstance(found, torch.Tensor) or found.ndim != 5 or found.shape[2] != latents:
            continue
        per_latent = found.float().movedim(2, 0).flatten(1)
        # A VACE mask that is all ones asks for everything, in every other kind zeros mark what is given.
        given = per_latent.amin(1) < 0.5
        if not bool(given.all()):
            pinned |= set(torch.nonzero(given).flatten().tolist())
    return pinned


def gather_conditioning(conditioning: list, schedule: FrameRateSchedule) -> list:
    """Return a CONDITIONING whose pictures along time are those of the kept latents; the given one is not changed.

    Raises:
        StrettoError: something is tied to the video's time and cannot be gathered, or has another length than the
            video (ComfyUI would cut it or fill it up with zeros, and say nothing).
    """
    return [[tokens, {name: _gathered(name, value, schedule) for name, value in entry.items()}] for tokens, entry in conditioning]


def obstacle_in(conditioning: list) -> str | None:
    """Return why a CONDITIONING cannot be brought to another length, or None; lengths are checked when gathering."""
    for _, entry in conditioning:
        for name, words in REFUSED.items():
            if entry.get(name) is not None:
                return f"conditioning holds {words}"
        area = entry.get("area")
        if area is not None and area[0] != "percentage" and len(area) > 4:
            return "conditioning is restricted to an area of frames"
    return None


def _gathered(name: str, value: Any, schedule: FrameRateSchedule) -> Any:
    if isinstance(value, list | tuple) and name not in BESIDE:
        return type(value)(_gathered(name, item, schedule) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim != 5 or name in BESIDE or value.shape[2] == 1:
        return value
    if value.shape[2] != schedule.full_latents:
        raise StrettoError(
            f"Dynamic frame rate: conditioning holds {name} of {value.shape[2]} latent frames and the video has "
            f"{schedule.full_latents}; make both equally long (ComfyUI would fill the difference with zeros)"
        )
    return gather_mask(value, schedule) if name in MASKS else gather_latents(value, schedule)


def _masks_in(conditioning: list) -> list[Any]:
    found: list[Any] = []
    for _, entry in conditioning:
        for name in ("concat_mask", "vace_mask"):
            value: Any = entry.get(name)
            found += value if isinstance(value, list | tuple) else [value]
    return found


def _check(tensor: torch.Tensor, schedule: FrameRateSchedule, what: str) -> None:
    if tensor.ndim != 5 or tensor.shape[2] != schedule.full_latents:
        raise StrettoError(
            f"Dynamic frame rate: {what} has the shape {tuple(tensor.shape)}; the schedule ({schedule.check}) needs "
            f"{schedule.full_latents} latent frames"
        )


def is_video(latent: Mapping[str, Any]) -> bool:
    """Whether a LATENT holds one video and nothing else."""
    samples = latent["samples"]
    return not samples.is_nested and samples.ndim == 5
