"""Low and high spatial frequencies of a latent, weighted apart (FasterCache, arXiv 2410.19355, section 3.3)."""

import torch

#: Radius of the low band, as a part of the smaller side.
RADIUS = 5
#: Noise levels of a flow between which low frequencies count more, and below which high ones do (timesteps of 1000).
LOW_BAND = (0.099, 0.901)
HIGH_BELOW = 0.301


def band_weights(sigma: float, low: float, high: float) -> tuple[float, float]:
    """Return the factors of the low and of the high band at ``sigma``.

    Args:
        sigma: noise level of a flow, in [0, 1]; beyond 1 that of noise added to unscaled data, of which the flow's is taken.
        low: factor of the low band in the middle of the run, 1 elsewhere.
        high: factor of the high band late in the run, 1 elsewhere.
    """
    level = sigma if sigma <= 1.0 else sigma / (1.0 + sigma)
    return low if LOW_BAND[0] < level < LOW_BAND[1] else 1.0, high if level < HIGH_BELOW else 1.0


def reweighted(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return ``tensor`` with its low spatial frequencies times ``low`` and the others times ``high``.

    Args:
        tensor: [..., H, W], floating point; anything with fewer than three dimensions has no spatial ones.
        low: factor of frequencies within a disc of radius min(H, W) // 5 around zero.
        high: factor of all others.
    """
    if low == high or tensor.ndim < 3:
        return tensor * low
    height, width = tensor.shape[-2:]
    rows = torch.fft.fftfreq(height, 1.0 / height, device=tensor.device)
    columns = torch.fft.rfftfreq(width, 1.0 / width, device=tensor.device)
    radius = min(height, width) // RADIUS
    inside = rows[:, None] ** 2 + columns**2 <= radius**2 + 1e-6
    spectrum = torch.fft.rfft2(tensor.float())
    factors = torch.where(inside, low, high)
    return torch.fft.irfft2(spectrum * factors, s=(height, width)).to(tensor.dtype)
