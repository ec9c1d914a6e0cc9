"""Mixed precision: which layer gets how many bits, within a budget of bytes.

Every layer has options, each with bytes and a loss; one is chosen per layer so that the losses' sum is least and the bytes fit: a
multiple-choice knapsack. The greedy along the lower convex choices is within one step of the best; what is left over is
filled by single swaps. Losses of different groups measure different harms (ViDiT-Q, arXiv 2406.02540, section 3.4: text
alignment, motion, looks), so each group can be put on its own scale before they are added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import StrettoError

#: Units of bytes that a budget is divided into.
_UNITS = 1 << 14


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Attributes:
        format: its name.
        nbytes: what it takes.
        loss: harm, at least 0; comparable within a group.
    """

    format: str
    nbytes: int
    loss: float


def allocate(
    options: Mapping[str, Sequence[Option]],
    budget: int,
    groups: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Return the format of every layer.

    Args:
        options: by layer, at least one each.
        budget: bytes of all layers together.
        groups: group of every layer: losses are divided by the sum of the largest losses of the group. None: as they are.
        weights: importance of groups, 1 where left out.

    Raises:
        StrettoError: not even the smallest options fit.
    """
    scale = _scales(options, groups, weights or {})
    choices = {layer: _useful(found, scale[layer]) for layer, found in options.items()}
    smallest = sum(found[0].nbytes for found in choices.values())
    if smallest > budget:
        raise StrettoError(f"budget of {budget:,} bytes: the smallest formats of all layers take {smallest:,}")
    picked = _dynamic(choices, budget - smallest)
    return {layer: option.format for layer, option in _swapped(picked, choices, budget).items()}


def _dynamic(choices: Mapping[str, list[Option]], room: int) -> dict[str, Option]:
    """Dynamic programme over the bytes beyond the smallest options, in units that are rounded up, so the budget holds."""
    unit = max(-(-room // _UNITS), 1)
    size = room // unit + 1
    best = torch.zeros(size, dtype=torch.float64)
    picks = []
    for found in choices.values():
        totals = torch.full((len(found), size), torch.inf, dtype=torch.float64)
        for index, option in enumerate(found):
            more = -(-(option.nbytes - found[0].nbytes) // unit)
            if more < size:
                totals[index, more:] = best[: size - more] + option.loss
        best, pick = totals.min(0)
        picks.append(pick.to(torch.uint8))
    at, picked = size - 1, {}
    for (layer, found), pick in zip(reversed(choices.items()), reversed(picks)):
        option = found[int(pick[at])]
        at -= -(-(option.nbytes - found[0].nbytes) // unit)
        picked[layer] = option
    return picked


def _scales(
    options: Mapping[str, Sequence[Option]], groups: Mapping[str, str] | None, weights: Mapping[str, float]
) -> dict[str, float]:
    for layer, choices in options.items():
        if not choices or any(option.loss < 0 or option.loss != option.loss for option in choices):
            raise StrettoError(f"{layer}: needs options with losses of at least 0")
    if groups is None:
        return dict.fromkeys(options, 1.0)
    totals: dict[str, float] = {}
    for layer, choices in options.items():
        totals[groups[layer]] = totals.get(groups[layer], 0.0) + max(option.loss for option in choices)
    return {layer: weights.get(groups[layer], 1.0) / (totals[groups[layer]] or 1.0) for layer in options}


def _useful(choices: Sequence[Option], scale: float) -> list[Option]:
    """Options that no smaller one beats, smallest first, with losses on the group's scale."""
    useful: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.nbytes, option.loss)):
        if not useful or option.loss * scale < useful[-1].loss:
            useful.append(Option(option.format, option.nbytes, option.loss * scale))
    return useful


def _swapped(picked: dict[str, Option], choices: Mapping[str, list[Option]], budget: int) -> dict[str, Option]:
    """Improve by moving one layer up and, where it takes that, another down, until nothing gains."""
    used = sum(option.nbytes for option in picked.values())
    for _ in range(4 * len(picked)):
        best = (0.0, None)
        downs = [
            (lower.loss - picked[layer].loss, picked[layer].nbytes - lower.nbytes, layer, lower)
            for layer, found in choices.items() for lower in found if lower.nbytes < picked[layer].nbytes
        ]  # fmt: skip
        for layer, found in choices.items():
            for upper in found:
                gain, more = picked[layer].loss - upper.loss, upper.nbytes - picked[layer].nbytes
                if gain <= 0:
                    continue
                if used + more <= budget:
                    best = max(best, (gain, ((layer, upper),)), key=lambda item: item[0])
                for cost, freed, other, lower in downs:
                    if other != layer and gain - cost > best[0] * (1 + 1e-9) and used + more - freed <= budget:
                        best = (gain - cost, ((layer, upper), (other, lower)))
        if best[1] is None or best[0] <= 0:
            return picked
        for layer, option in best[1]:
            used += option.nbytes - picked[layer].nbytes
            picked[layer] = option
    return picked
