"""The schemas of all nodes, without a server."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def object_info(comfyui: Path) -> dict[str, Any]:
    """Return what the server of the ComfyUI in a folder answers to /object_info, from the node classes themselves.

    A process of its own: ComfyUI reads its command line on import, and its modules stay loaded.

    Raises:
        RuntimeError: ComfyUI or the pack could not be imported; with the end of what they said.
    """
    command = [sys.executable, str(ROOT / "scripts" / "dump_object_info.py"), str(comfyui), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])
