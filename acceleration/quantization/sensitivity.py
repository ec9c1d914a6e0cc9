"""How much each layer minds being rounded: measured on recorded network calls, or estimated from weights alone."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SchemaError, StrettoError
from .allocation import Option, allocate
from .architectures import Architecture
from .layouts import Layout, fitting
from .quantizing import BLOCK, Plan
from .recipes import Recipe

VERSION = 1
#: ViDiT-Q's number of equal ranges of the timesteps.
RANGES = 4


@dataclass(frozen=True)
class Cell:
    """The loss of one layer in one format, over one range of the timesteps.

    Attributes:
        layer: its name.
        format: of the layer while all others stay.
        range: number of the range, 0 the noisiest; -1: no ranges.
        loss: squared change of the network's output relative to the output's own square.
    """

    layer: str
    format: str
    range: int
    loss: float


def measure(
    call: Callable[[int], torch.Tensor],
    positions: Sequence[float],
    layers: Mapping[str, Sequence[str]],
    swapped: Callable[[str, str], AbstractContextManager[Any]],
    ranges: int = RANGES,
) -> list[Cell]:
    """Measure cells: one layer in one format at a time, over recorded calls.

    Args:
        call: runs recorded network call k and returns its output.
        positions: place of every call in the run, 0 (noisiest) to 1.
        layers: formats to try, by layer.
        swapped: context in which a layer's weight is that of a format.
        ranges: equal ranges of the positions.
    """
    plain = [call(index).double() for index in range(len(positions))]
    sizes = [float(output.square().sum()) for output in plain]
    cells = []
    for layer, formats in layers.items():
        for form in formats:
            losses: dict[int, list[float]] = {}
            with swapped(layer, form):
                for index, position in enumerate(positions):
                    change = float((call(index).double() - plain[index]).square().sum())
                    which = min(int(position * ranges), ranges - 1)
                    losses.setdefault(which, []).append(change / max(sizes[index], 1e-30))
            cells += [Cell(layer, form, which, sum(values) / len(values)) for which, values in sorted(losses.items())]
    return cells


def estimate(plan: Plan, formats: Iterable[str]) -> list[Cell]:
    """Estimate cells from the weights alone: the squared error of a sample of rows, ``|W' - W|^2``.

    Normalised activations have unit variance, so this is the noise that a layer adds. It knows nothing of what becomes of the
    noise later; a measurement does.
    """
    cells = []
    for layer, choice in plan.quantized.items():
        tensor = plan.tensors[f"{layer}.weight"]
        stop = max(min(tensor.rows, BLOCK // 8 // choice.shape[1]), 1)
        block = tensor.wide(0, stop)
        for form in formats:
            layout = fitting(form, *choice.shape)
            if isinstance(layout, Layout):
                decoded = layout.quantize(block).dequantize()
                loss = float((decoded - block).square().mean()) * choice.shape[0] * choice.shape[1]
                cells.append(Cell(layer, form, -1, loss))
    return cells


def combined(cells: Iterable[Cell]) -> dict[str, dict[str, float]]:
    """Return the loss by layer and format: over the ranges of the timesteps, their sum."""
    losses: dict[str, dict[str, float]] = {}
    for cell in cells:
        by_format = losses.setdefault(cell.layer, {})
        by_format[cell.format] = by_format.get(cell.format, 0.0) + cell.loss
    return losses


def mixed_recipe(
    recipe: Recipe,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, int]],
    cells: Iterable[Cell],
    budget: int,
    by_group: bool = False,
) -> Recipe:
    """Return the recipe with a format for every layer that has cells, within a budget.

    Args:
        recipe: what decides for other layers.
        architecture: tells the groups.
        shapes: (N, K) of the layers with cells.
        cells: measured or estimated.
        budget: bytes of these layers' weights together.
        by_group: put every group's losses on its own scale (ViDiT-Q's decoupling) instead of adding them as they are.

    Raises:
        StrettoError: the budget is too small, or there are no cells.
    """
    losses = combined(cells)
    if not losses:
        raise StrettoError("mixed precision: no layer has a measured or estimated sensitivity")
    options = {}
    for layer, by_format in losses.items():
        layouts = {form: fitting(form, *shapes[layer]) for form in by_format}
        options[layer] = [
            Option(form, layout.nbytes(*shapes[layer]), by_format[form])
            for form, layout in layouts.items()
            if isinstance(layout, Layout)
        ]
    groups = {layer: architecture.group(layer) for layer in options} if by_group else None
    chosen = allocate(options, budget, groups)
    return Recipe(
        recipe.default, recipe.weight_only, recipe.rules, {**recipe.layers, **chosen}, recipe.min_numel, recipe.architecture,
        f"{recipe.name}, mixed to {budget} bytes", recipe.source, recipe.safe,
    )  # fmt: skip


def save_cells(path: str | Path, cells: Sequence[Cell], words: str) -> None:
    """Write cells as a sensitivity file."""
    rows = [[cell.layer, cell.format, cell.range, cell.loss] for cell in cells]
    document = {"sensitivity": VERSION, "words": words, "columns": ["layer", "format", "range", "loss"], "cells": rows}
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load_cells(path: str | Path) -> list[Cell]:
    """Read a sensitivity file.

    Raises:
        SchemaError: another version.
        StrettoError: says what is wrong with it.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: not JSON ({str(error)[:120]})") from None
    if not isinstance(document, dict) or "sensitivity" not in document:
        raise StrettoError(f"{path}: no sensitivity file (it has no field `sensitivity`)")
    if document["sensitivity"] != VERSION:
        raise SchemaError(f"{path}: sensitivity is {document['sensitivity']!r:.40}; this release reads {VERSION}")
    return [cell_of(str(path), row) for row in document.get("cells", [])]


def cell_of(path: str, row: Any) -> Cell:
    """Return the cell that a row of a file holds (StrettoError)."""
    fine = isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and isinstance(row[1], str)
    if not fine or not isinstance(row[2], int) or not isinstance(row[3], int | float) or not row[3] >= 0:
        raise StrettoError(f"{path}: a cell is {str(row)[:80]}; expected layer, format, range and a loss of at least 0")
    return Cell(row[0], row[1], row[2], float(row[3]))
