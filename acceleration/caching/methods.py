"""The published caching methods as rows of one table, and the settings they share."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import StrettoError
from .store import STORES
from .tap import BLOCKS, DELTA, DENOISED, OUTPUT, TABLE, Tap


@dataclass(frozen=True)
class Method:
    """How one method is composed of the engine's parts.

    Attributes:
        name: as its authors call it.
        tap: where features are taken: ``"output"``, ``"delta"``, ``"denoised"`` or ``"blocks"`` (:class:`~.tap.Tap`);
            ``"table"`` where a table of blocks or modules says (:mod:`.named_tables`).
        policy: ``"interval"``, ``"growing"``, ``"mask"``, ``"magnitude"``, ``"accumulate"``, ``"threshold"``,
            ``"decaying"`` (a threshold that falls along the run) or ``"codebook"``.
        forecaster: key of :data:`~.forecast.FORECASTERS`.
        indicator: ``""``, ``"rate"`` (network input and output), ``"drift"`` (what was stored), ``"input"`` (the first
            block's modulated input), ``"residual"`` (what the first blocks add), ``"forecast"`` (how wrong a forecast of
            what they yield is), ``"draft"`` (the same, element by element) or ``"trajectory"`` (how far they have come).
        residual: whether ``"blocks"`` stores what the range adds instead of what it yields.
        before: blocks that always run ahead of the range; None takes the setting ``first_blocks``.
        after: blocks that always run behind it; None takes the setting ``last_blocks``.
        source: paper.
    """

    name: str
    tap: str
    policy: str
    forecaster: str
    source: str
    indicator: str = ""
    residual: bool = False
    before: int | None = 0
    after: int | None = 0

    @property
    def static(self) -> bool:
        """Whether the schedule is known before sampling."""
        return self.policy in ("interval", "growing", "mask", "magnitude")

    @property
    def inside(self) -> bool:
        """Whether the indicator looks inside the network."""
        return self.indicator in ("input", "residual", "forecast", "draft", "trajectory")

    def place(self, settings: "CacheSettings", blocks: int) -> Tap:
        """Return the tap for a network of ``blocks`` blocks."""
        if self.tap != BLOCKS:
            return Tap(self.tap)
        first = settings.first_blocks if self.before is None else self.before
        after = settings.last_blocks if self.after is None else self.after
        return Tap(BLOCKS, first, blocks - after, self.residual)


METHODS = {
    method.name: method
    for method in (
        Method("Taylor", BLOCKS, "interval", "newton", "TaylorSeer-Lite, arXiv 2503.06923, in Newton's form"),
        Method("EasyCache", DELTA, "accumulate", "reuse", "EasyCache, arXiv 2507.02860", "rate"),
        Method("Adaptive", BLOCKS, "accumulate", "newton", "EasyCache's decision with Taylor's forecast", "rate"),
        Method("TaylorSeer", BLOCKS, "interval", "taylor", "TaylorSeer-Lite, arXiv 2503.06923, as published"),
        Method(
            "CG-Taylor",
            BLOCKS,
            "threshold",
            "newton",
            "Confidence-Gated Taylor, arXiv 2508.02240",
            "forecast",
            before=1,
        ),
        Method(
            "SpeCa",
            BLOCKS,
            "decaying",
            "taylor",
            "SpeCa, arXiv 2509.11628, verified at the front",
            "draft",
            before=None,
        ),
        Method("HiCache", BLOCKS, "interval", "hermite", "HiCache, arXiv 2508.16984"),
        Method("Spectrum", BLOCKS, "growing", "chebyshev", "Spectrum, arXiv 2603.01623, anchored"),
        Method("TeaCache", BLOCKS, "accumulate", "reuse", "TeaCache, arXiv 2411.19108", "input", residual=True),
        Method("MagCache", BLOCKS, "magnitude", "reuse", "MagCache, arXiv 2506.09045", residual=True),
        Method(
            "FBCache", BLOCKS, "threshold", "reuse", "First-Block-Cache of ParaAttention", "residual", True, before=1
        ),
        Method(
            "DBCache", BLOCKS, "threshold", "reuse", "DBCache of cache-dit", "residual", True, before=None, after=None
        ),
        Method(
            "DBCache-Taylor",
            BLOCKS,
            "threshold",
            "newton",
            "DBCache of cache-dit with its TaylorSeer calibrator",
            "residual",
            True,
            before=None,
            after=None,
        ),
        Method("DiCache", BLOCKS, "accumulate", "aligned", "DiCache, arXiv 2508.17356", "trajectory", residual=True),
        Method("AdaCache", BLOCKS, "codebook", "reuse", "AdaCache, arXiv 2411.02397", "drift", residual=True),
        Method("LazyCache", DENOISED, "accumulate", "reuse", "LazyCache of ComfyUI, before guidance", "rate"),
        Method("FORA", BLOCKS, "interval", "reuse", "FORA, arXiv 2407.01425, over the whole stack", residual=True),
        Method("SCM", BLOCKS, "mask", "reuse", "static compute masks of cache-dit", residual=True),
        Method("Schedule", BLOCKS, "mask", "newton", "a mask of yours"),
        Method("Output", OUTPUT, "interval", "newton", "multistep solver of the network's output"),
        Method("Fitted", OUTPUT, "mask", "fitted", "weights fitted to the model; after S4S, arXiv 2502.17423"),
        Method("PAB", TABLE, "interval", "reuse", "Pyramid Attention Broadcast, arXiv 2408.12588, module by module"),
        Method("DeltaDiT", TABLE, "interval", "reuse", "Delta-DiT, arXiv 2406.01125, block by block"),
        Method("FORA modules", TABLE, "interval", "reuse", "FORA, arXiv 2407.01425, module by module as published"),
        Method("TaylorSeer modules", TABLE, "interval", "taylor", "TaylorSeer, arXiv 2503.06923, module by module as published"),
    )
}

#: What the node's number fields mean for methods that have presets of their own lives in presets/; this is for all.
LIMITS = {
    "interval": (1, 16),
    "order": (0, 3),
    "warmup": (0, 100),
    "tail": (0, 100),
    "max_skips": (0, 100),
    "first_blocks": (1, 100),
    "last_blocks": (0, 100),
    "forced": (-1, 1000),
    "degree": (1, 8),
    "snapshots": (2, 100),
    "probe_order": (-1, 3),
}
NUMBERS = {
    "threshold": (0.0, 10.0),
    "growth": (0.0, 10.0),
    "damping": (0.0, 1.0),
    "ridge": (0.0, 10.0),
    "blend": (0.0, 1.0),
    "window": (1.0, 100.0),
    "decay": (0.0, 1.0),
    "floor": (0.0, 10.0),
}
COORDINATES = ("step", "sigma", "logsnr")
LEVELS = ("slow", "medium", "fast", "ultra")
#: Where the numbers come from: the request itself, the method's authors, or a measured trade of speed for quality.
AS_SET, PUBLISHED = "as set", "published"
PRESETS = (AS_SET, PUBLISHED, "quality", "balanced", "fast")


@dataclass(frozen=True)
class CacheSettings:
    """Validated settings of a cache request; the node's help page explains each.

    Attributes:
        method: key of :data:`METHODS`.
        interval: compute every n-th step (``"interval"``); the longest gap of AdaCache's codebook.
        order: degree of a polynomial forecast, 0 for reuse.
        threshold: what a signal, or a sum of signals, must stay below.
        warmup: first steps that are always computed.
        tail: last steps that are always computed.
        max_skips: most evaluations skipped in a row, 0 for no limit.
        first_blocks: blocks ahead of the cached range (DBCache's F), or that tell how much has changed (SpeCa, DiCache).
        last_blocks: blocks behind it (DBCache's B).
        growth: how much Spectrum's window grows with every computed step.
        damping: share of the slope that a line keeps.
        coordinate: what forecasts are made over: ``"step"``, ``"sigma"`` or ``"logsnr"``.
        level: which static mask (SCM).
        mask: the mask of ``"Schedule"`` and ``"Fitted"``, ``#`` computed and ``.`` skipped.
        preset: one of :data:`PRESETS`; other than "as set" it replaces the numbers by a preset's.
        family: the architecture family these settings were calibrated for, "" for any.
        forced: one step that is computed besides, -1 for none.
        degree: Spectrum's highest polynomial.
        ridge: Spectrum's penalty.
        snapshots: Spectrum's window.
        blend: share of Spectrum's fit, against the line.
        weights: weights of ``"Fitted"`` per skipped step (:meth:`~.fitting.FittedWeights.to_settings`).
        sigmas: noise levels that they were fitted on.
        window: Spectrum's first window, whose whole part is the first gap between computed steps.
        probe_order: degree of the gate's forecast (CG-Taylor, SpeCa), -1 for ``order``.
        decay: share of SpeCa's threshold that is left at the run's end.
        floor: what SpeCa's threshold never falls below.
        codebook: AdaCache's, as ``"change:rate change:rate"``; "" for an even one of ``threshold`` and ``interval``.
        curve: MagCache's magnitudes (:meth:`~.magnitude.MagnitudeCurve.to_text`), "" for those published for the model.
        variant: the model within the family that these settings belong to, "" for any.
        origin: the file they come from, for messages.
        store: how features are kept, one of :data:`~.store.STORES`.
        text_features: whether keys and values that depend on the prompt alone are kept, to the bit
            (:mod:`.text_features`).

    Raises:
        StrettoError: a value is out of range; the message names field, value and range.
    """

    method: str = "Taylor"
    interval: int = 3
    order: int = 1
    threshold: float = 0.05
    warmup: int = 4
    tail: int = 5
    max_skips: int = 0
    first_blocks: int = 1
    last_blocks: int = 0
    growth: float = 0.75
    damping: float = 1.0
    coordinate: str = "step"
    level: str = "medium"
    mask: str = ""
    preset: str = AS_SET
    family: str = ""
    forced: int = -1
    degree: int = 4
    ridge: float = 0.1
    snapshots: int = 10
    blend: float = 0.5
    weights: str = ""
    sigmas: str = ""
    window: float = 2.0
    probe_order: int = -1
    decay: float = 0.3
    floor: float = 0.0
    codebook: str = ""
    curve: str = ""
    variant: str = ""
    origin: str = ""
    store: str = "as computed"
    text_features: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("coordinate", self.coordinate, COORDINATES)
        _one_of("level", self.level, LEVELS)
        _one_of("preset", self.preset, PRESETS)
        _one_of("store", self.store, STORES)
        if not isinstance(self.text_features, bool):
            raise StrettoError(f"Stretto Cache: text_features is {self.text_features!r}; it must be true or false")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise StrettoError(f"Stretto Cache: {name} is {value!r}; it must be a whole number in [{low}, {high}]")
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise StrettoError(f"Stretto Cache: {name} is {value!r}; it must be a number in [{low:g}, {high:g}]")
        for name in ("mask", "family", "weights", "sigmas", "codebook", "curve", "variant", "origin"):
            if not isinstance(getattr(self, name), str):
                raise StrettoError(f"Stretto Cache: {name} is {getattr(self, name)!r}; it must be text")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "CacheSettings":
        """Build from a request's settings; unknown fields are refused by name."""
        unknown = set(settings) - {item.name for item in fields(cls)}
        if unknown:
            raise StrettoError(f"Stretto Cache: unknown setting {sorted(unknown)[0]!r}")
        return cls(**settings)


def _one_of(name: str, value: Any, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in known:
        raise StrettoError(f"Stretto Cache: {name} is {value!r}; known {name}s: {', '.join(known)}")
