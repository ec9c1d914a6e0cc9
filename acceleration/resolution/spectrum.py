"""The power spectrum of a model's latents: published numbers, and a fit to one's own pictures."""

from dataclasses import dataclass

import torch

from ..errors import StrettoError
from .spectral import dct


@dataclass(frozen=True)
class Spectrum:
    """``power = amplitude * frequency ** -exponent``, over cycles per shorter side; noise has power 1.

    Attributes:
        amplitude: at one cycle.
        exponent: how fast it falls.
        source: where the numbers come from.
    """

    amplitude: float
    exponent: float
    source: str = ""


SPECTRA = {
    "FLUX": Spectrum(203.615, 1.9155, "SPEED's authors, for FLUX.1"),
    "Wan": Spectrum(219.485, 2.4227, "SPEED's authors, for Wan 2.1"),
    "PixelGen": Spectrum(3745.46, 2.4493, "SPEED's authors, for pixels"),
    "demo image": Spectrum(2.205, 1.4702, "fitted here to 12 samples of the demo image model, 8x8"),
    "demo video": Spectrum(2.003, 0.708, "fitted here to 4 samples of the demo video model, 5 frames of 8x8"),
}


def radial_power(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frequencies and mean power of latents, one entry a ring of half a cycle.

    Args:
        latents: [N, C, (T,) H, W] clean latents in the model's own scale.

    Returns:
        cycles over the shorter side [K] and the mean squared DCT coefficient there [K], fp64, without the constant part.
    """
    height, width = latents.shape[-2:]
    power = dct(latents.double()).square().flatten(0, -3).mean(0)
    shorter = min(height, width)
    rows = torch.arange(height, dtype=torch.float64) / (2 * height) * shorter
    columns = torch.arange(width, dtype=torch.float64) / (2 * width) * shorter
    frequency = (rows[:, None] ** 2 + columns**2).sqrt()
    ring = (2 * frequency).round().long()
    kept = range(1, shorter)  # beyond, rings are cut off by the corners
    return (
        torch.stack([frequency[ring == index].mean() for index in kept]),
        torch.stack([power[ring == index].mean() for index in kept]),
    )


def fit_spectrum(latents: torch.Tensor) -> Spectrum:
    """Return the power law that fits clean latents [N, C, (T,) H, W] best, by least squares of logarithms.

    Raises:
        StrettoError: the latents are too small, constant, or their power does not fall.
    """
    if min(latents.shape[-2:]) < 4:
        raise StrettoError(
            f"Stretto Spectrum: the latents are {latents.shape[-1]}x{latents.shape[-2]}; at least 4x4 are needed for a spectrum"
        )
    frequency, power = radial_power(latents)
    if not torch.isfinite(power).all() or not (power > 1e-12 * latents.double().square().mean()).all():
        raise StrettoError("Stretto Spectrum: the latents are constant or not finite; encode some pictures first")
    x, y = frequency.log(), power.log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    if slope >= 0:
        raise StrettoError(
            f"Stretto Spectrum: the power grows with frequency (exponent {-slope:.2f}); these are not latents of pictures"
        )
    amplitude = float((y.mean() - slope * x.mean()).exp())
    count = latents.shape[0]
    return Spectrum(
        amplitude,
        -slope,
        f"fitted to {count} latent{'s' if count > 1 else ''} of {latents.shape[-1]}x{latents.shape[-2]}",
    )
