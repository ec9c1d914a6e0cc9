"""What one attention keeps of one guidance branch, in groups of heads that were kept at the same time."""

from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .modes import Mode
from .storage import Packed


@dataclass(frozen=True, eq=False)
class Output:
    """Outputs of some heads, for later steps to share.

    Attributes:
        packed: the outputs.
        step: of the run they were computed at.
    """

    packed: Packed
    step: int

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads it holds."""
        return self.packed.heads

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.packed.system else self.packed.bytes

    @property
    def system_bytes(self) -> int:
        """Bytes in system memory."""
        return self.packed.bytes if self.packed.system else 0

    def only(self, heads: tuple[int, ...]) -> "Output":
        """Return what it holds of some of its heads."""
        return replace(self, packed=self.packed.only(heads))


@dataclass(eq=False)
class Held:
    """What a full step left of some heads for corrected ones.

    Attributes:
        heads: ascending.
        mode: the correction it serves. Without its values it falls back: RHO to MEAN, RESIDUAL to LIST.
        step: of the run it was made at.
        sigma: noise level of the latest step that used or made it.
        age: sparse steps that used it, evaluations of one noise level counting once.
        values: R or R'; None where the mode needs none, or where memory did not suffice.
        rho: fp32 [B, h, N]; None for RESIDUAL.
        lists: bits of the kept blocks, uint8 [B', h, Nq, ceil(Nk / 8)]; None where the lists never change.
        weight: fp32 scalar, mean 1 - rho: what the correction is worth.
    """

    heads: tuple[int, ...]
    mode: Mode
    step: int
    sigma: float
    age: int
    values: Packed | None
    rho: Tensor | None
    lists: Tensor | None
    weight: Tensor

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        values = 0 if self.values is None or self.values.system else self.values.bytes
        return values + sum(tensor.nbytes for tensor in (self.rho, self.lists) if tensor is not None)

    @property
    def system_bytes(self) -> int:
        """Bytes in system memory."""
        return self.values.bytes if self.values is not None and self.values.system else 0

    def only(self, heads: tuple[int, ...]) -> "Held":
        """Return what it holds of some of its heads; itself where these are all."""
        if heads == self.heads:
            return self
        place = [self.heads.index(head) for head in heads]
        lists = self.lists
        if lists is not None:
            lists = lists[:, place].contiguous()
        return replace(
            self,
            heads=heads,
            values=None if self.values is None else self.values.only(heads),
            rho=None if self.rho is None else self.rho[:, place].contiguous(),
            lists=lists,
        )

    def fall_back(self) -> None:
        """Give up the residual."""
        self.values = None
        self.mode = Mode.MEAN if self.rho is not None else Mode.LIST

    def advance(self, sigma: float) -> int:
        """Return the age at ``sigma``: one more at a new noise level, the same at one it has seen."""
        if abs(sigma - self.sigma) > 1e-6 * max(abs(sigma), abs(self.sigma)):
            self.sigma, self.age = sigma, self.age + 1
        return self.age


@dataclass(eq=False)
class Entry:
    """Everything one attention keeps of one guidance branch.

    Attributes:
        shape: what its tensors were made of: (rows, heads, tokens, head size, dtype, device).
        outputs: of heads that later steps share.
        held: of heads that later steps correct.
        evaluation: number of the last evaluation that came by.
    """

    shape: Hashable
    outputs: list[Output] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    evaluation: int = -1

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return sum(group.bytes for group in (*self.outputs, *self.held))

    @property
    def system_bytes(self) -> int:
        """Bytes in system memory."""
        return sum(group.system_bytes for group in (*self.outputs, *self.held))

    def copy(self) -> "Entry":
        """Return an entry that changes by itself; tensors are shared, nobody writes to them."""
        return Entry(self.shape, list(self.outputs), [copy(group) for group in self.held], self.evaluation)

    def has_output(self, heads: int) -> np.ndarray:
        """Return bool [H]: whose output is kept."""
        return _flags([group.heads for group in self.outputs], heads)

    def correction(self, heads: int) -> np.ndarray:
        """Return uint8 [H]: the mode that what is kept of a head serves; 255 where nothing is."""
        found = np.full(heads, 255, np.uint8)
        for group in self.held:
            found[list(group.heads)] = int(group.mode)
        return found

    def keep_outputs(self, keep: np.ndarray) -> None:
        """Drop the outputs of heads that are not in ``keep`` [H]."""
        self.outputs = _kept(self.outputs, keep)

    def keep_held(self, keep: np.ndarray) -> None:
        """Drop what is held of heads that are not in ``keep`` [H]."""
        self.held = _kept(self.held, keep)

    def prune(self, step: int, shares: np.ndarray, corrects: np.ndarray) -> None:
        """Drop what no step from ``step`` on can use; what ``step`` itself has made stays.

        A full step that a cache above skipped drops what it would have replaced: the next one that runs is full then.

        Args:
            step: of the run, about to be evaluated.
            shares: bool [H], heads that share at this step.
            corrects: bool [H], heads that are corrected at this step or later without a full one before.
        """
        self.outputs = [
            part for group in self.outputs for part in ([group] if group.step == step else _kept([group], shares))
        ]
        self.held = [
            part for group in self.held for part in ([group] if group.step == step else _kept([group], corrects))
        ]


def weight_of(rho: Tensor) -> Tensor:
    """Return fp32 scalar: the mean share that the lists leave out."""
    return (1 - rho).mean(dtype=torch.float32)


def _kept(groups: list, keep: np.ndarray) -> list:
    parts = ((group, tuple(head for head in group.heads if keep[head])) for group in groups)
    return [group.only(heads) for group, heads in parts if heads]


def _flags(groups: list[tuple[int, ...]], heads: int) -> np.ndarray:
    flags = np.zeros(heads, bool)
    for group in groups:
        flags[list(group)] = True
    return flags
