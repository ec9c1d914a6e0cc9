"""Static compute masks: which steps, or which blocks at which step, are computed. True means computed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import StrettoError
from .policy import Rails

Mask = tuple[bool, ...]

COMPUTED, SKIPPED = "#1x", ".0-"

#: cache-dit's static compute masks: (computed bins, cached bins), alternating, for 28 and for 9 steps.
SCM_BINS = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
}
#: Runs of fewer steps than this scale the 9-step bins, others the 28-step bins.
FEW_STEPS = 16


def parse_mask(text: str) -> Mask:
    """Return the mask that ``text`` draws, one character a step.

    ``#``, ``1`` and ``x`` are computed, ``.``, ``0`` and ``-`` skipped; white space is ignored.

    Raises:
        StrettoError: another character (named, with its position counted from 1), or no step at all.
    """
    mask = []
    for position, character in enumerate(text, start=1):
        if character in COMPUTED:
            mask.append(True)
        elif character in SKIPPED:
            mask.append(False)
        elif not character.isspace():
            raise StrettoError(
                f"mask: character {position} is {character!r}; use '#' for computed and '.' for skipped steps"
            )
    if not mask:
        raise StrettoError("mask: it is empty; write one '#' or '.' per step")
    return tuple(mask)


def strip(mask: Iterable[bool]) -> str:
    """Return the drawing of a mask: ``#`` computed, ``.`` skipped. Inverse of :func:`parse_mask`."""
    return "".join("#" if computed else "." for computed in mask)


def bins_mask(compute_bins: Sequence[int], cache_bins: Sequence[int], steps: int) -> Mask:
    """Return the mask of alternating runs: the first bin is computed, the next skipped, and so on.

    Computed runs left over when the skipped ones are used up follow each other.

    Raises:
        StrettoError: more skipped than computed runs, one is not positive, or they do not add up to ``steps``.
    """
    if len(cache_bins) > len(compute_bins):
        raise StrettoError(
            f"mask bins: {len(compute_bins)} computed and {len(cache_bins)} skipped runs cannot alternate; "
            "give at most as many skipped runs as computed ones"
        )
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in (*compute_bins, *cache_bins)):
        raise StrettoError(f"mask bins: {(*compute_bins, *cache_bins)}; every run must be a whole number >= 1")
    mask: list[bool] = []
    for computed, skipped in zip_longest(compute_bins, cache_bins, fillvalue=0):
        mask += [True] * computed + [False] * skipped
    if len(mask) != steps:
        raise StrettoError(f"mask bins: they add up to {len(mask)} steps, the run has {steps}")
    return tuple(mask)


def scm_mask(level: str, steps: int) -> Mask:
    """Return cache-dit's static compute mask (SCM) for a run of ``steps`` steps.

    At 28 and at 9 steps these are the published bins. Any other run stretches one of the
    two with :func:`stretch`, which keeps the share of computed steps and where in the run
    they fall: the 9-step mask for runs below 16 steps, the 28-step mask from there on.

    Args:
        level: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``: from most to fewest computed steps.
        steps: steps of the run, >= 1.

    Raises:
        StrettoError: an unknown level.
    """
    if level not in SCM_BINS[28]:
        raise StrettoError(f"SCM: level is {level!r}; known levels: {', '.join(SCM_BINS[28])}")
    base = 9 if steps < FEW_STEPS else 28
    return stretch(bins_mask(*SCM_BINS[base][level], base), steps)


def growing_mask(steps: int, rails: Rails, window: float, growth: float) -> Mask:
    """Return Spectrum's schedule: skips between computed steps grow along the run (arXiv 2603.01623).

    A free step is computed when the number of steps since the last computed one reaches
    the window, rounded down; each such step widens the window by ``growth``. Steps on the
    rails are computed and leave the window as it is. The published schedule has a warm-up
    of 5, no tail, window 2 and growth 0.75 (14 of 50 steps) or 3 (10 of 50).

    Args:
        steps: steps of the run.
        rails: steps that are always computed.
        window: first distance between computed steps, >= 1.
        growth: added to the window at each computed free step, >= 0.
    """
    mask: list[bool] = []
    skipped = 0
    for step in range(steps):
        on_rails = rails.reason(step, steps) is not None
        computed = on_rails or skipped + 1 >= int(window + 1e-9)
        if computed and not on_rails:
            window += growth
        skipped = 0 if computed else skipped + 1
        mask.append(computed)
    return tuple(mask)


def stretch(mask: Sequence[bool], steps: int) -> Mask:
    """Return ``mask`` for a run of another number of steps.

    What is kept is the density of computed steps along the run: where every third step was
    computed, every third one is again; a warm-up of a fifth of the run stays a fifth. (The
    nearest old step would turn ``#.#.#.`` into all or nothing at half the steps.) Equal
    lengths return the mask itself; the first and the last step stay computed if they were.
    """
    old = len(mask)
    if steps < 1 or old < 1:
        raise StrettoError(f"mask: cannot stretch {old} steps to {steps}; both must be at least 1")
    if steps == old:
        return tuple(mask)
    computed = [index for index, value in enumerate(mask) if value]
    if not computed:
        return (False,) * steps
    # Count computed steps along the run as a continuous phase, with a virtual computed step just
    # outside each end that is skipped; then place the new run's steps at equal phases.
    old_at = [*([] if mask[0] else [-1]), *computed, *([] if mask[-1] else [old])]
    start, end = (0 if mask[0] else -1), (steps - 1 if mask[-1] else steps)
    if len(old_at) == 1:
        return (True,) * steps
    share = (end - start) / (old_at[-1] - old_at[0])
    # Rounded up: one step too many costs time, a longer gap costs the picture.
    gaps = max(math.ceil((len(old_at) - 1) * share - 1e-9), 1)
    phases = np.linspace(0, len(old_at) - 1, gaps + 1)
    positions = start + (np.interp(phases, range(len(old_at)), old_at) - old_at[0]) * share
    chosen = {int(np.floor(position + 0.5)) for position in positions}
    return tuple(step in chosen for step in range(steps))


@dataclass(frozen=True)
class Table:
    """Which blocks, or which modules of which blocks, are computed at each step (HarmoniCa, arXiv 2410.01723).

    Attributes:
        rows: ``rows[step][block]``, or ``rows[step][block][module]`` when ``modules`` is not empty.
        modules: names of the modules of a block in the order of the innermost axis, for example
            ``("attn", "mlp")``; empty for a table of whole blocks.

    Raises:
        StrettoError: no step or no block, rows of unequal length, or values that are not true or false.
    """

    rows: tuple[tuple[Any, ...], ...]
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _checked_rows(self.rows, len(self.modules), "table"))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.rows)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.rows[0])

    @property
    def computed_share(self) -> float:
        """Share of entries that are computed, in [0, 1]."""
        entries = [entry for row in self.rows for cell in row for entry in (cell if self.modules else (cell,))]
        return sum(entries) / len(entries)

    def computed(self, step: int, block: int, module: str | None = None) -> bool:
        """Return whether a block, or one of its modules, is computed at ``step``.

        Without ``module`` a table of modules answers whether any of them is.

        Raises:
            StrettoError: a module that the table does not know.
        """
        cell = self.rows[step][block]
        if not self.modules:
            return cell
        if module is None:
            return any(cell)
        if module not in self.modules:
            raise StrettoError(f"table: no module {module!r}; it has {', '.join(self.modules)}")
        return cell[self.modules.index(module)]

    def require_shape(self, blocks: int, steps: int | None = None, source: str = "table") -> None:
        """Raise :class:`StrettoError` unless the table fits a model of ``blocks`` blocks (and a run of ``steps``)."""
        if self.blocks != blocks:
            raise StrettoError(f"{source}: it is for {self.blocks} blocks, this model has {blocks}")
        if steps is not None and self.steps != steps:
            raise StrettoError(f"{source}: it is for {self.steps} steps, this run has {steps}")

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values: mask strings per step, or per block and step."""
        if not self.modules:
            return {"computed": [strip(row) for row in self.rows]}
        return {"modules": list(self.modules), "computed": [[strip(cell) for cell in row] for row in self.rows]}

    @classmethod
    def from_json(cls, document: Any, source: str = "table") -> "Table":
        """Read a table.

        Args:
            document: ``{"computed": rows, "modules": [names]}``, or the bare rows (modules are then
                called ``module0``, ``module1``, ...). The innermost axis may be a mask string
                (``"##.#"``) or a list of true/false or 1/0.
            source: what to call the document in errors, such as its path.

        Raises:
            StrettoError: names the source, the field and what was expected there.
        """
        names: Any = ()
        if isinstance(document, Mapping):
            unknown = sorted(set(document) - {"computed", "modules"})
            if unknown or "computed" not in document:
                raise StrettoError(f"{source}: expected the fields computed and modules, found {sorted(document)}")
            names, document = document.get("modules", ()), document["computed"]
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
                raise StrettoError(f"{source}: modules is {names!r}; expected a list of names")
            if len(set(names)) != len(names):
                raise StrettoError(f"{source}: modules is {names!r}; expected different names")
        elif _depth(document) == 3:
            names = [f"module{index}" for index in range(_width(document))]
        return cls(_checked_rows(document, len(names), source), tuple(names))


def _depth(value: Any) -> int:
    """Return how deep lists nest along the first elements; a mask string counts as one level."""
    if isinstance(value, str):
        return 1
    return 1 + (_depth(value[0]) if value else 0) if isinstance(value, list | tuple) else 0


def _width(rows: Any) -> int:
    cell = rows[0][0]
    return len(parse_mask(cell)) if isinstance(cell, str) else len(cell)


def _checked_rows(rows: Any, modules: int, source: str) -> tuple[tuple[Any, ...], ...]:
    """Return ``rows`` as nested tuples of bool; ``modules`` is the width of the innermost axis, 0 for none."""
    if not isinstance(rows, list | tuple) or not rows:
        raise StrettoError(f"{source}: computed is {rows!r}; expected one row per step")
    result = []
    for step, row in enumerate(rows):
        where = f"computed[{step}]"
        if modules:
            if not isinstance(row, list | tuple) or not row:
                raise StrettoError(f"{source}: {where} is {row!r}; expected one entry per block")
            cells = tuple(_booleans(cell, f"{where}[{block}]", source, modules) for block, cell in enumerate(row))
        else:
            cells = _booleans(row, where, source)
        if result and len(cells) != len(result[0]):
            raise StrettoError(
                f"{source}: {where} has {len(cells)} blocks; expected {len(result[0])} as in computed[0]"
            )
        result.append(cells)
    return tuple(result)


def _booleans(values: Any, where: str, source: str, length: int | None = None) -> Mask:
    """Return a mask string or a list of true/false/1/0 as a tuple of bool."""
    if isinstance(values, str):
        try:
            mask = parse_mask(values)
        except StrettoError as error:
            raise StrettoError(f"{source}: {where}: {error}") from None
    elif isinstance(values, list | tuple) and values and all(value in (0, 1) for value in values):
        mask = tuple(bool(value) for value in values)
    else:
        raise StrettoError(
            f"{source}: {where} is {values!r}; expected a mask such as '##.#' or a list of true and false"
        )
    if length is not None and len(mask) != length:
        raise StrettoError(f"{source}: {where} has {len(mask)} entries; expected {length}, one per module")
    return mask
