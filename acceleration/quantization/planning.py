"""From what a person asks for to a plan: mixed precision within a budget, and balancing, on top of a recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import StrettoError
from .balancing import Edit, fold_edits
from .quantizing import BLOCK, Plan, plan_file
from .recipes import Recipe, preset_for
from .sensitivity import Cell, estimate, mixed_recipe
from .statistics import Statistics

MIXED = "mixed"
#: Formats that mixed precision chooses from, in order of bytes.
MIXED_FORMATS = ("w4a8", "w6a8", "int8")
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Wishes:
    """What a checkpoint is to become.

    Attributes:
        source: file, index of shards or folder.
        recipe: None for the preset of the architecture.
        format: of the layers; :data:`MIXED` chooses per layer within ``budget``; None is the recipe's.
        keep: patterns of layers to leave alone.
        safe: leave the first and last blocks alone.
        transcode: sources that are quantized already are allowed.
        assume_rotation: see :func:`.formats.find_formats`.
        budget: bytes of the file, for :data:`MIXED`.
        cells: measured losses; None: those of ``statistics``, or an estimate from the weights.
        by_group: judge groups of layers apart.
        statistics: of a recorded run.
        balance: fold factors per channel where that is exact (needs ``statistics``).
    """

    source: str | Path
    recipe: Recipe | None = None
    format: str | None = None
    keep: Sequence[str] = ()
    safe: bool = False
    transcode: bool = False
    assume_rotation: int | None = None
    budget: int | None = None
    cells: Sequence[Cell] | None = None
    by_group: bool = False
    statistics: Statistics | None = None
    balance: bool = False


def plan_wishes(wishes: Wishes, say: Say = lambda line: None) -> Plan:
    """Return the plan; reads headers, and weights where they have to be surveyed.

    Args:
        wishes: what is asked for.
        say: is told what was decided, a line each.

    Raises:
        StrettoError: a wish cannot be fulfilled; names the setting and what would be right.
    """
    if wishes.balance and wishes.statistics is None:
        raise StrettoError("balancing needs statistics of a run: the largest inputs per channel")
    plan = plan_file(
        wishes.source,
        wishes.recipe,
        format=None if wishes.format == MIXED else wishes.format,
        keep=wishes.keep,
        safe=wishes.safe,
        transcode=wishes.transcode,
        assume_rotation=wishes.assume_rotation,
    )
    try:
        if wishes.format == MIXED:
            plan = _again(plan, wishes, _mixed(plan, wishes, say), {})
        return _again(plan, wishes, plan.recipe, _balancing(plan, wishes, say)) if wishes.balance else plan
    except BaseException:
        plan.checkpoint.close()
        raise


def _again(plan: Plan, wishes: Wishes, recipe: Recipe, edits: dict[str, Edit]) -> Plan:
    if edits:
        recipe = replace(recipe, name=f"{recipe.name}, balanced by statistics {wishes.statistics.digest()}")
    return plan_file(
        plan.checkpoint, recipe, transcode=wishes.transcode, assume_rotation=wishes.assume_rotation, edits=edits
    )  # fmt: skip


def _mixed(plan: Plan, wishes: Wishes, say: Say) -> Recipe:
    if wishes.budget is None:
        raise StrettoError("format mixed needs a budget (--budget), the size of the quantized file, for example 8GB")
    if plan.architecture is None:
        raise StrettoError("format mixed needs an architecture that this release knows")
    shapes = {layer: choice.shape for layer, choice in plan.quantized.items()}
    fixed = plan.nbytes() - sum(choice.layout.nbytes(*choice.shape) for choice in plan.quantized.values())
    cells = wishes.cells if wishes.cells is not None else wishes.statistics.cells if wishes.statistics else ()
    cells = [cell for cell in cells if cell.layer in shapes]
    if cells:
        say(f"sensitivity: measured, {len({cell.layer for cell in cells})} layers")
    else:
        say("sensitivity: estimated from the weights; measured ones are better")
        cells = estimate(plan, MIXED_FORMATS)
    missing = set(shapes) - {cell.layer for cell in cells}
    fixed += sum(plan.quantized[layer].layout.nbytes(*shapes[layer]) for layer in missing)
    base = (wishes.recipe or preset_for(plan.architecture)).changed(keep=wishes.keep, safe=wishes.safe)
    return mixed_recipe(base, plan.architecture, shapes, cells, wishes.budget - fixed, wishes.by_group)


def _balancing(plan: Plan, wishes: Wishes, say: Say) -> dict[str, Edit]:
    if plan.architecture is None:
        raise StrettoError("balancing needs an architecture that this release knows")
    layers = {layer: plan.tensors[f"{layer}.weight"] for layer in plan.quantized if layer in wishes.statistics.maxima}
    if not layers:
        raise StrettoError("the statistics know none of the layers that are quantized; they are of another model")
    activations = {layer: wishes.statistics.maxima[layer] for layer in layers}
    strange = next((layer for layer, tensor in layers.items() if tensor.shape[1:] != activations[layer].shape), None)
    if strange is not None:
        raise StrettoError(
            f"the statistics have {activations[strange].numel()} channels for {strange}, the checkpoint "
            f"{layers[strange].shape[1]}; they are of another model"
        )
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    legal = {consumer.layer for fold in plan.architecture.folds(shapes) for consumer in fold.consumers}
    weights = {layer: _column_maxima(tensor) for layer, tensor in layers.items() if layer in legal}
    edits = fold_edits(plan.architecture, shapes, weights, activations)
    folded = sum(edit.columns is not None for edit in edits.values())
    say(f"balancing: factors folded before {folded} of {len(plan.quantized)} quantized layers")
    if not edits:
        say(f"  none is exact: {plan.architecture.unfoldable or 'nothing here makes an input of one layer alone'}")
    return edits


def _column_maxima(tensor) -> torch.Tensor:
    return torch.stack([tensor.wide(start, stop).abs().amax(0) for start, stop in tensor.blocks(BLOCK)]).amax(0)
