"""Settings of a sparse attention request, checked where the user gave them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StrettoError
from .methods import DEFAULT, METHODS

NODE = "Stretto Sparse Attention"
#: What may be set to a number, and between which.
WHOLE = {"min_tokens": (0, 10_000_000), "radius": (0, 4096), "sink_frames": (-1, 100)}
NUMBERS = {"dense_until": (0.0, 1.0), "tau": (0.0, 10.0), "decay": (0.0, 16.0)}
CHOICES = {
    "block": (16, 32, 64, 128),
    "parts": (1, 2, 4, 8),
    "pool": (0, 2, 4, 8),
    "tail": ("auto", "on", "off"),
    "exact": ("auto", "on", "off"),
    "pattern": ("window", "top-k"),
    "fit": ("share", "map"),
}
#: What one head of Sparse-vDiT may do.
HEAD_MODES = ("diagonal", "multi-diagonal", "stripes", "full", "skip")


@dataclass(frozen=True)
class AttentionSettings:
    """Validated settings of a sparse attention request; the node's help page explains each.

    Attributes:
        method: key of :data:`~.methods.METHODS`.
        keep: share of the visual key blocks that a query block attends to, in (0, 1]. Methods by score keep exactly
            that many, those with a fixed pattern make it as large as fits. Text and references come on top.
        dense_until: share of the steps that stay dense, from the first on, in [0, 1].
        dense_layers: attentions of the network that stay dense, counted from 0.
        min_tokens: shorter sequences stay dense.
        block: tokens in a block of queries and of keys.
        tile: (t, y, x) of the tiles that tokens are ordered by, or "auto" for the method's own.
        radius: CLEAR's, in tokens; 0 takes ``keep``.
        tail: whether left-out blocks enter the softmax as one pooled key each; "auto" as the method does.
        exact: whether windows hold for tokens ("on") or are rounded up to blocks ("off"); "auto" as the method does.
        pool: CLEAR's factor of pooled extra keys, 0 for none.
        tau: Sol's threshold in standard deviations; 0 takes ``keep``.
        decay: Radial's; 0 takes ``keep``.
        parts: sub-blocks that a block is split into where a method scores by them.
        pattern: what SALAD's softmax branch keeps.
        heads: Sparse-vDiT's modes, one per head, of :data:`HEAD_MODES`; empty: found at run time.
        sink_frames: first frames that all queries attend to; -1 as the method does.
        weights: file of trained parts of the method (:mod:`.weights`), "" for none.
        probe: whether a few steps are compared with full attention, for the report.
        fit: what is fitted of a branch without weights: one share per head, or a joint map of both outputs (:mod:`.ridge`).

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    method: str = DEFAULT
    keep: float = 0.25
    dense_until: float = 0.2
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 8192
    block: int = 64
    tile: str | tuple[int, int, int] = "auto"
    radius: int = 16
    tail: str = "auto"
    exact: str = "auto"
    pool: int = 0
    tau: float = 0.0
    decay: float = 0.0
    parts: int = 4
    pattern: str = "window"
    heads: tuple[str, ...] = ()
    sink_frames: int = -1
    probe: bool = True
    weights: str = ""
    fit: str = "share"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            _refuse("method", self.method, f"known methods: {', '.join(METHODS)}")
        if not _number(self.keep) or not 0 < self.keep <= 1:
            _refuse("keep", self.keep, "it must be a number above 0 and at most 1")
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                _refuse(name, value, f"it must be a whole number in [{low}, {high}]")
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if not _number(value) or not low <= value <= high:
                _refuse(name, value, f"it must be a number in [{low:g}, {high:g}]")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or value not in known:
                _refuse(name, value, f"it must be one of {', '.join(map(str, known))}")
        if not isinstance(self.probe, bool):
            _refuse("probe", self.probe, "it must be true or false")
        if not isinstance(self.weights, str):
            _refuse("weights", self.weights, "it must be the path of a file, or empty")
        self._check_lists()

    def _check_lists(self) -> None:
        layers = _tuple(self.dense_layers)
        if layers is None or not all(_whole(layer) and layer >= 0 for layer in layers):
            _refuse("dense_layers", self.dense_layers, "it must be a list of whole numbers from 0 on")
        heads = _tuple(self.heads)
        if heads is None or not all(isinstance(mode, str) and mode in HEAD_MODES for mode in heads):
            _refuse("heads", self.heads, f"it must be a list of {', '.join(HEAD_MODES)}, one per head")
        if self.tile != "auto":
            tile = _tuple(self.tile)
            if tile is None or len(tile) != 3 or not all(_whole(size) and 1 <= size <= 1024 for size in tile):
                _refuse("tile", self.tile, 'it must be "auto" or three whole numbers in [1, 1024]: frames, rows, columns')
            object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "dense_layers", layers)
        object.__setattr__(self, "heads", heads)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "AttentionSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"{NODE}: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"{NODE}: {name} is {value!r}; {expected}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tuple(value: Any) -> tuple | None:
    return tuple(value) if isinstance(value, list | tuple) else None
