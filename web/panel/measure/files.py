"""Files that are whole or not there, and a disk that is full in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CannotWrite

LEAST_FREE = 64 * 2**20  # bytes; a comparison of small pictures needs about that


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: nobody ever reads half of it, and what was there stays until the new one is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def check_space(folder: Path) -> None:
    """Refuse to begin on a disk that is all but full; `folder` exists."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise CannotWrite(
            f"Only {free // 2**20} MiB are free where {folder} lies, and a comparison needs {LEAST_FREE // 2**20} MiB or more. "
            "Free some space or choose another folder."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn whatever keeps files of a comparison from being written into a sentence that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "The disk is full" if full else f"A file cannot be written ({error.strerror or error})"
        remedy = "Free some space" if full else "Set that right"
        raise CannotWrite(
            f"{cause}: {error.filename or folder}. Everything measured before is kept in {folder}. {remedy}, then resume."
        ) from error
