"""ComfyUI in process, on the CUDA device. A pytest process of its own: ComfyUI chooses its device when it is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

COMFYUI = Path(os.environ.get("STRETTO_COMFYUI", Path(__file__).resolve().parents[2] / ".comfyui"))
MISSING = "" if torch.cuda.is_available() else "torch finds no CUDA device here"
if not (COMFYUI / "comfy").is_dir():
    collect_ignore_glob = ["test_runs.py"]
else:
    sys.path.insert(0, str(COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = bool(MISSING)
    comfy.cli_args.args.use_pytorch_cross_attention = True


def pytest_collection_modifyitems(items):
    """Mark everything in this folder, and skip it where there is nothing to run it on."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(autouse=True)
def exact_products():
    """Compare 32-bit products with 32-bit products."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
