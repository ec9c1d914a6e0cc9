"""Rows of tokens taken out of a sequence, and put back: what region-adaptive sampling does around every block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from . import reference

__all__ = ["CONSTRAINTS", "put_rows", "take_rows", "why_reference"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@dataclass(frozen=True)
class Constraint:
    """What the Triton kernels need of a tensor and the rows: a check, and the words for when it fails."""

    holds: Callable[[torch.Tensor, torch.Tensor], bool]
    otherwise: str


#: Declared once: the dispatcher, the reason and the tests read this table. Cheap and telling ones first.
CONSTRAINTS = (
    Constraint(lambda x, rows: x.is_cuda, "the tensor is not on a CUDA device"),
    Constraint(lambda x, rows: rows.device == x.device, "the rows are on another device"),
    Constraint(lambda x, rows: x.dtype in DTYPES, "the dtype is none of fp32, fp16, bf16 and bytes"),
    Constraint(lambda x, rows: rows.dtype == torch.int64 and rows.is_contiguous(), "the rows are not contiguous int64"),
    Constraint(lambda x, rows: x.numel() > 0 and rows.numel() > 0, "there is nothing to copy"),
    Constraint(lambda x, rows: x.is_contiguous(), "the tensor is not contiguous"),
    Constraint(lambda x, rows: not (torch.is_grad_enabled() and x.requires_grad), "the tensor wants a gradient"),
    Constraint(lambda x, rows: find_spec("triton") is not None, "Triton is not installed"),
)


def why_reference(x: torch.Tensor, rows: torch.Tensor) -> str | None:
    """Return why the torch reference is used for ``x`` and ``rows``, or None for the Triton kernels."""
    broken = next((constraint.otherwise for constraint in CONSTRAINTS if not constraint.holds(x, rows)), None)
    return broken or _trial(x.device)


def take_rows(x: torch.Tensor, rows: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Return the slices of ``x`` at ``rows`` along ``axis``, as a new contiguous tensor.

    Args:
        x: [B, N, D] or of any other shape.
        rows: int64 [n], each in [0, x.shape[axis]).
        axis: where the tokens are, not negative.
    """
    if why_reference(x, rows) is not None:
        return reference.take_rows(x, rows, axis)
    from .triton_kernel import take_rows as kernel  # only here: Triton takes its time, and may be missing

    return kernel(x, rows, axis)


def put_rows(kept: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Write ``values`` into ``kept`` at ``rows`` along ``axis``, in place, and return ``kept``.

    Args:
        kept: [B, N, D] or of any other shape; the caller owns it.
        rows: int64 [n], each in [0, kept.shape[axis]), no two equal.
        values: shaped like ``kept`` with n along ``axis``; of the same dtype.
        axis: where the tokens are, not negative.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    expected = (*kept.shape[:axis], len(rows), *kept.shape[axis + 1 :])
    if values.shape != expected or values.dtype != kept.dtype:
        raise ValueError(
            f"put_rows needs values of shape {expected} and {kept.dtype}, got {tuple(values.shape)} and {values.dtype}"
        )
    if why_reference(kept, rows) is not None:
        return reference.put_rows(kept, rows, values, axis)
    from .triton_kernel import put_rows as kernel

    return kernel(kept, rows, values.contiguous(), axis)


@cache
def _trial(device: torch.device) -> str | None:
    """Run the kernels once on ``device`` and return why they cannot be used there, or None."""
    try:
        from .triton_kernel import put_rows, take_rows

        x, rows = torch.arange(6.0, device=device).reshape(1, 3, 2), torch.tensor([2, 0], device=device)
        result = put_rows(torch.zeros_like(x), rows, take_rows(x, rows, 1), 1).flatten().tolist()
    except Exception as error:  # a missing compiler, driver or architecture shows as almost any error
        return f"Triton does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    return (
        None
        if result == [0.0, 1.0, 0.0, 0.0, 4.0, 5.0]
        else f"Triton copies {result} where [0, 1, 0, 0, 4, 5] is right"
    )
