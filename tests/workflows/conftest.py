"""Shared by the tests of workflow files: the node schemas of the real ComfyUI, and the shipped files."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"


@pytest.fixture(scope="session")
def object_info() -> dict[str, Any]:
    """What the server answers to /object_info."""
    comfyui = ROOT / ".comfyui"
    if not (comfyui / "main.py").exists():
        pytest.skip("needs .comfyui: run scripts/bootstrap.py --dev")
    from stretto.scripts.shipped_workflows.schemas import object_info as read

    return read(comfyui)


@pytest.fixture(scope="session")
def workflow() -> ModuleType:
    """The module under test."""
    import stretto.web.panel.measure.workflow as module

    return module


def workflow_files() -> list[Path]:
    """Every workflow that the pack ships."""
    return sorted(WORKFLOWS.glob("*.json"))


@pytest.fixture(params=workflow_files(), ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One shipped workflow after the other."""
    return json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def comfyui_folders(object_info: dict[str, Any]) -> set[str]:
    """The names of ComfyUI's model folders, read from its source: no second ComfyUI is imported for that."""
    import re

    text = (ROOT / ".comfyui" / "folder_paths.py").read_text(encoding="utf-8")
    return set(re.findall(r'folder_names_and_paths\["(\w+)"\]', text))
