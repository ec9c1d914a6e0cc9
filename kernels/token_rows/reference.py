"""Torch reference of taking and putting token rows."""

import torch


def take_rows(x: torch.Tensor, rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the slices of ``x`` at ``rows`` along ``axis``, as a new contiguous tensor.

    Args:
        x: of any shape and dtype.
        rows: int64 [n], each in [0, x.shape[axis]).
        axis: not negative.
    """
    return x.index_select(axis, rows)


def put_rows(kept: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    """Write ``values`` into the slices of ``kept`` at ``rows`` along ``axis``, in place, and return ``kept``.

    Args:
        kept: of any shape and dtype; the caller owns it.
        rows: int64 [n], each in [0, kept.shape[axis]), no two equal.
        values: shaped like ``kept`` with n along ``axis``; of the same dtype.
        axis: not negative.
    """
    return kept.index_copy_(axis, rows, values)
