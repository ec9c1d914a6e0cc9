"""A diffusers pipeline folder made of ComfyUI's files: SD3 and Wan transformers, TAESD and Wan's VAE. diffusers is not needed."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..models.diffusers_names import sd3_config, to_diffusers
from ..models.diffusers_vae_names import taesd_to_diffusers, wan_vae_to_diffusers
from ..models.diffusers_wan_names import TELLING, wan_config, wan_to_diffusers
from ..safetensors_header import read_header

#: Version whose configurations these are.
_VERSION = "0.39.0"
_PREFIX = "model.diffusion_model."
_SLACK = 64 << 20
_SD3_ABSENT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
               "image_encoder", "feature_extractor")  # fmt: skip
_WAN_ABSENT = ("text_encoder", "tokenizer", "transformer_2")


def write_folder(transformer: Path, vae: Path, target: Path, shift: float = 3.0) -> Path:
    """Write a pipeline folder without text encoders: prompts reach it as embeddings.

    Args:
        transformer: safetensors file of an SD3 or Wan transformer under ComfyUI's names.
        vae: safetensors file of its VAE: a TAESD for SD3, Wan 2.1's for Wan.
        target: the folder; it must not exist. It appears under its name only when it is whole.
        shift: of the noise levels of the flow, above 0.

    Raises:
        StrettoError: a file is damaged or of another kind, the folder exists, or the disk has no room.
    """
    target = Path(target)
    if not math.isfinite(shift) or shift <= 0:
        raise StrettoError(f"shift is {shift}; expected a number above 0, usually 1 to 12")
    if target.exists():
        raise StrettoError(f"{target}: exists already; name another folder")
    if not target.absolute().parent.is_dir():
        raise StrettoError(f"{target.absolute().parent}: there is no such folder")
    needed = sum(read_header(path).size for path in (transformer, vae))  # refuses pickles and damaged files
    free = shutil.disk_usage(target.absolute().parent).free
    if needed + _SLACK > free:
        raise StrettoError(f"{target}: needs {needed >> 20} MB, and {free >> 20} MB are free")
    index, parts = _pipeline(transformer, vae, shift)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
    try:
        _write(work, index, parts)
        os.replace(work, target)
    except OSError as error:
        raise StrettoError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _pipeline(transformer: Path, vae: Path, shift: float) -> tuple[dict[str, Any], dict[str, tuple]]:
    """Return model_index.json, and (file name, configuration, weights or None) of each component."""
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in _read(transformer).items()}
    wan = TELLING in weights
    try:
        if wan:
            name, config, renamed = "WanTransformer3DModel", wan_config(weights), wan_to_diffusers(weights)
        else:
            name, config, renamed = "SD3Transformer2DModel", sd3_config(weights), to_diffusers(weights)
    except StrettoError as error:
        raise StrettoError(f"{transformer}: {error}. Transformers of SD3 and Wan are converted") from None
    try:
        vae_name = "AutoencoderKLWan" if wan else "AutoencoderTiny"
        vae_config, vae_weights = (wan_vae_to_diffusers if wan else taesd_to_diffusers)(_read(vae))
    except StrettoError as error:
        raise StrettoError(f"{vae}: {error}") from None
    scheduler = {"num_train_timesteps": 1000, "shift": shift}
    parts = {
        "transformer": (name, config, renamed),
        "vae": (vae_name, vae_config, vae_weights),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", scheduler, None),
    }
    index = {"_class_name": "WanPipeline" if wan else "StableDiffusion3Pipeline", "_diffusers_version": _VERSION}
    index |= {part: ["diffusers", made[0]] for part, made in parts.items()}
    index |= {part: [None, None] for part in (_WAN_ABSENT if wan else _SD3_ABSENT)}
    return index, parts


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _write(folder: Path, index: Mapping[str, Any], parts: Mapping[str, tuple]) -> None:
    from safetensors.torch import save_file

    for part, (class_name, config, weights) in parts.items():
        (folder / part).mkdir()
        name = "config.json" if weights is not None else "scheduler_config.json"
        _json(folder / part / name, {"_class_name": class_name, "_diffusers_version": _VERSION, **config})
        if weights is not None:
            whole = {key: tensor.contiguous() for key, tensor in weights.items()}
            save_file(whole, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    _json(folder / "model_index.json", index)
    folder.chmod(0o755)  # mkdtemp's folders are their owner's alone


def _json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def run_to_diffusers(args: Any, say: Callable[[str], None], _: Any) -> int:
    """Handle ``cli.py to-diffusers``; return the exit status."""
    folder = write_folder(args.transformer, args.vae, args.folder, args.shift)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder}: {size / 2**20:,.1f} MB")
    return 0
