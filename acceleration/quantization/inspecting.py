"""Looking at a checkpoint without loading it, and checking one against its own markers and its source."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from .architectures import find_architecture
from .checkpoints import Checkpoint, open_checkpoint
from .files import Stored
from .formats import (
    COMFY,
    GGUF,
    PLAIN,
    SCALED_FP8,
    TITLES,
    UNREADABLE,
    Found,
    QuantizedLayer,
    dequantized,
    find_formats,
)
from .gguf_files import GgufTensor
from .quantizing import PROVENANCE_KEY, RECIPE_KEY, rotation_check, rotation_checks
from .renaming import comfy_names

#: Two rotation checks agree within this share of the layer's size; fp32 sums in another order differ by far less.
_CLOSE = 1e-3


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is.

    Attributes:
        path: of the (first) file.
        kind: one of :data:`.formats.TITLES`.
        architecture: title of the architecture, or empty.
        formats: layers per format, "kept" among them.
        nbytes: of all tensors.
        nbytes_16: what the same weights take in 16 bit.
        parameters: weights in all.
        provenance: what we wrote about its making.
        recipe: name of the recipe, where we made it.
        notes: remarks.
    """

    path: Path
    kind: str
    architecture: str
    formats: Mapping[str, int]
    nbytes: int
    nbytes_16: int
    parameters: int
    provenance: Mapping[str, Any]
    recipe: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return it in words."""
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items()) or "none"
        lines = [
            f"{self.path}",
            f"  format        {TITLES[self.kind]}",
            f"  architecture  {self.architecture or 'not known'}",
            f"  linear layers {formats}",
            f"  size          {self.nbytes / 1e6:,.1f} MB; in 16 bit {self.nbytes_16 / 1e6:,.1f} MB "
            f"({self.parameters / 1e6:,.1f} M weights)",
        ]
        if self.provenance:
            lines.append(f"  made by       {self.provenance.get('tool', '?')}, recipe {self.recipe or '?'}")
            source = self.provenance.get("source")
            if source:
                lines.append(
                    f"  from          {', '.join(map(str, source))}, sha256 {str(self.provenance.get('source_sha256'))[:16]}..."
                )
        lines += [f"  note          {note}" for note in self.notes]
        if self.kind in UNREADABLE:
            lines.append(f"  cannot be read: {UNREADABLE[self.kind]}")
        return lines


def inspect(path: str | Path) -> Summary:
    """Describe a checkpoint from its header and markers.

    Raises:
        StrettoError: the file is damaged; names tensor or layer.
    """
    with open_checkpoint(path) as checkpoint:
        tensors, renamed = comfy_names(checkpoint.tensors)
        found = find_formats(checkpoint, tensors)
        logical = dequantized(found) if found.kind not in UNREADABLE else found.plain
        architecture = find_architecture(logical)
        formats: Counter[str] = Counter(layer.layout.name for layer in found.layers.values())
        for name, tensor in found.plain.items():
            if name.endswith(".weight") and len(tensor.shape) == 2:
                formats[_kept(tensor)] += 1
        parameters = sum(math.prod(tensor.shape) for tensor in logical.values())
        provenance = _document(checkpoint, PROVENANCE_KEY)
        return Summary(
            checkpoint.paths[0], found.kind, architecture.title if architecture else "", dict(formats), checkpoint.nbytes,
            2 * parameters, parameters, provenance, str(_document(checkpoint, RECIPE_KEY).get("name", "")),
            (*checkpoint.notes, *([renamed] if renamed else []), *found.notes),
        )  # fmt: skip


def _kept(tensor: Stored) -> str:
    if isinstance(tensor, GgufTensor):
        return tensor.kind
    return "kept (" + str(tensor.dtype).removeprefix("torch.") + ")"


def _document(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    try:
        document = json.loads(checkpoint.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


@dataclass(frozen=True)
class LayerCheck:
    """One verified layer.

    Attributes:
        layer: its name.
        format: name of its layout.
        error: ``|W' - W| / |W|`` over the blocks that were read, or None without a source.
        problem: what is wrong, or empty.
    """

    layer: str
    format: str
    error: float | None
    problem: str = ""


#: Relative weight error beyond which a layer of a format is not what it should be: twice that of normal weights.
LIMITS = {"int8": 0.02, "w6a8": 0.045, "w4a8": 0.15, "fp8": 0.055, "fp8_rows": 0.055, "w4a16": 0.2}


def verify(path: str | Path, source: str | Path | None = None, blocks: int = 2, rows: int = 32) -> list[LayerCheck]:
    """Read blocks of every quantized layer again and check them.

    Checked: shapes and dtypes (all), scales and decoded values finite, the rotation against the check value in the file
    (guard G1), and, with a source, the relative error against it.

    Args:
        path: the quantized file.
        source: what it was made from, any layout of files.
        blocks: blocks per layer: the first, and evenly spread ones.
        rows: rows per block.

    Raises:
        StrettoError: a file cannot be read, or is not quantized.
    """
    with open_checkpoint(path) as checkpoint:
        found = find_formats(checkpoint).require_readable()
        if found.kind not in (COMFY, SCALED_FP8):
            raise StrettoError(f"{path}: {TITLES[found.kind]}; there is nothing to verify")
        checks = rotation_checks(checkpoint.metadata)
        if source is None:
            return [_verified(layer, None, checks.get(layer.name), blocks, rows) for layer in found.layers.values()]
        with open_checkpoint(source) as original:
            tensors, _ = comfy_names(original.tensors)
            before: Found = find_formats(original, tensors)
            logical = dequantized(before) if before.kind not in (PLAIN, GGUF) else tensors
            return [
                _verified(layer, logical.get(f"{layer.name}.weight"), checks.get(layer.name), blocks, rows, True)
                for layer in found.layers.values()
            ]


def _verified(
    layer: QuantizedLayer, original: Stored | None, check: Any, blocks: int, rows: int, wanted: bool = False
) -> LayerCheck:
    form = layer.layout.name
    if wanted and (original is None or tuple(original.shape) != layer.shape):
        return LayerCheck(layer.name, form, None, "the source has no such weight of this shape")
    step = max(layer.shape[0] // max(blocks, 1), 1)
    difference = size = 0.0
    for index, start in enumerate(range(0, layer.shape[0], step)):
        if index >= blocks:
            break
        stop = min(start + rows, layer.shape[0])
        decoded = layer.rows(start, stop)
        if not bool(torch.isfinite(decoded).all()):
            return LayerCheck(layer.name, form, None, f"rows {start} to {stop} decode to values that are not finite")
        if start == 0 and check is not None:
            problem = rotation_problem(layer.name, decoded, check)
            if problem:
                return LayerCheck(layer.name, form, None, problem)
        if original is not None:
            block = original.wide(start, stop)
            difference += float((decoded - block).square().sum())
            size += float(block.square().sum())
    if original is None:
        return LayerCheck(layer.name, form, None)
    error = math.sqrt(difference / size) if size else math.sqrt(difference)
    over = error > LIMITS.get(form, 0.2)
    problem = (
        f"differs by {error:.3f} from the source; at most {LIMITS.get(form, 0.2)} is right for {form}" if over else ""
    )
    return LayerCheck(layer.name, form, error, problem)


def rotation_problem(layer: str, rows: torch.Tensor, check: Any) -> str:
    """Return what is wrong if a layer's first row, as its marker decodes it, is not the row that was written (guard G1).

    Args:
        layer: its name.
        rows: fp32 rows from the first on, as decoded.
        check: value in the file.
    """
    try:
        expected = float(check)
    except (TypeError, ValueError):
        return f"its rotation check is {str(check)[:40]!r}; expected a number"
    got = float(rotation_check(rows))
    scale = max(float(rows[0].norm()) / math.sqrt(rows.shape[1]), 1e-12)
    if abs(got - expected) <= _CLOSE * max(abs(expected), scale):
        return ""
    return (
        f"{layer}: decodes to other weights than were written (check {got:+.3e}, {expected:+.3e} is right): the marker's "
        "rotation does not belong to the weights, or they were changed"
    )
