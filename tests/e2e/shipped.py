"""The workflows that the pack ships."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEDIA = ("image", "video")
KINDS = ("plain", "taylor", "easycache", "fitted")
ACCELERATED = KINDS[1:]
#: Workflows of models that have to be downloaded: they open, and name their files, but cannot run here.
MODELS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json") if not path.stem.startswith("demo-"))
#: Demo workflows that the tests of the kinds leave out, by name. Calibrating, searching for a plan, and measuring what
#: rounding each layer does take dozens of runs: other tests do them in short.
OTHERS = sorted(
    {path.stem for path in (ROOT / "workflows").glob("demo-*.json")}
    - {f"demo-{medium}-{kind}" for medium in MEDIA for kind in KINDS}
    - {"demo-image-calibrate", "demo-image-quantize", "demo-video-find-plan"}
)


def path_of(kind: str, medium: str = "image") -> Path:
    """The file of a demo workflow."""
    return ROOT / "workflows" / f"demo-{medium}-{kind}.json"


def load_ui(kind: str, medium: str = "image") -> dict[str, Any]:
    """The UI form of a demo workflow."""
    return json.loads(path_of(kind, medium).read_text(encoding="utf-8"))


def key_of(api: dict[str, Any], class_type: str) -> str:
    """The id of the only node of a class."""
    (key,) = (key for key, node in api.items() if node["class_type"] == class_type)
    return key
