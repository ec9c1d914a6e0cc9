"""Presets of the user's own: names that are safe as files, and files that are never overwritten."""

import re
from itertools import count
from pathlib import Path

from ..errors import StrettoError
from .presets import Preset, save_preset

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9_-])?")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def checked_name(name: str) -> str:
    """Return ``name`` without surrounding space if every file system takes it as a file's name.

    Raises:
        StrettoError: another character, more than 64 of them, or a name that Windows reserves.
    """
    name = name.strip()
    if not _NAME.fullmatch(name) or ".." in name or name.split(".")[0].lower() in _RESERVED:
        raise StrettoError(
            f"preset name {name!r:.80}: use 1 to 64 letters, digits, spaces, dots, dashes and underscores, starting with a "
            "letter or digit"
        )
    return name


def save_new(folder: Path, name: str, preset: Preset) -> Path:
    """Save ``preset`` as ``<folder>/<name>.json``, or ``<name>-2.json``, ``-3`` ... where that exists; return the path.

    Raises:
        StrettoError: the name cannot be a file's, or the folder cannot be written.
    """
    name = checked_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StrettoError(f"{folder}: cannot be made ({error.strerror})") from None
    for number in count(1):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        if path.exists():
            continue
        try:
            save_preset(path, preset)
        except StrettoError:
            if path.exists():  # another run took the name in between
                continue
            raise
        return path
    raise AssertionError("unreachable")
