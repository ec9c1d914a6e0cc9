"""Layouts of quantized weights: the names users choose, and ComfyUI's markers, to one abstraction.

==========  =====================  =============  ==========================================================
name        ComfyUI's key          bytes/weight   mathematics
==========  =====================  =============  ==========================================================
int8        int8_tensorwise        1.003          int8 x int8, rotated, scales per row and token
w6a8        asym_w4a8_int8         0.815          6-bit codes on the int8 grid, then as int8
w4a8        asym_w4a8_int8         0.565          4-bit codes on the int8 grid, then as int8
fp8         float8_e4m3fn          1.0            fp8 weight, one scale; any ComfyUI loads it
fp8_rows    (the pack's own)       1.001          fp8 x fp8, scales per row and token
w4a16       awq_w4a16              0.563          4-bit weight, products in 16 bit
==========  =====================  =============  ==========================================================
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .awq import Awq
from .base import ALIGNMENT, Layout, Packed, Part, offsets
from .fp8 import Fp8
from .grid import Grid
from .int8 import Int8Rows, rotation_for, rotation_unfit

__all__ = [
    "ALIGNMENT", "FOLDED", "NAMES", "Awq", "Fp8", "Grid", "Int8Rows", "Layout", "Packed", "Part", "fitting", "from_marker",
    "offsets", "rotation_for", "rotation_unfit",
]  # fmt: skip

#: Before the key of a layer whose input channels carry folded factors: other loaders must refuse it, because they would apply
#: LoRAs to it wrongly.
FOLDED = "stretto_folded:"
#: Layouts by the name users choose, best quality first.
NAMES: Mapping[str, Layout] = {
    layout.name: layout for layout in (Int8Rows(), Fp8(), Fp8(rows=True), Grid(bits=6), Grid(bits=4), Awq())
}


def fitting(name: str, rows: int, columns: int) -> Layout | str:
    """Return the layout ``name`` for a weight of this shape, with the largest rotation that divides its columns.

    Where no rotation divides them, int8 goes without; the grid formats cannot. Returns the reason where nothing fits.
    """
    layout = NAMES[name]
    if isinstance(layout, Int8Rows | Grid):
        layout = replace(layout, rotation=rotation_for(columns))
    return layout.unfit(rows, columns) or layout


def from_marker(
    marker: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[Layout, tuple[int, int]]:
    """Return the layout and logical shape (N, K) that a marker of ComfyUI's format describes.

    Args:
        marker: the layer's JSON, from the header or the tensor ``comfy_quant``.
        tensors: dtype and shape of the layer's tensors by suffix; K comes from their arithmetic.

    Raises:
        ValueError: the format is unknown, a setting is none, or the shapes cannot be of this format.
    """
    key = marker.get("format")
    if isinstance(key, str):
        key = key.removeprefix(FOLDED)
    settings = marker.get("params") if isinstance(marker.get("params"), Mapping) else {}
    settings = {**settings, **marker}
    if "weight" not in tensors:
        raise ValueError("it has a marker and no weight")
    shape = tensors["weight"][1]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"its weight has shape {list(shape)}; expected rows and columns")
    rows, columns = shape
    scale = tensors.get("weight_scale")
    if key == Int8Rows.key:
        rotation = _number(settings, "convrot_groupsize", 256) if settings.get("convrot") else 0
        shared = scale is not None and all(side == 1 for side in scale[1]) and rows != 1
        layout: Layout = Int8Rows(rotation, shared_scale=shared)
    elif key in (Fp8().key, Fp8(rows=True).key):
        layout = Fp8(rows=key != Fp8().key)
    elif key == Grid.key:
        group = _number(settings, "group_size", 16)
        if "weight_s_rel" not in tensors or len(tensors["weight_s_rel"][1]) != 2:
            raise ValueError(f"{key} needs a tensor weight_s_rel of two axes, which is missing")
        stored, columns = columns, tensors["weight_s_rel"][1][1] * group
        bits = 8 * stored // columns if columns else 0
        if bits not in (4, 6) or stored * 8 != columns * bits:
            raise ValueError(f"rows of {stored} bytes hold no 4- or 6-bit codes of {columns} input channels")
        if "weight_correction" in tensors:
            raise ValueError(f"{key} with a correction per group is not read")
        layout = Grid(bits, _number(settings, "convrot_groupsize", 256), group, codebook="weight_codebook" in tensors)
    elif key == Awq.key:
        columns *= 2
        layout = Awq(_number(settings, "group_size", 64), scale[0] if scale else torch.bfloat16)
        if layout.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"weight_scale has dtype {layout.dtype}; {key} stores a floating one")
    else:
        known = ", ".join(sorted({layout.key for layout in NAMES.values()}))
        raise ValueError(f"the format is {str(key)[:60]!r}; this release reads {known}")
    reason = layout.unfit(rows, columns)
    if reason:
        raise ValueError(f"{key}: {reason}")
    return layout, (rows, columns)


def _number(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
        raise ValueError(f"{name} is {str(value)[:40]!r}; expected a whole number from 1 to 4096")
    return value
