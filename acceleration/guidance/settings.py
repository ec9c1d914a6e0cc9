"""Methods of guidance reduction and their settings, checked where the user gave them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StrettoError

NODE = "Stretto Guidance Saver"
#: What stands in for the unconditional branch.
DIFFERENCE, SPLIT, NOTHING = "difference", "frequencies", "no guidance"
AS_METHOD = "as the method"
STAND_INS = (AS_METHOD, DIFFERENCE, SPLIT, NOTHING)
#: How a difference is carried on: degree of the forecast.
FORECASTS = {"repeat": 0, "line": 1}


@dataclass(frozen=True)
class Method:
    """One way of saving guidance.

    Attributes:
        name: what users choose.
        when: ``"periodic"`` (every so many steps), ``"adaptive"`` (until both branches agree) or ``"always"``.
        stand_in: what stands in for the unconditional branch at a saved step.
        order: degree of the forecast of a difference.
        source: publication.
    """

    name: str
    when: str
    stand_in: str
    order: int
    source: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("Periodic", "periodic", DIFFERENCE, 1, "a plain form of CFG-Cache, arXiv 2410.19355"),
        Method("FasterCache", "periodic", SPLIT, 0, "CFG-Cache, arXiv 2410.19355, section 3.3"),
        Method("Adaptive", "adaptive", NOTHING, 0, "Adaptive Guidance, arXiv 2312.12487"),
        Method("Interval", "always", NOTHING, 0, "guidance in a limited interval, arXiv 2404.07724"),
    )
}
DEFAULT = "Periodic"

#: Whole numbers: name -> range.
WHOLE = {"interval": (1, 16), "warmup": (0, 100), "tail": (0, 100), "patience": (1, 20), "recheck": (0, 100)}
#: Other numbers: name -> range.
NUMBERS = {
    "guide_from": (0.0, 1.0),
    "guide_until": (0.0, 1.0),
    "sigma_from": (0.0, 1000.0),
    "sigma_until": (0.0, 1000.0),
    "agreement": (-1.0, 1.0),
    "hysteresis": (0.0, 1.0),
    "low_weight": (0.0, 2.0),
    "high_weight": (0.0, 2.0),
}


@dataclass(frozen=True)
class GuidanceSettings:
    """Validated settings of a guidance request; the node's help page explains each.

    Attributes:
        method: key of :data:`METHODS`.
        interval: the unconditional branch is asked every so many steps; 1 asks at every step.
        warmup: first steps with guidance that always ask it.
        tail: last steps that always ask it.
        guide_from: share of the steps before which there is no guidance, in [0, 1].
        guide_until: share of the steps from which on there is none, in [0, 1].
        sigma_from: noise level above which there is no guidance; 0 for no such limit.
        sigma_until: noise level below which there is none.
        agreement: cosine of both branches' predictions from which on guidance is dropped (Adaptive).
        hysteresis: how far the cosine must fall below ``agreement`` before guidance comes back.
        patience: steps in a row that must agree.
        recheck: once dropped, ask again every so many steps; 0 for never.
        stand_in: one of :data:`STAND_INS`.
        forecast: "repeat" takes the last difference of the branches, "line" continues the last two, "as the method" either.
        low_weight: factor of the difference's low frequencies in the middle of the run (FasterCache).
        high_weight: factor of its high frequencies late in the run (FasterCache).

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    method: str = DEFAULT
    interval: int = 3
    warmup: int = 4
    tail: int = 4
    guide_from: float = 0.0
    guide_until: float = 1.0
    sigma_from: float = 0.0
    sigma_until: float = 0.0
    agreement: float = 0.99
    hysteresis: float = 0.01
    patience: int = 2
    recheck: int = 0
    stand_in: str = AS_METHOD
    forecast: str = AS_METHOD
    low_weight: float = 1.1
    high_weight: float = 1.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            _refuse("method", self.method, f"known methods: {', '.join(METHODS)}")
        if self.stand_in not in STAND_INS:
            _refuse("stand_in", self.stand_in, f"it must be one of {', '.join(STAND_INS)}")
        if self.forecast not in (AS_METHOD, *FORECASTS):
            _refuse("forecast", self.forecast, f"it must be one of {AS_METHOD}, {', '.join(FORECASTS)}")
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                _refuse(name, value, f"it must be a whole number in [{low}, {high}]")
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                _refuse(name, value, f"it must be a number in [{low:g}, {high:g}]")
        if self.guide_from >= self.guide_until:
            _refuse("guide_from", self.guide_from, f"it must be below guide_until, which is {self.guide_until:g}")
        if self.sigma_from and self.sigma_from <= self.sigma_until:
            _refuse("sigma_from", self.sigma_from, f"it must be above sigma_until, which is {self.sigma_until:g}")

    @property
    def stands_in(self) -> str:
        """What stands in for the unconditional branch where guidance goes on."""
        return METHODS[self.method].stand_in if self.stand_in == AS_METHOD else self.stand_in

    @property
    def order(self) -> int:
        """0 where the last difference is repeated, 1 where the line through the last two goes on."""
        return METHODS[self.method].order if self.forecast == AS_METHOD else FORECASTS[self.forecast]

    @property
    def when(self) -> str:
        """When the unconditional branch is saved."""
        return METHODS[self.method].when

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "GuidanceSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"{NODE}: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"{NODE}: {name} is {value!r}; {expected}")
