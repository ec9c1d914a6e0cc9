"""Facts read from ComfyUI's source without importing it."""

import ast
from pathlib import Path

import pytest

SAMPLERS = Path(__file__).resolve().parents[2] / ".comfyui" / "comfy" / "samplers.py"


@pytest.fixture
def comfy_samplers():
    """Return the sampler names that this ComfyUI offers, in the engine's spelling."""
    if not SAMPLERS.is_file():
        pytest.skip("no ComfyUI beside the pack: run ./test.sh, which fetches one")
    for node in ast.parse(SAMPLERS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "KSAMPLER_NAMES":
            return [*ast.literal_eval(node.value), "unipc", "unipc_bh2"]
    raise AssertionError("KSAMPLER_NAMES is gone from comfy/samplers.py")
