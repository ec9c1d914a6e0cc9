"""Settings of region-adaptive sampling, checked where the user gave them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StrettoError

NODE = "Stretto Region Adaptive"
#: How the share of active tokens runs over the steps.
CONSTANT, LINEAR, BY_SIGMA = "constant", "linear", "by noise level"
SCHEDULES = (CONSTANT, LINEAR, BY_SIGMA)
#: What inactive tokens keep: their last velocity, the line through their last two, or their last hidden state.
REPEAT, LINE, HIDDEN = "repeat", "line", "hidden state"
STALE = (REPEAT, LINE, HIDDEN)
KEYS = (REPEAT, LINE)
#: Which tokens stay active: what changes most, guarded against starvation, or the order of the published code.
CORRECTED, PUBLISHED = "corrected", "published"
GUARDS = (CORRECTED, PUBLISHED)

#: Whole numbers: name -> range.
WHOLE = {
    "start": (1, 1000),
    "tail": (0, 1000),
    "refresh_every": (0, 1000),
    "most_skips": (1, 1000),
    "min_tokens": (0, 1 << 24),
}
#: Other numbers: name -> range.
NUMBERS = {"ratio": (0.05, 1.0), "starvation": (0.0, 10.0), "memory_share": (0.01, 1.0)}
#: Rows and columns that a mask may have; finer ones say nothing that tokens could follow.
MASK_SIDE = 64


@dataclass(frozen=True)
class RegionSettings:
    """Validated settings of a region request; the node's help page explains each.

    Attributes:
        ratio: share of the tokens that are active at a step, in (0, 1].
        start: first steps that compute every token.
        tail: last steps that compute every token.
        refresh_every: every so many steps all tokens are computed; 0 for never.
        resets: further steps, counted from 0, that compute every token.
        starvation: how much a token's importance grows with every step it was left out, as exp(starvation * steps).
        most_skips: steps in a row that a token may be left out.
        schedule: one of :data:`SCHEDULES`.
        stale: one of :data:`STALE`.
        keys: what the keys and values of inactive tokens do: :data:`REPEAT` their last, or :data:`LINE`, which takes twice
            the memory.
        guard: one of :data:`GUARDS`.
        mask: rows of "0" and "1", top to bottom: tokens under a 1 are always active; empty for none.
        min_tokens: below so many image tokens everything is computed.
        memory_share: share of the free memory that keys and values may take.

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    ratio: float = 0.5
    start: int = 4
    tail: int = 5
    refresh_every: int = 2
    resets: tuple[int, ...] = ()
    starvation: float = 0.1
    most_skips: int = 4
    schedule: str = CONSTANT
    stale: str = LINE
    keys: str = LINE
    guard: str = CORRECTED
    mask: tuple[str, ...] = ()
    min_tokens: int = 64
    memory_share: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "resets", tuple(self.resets))
        object.__setattr__(self, "mask", tuple(self.mask))
        for name, options in (("schedule", SCHEDULES), ("stale", STALE), ("keys", KEYS), ("guard", GUARDS)):
            if getattr(self, name) not in options:
                _refuse(name, getattr(self, name), f"it must be one of {', '.join(options)}")
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                _refuse(name, value, f"it must be a whole number in [{low}, {high}]")
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                _refuse(name, value, f"it must be a number in [{low:g}, {high:g}]")
        if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in self.resets):
            _refuse("resets", list(self.resets), "it must hold steps, counted from 0")
        if any(not isinstance(row, str) or not re.fullmatch(r"[01]+", row) for row in self.mask):
            _refuse("mask", "a row with other characters", "rows are made of 0 and 1")
        if len({len(row) for row in self.mask}) > 1 or max(len(self.mask), *map(len, self.mask), 0) > MASK_SIDE:
            _refuse("mask", f"{len(self.mask)} rows", f"rows must be equally long, and no side above {MASK_SIDE}")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "RegionSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"{NODE}: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def steps_from_text(text: str) -> list[int]:
    """Return the steps of a list such as ``"12, 22"``; an empty text is an empty list.

    Raises:
        StrettoError: something else than whole numbers stands in it.
    """
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    if any(not word.isascii() or not word.isdecimal() for word in words):
        _refuse("resets", text, "it must be steps, counted from 0, with commas between them")
    return [int(word) for word in words]


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"{NODE}: {name} is {value!r}; {expected}")
