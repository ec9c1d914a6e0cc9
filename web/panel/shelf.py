"""Workflows to choose from: files of one folder, and those that were dropped in or handed over by the editor."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure.carried import read_carried, workflow_of
from .measure.errors import WorkflowError

MOST_KEPT = 24  # dropped workflows; the oldest goes first
TOKEN_BYTES = 18


@dataclass(frozen=True)
class Source:
    """A workflow as it was drawn or sent: `document` is UI or API JSON, `name` what people call it."""

    name: str
    document: dict[str, Any]


class Shelf:
    """Finds workflows by a key: the name of a file in the folder, or a token of a workflow that was put here."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept: OrderedDict[str, Source] = OrderedDict()
        self._lock = threading.Lock()

    def files(self) -> list[str]:
        """Names of the workflow files; the pack's default method comes first and the plain ones last."""
        names = sorted(path.name for path in self.folder.glob("*.json")) if self.folder.is_dir() else []
        return sorted(names, key=lambda name: ("plain" in name, "taylor" not in name))

    def choices(self) -> list[tuple[str, str]]:
        """Label and key of everything there is: what was put here last comes first, then the files."""
        with self._lock:
            kept = [(source.name, token) for token, source in reversed(self._kept.items())]
        return kept + [(name, name) for name in self.files()]

    def put(self, document: dict[str, Any], name: str) -> str:
        """Keep a workflow and return its token; raises `WorkflowError` when it is none."""
        document = workflow_of(document, name)
        token = secrets.token_urlsafe(TOKEN_BYTES)
        with self._lock:
            self._kept[token] = Source(name, document)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return token

    def drop(self, data: bytes, name: str) -> str:
        """Keep the workflow that a file carries; raises `WorkflowError` when it carries none."""
        return self.put(read_carried(data, name), name)

    def has(self, key: str | None) -> bool:
        """Whether there is a workflow of that key."""
        with self._lock:
            kept = key in self._kept
        return kept or key in self.files()

    def get(self, key: str | None) -> Source:
        """The workflow of a key; raises `WorkflowError`. Only files of the folder are opened, by name."""
        if not key:
            raise WorkflowError("Choose a workflow first.")
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        if key not in self.files():
            raise WorkflowError(f"There is no workflow {key!r} here any more; choose one or drop its file in again.")
        try:
            data = (self.folder / key).read_bytes()
        except OSError as error:
            raise WorkflowError(f"{key} cannot be read: {error.strerror}.") from error
        return Source(key, read_carried(data, key))
