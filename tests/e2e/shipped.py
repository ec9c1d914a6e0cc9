"""The workflows that the pack ships."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("plain", "taylor", "easycache")
ACCELERATED = KINDS[1:]


def path_of(kind: str) -> Path:
    """The file of a demo workflow."""
    return ROOT / "workflows" / f"demo-image-{kind}.json"


def load_ui(kind: str) -> dict[str, Any]:
    """The UI form of a demo workflow."""
    return json.loads(path_of(kind).read_text(encoding="utf-8"))


def key_of(api: dict[str, Any], class_type: str) -> str:
    """The id of the only node of a class."""
    (key,) = (key for key, node in api.items() if node["class_type"] == class_type)
    return key
