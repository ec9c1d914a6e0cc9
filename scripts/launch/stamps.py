"""Stamps: how a finished piece is told from a half-made or foreign one.

A piece is a folder. While it is being made it holds a marker; when it is complete, the marker goes and a stamp with a
digest of everything it was made from is written last. Only a folder with the right stamp is believed.
"""

import hashlib
import json
import os
from pathlib import Path

MAKING = ".stretto-making"
STAMP = ".stretto-stamp"


def digest(*parts: str) -> str:
    """Return a short digest of texts; order matters."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode("utf-8"))
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def read(folder: Path, layer: str) -> str | None:
    """Return the digest stored for `layer` of the piece, or None when there is no readable stamp."""
    try:
        return json.loads((folder / f"{STAMP}-{layer}").read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(folder: Path, layer: str, value: str) -> None:
    """Declare `layer` of the piece complete; appears at once or not at all."""
    path = folder / f"{STAMP}-{layer}"
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"digest": value}) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    (folder / MAKING).unlink(missing_ok=True)


def mark_making(folder: Path) -> None:
    """Declare the folder ours and unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MAKING).write_text("This folder is being made; it is removed if that is interrupted.\n")


def is_half_made(folder: Path) -> bool:
    """True when we began this folder and never finished it."""
    return (folder / MAKING).exists()
