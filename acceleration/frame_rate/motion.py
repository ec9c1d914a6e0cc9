"""Frames between two others, along a motion found by matching blocks from coarse to fine.

Small on purpose: no weights, no dependency. Motion is taken as straight and even between the two frames, searched
around the middle frame (as video coders do for a bidirectional block), so every pixel of it has exactly one motion and
nothing must be filled. Where following the motion explains the two frames no better than standing still, it stands.
"""

import math

import torch
import torch.nn.functional as F

#: Side of a matched block in pixels, and how far is searched at the coarsest and at every finer level, in pixels.
BLOCK, COARSE_RADIUS, RADIUS = 8, 3, 1
#: Shorter sides of the coarsest and of the finest picture that are searched, in pixels.
COARSEST, FINEST = 16, 240
#: How much better (share of the block's error) motion must be than a zero motion to be followed.
GAIN = 0.2


def between(before: torch.Tensor, after: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return frames [N, H, W, C] at ``times`` in (0, 1) between two frames [H, W, C] in 0..1."""
    pair = torch.stack([before, after]).movedim(-1, 1).float()
    motion = symmetric_motion(pair)
    made = [_warped(pair, motion, float(time)) for time in times]
    return torch.cat(made).movedim(1, -1).to(before.dtype)


def symmetric_motion(pair: torch.Tensor) -> torch.Tensor:
    """Return the motion [1, 2, H, W] (x, y in pixels, from the first frame to the second) of two pictures [2, C, H, W].

    Seen from the frame halfway: the pixel p of it comes from p - motion / 2 of the first and goes to p + motion / 2 of
    the second.
    """
    grey = pair[:, :3].mean(1, keepdim=True)
    full, shrink = grey.shape[-2:], max(1, min(grey.shape[-2:]) // FINEST)
    grey = F.avg_pool2d(grey, shrink) if shrink > 1 else grey
    levels = max(1, 1 + int(math.log2(max(1, min(grey.shape[-2:]) / COARSEST))))
    pyramid = [grey]
    for _ in range(levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2, ceil_mode=True))
    motion = grey.new_zeros(1, 2, *pyramid[-1].shape[-2:])
    for level in reversed(pyramid):
        size = level.shape[-2:]
        if motion.shape[-2:] != size:
            motion = 2 * F.interpolate(motion, size=size, mode="bilinear", align_corners=False)
        motion = _refined(level, motion, COARSE_RADIUS if level is pyramid[-1] else RADIUS)
    still = _error(grey, torch.zeros_like(motion))
    moving = _error(grey, motion)
    follow = (moving < (1 - GAIN) * still).to(motion.dtype)
    motion = motion * F.avg_pool2d(follow, 5, 1, 2, count_include_pad=False)
    return motion if shrink == 1 else shrink * F.interpolate(motion, size=full, mode="bilinear", align_corners=False)


def _refined(level: torch.Tensor, motion: torch.Tensor, radius: int) -> torch.Tensor:
    """Return ``motion`` with the best of the shifts around it, per pixel over a block."""
    reach = range(-radius, radius + 1)
    shifts = sorted(((x, y) for x in reach for y in reach), key=lambda shift: shift[0] ** 2 + shift[1] ** 2)
    best = best_motion = None
    for shift in shifts:
        moved = motion + motion.new_tensor(shift).reshape(1, 2, 1, 1)
        # A longer way must pay: flat parts match anywhere.
        error = _error(level, moved) + 1e-5 * moved.square().sum(1, keepdim=True).sqrt()
        if best is None:
            best, best_motion = error, moved
        else:
            better = error < best
            best, best_motion = torch.where(better, error, best), torch.where(better, moved, best_motion)
    return F.avg_pool2d(best_motion, 3, 1, 1, count_include_pad=False)


def _error(grey: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Return how far the two frames differ along ``motion`` [1, 1, H, W], over a block around each pixel."""
    difference = (_moved(grey[:1], -0.5 * motion) - _moved(grey[1:], 0.5 * motion)).abs()
    return F.avg_pool2d(difference, BLOCK + 1, 1, BLOCK // 2, count_include_pad=False)


def _warped(pair: torch.Tensor, motion: torch.Tensor, time: float) -> torch.Tensor:
    first, second = _moved(pair[:1], -time * motion), _moved(pair[1:], (1 - time) * motion)
    return torch.lerp(first, second, time)


def _moved(picture: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return ``picture`` [1, C, H, W] read at every pixel's place plus ``by`` [1, 2, H, W] pixels."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=by.device, dtype=by.dtype),
        torch.arange(width, device=by.device, dtype=by.dtype),
        indexing="ij",
    )
    grid = torch.stack(
        [(x + by[0, 0]) * 2 / max(width - 1, 1) - 1, (y + by[0, 1]) * 2 / max(height - 1, 1) - 1], -1
    )
    return F.grid_sample(picture, grid[None], mode="bilinear", padding_mode="border", align_corners=True)
