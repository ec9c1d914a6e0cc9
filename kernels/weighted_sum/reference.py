"""Torch reference of the weighted sum."""

from collections.abc import Sequence

import torch


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return ``sum_j weights[j] * tensors[j]`` as a new tensor of the inputs' dtype.

    Products and sums are made in fp32 (fp64 for fp64 inputs) and rounded once, because
    differences of neighbouring features vanish in half precision.

    Args:
        tensors: at least one; equal shapes, dtypes and devices.
        weights: as many numbers.

    Raises:
        ValueError: counts differ, nothing is given, or shapes differ.
    """
    if not tensors or len(tensors) != len(weights):
        raise ValueError(f"weighted_sum needs as many weights as tensors, got {len(weights)} for {len(tensors)}")
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(f"weighted_sum needs equal shapes, got {[tuple(t.shape) for t in tensors]}")
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(wide) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(wide), alpha=weight)
    return total.to(first.dtype)
