"""What the user asked for: frozen requests in a plan that does not depend on node order."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from .errors import StrettoError
from .schemas import require

SCHEMA = "plan@1"


@dataclass(frozen=True)
class Request:
    """One technique with its settings.

    Attributes:
        technique: registered name, for example ``"cache"``.
        settings: JSON values only; frozen on construction.
        interval: part of the run it may act in, as fractions of the steps (start included, end excluded).
        required: raise instead of falling back to native sampling when it cannot run.
        force: keep the hooks in place even where they would change nothing
            (exactness tests and overhead benchmarks; no node sets it).
    """

    technique: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = (0.0, 1.0)
    required: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        start, end = (float(value) for value in self.interval)
        if not 0.0 <= start < end <= 1.0:
            raise StrettoError(
                f"{self.technique}: interval is [{start}, {end}]; it must satisfy 0 <= start < end <= 1"
            )
        object.__setattr__(self, "interval", (start, end))
        object.__setattr__(self, "settings", MappingProxyType(dict(sorted(self.settings.items()))))

    def __hash__(self) -> int:
        return hash(self.sort_key())

    def __deepcopy__(self, memo: dict) -> "Request":
        return self  # frozen; some ComfyUI versions deep-copy model options on every clone

    def sort_key(self) -> str:
        """A total order over requests that no insertion order can influence."""
        return json.dumps(self.to_json(), sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        return {
            "technique": self.technique,
            "settings": dict(self.settings),
            "interval": list(self.interval),
            "required": self.required,
            "force": self.force,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Request":
        """Inverse of :meth:`to_json`; raises :class:`StrettoError` on missing or unknown fields."""
        allowed = {"technique", "settings", "interval", "required", "force"}
        if "technique" not in document or not set(document) <= allowed:
            raise StrettoError(f"a request has the fields {sorted(allowed)}, not {sorted(document)}")
        return cls(**{**document, "interval": tuple(document.get("interval", (0.0, 1.0)))})


@dataclass(frozen=True)
class Plan:
    """The requests of one model, kept sorted, so that equal wishes make equal plans."""

    requests: tuple[Request, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(sorted(self.requests, key=Request.sort_key)))

    def __deepcopy__(self, memo: dict) -> "Plan":
        return self

    def with_request(self, request: Request) -> "Plan":
        """Return a new plan that also holds ``request``."""
        return replace(self, requests=(*self.requests, request))

    def of(self, technique: str) -> tuple[Request, ...]:
        """Return the requests of one technique."""
        return tuple(request for request in self.requests if request.technique == technique)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a ``plan@1`` document."""
        return {"schema": SCHEMA, "requests": [request.to_json() for request in self.requests]}

    @classmethod
    def from_json(cls, document: Any) -> "Plan":
        """Read a ``plan@1`` document; raises :class:`SchemaError` for anything else."""
        require(document, "plan")
        return cls(tuple(Request.from_json(request) for request in document["requests"]))
