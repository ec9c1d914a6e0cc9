"""The published caching methods as rows of one table, and the settings they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StrettoError


@dataclass(frozen=True)
class Method:
    """How one method is composed of the engine's parts.

    Attributes:
        granularity: what is stored and re-injected: ``"last"`` (output of the last block,
            before the head, which always runs at the current timestep) or ``"delta"``
            (network output minus network input).
        policy: ``"interval"`` (fixed steps) or ``"accumulate"`` (EasyCache's transform rate, summed up).
        source: paper.
    """

    name: str
    granularity: str
    policy: str
    source: str


METHODS = {
    method.name: method
    for method in (
        Method("Taylor", "last", "interval", "TaylorSeer-Lite, arXiv 2503.06923 (Newton form)"),
        Method("EasyCache", "delta", "accumulate", "EasyCache, arXiv 2507.02860"),
    )
}


@dataclass(frozen=True)
class CacheSettings:
    """Validated settings of a cache request; the node's help page explains each.

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    method: str = "Taylor"
    interval: int = 3
    order: int = 1
    threshold: float = 0.05
    warmup: int = 4
    tail: int = 5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise StrettoError(f"Stretto Cache: method is {self.method!r}; known methods: {', '.join(METHODS)}")
        for name, low, high in (("interval", 1, 16), ("order", 0, 2), ("warmup", 0, 100), ("tail", 0, 100)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise StrettoError(f"Stretto Cache: {name} is {value!r}; it must be a whole number in [{low}, {high}]")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise StrettoError(f"Stretto Cache: threshold is {self.threshold!r}; it must be a number in [0, 1]")
        if not 0.0 <= self.threshold <= 1.0:
            raise StrettoError(f"Stretto Cache: threshold is {self.threshold!r}; it must lie in [0, 1]")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "CacheSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - set(cls.__dataclass_fields__)
        if unknown:
            raise StrettoError(f"Stretto Cache: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)
