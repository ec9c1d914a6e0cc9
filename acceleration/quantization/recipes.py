"""Recipes: which layer of a checkpoint gets which format, as small JSON files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import SchemaError, StrettoError
from .architectures import FREE, STAYS, Architecture
from .layouts import NAMES, Layout, fitting

VERSION = 1
KEEP = "keep"
PRESETS = Path(__file__).resolve().parents[2] / "presets" / "quantization"
#: What layers that see one row per step may take: their activations stay 16 bit.
WEIGHT_FORMATS = (KEEP, "w4a16", "fp8", "int8")
MIN_NUMEL = 1 << 14
_MAX_FILE = 4 << 20
_MAX_PATTERN = 400


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches ``match`` (searched, not anchored) get ``format``."""

    match: str
    format: str
    why: str = ""


@dataclass(frozen=True)
class Recipe:
    """What to do with a checkpoint's linear layers; the first rule that matches decides.

    Attributes:
        default: format of free layers without a rule.
        weight_only: format of layers that see one row per step (modulations, text projections, text encoders).
        rules: exceptions.
        layers: format of single layers by exact name; decides before the rules. What mixed precision yields.
        min_numel: smaller weights stay as they are.
        architecture: the one it is for; empty: any.
        name: for provenance.
        source: where its choices come from.
        safe: patterns of layers (the first and last blocks) that the option for more safety keeps.
    """

    default: str = "int8"
    weight_only: str = KEEP
    rules: tuple[Rule, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    min_numel: int = MIN_NUMEL
    architecture: str = ""
    name: str = "default"
    source: str = ""
    safe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value in (("default", self.default), *((f"rule {rule.match!r}", rule.format) for rule in self.rules),
                            *((f"layer {name!r}", value) for name, value in self.layers.items())):  # fmt: skip
            if value != KEEP and value not in NAMES:
                raise StrettoError(f"recipe: {what} has format {value!r:.40}; known are {KEEP}, {', '.join(NAMES)}")
        if self.weight_only not in WEIGHT_FORMATS:
            raise StrettoError(
                f"recipe: weight_only is {self.weight_only!r:.40}; use one of {', '.join(WEIGHT_FORMATS)}"
            )
        if not 0 <= self.min_numel < 1 << 40:
            raise StrettoError(f"recipe: min_numel is {self.min_numel}; expected a number of weights")
        for pattern in (*(rule.match for rule in self.rules), *self.safe):
            _compiled(pattern)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def document(self) -> dict[str, Any]:
        """Return the recipe as it is kept in files."""
        return {
            "recipe": VERSION, "name": self.name, "architecture": self.architecture, "source": self.source,
            "default": self.default, "weight_only": self.weight_only, "min_numel": self.min_numel, "safe": list(self.safe),
            "rules": [{"match": rule.match, "format": rule.format, "why": rule.why} for rule in self.rules],
            "layers": dict(self.layers),
        }  # fmt: skip

    def changed(self, format: str | None = None, keep: Sequence[str] = (), safe: bool = False) -> "Recipe":
        """Return the recipe with another default format, and with more layers kept (patterns)."""
        kept = [Rule(pattern, KEEP, "asked for") for pattern in keep]
        kept += [Rule(pattern, KEEP, "first or last block") for pattern in (self.safe if safe else ())]
        recipe = replace(self, rules=(*kept, *self.rules))
        if format is None:
            return recipe
        if format not in NAMES:
            raise StrettoError(f"format {format!r:.40}; known are {', '.join(NAMES)}")
        text = self.architecture in ("t5", "llama", "clip")
        return replace(recipe, weight_only=format) if text else replace(recipe, default=format)


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear layer: a layout, or None where it stays, and why."""

    layer: str
    shape: tuple[int, int]
    layout: Layout | None
    why: str = ""


def choose(recipe: Recipe, architecture: Architecture | None, shapes: Mapping[str, tuple[int, ...]]) -> list[Choice]:
    """Return a choice for every linear layer (two-axis weight) of a checkpoint.

    Where the chosen format does not fit a layer's shape, the next of int8 and fp8 that does is taken, and the reason kept.

    Args:
        recipe: the recipe.
        architecture: None for one we do not know: then rules and layers of the recipe decide alone, nothing by default.
        shapes: of floating weights by tensor name.

    Raises:
        StrettoError: the recipe is for another architecture, or names a layer that is not there or has to stay.
    """
    if recipe.architecture and architecture and recipe.architecture != architecture.name:
        raise StrettoError(
            f"the recipe {recipe.name!r} is for {recipe.architecture}, the checkpoint is {architecture.title}"
        )
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    strange = next((layer for layer in recipe.layers if layer not in layers), None)
    if strange is not None:
        raise StrettoError(
            f"the recipe {recipe.name!r} names the layer {strange!r:.100}, which the checkpoint does not have"
        )
    return [_choice(recipe, architecture, layer, shape) for layer, shape in layers.items()]


def _choice(recipe: Recipe, architecture: Architecture | None, layer: str, shape: tuple[int, int]) -> Choice:
    rule = next((rule for rule in recipe.rules if _compiled(rule.match).search(layer)), None)
    explicit = recipe.layers.get(layer)
    role = architecture.role(layer) if architecture else (FREE if explicit or (rule and rule.format != KEEP) else STAYS)
    if role == STAYS:
        if explicit not in (None, KEEP) or (
            architecture and rule and rule.format != KEEP and rule.match == re.escape(layer)
        ):
            raise StrettoError(
                f"the recipe {recipe.name!r} quantizes {layer}, which has to stay in {architecture.title}"
            )
        return Choice(
            layer, shape, None, "an embedding or projection that stays" if architecture else "no rule names it"
        )
    wanted = explicit or (rule.format if rule else recipe.default if role == FREE else recipe.weight_only)
    if wanted == KEEP:
        return Choice(layer, shape, None, (rule.why or "kept by a rule") if rule and not explicit else
                      "sees one row per step" if role != FREE and not explicit else "kept")  # fmt: skip
    if role != FREE and wanted not in WEIGHT_FORMATS:
        return Choice(layer, shape, None, f"sees one row per step; {wanted} is for layers that see many")
    if shape[0] * shape[1] < recipe.min_numel:
        return Choice(layer, shape, None, f"{shape[0] * shape[1]} weights, fewer than {recipe.min_numel}")
    found = fitting(wanted, *shape)
    if isinstance(found, Layout):
        return Choice(layer, shape, found)
    other = next(
        (form for form in (fitting(name, *shape) for name in ("int8", "fp8")) if isinstance(form, Layout)), None
    )
    return Choice(layer, shape, other, f"{other.name} instead of {wanted}: {found}" if other else found)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        SchemaError: another version.
        StrettoError: names the file, the field and what is right.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE:
            raise StrettoError(f"{path}: {path.stat().st_size:,} bytes; no recipe is larger than {_MAX_FILE:,}")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: not JSON ({str(error)[:120]})") from None
    try:
        return recipe_of(document)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    except StrettoError as error:
        raise StrettoError(f"{path}: {error}") from None


def recipe_of(document: Any) -> Recipe:
    """Return the recipe that a parsed file holds (SchemaError, StrettoError)."""
    if not isinstance(document, dict) or "recipe" not in document:
        raise StrettoError("no recipe: it has no field `recipe`")
    if document["recipe"] != VERSION:
        raise SchemaError(f"recipe is {document['recipe']!r:.40}; this release reads {VERSION}")
    known = {
        "recipe",
        "name",
        "architecture",
        "source",
        "default",
        "weight_only",
        "min_numel",
        "safe",
        "rules",
        "layers",
    }
    unknown = next((name for name in document if name not in known), None)
    if unknown is not None:
        raise StrettoError(f"unknown field {unknown!r:.60}; known are {', '.join(sorted(known))}")
    expected = {"name": str, "architecture": str, "source": str, "default": str, "weight_only": str, "min_numel": int,
                "safe": list, "rules": list, "layers": dict}  # fmt: skip
    for name, kind in expected.items():
        if name in document and (not isinstance(document[name], kind) or isinstance(document[name], bool)):
            raise StrettoError(f"{name} is {str(document[name])[:60]!r}; expected {kind.__name__}")
    rules = []
    for rule in document.get("rules", []):
        if (
            not isinstance(rule, dict)
            or not {"match", "format"} <= set(rule)
            or not all(isinstance(v, str) for v in rule.values())
        ):
            raise StrettoError(f"a rule is {str(rule)[:80]}; expected match and format, perhaps why, all texts")
        rules.append(Rule(rule["match"], rule["format"], rule.get("why", "")))
    fields = {name: document[name] for name in expected if name in document and name not in ("rules", "safe")}
    if not all(isinstance(value, str) for value in (*document.get("safe", []), *document.get("layers", {}).values())):
        raise StrettoError("safe is a list of patterns, layers a format by name: texts")
    return Recipe(**fields, rules=tuple(rules), safe=tuple(document.get("safe", [])))


def preset_for(architecture: Architecture | None) -> Recipe:
    """Return the shipped recipe of an architecture, or one that quantizes nothing by itself."""
    path = PRESETS / f"{architecture.name}.json" if architecture else None
    if path is not None and path.is_file():
        return load_recipe(path)
    return Recipe(
        architecture=architecture.name if architecture else "",
        weight_only="fp8" if architecture and architecture.text else KEEP,
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _MAX_PATTERN:
        raise StrettoError(f"recipe: a pattern of {len(pattern)} characters; {_MAX_PATTERN} are allowed")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise StrettoError(f"recipe: {pattern!r:.80} is no regular expression ({error})") from None
