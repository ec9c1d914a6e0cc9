"""Snapshots of features, one short history per branch."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

#: Two evaluations closer than this (in steps) describe the same point of the run.
SAME_POSITION = 1e-6
#: Bytes of a snapshot's scale, one fp32 number.
_SCALE_BYTES = 4


@dataclass(frozen=True)
class StorePolicy:
    """How snapshots are kept. Whatever it is, they are read back in the dtype and on the device they came from.

    Attributes:
        name: what a user calls it.
        dtype: narrower floating point type that wider features are kept in, None for their own. The type's range does
            not matter: a snapshot is scaled to fill it.
        in_system_memory: whether snapshots leave the device.
    """

    name: str
    dtype: torch.dtype | None = None
    in_system_memory: bool = False

    @property
    def at_most(self) -> int | None:
        """Bytes that a stored element takes at most, None where it takes what it took."""
        return None if self.dtype is None else self.dtype.itemsize

    def narrows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is kept in another dtype than its own."""
        return self.dtype is not None and tensor.element_size() > self.dtype.itemsize

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """Return the bytes that a snapshot of ``tensor`` takes, wherever it is kept."""
        if self.narrows(tensor):
            return tensor.numel() * self.dtype.itemsize + _SCALE_BYTES
        return tensor.nbytes

    def keep(self, tensor: torch.Tensor, ours: bool = False) -> "Snapshot":
        """Return a snapshot of ``tensor``; see :class:`Snapshot` for what it costs in precision.

        Args:
            tensor: what to keep.
            ours: whether nobody else will write to it, and nothing else lives in its memory: it need not be copied.
        """
        tensor, scale = tensor.detach() if tensor.requires_grad else tensor, None
        if self.narrows(tensor):
            values, scale = _narrowed(tensor, self.dtype)
        elif self.in_system_memory:
            values = tensor
        elif ours:
            values = tensor.contiguous()
        else:
            # contiguous_format: a slice of a merged batch must not keep the whole batch alive.
            values = tensor.clone(memory_format=torch.contiguous_format)
        if self.in_system_memory:
            values = _in_system_memory(values)
        return Snapshot(values, tensor.dtype, tensor.device, scale)


#: Features as they are, to the bit.
AS_COMPUTED = StorePolicy("as computed")
#: Every policy by name, from exact to coarse; system memory is exact and pays with transfers.
POLICIES = {
    policy.name: policy
    for policy in (
        AS_COMPUTED,
        StorePolicy("half", torch.float16),
        *([StorePolicy("eighth", torch.float8_e4m3fn)] if hasattr(torch, "float8_e4m3fn") else []),
        StorePolicy("system memory", in_system_memory=True),
    )
}
#: Names of all policies, those included that this version of torch lacks.
STORES = ("as computed", "half", "eighth", "system memory")


class Snapshot(NamedTuple):
    """One tensor as it is stored.

    Narrowed values are ``tensor / scale`` with ``scale = max|tensor| / (largest value of the type)``, rounded to nearest.
    An element x is read back within ``max(u |x|, s scale)``, up to fp32's own rounding: u is 2^-11 for half precision and
    2^-4 for e4m3 (half the spacing of their significands of 11 and 4 bits), s is 2^-25 and 2^-10 (half the spacing of
    their subnormal numbers).

    Attributes:
        values: what is stored.
        dtype: of the tensor.
        device: of the tensor.
        scale: fp32 scalar on that device, None where nothing was scaled.
    """

    values: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    scale: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return self.values.nbytes + (0 if self.scale is None else _SCALE_BYTES)

    def read(self) -> torch.Tensor:
        """Return the tensor in its dtype and on its device: the stored one itself where that is what it is."""
        values = self.values.to(self.device, non_blocking=True)
        return values if self.scale is None else (values.float() * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Tensors(Sequence[torch.Tensor]):
    """The tensors of snapshots; each is read back when it is asked for."""

    snapshots: deque[Snapshot]

    def __len__(self) -> int:
        return len(self.snapshots)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.snapshots[index].read()


@dataclass
class History:
    """The newest snapshots of one branch, newest first."""

    positions: deque[float]
    snapshots: deque[Snapshot]

    @property
    def tensors(self) -> Tensors:
        """The tensors, newest first."""
        return Tensors(self.snapshots)


@dataclass
class SnapshotStore:
    """Copies of tensors per key, bounded in number and in bytes.

    A key whose tensor changes shape starts over. A snapshot that would exceed the
    budget empties its key instead: the technique then computes, it never guesses.

    Args:
        depth: snapshots per key.
        budget_bytes: bytes of all snapshots together, as they are stored.
        policy: how they are kept.
    """

    depth: int
    budget_bytes: int
    policy: StorePolicy = AS_COMPUTED
    histories: dict[Hashable, History] = field(default_factory=dict)
    bytes: int = 0
    peak_bytes: int = 0

    def push(self, key: Hashable, position: float, tensor: torch.Tensor, ours: bool = False) -> bool:
        """Store ``tensor`` taken at ``position``; return False when the budget forbids it.

        Args:
            key: what it belongs to.
            position: where it was taken.
            tensor: any; a copy of it is stored.
            ours: whether it may be stored itself (:meth:`StorePolicy.keep`).
        """
        history = self.histories.get(key)
        if history is not None and history.snapshots[0].values.shape != tensor.shape:
            self.drop(key)
            history = None
        if history is None:
            history = self.histories[key] = History(deque(), deque())
        elif abs(history.positions[0] - position) < SAME_POSITION:
            self._forget(history, newest=True)
        if len(history.snapshots) == self.depth:
            self._forget(history, newest=False)
        size = self.policy.bytes_of(tensor)
        if self.bytes + size > self.budget_bytes:
            self.drop(key)
            return False
        history.positions.appendleft(position)
        history.snapshots.appendleft(self.policy.keep(tensor, ours))
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return True

    def get(self, key: Hashable) -> History | None:
        """Return the history of ``key``, or None when nothing is stored."""
        return self.histories.get(key)

    def drop(self, key: Hashable) -> None:
        """Forget everything under ``key``."""
        history = self.histories.pop(key, None)
        if history is not None:
            self.bytes -= sum(snapshot.bytes for snapshot in history.snapshots)

    def clear(self) -> None:
        """Forget everything."""
        self.histories.clear()
        self.bytes = 0

    def _forget(self, history: History, newest: bool) -> None:
        snapshot = history.snapshots.popleft() if newest else history.snapshots.pop()
        if newest:
            history.positions.popleft()
        else:
            history.positions.pop()
        self.bytes -= snapshot.bytes


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``tensor`` in a narrower dtype, scaled to its range, and the scale (fp32, no host synchronisation)."""
    low, high = torch.aminmax(tensor)
    scale = (torch.maximum(-low, high).float() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).to(dtype).contiguous(), scale


def _in_system_memory(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``values`` in system memory, pinned for CUDA so that neither way waits for the other work."""
    pinned = values.device.type == "cuda"
    copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(values, non_blocking=pinned)
