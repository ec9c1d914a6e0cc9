"""Presets: published or measured numbers of one caching method for one model, as data with provenance."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import SchemaError, StrettoError
from ..schemas import require
from .magnitude import MagnitudeCurve, flow_sigmas, retained_steps
from .masks import Mask, Table, parse_mask
from .policy import Codebook
from .polynomial import ClampedPolynomial
from .profile import MAX_STEPS, Profile

SCHEMA = "preset@1"
FOLDER = Path(__file__).resolve().parents[2] / "presets" / "caching"
#: Larger files are refused unread: no preset comes near it.
MAX_BYTES = 1 << 20
#: Variant or family of presets that fit every model.
ANY = "any"
PUBLISHED, MEASURED = "published", "measured"

_FIELDS = ("schema", "technique", "family", "variant", "method", "settings", "levels", "steps", "data", "provenance")
_OPTIONAL = ("levels", "data")
_DATA = ("ratios", "shift", "sigmas", "coefficients", "range", "range_source", "indicator", "masks", "table", "notes")


@dataclass(frozen=True)
class Provenance:
    """Where a preset's numbers come from.

    Attributes:
        source: paper or program, with its arXiv number where it has one.
        kind: ``"published"`` (by the method's authors or a port; not measured with this pack) or ``"measured"``.
        measured: figures of the measurement (model, steps, speed-up, quality, ...); None when published.
    """

    source: str
    kind: str = PUBLISHED
    measured: Mapping[str, Any] | None = None

    def words(self) -> str:
        """Return the provenance as a person reads it."""
        return self.source if self.kind == MEASURED else f"{self.source}; published, not measured here"


@dataclass(frozen=True)
class Preset:
    """Settings and data of one method for one model.

    Attributes:
        family: architecture family, or ``"any"``.
        variant: model within the family (``"dev"``, ``"2.1-t2v-14b"``), or ``"any"``.
        method: caching method's name.
        settings: the method's settings, plain values.
        steps: step counts it is meant for, both included.
        provenance: where the numbers come from.
        levels: named changes of the settings, from careful to bold (``"slow"``, ``"fast"``).
        data: what the method needs beyond settings: magnitude ``ratios`` with the ``shift`` (or ``sigmas``) of
            their calibration run; polynomial ``coefficients`` with ``range``, ``range_source`` and the
            ``indicator`` they belong to; ``masks`` by level; a ``table``; ``notes``.
    """

    family: str
    variant: str
    method: str
    settings: Mapping[str, Any]
    steps: tuple[int, int]
    provenance: Provenance
    levels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("settings", "levels", "data"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __hash__(self) -> int:
        return hash((self.family, self.variant, self.method))

    def at(self, level: str | None = None) -> dict[str, Any]:
        """Return the settings of a level, None for the preset's own.

        Raises:
            StrettoError: an unknown level.
        """
        if level is not None and level not in self.levels:
            known = ", ".join(self.levels) or "none"
            raise StrettoError(f"preset {self.method} for {self.family}: no level {level!r}; known levels: {known}")
        return {**self.settings, **(self.levels[level] if level is not None else {})}

    def request(self, origin: str = "") -> dict[str, Any]:
        """Return the settings of a cache request that runs with this preset.

        A mask serves every model of the family it was found for; a magnitude curve and fitted weights belong to one model,
        so they travel with the model's name.

        Args:
            origin: the file the preset was read from, for messages.
        """
        family, variant = ("" if name == ANY else name for name in (self.family, self.variant))
        settings = {"method": self.method, **self.settings, "family": family, "origin": origin}
        if self.method == "Fitted":
            settings["variant"] = variant
        if self.method == "MagCache" and "ratios" in self.data:
            settings.update(curve=self.curve().to_text(), variant=variant)
        return settings

    def fits(self, steps: int) -> bool:
        """Whether the preset is meant for runs of ``steps`` steps."""
        return self.steps[0] <= steps <= self.steps[1]

    def curve(self) -> MagnitudeCurve:
        """Return the magnitude curve on the noise levels of its calibration run; StrettoError without one."""
        ratios = self._need("ratios")
        sigmas = self.data.get("sigmas") or flow_sigmas(len(ratios), self._need("shift"))
        return MagnitudeCurve.from_ratios(ratios, sigmas)

    def polynomial(self) -> ClampedPolynomial:
        """Return the rescaling polynomial, clamped to its range; StrettoError without one."""
        return ClampedPolynomial(tuple(self._need("coefficients")), *self._need("range"))

    def mask(self, level: str) -> Mask:
        """Return the static mask of a level; StrettoError without one."""
        masks = self._need("masks")
        if level not in masks:
            raise StrettoError(f"preset {self.method}: no mask {level!r}; it has {', '.join(masks)}")
        return parse_mask(masks[level])

    def table(self) -> Table:
        """Return the table of blocks per step; StrettoError without one."""
        return Table.from_json(self._need("table"), f"preset {self.method} for {self.family}")

    def to_json(self) -> dict[str, Any]:
        """Return the preset as JSON values."""
        measured = self.provenance.measured
        return {
            "schema": SCHEMA,
            "technique": "cache",
            "family": self.family,
            "variant": self.variant,
            "method": self.method,
            "settings": dict(self.settings),
            "levels": {name: dict(settings) for name, settings in self.levels.items()},
            "steps": list(self.steps),
            "data": dict(self.data),
            "provenance": {
                "source": self.provenance.source,
                "kind": self.provenance.kind,
                "measured": None if measured is None else dict(measured),
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "preset") -> "Preset":
        """Check a document and return its preset.

        Raises:
            SchemaError: no preset, or of a major version that this release does not read.
            StrettoError: names ``source``, the field, its value and what was expected.
        """
        try:
            document = require(document, "preset")
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from None
        check = _Checks(source)
        check.fields(document, "the file", _FIELDS, _OPTIONAL)
        check.that(document["technique"] == "cache", "technique", document["technique"], "'cache'")
        for name in ("family", "variant", "method"):
            check.text(document[name], name)
        check.settings(document["settings"], "settings")
        levels = check.mapping(document.get("levels", {}), "levels")
        for name, settings in levels.items():
            check.settings(settings, f"levels.{name}")
        preset = cls(
            family=document["family"],
            variant=document["variant"],
            method=document["method"],
            settings=document["settings"],
            levels=levels,
            steps=check.steps(document["steps"]),
            data=check.data(document.get("data", {})),
            provenance=check.provenance(document["provenance"]),
        )
        preset._try_data(source)
        return preset

    def _need(self, name: str) -> Any:
        if self.data.get(name) is None:
            raise StrettoError(f"preset {self.method} for {self.family}, {self.variant}: it has no {name}")
        return self.data[name]

    def _try_data(self, source: str) -> None:
        """Build what the data describes once, so that a file fails when it is read and not in the middle of a run."""
        try:
            if "ratios" in self.data:
                self.curve()
            if "coefficients" in self.data:
                self.polynomial()
            for level in self.data.get("masks", {}):
                self.mask(level)
        except ValueError as error:
            raise StrettoError(f"{source}: data: {error}") from None
        try:
            if self.settings.get("curve"):
                MagnitudeCurve.from_text(str(self.settings["curve"]))
            if self.settings.get("codebook"):
                Codebook.parse(str(self.settings["codebook"]))
        except StrettoError as error:
            raise StrettoError(f"{source}: settings.{error}") from None
        if "table" in self.data:
            Table.from_json(self.data["table"], f"{source}: data.table")


def load_preset(path: str | os.PathLike[str]) -> Preset:
    """Read and check a preset file (UTF-8 JSON, ``preset@1``).

    Raises:
        SchemaError: no preset, or of an unknown major version.
        StrettoError: cannot be read, larger than 1 MiB, no JSON, or a field is wrong; names file, field and value.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise StrettoError(f"{path}: larger than {MAX_BYTES} bytes; a preset is never that large")
    try:
        document = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: not a JSON file ({error})") from None
    return Preset.from_json(document, str(path))


def save_preset(path: str | os.PathLike[str], preset: Preset, overwrite: bool = False) -> None:
    """Write a preset, whole or not at all.

    Raises:
        StrettoError: the file exists and ``overwrite`` is False, the preset would not load again, or writing failed.
    """
    path = Path(path)
    document = preset.to_json()
    Preset.from_json(json.loads(json.dumps(document)), str(path))
    # One field a line: readable, and curves stay on one line.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items())
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", encoding="utf-8", delete=False
        ) as file:
            file.write(f"{{\n{lines}\n}}\n")
        try:
            if overwrite:
                os.replace(file.name, path)
            else:
                os.link(file.name, path)  # unlike a check beforehand, this cannot lose a race
        finally:
            Path(file.name).unlink(missing_ok=True)
    except FileExistsError:
        raise StrettoError(f"{path}: exists already; pass another name, or ask to overwrite it") from None
    except OSError as error:
        raise StrettoError(f"{path}: cannot be written ({error.strerror})") from None


def magnitude_preset(profile: Profile, threshold: float = 0.12, max_skips: int = 4, retention: float = 0.2) -> Preset:
    """Return the magnitude curve of a profiled run as a MagCache preset for the profiled model.

    The numbers are the published ones of Wan 2.1 1.3B (arXiv 2506.09045), the middle of the published range.

    Args:
        profile: a run with nothing skipped; ``about`` names the family.
        threshold: accumulated error that computes.
        max_skips: longest run of skipped steps.
        retention: share of the run that is computed at its start, in [0, 1].

    Raises:
        StrettoError: the profile does not say which family it is of.
    """
    about, curve = profile.about, profile.curve()
    if not about.get("family"):
        raise StrettoError(f"profile: about.family is {about.get('family')!r}; expected the model's family")
    figures = {name: about[name] for name in ("family", "network", "sampler", "device", "dtype") if name in about}
    figures["steps"] = profile.steps
    warmup = retained_steps(retention, profile.steps)
    return Preset(
        family=about["family"],
        variant=about.get("variant") or ANY,
        method="MagCache",
        settings={"threshold": threshold, "max_skips": max_skips, "warmup": warmup, "tail": 1},
        steps=(1, MAX_STEPS),
        data={"ratios": list(curve.ratios), "sigmas": list(curve.sigmas)},
        provenance=Provenance("Stretto Profile, on the user's own model and prompt", MEASURED, figures),
    )


@cache
def builtin_presets() -> tuple[Preset, ...]:
    """Return the presets that come with the pack, in the order of their file names."""
    return tuple(load_preset(path) for path in sorted(FOLDER.glob("*.json")))


def find(family: str, variant: str, method: str, steps: int | None = None) -> Preset | None:
    """Return the built-in preset of ``method`` that fits best, or None.

    An exact variant wins over one for any variant of the family, and that over one for any family;
    among equals, one meant for ``steps`` wins.
    """
    for wanted in ((family, variant), (family, ANY), (ANY, ANY)):
        found = [p for p in builtin_presets() if (p.family, p.variant) == wanted and p.method == method]
        if found:
            return next((preset for preset in found if steps is None or preset.fits(steps)), found[0])
    return None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class _Checks:
    """Checks of one file; every failure names the file, the field, its value and what was expected."""

    source: str

    def that(self, fine: bool, name: str, value: Any, expected: str) -> None:
        if not fine:
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise StrettoError(f"{self.source}: {name} is {shown}; expected {expected}")

    def fields(self, value: Any, name: str, known: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        self.mapping(value, name)
        missing = [key for key in known if key not in value and key not in optional]
        if missing:
            raise StrettoError(f"{self.source}: {name} has no field {missing[0]!r}; expected {', '.join(known)}")
        unknown = [key for key in value if key not in known]
        if unknown:
            raise StrettoError(
                f"{self.source}: {name} has an unknown field {unknown[0]!r}; expected {', '.join(known)}"
            )

    def mapping(self, value: Any, name: str) -> Mapping[str, Any]:
        self.that(isinstance(value, Mapping), name, value, "an object")
        return value

    def text(self, value: Any, name: str) -> None:
        self.that(isinstance(value, str) and bool(value.strip()), name, value, "a text that is not empty")

    def settings(self, value: Any, name: str) -> None:
        for key, setting in self.mapping(value, name).items():
            fine = isinstance(setting, bool | str) or _is_number(setting)
            self.that(fine, f"{name}.{key}", setting, "a finite number, a text, true or false")

    def numbers(self, value: Any, name: str, least: int, most: int) -> None:
        fine = isinstance(value, list | tuple) and least <= len(value) <= most and all(map(_is_number, value))
        amount = f"{least}" if least == most else f"{least} to {most}"
        self.that(fine, name, value, f"a list of {amount} finite numbers")

    def steps(self, value: Any) -> tuple[int, int]:
        fine = isinstance(value, list | tuple) and len(value) == 2
        fine = fine and all(isinstance(step, int) and not isinstance(step, bool) for step in value)
        fine = fine and 1 <= value[0] <= value[1]
        self.that(fine, "steps", value, "two whole numbers [fewest, most] with 1 <= fewest <= most")
        return value[0], value[1]

    def data(self, value: Any) -> Mapping[str, Any]:
        self.fields(value, "data", _DATA, _DATA)
        if "ratios" in value:
            self.numbers(value["ratios"], "data.ratios", 2, 1000)
            for index, ratio in enumerate(value["ratios"]):
                self.that(ratio > 0, f"data.ratios[{index}]", ratio, "a number > 0")
            self.that(
                value.get("shift") is not None or value.get("sigmas") is not None,
                "data.shift",
                value.get("shift"),
                "the shift of the calibration run, or its noise levels in data.sigmas",
            )
        if value.get("shift") is not None:
            self.that(_is_number(value["shift"]) and value["shift"] > 0, "data.shift", value["shift"], "a number > 0")
        if value.get("sigmas") is not None:
            self.numbers(value["sigmas"], "data.sigmas", 2, 1001)
        if "coefficients" in value:
            self.numbers(value["coefficients"], "data.coefficients", 1, 10)
            self.numbers(value.get("range"), "data.range", 2, 2)
            self.that(
                value["range"][0] <= value["range"][1], "data.range", value["range"], "[low, high] with low <= high"
            )
            self.text(value.get("range_source"), "data.range_source")
            self.text(value.get("indicator"), "data.indicator")
        for level, mask in self.mapping(value.get("masks", {}), "data.masks").items():
            self.text(mask, f"data.masks.{level}")
        if "notes" in value:
            self.text(value["notes"], "data.notes")
        return value

    def provenance(self, value: Any) -> Provenance:
        self.fields(value, "provenance", ("source", "kind", "measured"))
        kind, measured = value["kind"], value["measured"]
        self.text(value["source"], "provenance.source")
        self.that(kind in (PUBLISHED, MEASURED), "provenance.kind", kind, "'published' or 'measured'")
        if kind == MEASURED:
            fine = isinstance(measured, Mapping) and bool(measured)
            self.that(fine, "provenance.measured", measured, "the figures of the measurement")
        else:
            self.that(measured is None, "provenance.measured", measured, "null, because nothing was measured")
        return Provenance(value["source"], kind, measured)
