"""ComfyUI in process, with tiny real networks of three families. No server, no files."""

import os
import sys
from pathlib import Path

import pytest

COMFYUI = Path(os.environ.get("STRETTO_COMFYUI", Path(__file__).resolve().parents[2] / ".comfyui"))
if not (COMFYUI / "comfy").is_dir():
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True


@pytest.fixture(scope="session")
def tiny():
    """Return ``tiny(family)``: a MODEL of a tiny random network, made once per session."""
    from .tiny_models import TinyModels

    return TinyModels()
