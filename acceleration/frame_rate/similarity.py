"""How much of a video would be missed if a part of it had fewer frames, measured on small grey pictures."""

from dataclasses import dataclass

import torch

from .schedule import RATES, full_latents

#: Rec. 709 weights of red, green and blue in luma.
LUMA = (0.2126, 0.7152, 0.0722)
#: The short side of the small pictures, in pixels, and the side of the blocks that are compared.
SHORT_SIDE, BLOCK = 96, 8
#: Constants of SSIM (Wang et al. 2004) for pictures in 0..1.
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Loss:
    """What a latent frame's frames lose at a lower rate, for every latent after the first.

    Attributes:
        total: rate -> [L - 1]; sum over the latent's frames of 1 - SSIM between the frame and what its kept neighbours
            blend to.
        worst: rate -> [L - 1]; the largest of these.
        change: [T - 1]; 1 - SSIM of neighbouring frames.
    """

    total: dict[int, torch.Tensor]
    worst: dict[int, torch.Tensor]
    change: torch.Tensor

    @property
    def latents(self) -> int:
        """Latents after the first."""
        return len(self.total[1])


def small_luma(frames: torch.Tensor, short_side: int = SHORT_SIDE) -> torch.Tensor:
    """Return grey pictures [T, h, w] of ``frames`` [T, H, W, C] in 0..1, averaged over whole pixels.

    Args:
        frames: one (grey) or at least three channels; float.
        short_side: about how many pixels the shorter side keeps.
    """
    factor = max(1, min(frames.shape[1:3]) // short_side)
    height, width = (side // factor * factor for side in frames.shape[1:3])
    weights = frames.new_tensor(LUMA if frames.shape[-1] >= 3 else (1.0,))
    channels = len(weights)
    # One product of the frame with a vector per row of blocks: reads every value once, which is all the cost there is.
    weights = weights.repeat(factor) / factor**2
    small = []
    for frame in frames[:, :height, :width, :channels]:  # one at a time: a whole clip's copy would be gigabytes
        rows = frame.reshape(height, width // factor, factor * channels) @ weights
        small.append(rows.reshape(height // factor, factor, -1).sum(1))
    return torch.stack(small).float()


def block_ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity [N] of pictures [N, h, w] over separate blocks of 8 x 8, averaged.

    The formula of Wang et al. 2004 with box statistics of blocks in place of a sliding Gaussian window, which costs a
    hundredth.
    """
    n, height, width = first.shape
    side = min(BLOCK, height, width)
    height, width = height // side * side, width // side * side

    def blocks(x: torch.Tensor) -> torch.Tensor:
        cut = x[:, :height, :width].reshape(n, height // side, side, width // side, side)
        return cut.transpose(2, 3).reshape(n, -1, side * side)

    x, y = blocks(first), blocks(second)
    mean_x, mean_y = x.mean(-1), y.mean(-1)
    var_x, var_y = (x * x).mean(-1) - mean_x**2, (y * y).mean(-1) - mean_y**2
    covariance = (x * y).mean(-1) - mean_x * mean_y
    light = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x.clamp_min(0) + var_y.clamp_min(0) + C2)
    return (light * structure).mean(-1)


def loss_of(frames: torch.Tensor, stride: int = 4) -> Loss:
    """Measure what every latent of a video [T, H, W, C] would lose at rates 2 and 4.

    A rate r keeps every r-th frame of a latent, the last one among them, so what lies between is blended from frames
    that are kept under every schedule, and a latent's loss depends on no other latent's rate. Rates that do not divide
    ``stride`` keep frames at other distances and are judged by the change between neighbours instead.
    """
    luma = small_luma(frames)
    count = full_latents(len(luma), stride) - 1
    missing = 1 + count * stride - len(luma)
    if missing:
        luma = torch.cat([luma, luma[-1:].expand(missing, *luma.shape[1:])])
    change = 1 - block_ssim(luma[:-1], luma[1:])
    total, worst = {1: torch.zeros(count)}, {1: torch.zeros(count)}
    for rate in RATES[1:]:
        dropped = _blend_loss(luma, rate) if stride % rate == 0 else change * rate / 2
        per_latent = dropped.reshape(count, -1)
        total[rate], worst[rate] = per_latent.sum(1), per_latent.amax(1) if count else per_latent.sum(1)
    return Loss(total, worst, change[: change.shape[0] - missing])


def _blend_loss(luma: torch.Tensor, rate: int) -> torch.Tensor:
    """Return 1 - SSIM of every dropped frame against the blend of its kept neighbours, in order of time."""
    before, after = luma[:-1:rate], luma[rate::rate]
    lost = []
    for offset in range(1, rate):
        blend = torch.lerp(before, after, offset / rate)
        lost.append(1 - block_ssim(luma[offset::rate][: len(before)], blend))
    return torch.stack(lost, 1).flatten()

