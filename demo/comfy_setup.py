"""Start ComfyUI's library code without its server, so that training uses the very module classes that inference uses."""

from __future__ import annotations

import sys
from pathlib import Path


def start_comfy(folder: Path, device: str) -> None:
    """Put ComfyUI at `folder` on the path and initialise it for `device` ("cpu" or "cuda").

    Must run before any other `comfy` import: the argument parser and the device are fixed at import time.
    """
    if not (folder / "comfy").is_dir():
        raise FileNotFoundError(f"no ComfyUI at {folder}: pass --comfyui PATH")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True
    import comfy.model_management

    # Newer releases have a fused RoPE without a gradient; the flag selects the differentiable one.
    if hasattr(comfy.model_management, "in_training"):
        comfy.model_management.in_training = True
