"""Stopwatches and memory readings per device type."""

import os
from collections.abc import Callable
from typing import Any

import torch

from ..run import Clock, wall_clock

try:
    import psutil
except ImportError:  # ComfyUI brings it, diffusers does not
    psutil = None

#: Free bytes where nothing tells: techniques then plan as if there were enough.
UNKNOWN = 1 << 40


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
    """Return the peak since :func:`start_peak_memory` on CUDA, else the resident size (bytes, 0 where not known)."""
    if device.type == "cuda":
        return {"kind": "cuda", "peak_bytes": torch.cuda.max_memory_allocated(device)}
    return {"kind": "rss", "peak_bytes": psutil.Process().memory_info().rss if psutil is not None else 0}


def free_memory(device: torch.device) -> int:
    """Return the free bytes of ``device`` where no memory management of a host is there to ask."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if psutil is not None:
        return int(psutil.virtual_memory().available)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN
