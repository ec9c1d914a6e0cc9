"""Transformers of diffusers from ComfyUI's files, and back."""

from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..models.diffusers_names import sd3_config, to_diffusers
from ..safetensors_header import read_header


def load_transformer(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return a diffusers ``SD3Transformer2DModel`` with the weights of a ComfyUI file, in evaluation mode.

    Raises:
        StrettoError: diffusers is not installed, the file is not a whole safetensors file, or not SD3's.
    """
    try:
        from diffusers import SD3Transformer2DModel
        from safetensors.torch import load_file
    except ImportError as error:
        raise StrettoError(f"reading a transformer for diffusers needs {error.name}: pip install diffusers") from error
    read_header(path)  # refuses pickles and damaged files before anything is allocated
    weights = load_file(path)
    prefix = "model.diffusion_model."
    weights = {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in weights.items()}
    try:
        config, renamed = sd3_config(weights), to_diffusers(weights)
    except StrettoError as error:
        raise StrettoError(f"{path}: {error}") from error
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
    missing = sorted(set(transformer.state_dict()) - set(renamed))
    if missing:
        raise StrettoError(f"{path}: {missing[0]} is missing")
    transformer.load_state_dict(renamed, assign=True)
    return transformer.eval()
