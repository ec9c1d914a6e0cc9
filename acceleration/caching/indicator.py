"""Scalars that estimate how much a skipped evaluation would have changed."""

from dataclasses import dataclass

import torch


def magnitude_ratio(residual: torch.Tensor, previous: torch.Tensor) -> float:
    """Return MagCache's ratio: mean over tokens of the quotient of channel norms (arXiv 2506.09045).

    Args:
        residual: stack residual now, [..., tokens, channels].
        previous: stack residual of the evaluation before, same shape.
    """
    norms = torch.linalg.vector_norm(residual.float(), dim=-1)
    before = torch.linalg.vector_norm(previous.float(), dim=-1)
    return (norms / before.clamp_min(torch.finfo(torch.float32).tiny)).mean().item()


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
        if self.computed_input is not None and self.computed_input.shape == network_input.shape:
            moved = (network_input.float() - self.computed_input.float()).abs().mean()
            changed = (output.float() - self.computed_output.float()).abs().mean()
            if moved > 0:
                self.kappa = (changed / moved).item()
        self.computed_input = network_input.detach().clone()
        self.computed_output = output.detach().clone()
        self.output_norm = output.float().abs().mean().item()

    def reset(self) -> None:
        """Forget everything (a new trajectory has begun)."""
        self.kappa = self.previous_input = self.computed_input = self.computed_output = None
        self.output_norm = 0.0
