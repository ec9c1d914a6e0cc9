"""JSON Schemas of everything that leaves a run, and the one check every reader makes first.

A document names its schema as ``kind@major``. Minor, additive changes keep the
major; readers refuse a major they do not know rather than guess.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SchemaError

FOLDER = Path(__file__).resolve().parent


def schema(kind: str, major: int = 1) -> dict[str, Any]:
    """Return the JSON Schema of ``kind@major`` (for example ``trace@1``)."""
    return json.loads((FOLDER / f"{kind}.v{major}.json").read_text(encoding="utf-8"))


def require(document: Any, kind: str, major: int = 1) -> Mapping[str, Any]:
    """Return ``document`` if it calls itself ``kind@major``; raise :class:`SchemaError` otherwise."""
    if not isinstance(document, Mapping) or "schema" not in document:
        raise SchemaError(f"this is not a {kind} document: it has no 'schema' field")
    found = document["schema"]
    if found != f"{kind}@{major}":
        raise SchemaError(f"this document is {found!r}; this release reads {kind}@{major}")
    return document
