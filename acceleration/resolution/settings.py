"""Settings of progressive resolution, checked where the user gave them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StrettoError
from .spectrum import SPECTRA, Spectrum

NODE = "Stretto Progressive Resolution"
#: How stages follow on each other.
COUPLED, SPEED, FRESH, CORRECTED = "Coupled", "SPEED", "Fresh noise", "Corrected"
METHODS = {
    COUPLED: "one path: the small run's noise and noise levels are those of the full run, whose fine noise comes back",
    SPEED: "as published: the small run keeps the full run's noise levels, fine noise is new, the level jumps at a switch",
    FRESH: "as Jenga and Bottleneck Sampling have it: enlarge the predicted picture and add new noise (for comparison)",
    CORRECTED: "the sampler stays at full size; small steps predict coarse structure, and a full one every few steps measures "
    "what they miss: closest to the full run, and slower",
}
CUSTOM = "custom"
MAX_STAGES = 6


@dataclass(frozen=True)
class ResolutionSettings:
    """Validated settings; the node's help page explains each.

    Attributes:
        method: key of :data:`METHODS`.
        stages: sizes in running order, as shares of the side, each in [0.1, 1]; the last is 1.
        switches: shares of the steps at which stages end, rising, one fewer than stages; empty: from the spectrum.
        delta: how much of a frequency's power may be missing when its stage begins, in (0, 0.5].
        spectrum: key of :data:`~.spectrum.SPECTRA`, or ``"custom"``.
        amplitude: of the custom spectrum.
        exponent: of the custom spectrum.
        min_side: shortest side of a stage, in latent pixels.
        multiple: sides of stages are multiples of this many latent pixels (the network's patch).
        refresh: steps of small stages from one prediction at full size to the next (Corrected).

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    method: str = COUPLED
    stages: tuple[float, ...] = (0.5, 1.0)
    switches: tuple[float, ...] = ()
    delta: float = 0.02
    spectrum: str = "FLUX"
    amplitude: float = 203.615
    exponent: float = 1.9155
    min_side: int = 48
    multiple: int = 2
    refresh: int = 4

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("spectrum", self.spectrum, (*SPECTRA, CUSTOM))
        for name, low, high in (("delta", 1e-6, 0.5), ("amplitude", 1e-9, 1e9), ("exponent", 1e-3, 20.0)):
            value = getattr(self, name)
            if not _number(value) or not low <= value <= high:
                _refuse(name, value, f"it must be a number in [{low:g}, {high:g}]")
        for name, low, high in (("min_side", 2, 4096), ("multiple", 1, 64), ("refresh", 2, 100)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                _refuse(name, value, f"it must be a whole number in [{low}, {high}]")
        self._check_stages()

    def _check_stages(self) -> None:
        for name in ("stages", "switches"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(_number(item) for item in value):
                _refuse(name, value, "it must be a list of numbers")
            object.__setattr__(self, name, tuple(float(item) for item in value))
        if not 1 <= len(self.stages) <= MAX_STAGES or not all(0.1 <= scale <= 1.0 for scale in self.stages):
            _refuse("stages", self.stages, f"it must be 1 to {MAX_STAGES} numbers in [0.1, 1]")
        if self.stages[-1] != 1.0:
            _refuse("stages", self.stages, "the last one must be 1: the picture is wanted at its full size")
        rising = all(a < b for a, b in zip((0.0, *self.switches), (*self.switches, 1.0), strict=True))
        if self.switches and (len(self.switches) != len(self.stages) - 1 or not rising):
            _refuse(
                "switches", self.switches, f"it must be {len(self.stages) - 1} rising numbers between 0 and 1, or none"
            )
        falls = any(a > b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if falls and not self.switches:
            _refuse(
                "switches",
                self.switches,
                f"stages {self.stages} also go down; say at which shares of the steps they end",
            )
        if falls and self.method not in (COUPLED, CORRECTED):
            _refuse("method", self.method, f"stages {self.stages} also go down, which {COUPLED} and {CORRECTED} can")

    @property
    def power_law(self) -> Spectrum:
        """The spectrum that switches are chosen by."""
        return SPECTRA.get(self.spectrum, Spectrum(self.amplitude, self.exponent, "given at the node"))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "ResolutionSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"{NODE}: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def parse_numbers(name: str, text: str) -> list[float]:
    """Read numbers from a text field such as ``"0.5, 1"``; raises :class:`StrettoError` naming the field."""
    try:
        return [float(word) for word in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        _refuse(name, text, "it must be numbers with spaces or commas between them, such as 0.5 1")


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        _refuse(name, value, f"it must be one of {', '.join(known)}")


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"{NODE}: {name} is {value!r}; {expected}")
