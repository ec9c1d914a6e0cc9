"""What one run with nothing skipped tells about a model: the material of every calibration."""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import SchemaError, StrettoError
from ..schemas import require
from .magnitude import MagnitudeCurve

SCHEMA = "profile@1"
#: No run is longer, and no sketch larger, than these.
MAX_STEPS, MAX_SKETCH = 256, 1 << 16


@dataclass(frozen=True, eq=False)
class Profile:
    """A record of every step of a run in which everything was computed.

    Attributes:
        sigmas: N + 1 noise levels, the last is the run's end; strictly falling.
        positions: N step positions, rising.
        sketches: [N, m] fp32, sketches of the feature that would be stored (:class:`~.sketch.CountSketch`).
        log_norms: N natural logarithms of the Euclidean norm of what the stack of blocks adds (of the network's output
            less its input where blocks are out of reach).
        signals: by indicator's name, N scalars; None where it had nothing to compare with.
        seconds_computed: of one computed evaluation.
        seconds_skipped: of one skipped evaluation; None when it was not timed.
        amplification: N factors from a step's error to the final image's; None for the prior.
        about: what was profiled (family, sampler, resolution, seed, ...): plain values.

    Raises:
        StrettoError: lengths disagree, levels do not fall, or a number is not finite.
    """

    sigmas: tuple[float, ...]
    positions: tuple[float, ...]
    sketches: np.ndarray
    log_norms: tuple[float, ...]
    seconds_computed: float
    seconds_skipped: float | None = None
    signals: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    amplification: tuple[float, ...] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in ("sigmas", "positions", "log_norms"):
            set_(self, name, _numbers(getattr(self, name), name))
        if self.amplification is not None:
            set_(self, "amplification", _numbers(self.amplification, "amplification"))
        signals = {name: _numbers(values, f"signals.{name}", True) for name, values in self.signals.items()}
        set_(self, "signals", signals)
        set_(self, "sketches", np.ascontiguousarray(self.sketches, dtype=np.float32))
        self._check()

    @property
    def steps(self) -> int:
        """Number of steps, N."""
        return len(self.positions)

    @property
    def skipped_cost(self) -> float:
        """Cost of a skipped evaluation relative to a computed one, in [0, 1]; 0 when it was not timed."""
        if self.seconds_skipped is None or self.seconds_computed <= 0:
            return 0.0
        return min(max(self.seconds_skipped / self.seconds_computed, 0.0), 1.0)

    def curve(self) -> MagnitudeCurve:
        """Return the magnitude curve that this run shows (MagCache, arXiv 2506.09045)."""
        logs = np.asarray(self.log_norms) - self.log_norms[0]
        ratios = np.exp(np.diff(logs, prepend=logs[0]))
        return MagnitudeCurve(self.sigmas[: self.steps], tuple(logs.tolist()), tuple(ratios.tolist()))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; sketches as base64 of little-endian fp32."""
        return {
            "schema": SCHEMA,
            "sigmas": list(self.sigmas),
            "positions": list(self.positions),
            "log_norms": list(self.log_norms),
            "seconds_computed": self.seconds_computed,
            "seconds_skipped": self.seconds_skipped,
            "signals": {name: list(values) for name, values in self.signals.items()},
            "amplification": None if self.amplification is None else list(self.amplification),
            "about": dict(self.about),
            "sketches": {
                "shape": list(self.sketches.shape),
                "fp32": base64.b64encode(self.sketches.astype("<f4").tobytes()).decode("ascii"),
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "profile") -> "Profile":
        """Inverse of :meth:`to_json`.

        Raises:
            SchemaError: no profile, or of an unknown major version.
            StrettoError: names ``source``, the field and what was expected.
        """
        try:
            fields = dict(require(document, "profile"))
            del fields["schema"]
            unknown = set(fields) ^ set(cls.__dataclass_fields__)
            if unknown:
                raise StrettoError(f"field {sorted(unknown)[0]!r} is missing or unknown")
            for name in ("signals", "about", "sketches"):
                if not isinstance(fields[name], Mapping):
                    raise StrettoError(f"{name} is {fields[name]!r:.60}; expected an object")
            fields["sketches"] = _decode(fields["sketches"])
            return cls(**fields)
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from None
        except StrettoError as error:
            raise StrettoError(f"{source}: {error}") from None

    def _check(self) -> None:
        n = self.steps
        if not 1 <= n <= MAX_STEPS:
            raise StrettoError(f"positions has {n} entries; expected 1 to {MAX_STEPS}")
        lengths = {"sigmas": (len(self.sigmas), n + 1), "log_norms": (len(self.log_norms), n)}
        lengths |= {f"signals.{name}": (len(values), n) for name, values in self.signals.items()}
        if self.amplification is not None:
            lengths["amplification"] = (len(self.amplification), n)
        for name, (found, expected) in lengths.items():
            if found != expected:
                raise StrettoError(f"{name} has {found} entries; expected {expected} for {n} steps")
        if np.any(np.diff(self.sigmas) >= 0) or np.any(np.diff(self.positions) <= 0):
            raise StrettoError("sigmas must fall and positions rise from step to step")
        if self.sketches.ndim != 2 or len(self.sketches) != n or not np.isfinite(self.sketches).all():
            raise StrettoError(f"sketches has the shape {self.sketches.shape}; expected [{n}, size], all finite")
        for name in ("seconds_computed", "seconds_skipped"):
            value = getattr(self, name)
            if value is not None and not (_finite(value) and value >= 0):
                raise StrettoError(f"{name} is {value!r}; expected a number >= 0")
        if self.seconds_computed is None:
            raise StrettoError("seconds_computed is None; expected a number >= 0")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, name: str, unknown: bool = False) -> tuple[Any, ...]:
    """Return finite numbers as a tuple of float; None may stand for an unknown one where ``unknown``."""
    if isinstance(values, str | Mapping) or not hasattr(values, "__iter__"):
        raise StrettoError(f"{name} is {values!r:.60}; expected a list of numbers")
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    for index, value in enumerate(values):
        if not (_finite(value) or (unknown and value is None)):
            raise StrettoError(f"{name}[{index}] is {value!r:.60}; expected a finite number")
    return tuple(None if value is None else float(value) for value in values)


def _decode(document: Mapping[str, Any]) -> np.ndarray:
    shape, text = document.get("shape"), document.get("fp32")
    fine = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size >= 1 for size in shape)
    if not fine or shape[0] > MAX_STEPS or shape[1] > MAX_SKETCH:
        raise StrettoError(f"sketches.shape is {shape!r:.60}; expected [steps, size] up to [{MAX_STEPS}, {MAX_SKETCH}]")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise StrettoError("sketches.fp32: expected base64") from None
    if len(raw) != 4 * shape[0] * shape[1]:
        raise StrettoError(f"sketches.fp32 holds {len(raw)} bytes; expected {4 * shape[0] * shape[1]} for {shape}")
    return np.frombuffer(raw, dtype="<f4").reshape(shape)
