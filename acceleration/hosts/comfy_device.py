"""Stopwatches and memory readings per device type."""

from collections.abc import Callable
from typing import Any

import psutil
import torch

from ..run import Clock, wall_clock


def clock_for(device: torch.device) -> Clock:
    """Return a stopwatch factory for ``device``: CUDA events where kernels run asynchronously, else the wall clock."""
    return cuda_clock if device.type == "cuda" else wall_clock


def cuda_clock() -> Callable[[], float]:
    """Record an event now and another at the first read; later reads return the time between them.

    The first read only records: it does not wait. Seconds are available once the device is synchronised.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    ended = False

    def read() -> float:
        nonlocal ended
        if not ended:
            end.record()
            ended = True
            return float("nan")
        return start.elapsed_time(end) / 1000.0

    return read


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do where work is synchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak_memory(device: torch.device) -> None:
    """Begin a new peak reading."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak since :func:`start_peak_memory` on CUDA, else the process's resident size now (bytes)."""
    if device.type == "cuda":
        return {"kind": "cuda", "peak_bytes": torch.cuda.max_memory_allocated(device)}
    return {"kind": "rss", "peak_bytes": psutil.Process().memory_info().rss}
