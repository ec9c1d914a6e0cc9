"""Weighted sum of equally shaped tensors: the one kernel behind every linear forecaster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from . import reference

__all__ = ["CONSTRAINTS", "weighted_sum", "why_reference"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TENSORS = 16


@dataclass(frozen=True)
class Constraint:
    """What the Triton kernel needs of its inputs: a check, and the words for when it fails."""

    holds: Callable[[Sequence[torch.Tensor]], bool]
    otherwise: str


#: Declared once: the dispatcher, the reason and the tests read this table. Cheap and telling ones first.
CONSTRAINTS = (
    Constraint(lambda ts: len(ts) > 0, "there is nothing to sum"),
    Constraint(lambda ts: len(ts) <= MAX_TENSORS, f"more than {MAX_TENSORS} tensors"),
    Constraint(lambda ts: all(t.is_cuda for t in ts), "the tensors are not on a CUDA device"),
    Constraint(lambda ts: all(t.device == ts[0].device for t in ts), "the tensors are on different devices"),
    Constraint(lambda ts: all(t.dtype == ts[0].dtype for t in ts), "the dtypes differ"),
    Constraint(lambda ts: ts[0].dtype in DTYPES, "the dtype is none of fp32, fp16 and bf16"),
    Constraint(lambda ts: all(t.shape == ts[0].shape for t in ts), "the shapes differ"),
    Constraint(lambda ts: ts[0].numel() > 0, "the tensors are empty"),
    Constraint(lambda ts: all(t.is_contiguous() for t in ts), "a tensor is not contiguous"),
    Constraint(
        lambda ts: not (torch.is_grad_enabled() and any(t.requires_grad for t in ts)), "a tensor wants a gradient"
    ),
    Constraint(lambda ts: find_spec("triton") is not None, "Triton is not installed"),
)


def why_reference(tensors: Sequence[torch.Tensor]) -> str | None:
    """Return why :func:`weighted_sum` uses the torch reference for ``tensors``, or None for the Triton kernel."""
    broken = next((constraint.otherwise for constraint in CONSTRAINTS if not constraint.holds(tensors)), None)
    return broken or _trial(tensors[0].device)


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return ``sum_j weights[j] * tensors[j]`` as a new tensor of the inputs' dtype.

    Accumulated in fp32 (fp64 for fp64 inputs) and rounded once; :mod:`.reference` is the specification.

    Args:
        tensors: at least one; equal shapes, dtypes and devices.
        weights: as many numbers.

    Raises:
        ValueError: counts differ, nothing is given, or shapes differ.
    """
    if len(tensors) != len(weights) or why_reference(tensors) is not None:
        return reference.weighted_sum(tensors, weights)
    from .triton_kernel import weighted_sum as kernel  # only here: Triton takes its time, and may be missing

    return kernel(tensors, weights)


@cache
def _trial(device: torch.device) -> str | None:
    """Run the kernel once on ``device`` and return why it cannot be used there, or None."""
    try:
        from .triton_kernel import weighted_sum as kernel

        pair = [torch.ones(3, device=device), torch.full((3,), 2.0, device=device)]
        result = kernel(pair, [3.0, -1.0]).tolist()
    except Exception as error:  # a missing compiler, driver or architecture shows as almost any error
        return f"Triton does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    return None if result == [1.0, 1.0, 1.0] else f"Triton computes {result} where [1, 1, 1] is right"
