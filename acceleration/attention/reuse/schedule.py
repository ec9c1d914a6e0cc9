"""Which mode every head of every layer has at every step of a run, and what a step must keep for later ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import StrettoError
from .modes import CORRECTED, NAMES, Mode, is_any


class Table:
    """What tables of modes share: their shape.

    Attributes:
        modes: uint8 [steps, layers, heads] of :class:`~.modes.Mode`.
    """

    modes: np.ndarray

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.modes.shape[0]

    @property
    def layers(self) -> int:
        """Attentions of the network."""
        return self.modes.shape[1]

    @property
    def heads(self) -> int:
        """Heads of each."""
        return self.modes.shape[2]

    def clamp(self, step: int) -> int:
        """Return ``step``, or the last one where the run goes on beyond it."""
        return min(max(step, 0), self.steps - 1)


@dataclass(frozen=True, eq=False)
class ModeTable(Table):
    """The modes of a run.

    Attributes:
        modes: uint8 [steps, layers, heads] of :class:`~.modes.Mode`.
        cfg: bool, of the same shape: the second guidance branch of an evaluation takes what the first one computed (ASC of
            DiTFastAttn, arXiv 2406.08552).
        alpha: fp32, of the same shape: share of the lists in heads that blend; None: 1.

    Raises:
        ValueError: shapes or modes that cannot be.
    """

    modes: np.ndarray
    cfg: np.ndarray | None = None
    alpha: np.ndarray | None = None
    _later: np.ndarray = field(init=False, repr=False)
    _lent: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        modes = np.ascontiguousarray(self.modes, dtype=np.uint8)
        cfg = np.zeros(modes.shape, bool) if self.cfg is None else np.ascontiguousarray(self.cfg, dtype=bool)
        alpha = np.ones(modes.shape, np.float32) if self.alpha is None else np.asarray(self.alpha, np.float32)
        if modes.shape != alpha.shape:
            raise ValueError(f"alpha must have the shape of the modes, {modes.shape}, got {alpha.shape}")
        if modes.ndim != 3 or not modes.size or cfg.shape != modes.shape or modes.max() > max(Mode):
            raise ValueError(
                f"modes and cfg must be [steps, layers, heads] of 0 to {max(Mode):d}, got {modes.shape} and {cfg.shape}"
            )
        object.__setattr__(self, "modes", modes)
        object.__setattr__(self, "cfg", cfg)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "_later", _correction_from(modes))
        object.__setattr__(self, "_lent", cfg & ~_leaves_own(modes, cfg))

    def shares(self, step: int) -> np.ndarray:
        """Return bool [layers, heads]: whether ``step`` takes outputs of an earlier one; nothing past the last step."""
        return self.modes[step] == int(Mode.SHARE) if 0 <= step < self.steps else np.zeros(self.modes.shape[1:], bool)

    def correction(self, step: int) -> np.ndarray:
        """Return uint8 [layers, heads]: the first corrected mode from ``step`` on before a full one; 0 for none."""
        return self._later[step] if 0 <= step < self.steps else np.zeros(self.modes.shape[1:], np.uint8)

    def lent(self, step: int) -> np.ndarray:
        """Return bool [layers, heads]: whether the second guidance branch really takes what the first one computed.

        Not at a full step that leaves it a correction which it will use by itself.
        """
        return self._lent[step]

    def check(self) -> None:
        """Refuse a table that a run from its first step could not follow.

        Raises:
            StrettoError: a head shares or corrects before anything was computed in full, shares what is zero, or mixes
                corrections between two full steps. The message names step, layer and head.
        """
        computed = np.zeros(self.modes.shape[1:], bool)
        full, kind = computed.copy(), np.zeros(self.modes.shape[1:], np.uint8)
        for step, modes in enumerate(self.modes):
            shares, corrected = modes == int(Mode.SHARE), is_any(modes, CORRECTED)
            _refuse(shares & ~computed, step, "share", "a step that computes the head's output must come before")
            _refuse(corrected & ~full, step, "corrected", "a full step must come before")
            mixed = corrected & (kind != 0) & (kind != modes)
            _refuse(mixed, step, "corrected", "another correction came before without a full step between")
            full |= modes == int(Mode.FULL)
            computed = (computed | (modes != int(Mode.ZERO))) & (modes != int(Mode.ZERO))
            kind = np.where(corrected, modes, np.where(modes == int(Mode.FULL), 0, kind))

    def counts(self) -> dict[str, int]:
        """Return how many (step, layer, head) have each mode, by name."""
        return {name: int((self.modes == int(mode)).sum()) for name, mode in NAMES.items()}


def uniform(steps: int, layers: int, heads: int, by_step: Sequence[Mode], cfg: Sequence[bool] = ()) -> ModeTable:
    """Return a table whose layers and heads all do the same, one mode per step."""
    modes = np.array([int(mode) for mode in by_step], np.uint8)[:, None, None]
    shared = np.array(list(cfg) or [False] * steps)[:, None, None]
    return ModeTable(np.tile(modes, (1, layers, heads)), np.tile(shared, (1, layers, heads)))


def re_ttention(
    steps: int, layers: int, heads: int, full_until: float = 0.25, period: int = 5, mode: Mode = Mode.RHO
) -> ModeTable:
    """Return Re-ttention's schedule: first steps full, then every ``period``-th (arXiv 2505.22918: 5 of 20 steps; 5)."""
    first = max(1, round(full_until * steps))
    by_step = [Mode.FULL if step < first or (step - first) % period == period - 1 else mode for step in range(steps)]
    return uniform(steps, layers, heads, by_step)


def ditfastattn(
    steps: int, layers: int, heads: int, period: int = 4, guided: bool = True, full_until: float = 0.2
) -> ModeTable:
    """Return a schedule in DiTFastAttn's modes for models nobody has searched (after arXiv 2406.08552).

    The first ``full_until`` of the steps is full; then one full step in ``period``, the others a window with residual; in
    the last third the step before a full one takes the output of the step before it. Guidance branches share from 30 % on.
    """
    first = max(1, round(full_until * steps))
    by_step = []
    for step in range(steps):
        phase = (step - first) % period
        if step < first or phase == period - 1:
            by_step.append(Mode.FULL)
        else:
            by_step.append(
                Mode.SHARE if step >= 2 * steps / 3 and phase == period - 2 and period > 2 else Mode.RESIDUAL
            )
    return uniform(steps, layers, heads, by_step, [guided and step >= 0.3 * steps for step in range(steps)])


def with_refreshes(wanted: np.ndarray, period: Sequence[int], first_full: int = 1) -> np.ndarray:
    """Return modes in which every head that reuses something has a full step first, and one again every so often.

    Args:
        wanted: uint8 [steps, layers, heads].
        period: by step, how many steps a head may go without a full one while it shares or corrects; 0: for ever.
        first_full: first steps that are full whatever is wanted.
    """
    modes = wanted.copy()
    since = np.full(wanted.shape[1:], -1)  # steps since the last full one; -1: never
    kind = np.zeros(wanted.shape[1:], np.uint8)
    for step in range(len(modes)):
        now = modes[step]
        needs, corrected = is_any(now, (Mode.SHARE, *CORRECTED)), is_any(now, CORRECTED)
        due = needs & ((since < 0) | ((period[step] > 0) & (since + 1 >= max(period[step], 1))))
        due |= corrected & (kind != 0) & (kind != now)
        now[due | (step < first_full)] = int(Mode.FULL)
        full = now == int(Mode.FULL)
        kind = np.where(full, 0, np.where(is_any(now, CORRECTED), now, kind))
        since = np.where(full, 0, np.where(now == int(Mode.ZERO), -1, np.where(since < 0, since, since + 1)))
    return modes


def _correction_from(modes: np.ndarray) -> np.ndarray:
    found, later = np.zeros_like(modes), np.zeros(modes.shape[1:], np.uint8)
    for step in range(len(modes) - 1, -1, -1):
        now = modes[step]
        later = np.where(is_any(now, CORRECTED), now, np.where(now == int(Mode.FULL), 0, later)).astype(np.uint8)
        found[step] = later
    return found


def _leaves_own(modes: np.ndarray, cfg: np.ndarray) -> np.ndarray:
    """Return bool, as ``modes``: full steps that a corrected step builds on which guidance branches do not share."""
    found, needed = np.zeros(modes.shape, bool), np.zeros(modes.shape[1:], bool)
    for step in range(len(modes) - 1, -1, -1):
        full = modes[step] == int(Mode.FULL)
        found[step] = full & needed
        needed = (needed & ~full) | (is_any(modes[step], CORRECTED) & ~cfg[step])
    return found


def _refuse(wrong: np.ndarray, step: int, what: str, expected: str) -> None:
    if wrong.any():
        layer, head = (int(index) for index in np.argwhere(wrong)[0])
        raise StrettoError(f"attention plan: step {step}, layer {layer}, head {head} is {what}; {expected}")
