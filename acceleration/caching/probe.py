"""Indicators that look inside the network: how much a tensor near the input has changed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...kernels.weighted_sum import weighted_sum


class Probe(Protocol):
    """A scalar per evaluation from a tensor [B, tokens, C] of the deciding branch.

    Attributes:
        blocks: how many blocks run before the tensor is there; 0 means the first block's modulated input.
        raw: whether it is what these blocks yield, instead of what they add to their input.
    """

    blocks: int
    raw: bool

    def measure(self, key: Hashable, tensor: torch.Tensor, position: float) -> float | None:
        """Return the signal, None while there is nothing to compare with. One host synchronisation."""

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float) -> None:
        """The evaluation that was just measured is computed in full."""

    def reset(self) -> None:
        """Forget the trajectory."""


def relative_l1(now: torch.Tensor, reference: torch.Tensor) -> float:
    """mean|now - reference| / mean|reference|, accumulated in fp32."""
    reference = reference.float()
    return ((now.float() - reference).abs().mean() / reference.abs().mean().clamp(min=1e-12)).item()


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

    def measure(self, key: Hashable, tensor: torch.Tensor, position: float) -> float | None:
        """Return the change since the reference."""
        reference = self.references.get(key)
        if self.previous:
            self.references[key] = _copy(tensor)
        if reference is None or reference.shape != tensor.shape:
            return None
        return relative_l1(tensor, reference)

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float) -> None:
        """Make this evaluation the reference."""
        if not self.previous:
            self.references[key] = _copy(tensor)

    def reset(self) -> None:
        """Forget the references."""
        self.references.clear()


@dataclass
class ForecastError:
    """How wrong a forecast of the probed tensor is: Confidence-Gated Taylor (arXiv 2508.02240, section 3).

    mean|forecast - actual| / mean|actual|. Snapshots are taken at computed evaluations only, so the gate extrapolates as
    far as the forecast of the last block does.
    """

    blocks: int
    depth: int
    weights: Callable[[Sequence[float], float], list[float]]
    raw: bool = True
    positions: dict[Hashable, list[float]] = field(default_factory=dict)
    tensors: dict[Hashable, list[torch.Tensor]] = field(default_factory=dict)

    def measure(self, key: Hashable, tensor: torch.Tensor, position: float) -> float | None:
        """Return the relative error of the forecast."""
        stored = self.tensors.get(key)
        if not stored or stored[0].shape != tensor.shape or self.positions[key][0] == position:
            return None
        weights = self.weights(self.positions[key], position)
        forecast = weighted_sum(stored[: len(weights)], weights)
        return relative_l1(forecast, tensor)

    def computed(self, key: Hashable, tensor: torch.Tensor, position: float) -> None:
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


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # contiguous_format: a slice of a merged batch must not keep the whole batch alive.
    return tensor.detach().clone(memory_format=torch.contiguous_format)
