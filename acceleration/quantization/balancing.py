"""Channel balancing of ViDiT-Q (arXiv 2406.02540): factors per input channel, and folding them where that is exact.

``m_j = max_n |W_nj|^a / max |x_j|^(1 - a)``; the activation is multiplied by m, the weight's columns divided by it. Rotated
afterwards, what is left of the outliers is spread over a block. A factor costs nothing where the producer of the activation
can take it into its own rows; such places are listed in :mod:`.architectures`, and no other is accepted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import StrettoError
from .architectures import Architecture, Fold

#: Tensors beside a folded weight: what its columns were divided by, and what its rows were multiplied by.
COLUMNS, ROWS = "fold_columns", "fold_rows"
#: The exponent of ViDiT-Q's released balancing.
ALPHA = 0.5665
#: Factors are kept within these, so that a channel that was silent in a calibration does not explode.
LIMITS = (2.0**-8, 2.0**8)


@dataclass(frozen=True, eq=False)
class Edit:
    """What folding does to a tensor: ``(W * rows[:, None] + offset[:, None]) / columns``; vectors likewise by ``rows``.

    Attributes:
        rows: fp32 factors of the first axis, or None.
        offset: fp32 added along the first axis after them, for vectors only.
        columns: fp32 divisors of the second axis, or None.
    """

    rows: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, block: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop), given as fp32, edited."""
        tail = (1,) * (block.dim() - 1)
        if self.rows is not None:
            block = block * self.rows[start:stop].view(-1, *tail)
        if self.offset is not None:
            block = block + self.offset[start:stop].view(-1, *tail)
        return block if self.columns is None else block / self.columns

    def then(self, other: "Edit") -> "Edit":
        """Return this edit followed by another on the same tensor."""
        rows = other.rows if self.rows is None else self.rows if other.rows is None else self.rows * other.rows
        offset = self.offset
        if offset is not None and other.rows is not None:
            offset = offset * other.rows
        if other.offset is not None:
            offset = other.offset if offset is None else offset + other.offset
        columns = (
            other.columns
            if self.columns is None
            else self.columns
            if other.columns is None
            else self.columns * other.columns
        )
        return Edit(rows, offset, columns)


def factors(weight: torch.Tensor, activation: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """Return the factor of every input channel, fp32 [K], with geometric mean 1.

    Args:
        weight: largest magnitude per column of all weights that read the channel, [K].
        activation: largest magnitude per channel, [K].
        alpha: share of the weight, in [0, 1]; SmoothQuant's exponent is ``1 - alpha``.

    Raises:
        StrettoError: alpha is outside 0 to 1, or a magnitude is not finite.
    """
    if not 0.0 <= alpha <= 1.0:
        raise StrettoError(f"balancing: alpha is {alpha}; use 0 (activations decide) to 1 (weights decide)")
    if not bool(torch.isfinite(weight).all() and torch.isfinite(activation).all()):
        raise StrettoError("balancing: a magnitude is not finite; calibrate again")
    silent = (weight <= 0) | (activation <= 0)
    log = alpha * weight.float().clamp(min=1e-12).log() - (1 - alpha) * activation.float().clamp(min=1e-12).log()
    log = torch.where(silent, torch.zeros_like(log), log - log[~silent].mean() if bool((~silent).any()) else log)
    return log.exp().clamp(*LIMITS)


def fold_edits(
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    weight_maxima: Mapping[str, torch.Tensor],
    activation_maxima: Mapping[str, torch.Tensor],
    alpha: float = ALPHA,
    layers: Sequence[str] | None = None,
) -> dict[str, Edit]:
    """Return the edits that fold balancing into a checkpoint, by tensor name.

    Args:
        architecture: whose table says what is legal.
        shapes: of the checkpoint's tensors.
        weight_maxima: largest magnitude per column of layers, fp32 [K].
        activation_maxima: largest magnitude per input channel of layers, from a calibration.
        alpha: see :func:`factors`.
        layers: fold only into these consumers; one that has no legal fold is refused.

    Raises:
        StrettoError: a layer was asked for whose input cannot be folded; says why.
    """
    legal = architecture.folds(shapes)
    if layers is not None:
        foldable = {consumer.layer for fold in legal for consumer in fold.consumers}
        bad = next((layer for layer in layers if layer not in foldable), None)
        if bad is not None:
            why = architecture.unfoldable or "nothing in this architecture makes its input alone"
            raise StrettoError(f"{bad}: a factor per channel cannot be folded before it in {architecture.title}: {why}")
    edits: dict[str, Edit] = {}
    for fold in legal:
        names = [consumer.layer for consumer in fold.consumers]
        if (layers is not None and not set(names) <= set(layers)) or not all(
            name in activation_maxima and name in weight_maxima for name in names
        ):
            continue
        for name, edit in _edits(fold, shapes, weight_maxima, activation_maxima, alpha).items():
            edits[name] = edits[name].then(edit) if name in edits else edit
    return edits


def _part(vector: torch.Tensor, chunk: int, chunks: int) -> slice:
    size = vector.shape[0] // chunks
    return slice(chunk * size, (chunk + 1) * size)


def _edits(
    fold: Fold,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, torch.Tensor],
    activations: Mapping[str, torch.Tensor],
    alpha: float,
) -> dict[str, Edit]:
    def widest(maxima: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([maxima[c.layer][_part(maxima[c.layer], c.chunk, c.chunks)] for c in fold.consumers]).amax(0)

    m = factors(widest(weights), widest(activations), alpha)
    edits: dict[str, Edit] = {}

    def add(name: str, edit: Edit) -> None:
        edits[name] = edits[name].then(edit) if name in edits else edit

    for consumer in fold.consumers:
        columns = torch.ones(shapes[f"{consumer.layer}.weight"][1])
        columns[_part(columns, consumer.chunk, consumer.chunks)] = m
        add(f"{consumer.layer}.weight", Edit(columns=columns))
    for producer in fold.producers:
        rows = torch.ones(shapes[f"{producer.layer}.weight"][0])
        part = _part(rows, producer.chunk, producer.chunks)
        rows[part] = m
        add(f"{producer.layer}.weight", Edit(rows=rows))
        if f"{producer.layer}.bias" in shapes:
            offset = None
            if producer.one_plus:  # m (1 + x) - 1 = m x + (m - 1)
                offset = torch.zeros_like(rows)
                offset[part] = m - 1
            add(f"{producer.layer}.bias", Edit(rows=rows, offset=offset))
        elif producer.one_plus:
            raise StrettoError(f"{producer.layer}: has no bias to fold 1 + scale into")
    return edits
