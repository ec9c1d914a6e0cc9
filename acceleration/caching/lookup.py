"""What the built-in presets know about a model."""

from .magnitude import MagnitudeCurve
from .polynomial import ClampedPolynomial
from .presets import Preset, find

#: The hook at Wan's first block shows the projected time embedding, which the "retention" coefficients belong to.
_TEA_SUFFIX = {"wan": "-retention"}


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
