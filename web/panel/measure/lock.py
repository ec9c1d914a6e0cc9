"""A lock on the folder of a comparison: one run at a time, and whoever dies lets go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import MeasureError

NAME = "running.lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder (made if it is not there); raises `MeasureError` when a comparison runs in it, in any process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / NAME, thread_local=False)
    try:
        lock.acquire(timeout=1)  # `is_locked` holds it for a moment
    except Timeout:
        words = f"Another comparison is running in {folder}; wait for it, stop it, or choose another folder."
        raise MeasureError(words) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a comparison runs in the folder."""
    if not (folder / NAME).exists():
        return False
    lock = FileLock(folder / NAME, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # where nothing can be written nothing runs
    lock.release()
    return False
