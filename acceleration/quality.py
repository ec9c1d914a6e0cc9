"""How close one picture is to another."""

import math

import torch

from .errors import StrettoError

#: Wang et al. 2004: an 11 x 11 Gaussian window of standard deviation 1.5, and the constants that steady the quotients.
WINDOW, DEVIATION, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(picture: torch.Tensor, reference: torch.Tensor, peak: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB over all values; infinite for equal tensors.

    Args:
        picture: any shape.
        reference: the same shape.
        peak: largest possible value; None for the range of ``reference`` (latents have no fixed one).
    """
    reference = reference.double()
    error = float((picture.double() - reference).square().mean())
    peak = float(reference.max() - reference.min()) if peak is None else peak
    if error == 0.0:
        return math.inf
    return 10.0 * math.log10(max(peak * peak, 1e-300) / error)


def ssim(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004), 1 for equal pictures.

    Per picture and channel, over every place where the window fits, then averaged.

    Args:
        picture: [B, H, W, C] in 0..1.
        reference: the same shape.

    Raises:
        StrettoError: a side is shorter than the window.
    """
    if min(picture.shape[1:3]) < WINDOW:
        height, width = picture.shape[1:3]
        raise StrettoError(f"SSIM: the picture has {width} x {height} pixels; it needs at least {WINDOW} x {WINDOW}")
    values = [_ssim(p, r) for p, r in zip(picture, reference, strict=True)]  # one at a time: clips are long
    return float(torch.stack(values).double().mean())


def _ssim(picture: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    x, y = (tensor.float().movedim(-1, 0).contiguous() for tensor in (picture, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
    return (light * structure).mean()


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian mean of [N, H, W] where the window fits, along rows and then along columns.

    Eleven scaled sums of views: on the CPU many times as fast as a convolution of one channel.
    """
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = torch.exp(-(at**2) / (2 * DEVIATION**2))
    for axis in (-1, -2):
        length = x.shape[axis] - WINDOW + 1
        total = torch.zeros_like(x.narrow(axis, 0, length))
        for start, weight in enumerate((kernel / kernel.sum()).tolist()):
            total.add_(x.narrow(axis, start, length), alpha=weight)
        x = total
    return x
