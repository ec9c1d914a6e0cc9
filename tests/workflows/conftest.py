"""Shared by the tests of workflow files: the node schemas of the real ComfyUI, and the shipped files."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"


@pytest.fixture(scope="session")
def object_info() -> dict[str, Any]:
    """What the server answers to /object_info, from the node classes themselves.

    A process of its own: ComfyUI reads its command line on import, and its modules stay loaded.
    """
    comfyui = ROOT / ".comfyui"
    if not (comfyui / "main.py").exists():
        pytest.skip("needs .comfyui: run scripts/bootstrap.py --dev")
    dump = ROOT / "scripts" / "dump_object_info.py"
    result = subprocess.run(
        [sys.executable, str(dump), str(comfyui), str(ROOT)], capture_output=True, text=True, check=False, timeout=180
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


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
