"""Settings of a planned attention request, checked where the user gave them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import StrettoError
from ..reuse import POLICIES
from .schedules import SCHEDULES

NODE = "Stretto Attention Plan"
AUTO = "auto"
STORES = (AUTO, *POLICIES)
#: Share of the free memory that kept features may take where the user sets no limit.
FREE_SHARE = 0.5


@dataclass(frozen=True)
class PlannedSettings:
    """Validated settings; the node's help page explains each.

    Attributes:
        schedule: key of :data:`~.schedules.SCHEDULES`; "" with a file.
        file: plan file, "" for none.
        keep: share of the visual tokens that the schedule's lists keep, in (0, 1]; 0: the schedule's own.
        full_until: share of the steps that are full, from the first on, in [0, 1]; -1: the schedule's own.
        period: steps from one full step to the next, at least 2; 0: the schedule's own.
        share_guidance: whether the schedule lets guidance branches share; cheap, and far from plain guidance.
        min_tokens: shorter sequences are left alone.
        memory: MiB that kept features may take; 0: half of what is free.
        store: how features are kept, of :data:`STORES`; "auto": the first way that fits.
        compare: whether a few blocks are compared with full attention at three steps, for the report.

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    schedule: str = ""
    file: str = ""
    keep: float = 0.0
    full_until: float = -1.0
    period: int = 0
    share_guidance: bool = False
    min_tokens: int = 8192
    memory: int = 0
    store: str = AUTO
    compare: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not isinstance(self.schedule, str) or bool(self.file) == bool(self.schedule):
            _refuse("plan", self.file or self.schedule, "name a schedule or a plan file, one of the two")
        if self.schedule and self.schedule not in SCHEDULES:
            _refuse("plan", self.schedule, f"known schedules: {', '.join(SCHEDULES)}; or give a plan file")
        for name, low, high in (("keep", 0.0, 1.0), ("full_until", 0.0, 1.0)):
            value = getattr(self, name)
            own = value == type(self).__dataclass_fields__[name].default
            if isinstance(value, bool) or not isinstance(value, int | float) or not (own or low <= value <= high):
                _refuse(name, value, f"it must be a number in [{low:g}, {high:g}]")
        for name, low, high in (("period", 2, 1000), ("min_tokens", 0, 10_000_000), ("memory", 0, 1 << 20)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or low <= value <= high):
                _refuse(name, value, f"it must be 0 or a whole number in [{low}, {high}]")
        for name in ("share_guidance", "compare"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "it must be true or false")
        if self.store not in STORES:
            _refuse("store", self.store, f"it must be one of {', '.join(STORES)}")

    @property
    def name(self) -> str:
        """What a user calls the plan."""
        return self.schedule or self.file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".safetensors")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "PlannedSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"{NODE}: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"{NODE}: {name} is {value!r}; {expected}")
