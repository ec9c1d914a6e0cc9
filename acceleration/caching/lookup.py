"""What the built-in presets know about a model."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .magnitude import MagnitudeCurve, forced_steps, retained_steps
from .methods import AS_SET, PUBLISHED, CacheSettings
from .polynomial import ClampedPolynomial
from .presets import ANY, MEASURED, Preset, builtin_presets, find

#: Numbers of presets that are settings as they stand.
_KNOWN = {item.name for item in fields(CacheSettings)}
#: The hook at Wan's first block shows the projected time embedding, which the "retention" coefficients belong to.
_TEA_SUFFIX = {"wan": "-retention"}
#: Models that cannot be told apart by their sizes: the one that presets are looked up for, and who else it may be.
_LOOK_ALIKES = {
    ("wan", "2.1-t2v-14b"): "of Wan 2.2's text-to-video experts",
    ("flux", "dev"): "of FLUX.1 Kontext [dev]",
}
#: Numbers of presets that are turned into others.
_TURNED = ("retention", "start", "end")


def preset_for(family: str, variant: str, method: str, steps: int | None = None) -> Preset | None:
    """Return the preset of ``method`` for a model, None when there is none."""
    if method == "TeaCache":
        variant += _TEA_SUFFIX.get(family, "")
    return find(family, variant, method, steps)


def tea_polynomial(family: str, variant: str) -> ClampedPolynomial | None:
    """Return TeaCache's polynomial of a model."""
    preset = preset_for(family, variant, "TeaCache")
    return None if preset is None else preset.polynomial()


def magnitude_curve(family: str, variant: str, steps: int | None = None) -> MagnitudeCurve | None:
    """Return MagCache's magnitude curve of a model, the one nearest to a run of ``steps`` steps."""
    preset = preset_for(family, variant, "MagCache", steps)
    return None if preset is None else preset.curve()


def look_alike(settings: CacheSettings, family: str, variant: str) -> str:
    """Return a sentence where numbers of one published model are used that may belong to another of the same sizes.

    Args:
        settings: of the request.
        family: the model's family.
        variant: which model of the family it is taken for.
    """
    other = _LOOK_ALIKES.get((family, variant))
    per_model = settings.method == "TeaCache" or (settings.method == "MagCache" and not settings.curve)
    if other is None or not (per_model or settings.preset == PUBLISHED):
        return ""
    found = preset_for(family, variant, settings.method)
    if found is None or found.variant == ANY:
        return ""
    return f"this network has the sizes of {variant} and {other}: the numbers of {variant} are used"


def effective(settings: CacheSettings, family: str, variant: str, steps: int) -> tuple[CacheSettings, str]:
    """Return ``settings`` with the numbers of the preset they ask for, and a note about where those come from.

    Args:
        settings: of the request; ``preset`` says which numbers.
        family: the model's family.
        variant: which model of the family.
        steps: steps of the run; presets state some numbers as shares of it.
    """
    if settings.preset == AS_SET:
        return settings, ""
    if settings.preset == PUBLISHED:
        found = preset_for(family, variant, settings.method, steps)
        found = found if found is not None and found.provenance.kind == PUBLISHED else None
        numbers = found.at() if found else {}
    else:
        found = _measured(family, variant, settings.method, settings.preset, steps)
        numbers = found.at(settings.preset) if found else {}
    if found is None:
        what = f"{settings.preset} preset" if settings.preset != PUBLISHED else "published preset"
        return settings, f"there is no {what} of {settings.method} for this model: the numbers set here are used"
    note = f"{settings.preset} preset: {found.provenance.words()}"
    if not found.fits(steps):
        note += f", meant for {found.steps[0]} to {found.steps[1]} steps"
    unknown = sorted(set(numbers) - _KNOWN - set(_TURNED))
    if unknown:
        note += f" (not supported here: {', '.join(unknown)})"
    return replace(settings, **_numbers(numbers, found, steps)), note


def _measured(family: str, variant: str, method: str, level: str, steps: int) -> Preset | None:
    """Return the measured preset of a method with ``level``: the most specific one, and of these the one for most nearly
    as many steps."""
    found = [
        preset
        for preset in builtin_presets()
        if preset.method == method and preset.provenance.kind == MEASURED and level in preset.levels
    ]
    for wanted in ((family, variant), (family, ANY), (ANY, ANY)):
        fitting = [preset for preset in found if (preset.family, preset.variant) == wanted]
        if fitting:
            return min(fitting, key=lambda preset: max(preset.steps[0] - steps, steps - preset.steps[1], 0))
    return None


def _numbers(numbers: Mapping[str, Any], preset: Preset, steps: int) -> dict[str, Any]:
    """Return a preset's numbers as fields of the settings; shares of the run become steps."""
    result = {name: value for name, value in numbers.items() if name in _KNOWN and name != "forced"}
    if "retention" in numbers:
        result["warmup"] = retained_steps(numbers["retention"], steps)
        result.setdefault("tail", 0)
    if "start" in numbers:
        result["warmup"] = max(int(numbers["start"] * steps), result.get("warmup", 0))
    if "end" in numbers:
        result["tail"] = max(steps - int(numbers["end"] * steps), result.get("tail", 0))
    if "forced" in numbers:
        # A shorter run may have no step that stands for it.
        result["forced"] = next(iter(forced_steps(numbers["forced"], len(preset.data["ratios"]), steps)), -1)
    return result
