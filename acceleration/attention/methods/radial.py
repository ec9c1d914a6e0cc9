"""Radial attention (arXiv 2506.19852): the further two frames are apart, the narrower the band between them.

Between frames of p tokens at distance 0 or 1 all pairs stay. At a greater distance s the half-width is
2^bits(p) / 2^bits(s) * decay, at least 128; where it would be less than 128 by itself, only every int(128 / width)-th
distance stays at all. The first frame is seen by all. Without a ``decay`` the largest is taken that fits ``keep``, of those
that nest: any while no distance is left out, then powers of two.
"""

from collections.abc import Callable

from ..builders import frame_log_band
from ..order import OrderSpec
from .method import AttentionMethod, largest, make, sinks

#: Published block size: no band is narrower.
FLOOR = 128


def band_width(decay: float) -> Callable[[int, int], int]:
    """Return (distance, tokens of a frame) -> half-width, -1 where no pair of tokens is kept."""

    def width(distance: int, frame: int) -> int:
        if distance <= 1:
            return frame
        wide = 2.0 ** (frame.bit_length() - distance.bit_length()) * decay
        if wide < FLOOR and distance % int(FLOOR / wide):
            return -1
        return min(int(max(wide, FLOOR)), frame)

    return width


def decays(frames: int, frame: int) -> list[float]:
    """Return ascending decays whose patterns contain each other, from hardly anything to everything."""
    bits = frame.bit_length() - (frames - 1).bit_length()
    unbroken = FLOOR / 2.0**bits  # from here on no distance is left out
    powers = [2.0**power for power in range(-16, 17) if 2.0**power < unbroken]
    return powers + [unbroken * 2.0 ** (step / 8) for step in range(8 * 17)]


def _plan(settings, geometry):
    order, frames = OrderSpec(), geometry.grid[0]

    def builder(decay):
        return frame_log_band(band_width(decay))

    decay = settings.decay or largest(
        decays(frames, geometry.frame), builder, settings, geometry, order, sinks(settings, 1)
    )
    return make("Radial", settings, order, builder(decay), False, sink_frames=1, parameters={"decay": decay})


def _fits(geometry):
    return "" if geometry.video else "Radial thins out what lies frames apart, and there is only one frame"


RADIAL = AttentionMethod(
    "Radial",
    "keeps whole neighbouring frames and ever narrower bands of those further away",
    "Radial Attention, arXiv 2506.19852",
    _plan,
    dynamic=False,
    knob="decay",
    fits=_fits,
)
