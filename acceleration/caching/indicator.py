"""Scalars that estimate how much a skipped evaluation would have changed."""

from ctypes import c_float
from dataclasses import dataclass

import torch

from .store import SAME_POSITION


def read(*scalars: torch.Tensor) -> list[float]:
    """Return the values of scalar tensors of one device, with one host synchronisation."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    return torch.stack(scalars).tolist()


def quotient(over: float, under: float) -> float:
    """Return ``over / under`` of two fp32 numbers, rounded to fp32 like a device's division: thresholds may lie on it."""
    return c_float(over / under).value


def relative_change(now: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return mean|now - reference| / mean|reference|, accumulated in fp32, as a scalar on the tensors' device."""
    reference = reference.float()
    return (now.float() - reference).abs_().mean() / reference.abs().mean().clamp_(min=1e-12)


@dataclass
class TransformRate:
    """EasyCache's runtime indicator (arXiv 2507.02860, section 3).

    kappa = mean|v - v'| / mean|x - x'| over the last two *computed* evaluations, for
    network input x and output v; an input that has moved by mean|x - x_prev| since the
    previous evaluation is then expected to change the output, relatively, by
    kappa * mean|x - x_prev| / mean|v|. Until two evaluations were computed kappa is
    unknown, never zero.
    """

    kappa: float | None = None
    previous_input: torch.Tensor | None = None
    computed_input: torch.Tensor | None = None
    computed_output: torch.Tensor | None = None
    output_norm: float = 0.0

    def change(self, network_input: torch.Tensor) -> float | None:
        """Return the expected relative change since the previous evaluation; None while unknown.

        One host synchronisation. ``network_input`` is kept by copy as the new previous one.
        """
        previous, self.previous_input = self.previous_input, network_input.detach().clone()
        if previous is None or previous.shape != network_input.shape or self.kappa is None or not self.output_norm:
            return None
        moved = (network_input.float() - previous.float()).abs().mean().item()
        return self.kappa * moved / self.output_norm

    def observe(self, network_input: torch.Tensor, output: torch.Tensor) -> None:
        """Learn from a computed evaluation: input and output of the conditional branch, equal shapes."""
        norm = output.float().abs().mean()
        if self.computed_input is not None and self.computed_input.shape == network_input.shape:
            moved = (network_input.float() - self.computed_input.float()).abs_().mean()
            changed = (output.float() - self.computed_output.float()).abs_().mean()
            self.output_norm, distance, change = read(norm, moved, changed)
            if distance > 0:
                self.kappa = quotient(change, distance)
        else:
            self.output_norm = norm.item()
        self.computed_input = network_input.detach().clone()
        self.computed_output = output.detach().clone()

    def reset(self) -> None:
        """Forget everything (a new trajectory has begun)."""
        self.kappa = self.previous_input = self.computed_input = self.computed_output = None
        self.output_norm = 0.0


@dataclass
class FeatureDrift:
    """AdaCache's distance (arXiv 2411.02397, eq. 4): how fast the stored feature changed between two computed evaluations.

    mean|F_0 - F_1| / mean|F_1| per step between them, known from the second computed evaluation on and valid until the
    next. It is measured where the feature is stored and read when the next evaluation begins, so the host waits once and
    only after a computed evaluation.
    """

    position: float | None = None
    measured: torch.Tensor | None = None
    known: float | None = None

    def change(self) -> float | None:
        """Return the change per step; None while fewer than two evaluations were computed."""
        if self.measured is not None:
            self.known, self.measured = self.measured.item(), None
        return self.known

    def observe(self, position: float, feature: torch.Tensor, before: torch.Tensor | None) -> None:
        """Learn from a computed evaluation.

        Args:
            position: its step position.
            feature: what is stored now.
            before: what the computed evaluation before it stored, None where there is none.
        """
        last, self.position = self.position, position
        if before is None or last is None or before.shape != feature.shape:
            self.measured = self.known = None
        elif abs(position - last) > SAME_POSITION:
            self.measured = relative_change(feature, before) / abs(position - last)

    def reset(self) -> None:
        """Forget everything (a new trajectory has begun)."""
        self.position = self.measured = self.known = None
