"""How noise levels of a flow at one size belong to those at another.

A flow's state at a small size, ``(1 - q) c / r + q n`` in coefficients, times ``r / (1 + (r - 1) q)`` is the low band of a
full state at ``sigma = r q / (1 + (r - 1) q)``: coefficients of a picture are r times larger at the full size, noise is
not. The relation is SD3's timestep shift with shift r (arXiv 2403.03206, eq. 23), which SPEED uses in the same way.
"""

import math


def to_full(q: float, r: float) -> float:
    """Return the noise level at full size that a level ``q`` at 1/r of the side stands for."""
    return r * q / (1.0 + (r - 1.0) * q)


def to_small(sigma: float, r: float) -> float:
    """Inverse of :func:`to_full`."""
    return sigma / (r - (r - 1.0) * sigma)


def gain(q: float, r: float) -> float:
    """Return what a small state at ``q`` is multiplied with to be the low band of a full one."""
    return r / (1.0 + (r - 1.0) * q)


def band_power(amplitude: float, exponent: float, frequency: float) -> float:
    """Return the power of a latent's spectrum, ``amplitude * frequency ** -exponent``, noise having power 1.

    Args:
        amplitude: power at one cycle over the shorter side.
        exponent: how fast it falls.
        frequency: in cycles over the shorter side.
    """
    return amplitude * frequency**-exponent


def switch_level(power: float, delta: float) -> float:
    """Return the noise level below which frequencies of ``power`` begin to matter.

    There their share of the state's variance, ``((1 - t) / t)^2 P``, is ``delta / (1 + P - delta)`` (SPEED).

    Args:
        power: of the lowest frequency that the small size cannot hold.
        delta: how much may be missing: 0.01 is safe, 0.05 aggressive.
    """
    return 1.0 / (1.0 + math.sqrt(delta / (power * (1.0 + power - delta))))
