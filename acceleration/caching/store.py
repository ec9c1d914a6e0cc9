"""Snapshots of features, one short history per branch."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

#: Two evaluations closer than this (in steps) describe the same point of the run.
SAME_POSITION = 1e-6


@dataclass
class History:
    """The newest snapshots of one branch, newest first."""

    positions: deque[float]
    tensors: deque[torch.Tensor]


@dataclass
class SnapshotStore:
    """Copies of tensors per key, bounded in number and in bytes.

    A key whose tensor changes shape starts over. A snapshot that would exceed the
    budget empties its key instead: the technique then computes, it never guesses.
    """

    depth: int
    budget_bytes: int
    histories: dict[Hashable, History] = field(default_factory=dict)
    bytes: int = 0
    peak_bytes: int = 0

    def push(self, key: Hashable, position: float, tensor: torch.Tensor) -> bool:
        """Store a copy of ``tensor`` taken at ``position``; return False when the budget forbids it."""
        history = self.histories.get(key)
        if history is not None and history.tensors[0].shape != tensor.shape:
            self.drop(key)
            history = None
        if history is None:
            history = self.histories[key] = History(deque(), deque())
        elif abs(history.positions[0] - position) < SAME_POSITION:
            self._forget(history, newest=True)
        if len(history.tensors) == self.depth:
            self._forget(history, newest=False)
        size = tensor.numel() * tensor.element_size()
        if self.bytes + size > self.budget_bytes:
            self.drop(key)
            return False
        history.positions.appendleft(position)
        # contiguous_format: a slice of a merged batch must not keep the whole batch alive.
        history.tensors.appendleft(tensor.detach().clone(memory_format=torch.contiguous_format))
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
            self.bytes -= sum(t.numel() * t.element_size() for t in history.tensors)

    def clear(self) -> None:
        """Forget everything."""
        self.histories.clear()
        self.bytes = 0

    def _forget(self, history: History, newest: bool) -> None:
        tensor = history.tensors.popleft() if newest else history.tensors.pop()
        if newest:
            history.positions.popleft()
        else:
            history.positions.pop()
        self.bytes -= tensor.numel() * tensor.element_size()
