"""Indicators that look inside the network: how much a tensor near the input has changed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ...kernels.weighted_sum import weighted_sum
from .forecast import probe_weights
from .indicator import quotient, read, relative_change
from .store import SAME_POSITION


class Probe(Protocol):
    """A scalar per evaluation from a tensor [B, tokens, C] of the deciding branch.

    Attributes:
        blocks: how many blocks run before the tensor is there; 0 means the first block's modulated input.
        raw: whether what these blocks yield is enough. Where it is not, what went into the first of them comes along.
        weights: what the measurement says about the forecast: weights of the newest snapshots, newest first. None leaves
            them to the forecaster.
    """

    blocks: int
    raw: bool
    weights: tuple[float, ...] | None

    def measure(
        self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None
    ) -> float | None:
        """Return the signal, None while there is nothing to compare with. One host synchronisation.

        Args:
            key: of the branch.
            tensor: what the first blocks yield.
            position: of the evaluation, in the coordinate of forecasts.
            start: what went into the first block, same shape; given unless ``raw``.
        """

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None) -> None:
        """The evaluation that was just measured is computed in full. Arguments as for :meth:`measure`."""

    def reset(self) -> None:
        """Forget the trajectory."""


def relative_l1(now: torch.Tensor, reference: torch.Tensor) -> float:
    """mean|now - reference| / mean|reference|, accumulated in fp32."""
    reference = reference.float()
    change, size = read((now.float() - reference).abs_().mean(), reference.abs().mean())
    return quotient(change, max(size, 1e-12))


def elementwise_l1(now: torch.Tensor, reference: torch.Tensor) -> float:
    """mean(|now - reference| / |reference|), accumulated in fp32: the smallest elements of the reference weigh most."""
    reference = reference.float()
    return ((now.float() - reference).abs() / (reference.abs() + 1e-10)).mean().item()


@dataclass
class RelativeChange:
    """Relative L1 change of the probed tensor.

    TeaCache (arXiv 2411.19108, eq. 4) compares with the previous evaluation, skipped or not; First-Block-Cache and
    DBCache with the last computed one, which limits drift without adding anything up.
    """

    blocks: int
    previous: bool = False
    raw: bool = False
    references: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    weights: ClassVar[None] = None
    _added: torch.Tensor | None = field(default=None, repr=False)

    def measure(
        self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None
    ) -> float | None:
        """Return the change since the reference, of what the blocks add to ``start`` where one is given."""
        self._added = None if start is None else tensor - start  # a tensor of our own: computed() need not copy it
        tensor = tensor if start is None else self._added
        reference = self.references.get(key)
        known = reference is not None and reference.shape == tensor.shape
        change = relative_l1(tensor, reference) if known else None
        if self.previous and known and reference.dtype == tensor.dtype:
            reference.copy_(tensor)
        elif self.previous:
            self.references[key] = _copy(tensor)
        return change

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None) -> None:
        """Make this evaluation the reference."""
        if not self.previous:
            self.references[key] = _copy(_added(tensor, start)) if self._added is None else self._added

    def reset(self) -> None:
        """Forget the references."""
        self.references.clear()
        self._added = None


@dataclass
class ForecastError:
    """How wrong a forecast of the probed tensor is: Confidence-Gated Taylor (arXiv 2508.02240, section 3).

    mean|forecast - actual| / mean|actual|. Snapshots are taken at computed evaluations only, so the gate extrapolates as
    far as the forecast of the last block does. SpeCa (arXiv 2509.11628) verifies its drafts by ``error``
    :func:`elementwise_l1`.
    """

    blocks: int
    depth: int
    forecast: Callable[[Sequence[float], float], list[float]]
    error: Callable[[torch.Tensor, torch.Tensor], float] = relative_l1
    raw: bool = True
    positions: dict[Hashable, list[float]] = field(default_factory=dict)
    tensors: dict[Hashable, list[torch.Tensor]] = field(default_factory=dict)
    weights: ClassVar[None] = None

    def measure(
        self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None
    ) -> float | None:
        """Return the relative error of the forecast."""
        stored = self.tensors.get(key)
        if not stored or stored[0].shape != tensor.shape or self.positions[key][0] == position:
            return None
        weights = self.forecast(self.positions[key], position)
        return self.error(weighted_sum(stored[: len(weights)], weights), tensor)

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None) -> None:
        """Take a snapshot."""
        stored, positions = self.tensors.setdefault(key, []), self.positions.setdefault(key, [])
        if stored and (stored[0].shape != tensor.shape or positions[0] == position):
            stored.clear()
            positions.clear()
        stored.insert(0, _copy(tensor))
        positions.insert(0, position)
        del stored[self.depth :], positions[self.depth :]

    def reset(self) -> None:
        """Forget the snapshots."""
        self.positions.clear()
        self.tensors.clear()


@dataclass
class Trajectory:
    """Where the first blocks are on their way: DiCache (arXiv 2508.17356 and its public code).

    The signal is the relative L1 change of what they yield since the previous evaluation, skipped or not. What they add to
    their input is kept at the last two computed evaluations, p_1 and p_0 (newest). That it has come mean|p - p_1| by now,
    where it had come mean|p_0 - p_1|, is taken for how far the whole stack's addition has come:
    :func:`~.forecast.probe_weights`.
    """

    blocks: int
    raw: bool = False
    previous: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    added: dict[Hashable, list[torch.Tensor]] = field(default_factory=dict)
    positions: dict[Hashable, float] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None

    def measure(
        self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None
    ) -> float | None:
        """Return the change since the previous evaluation, and set ``weights`` once two evaluations were computed."""
        before, self.previous[key] = self.previous.get(key), _copy(tensor)
        self.weights = None
        if before is None or before.shape != tensor.shape:
            self.added.pop(key, None)
            return None
        change, added = relative_change(tensor, before), self.added.get(key, ())
        if len(added) < 2:
            return change.item()
        moved = (_added(tensor, start).float() - added[1].float()).abs().mean()
        span = (added[0].float() - added[1].float()).abs().mean()
        signal, distance, last_distance = torch.stack((change, moved, span)).tolist()
        self.weights = tuple(probe_weights(distance, last_distance))
        return signal

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float, start: torch.Tensor | None = None) -> None:
        """Keep what the blocks add; a second evaluation at one position replaces the first, as in the store."""
        added = self.added.setdefault(key, [])
        if added and abs(self.positions[key] - position) < SAME_POSITION:
            added.pop(0)
        added.insert(0, _copy(_added(tensor, start)))
        del added[2:]
        self.positions[key] = position

    def reset(self) -> None:
        """Forget the way."""
        self.weights = None
        for memory in (self.previous, self.added, self.positions):
            memory.clear()


def _added(tensor: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    return tensor if start is None else tensor - start


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # contiguous_format: a slice of a merged batch must not keep the whole batch alive.
    return (tensor.detach() if tensor.requires_grad else tensor).clone(memory_format=torch.contiguous_format)
