"""From the frames of a video to the few that are kept, and back to all of them."""

import torch

from ..errors import StrettoError
from .motion import between
from .schedule import FLOW, LINEAR, REPEAT, RESTORES, FrameRateSchedule


def fill_last_latent(frames: torch.Tensor, stride: int) -> torch.Tensor:
    """Return a video [T, H, W, C] whose last frame is repeated until every latent is full; itself where it fits."""
    missing = -(len(frames) - 1) % stride
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])]) if missing else frames


def keep_frames(frames: torch.Tensor, schedule: FrameRateSchedule) -> torch.Tensor:
    """Return the frames [T', H, W, C] that stand for all of ``frames`` [T, H, W, C].

    Raises:
        StrettoError: the video has another length than the schedule's.
    """
    if len(frames) != schedule.frames:
        raise StrettoError(
            f"The frame-rate schedule is for {schedule.frames} frames ({schedule.check}); this video has {len(frames)}"
        )
    filled = fill_last_latent(frames, schedule.stride)
    return filled if schedule.trivial else filled[list(schedule.kept_frames)]


def restore_frames(short: torch.Tensor, schedule: FrameRateSchedule, method: str | None = None) -> torch.Tensor:
    """Return all frames [T, H, W, C] of a video from those that were kept [T', H, W, C].

    Kept frames come back as they are, to the bit.

    Args:
        short: frames at the times :attr:`FrameRateSchedule.kept_frames`.
        schedule: what was kept.
        method: key of :data:`.schedule.RESTORES`; None for the schedule's own.

    Raises:
        StrettoError: unknown method, or another number of frames than the schedule's.
    """
    method = schedule.restore if method is None else method
    if method not in RESTORES:
        raise StrettoError(f"Restore frames: method is {method!r}; it must be one of {', '.join(RESTORES)}")
    if len(short) != schedule.short_frames:
        raise StrettoError(
            f"Restore frames: the schedule ({schedule.check}) has {schedule.short_frames} frames to restore from; "
            f"{len(short)} were given. The video was cut or joined since it was decoded."
        )
    if schedule.trivial:
        return short[: schedule.frames]
    whole = short.new_empty(schedule.padded_frames, *short.shape[1:])
    times = schedule.kept_frames
    for i, time in enumerate(times):
        whole[time] = short[i]
        gap = time - times[i - 1] if i else 1
        if gap > 1:
            whole[time - gap + 1 : time] = _fill(short[i - 1], short[i], gap, method)
    return whole[: schedule.frames]


def from_interpolated(dense: torch.Tensor, schedule: FrameRateSchedule) -> torch.Tensor:
    """Return all frames of a video from its kept ones after another interpolator has multiplied them.

    Args:
        dense: [1 + (T' - 1) * m, H, W, C]; ``m`` frames for every kept one after the first. ``m`` must be a multiple
            of the largest distance between kept frames (that of the slowest part: 2 or 4).
        schedule: what was kept.

    Raises:
        StrettoError: the number of frames fits no such ``m``.
    """
    times, gaps = schedule.kept_frames, max(schedule.rates, default=1)
    steps = len(times) - 1
    many, left = divmod(len(dense) - 1, steps) if steps else (gaps, 0)
    if left or many < 1 or many % gaps:
        raise StrettoError(
            f"Restore frames: {len(dense)} interpolated frames do not fit. The schedule keeps {len(times)} frames; an "
            f"interpolator that multiplies them by {gaps} makes {1 + steps * gaps}"
        )
    picked = [0]
    for i in range(1, len(times)):
        gap = times[i] - times[i - 1]
        picked += [(i - 1) * many + many * k // gap for k in range(1, gap + 1)]
    return dense[picked][: schedule.frames]


def _fill(before: torch.Tensor, after: torch.Tensor, gap: int, method: str) -> torch.Tensor:
    """Return the ``gap`` - 1 frames between two kept ones."""
    if method == REPEAT:
        return before.expand(gap - 1, *before.shape)
    times = torch.arange(1, gap, device=before.device, dtype=torch.float32) / gap
    if method == LINEAR:
        weight = times.to(before.dtype).reshape(-1, *[1] * before.ndim)
        return torch.lerp(before.expand(gap - 1, *before.shape), after.expand(gap - 1, *after.shape), weight)
    assert method == FLOW
    return between(before, after, times)
