"""Published SLA checkpoints: which keys are projections, and what the files do not say.

- TurboDiffusion and what derives from it: a state dict (.pth, .safetensors) with
  ``blocks.{i}.self_attn.attn_op.local_attn.proj_l.{weight,bias}``, before its own conversion under ``net.`` in
  ``state_dict``; FastVideo ``blocks.{i}.attn1.attn_impl.proj_l``; diffusers-style
  ``blocks.{i}.attn1.attn_op.local_attn.proj_l``; DiffSynth-style ``blocks.{i}.self_attn.proj_l``. One projection per layer.
- SimpleTuner's ``sla_attention.pt``: ``{"settings", "state": {"<d>:<dtype>": {"proj_l.weight", "proj_l.bias"}},
  "version": 1}``. *One* projection for all layers.

None of them says which variant it was trained for, so the caller must. Checkpoints are unpickled with ``weights_only``,
which runs no code of theirs, and mapped: of a model of many gigabytes only the projections are read.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import StrettoError
from ...safetensors_header import Header
from ..linear import ALL, COMPLEMENT
from .files import TRAINED, read_tensor
from .format import ANY, FORMAT, MAX_LAYERS, SLA_PARTS

#: Endings of files that torch.save wrote.
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_PROJECTION = re.compile(
    r"(?:(?:net|net_ema|model|module|diffusion_model|transformer)\.)*(?:transformer_)?blocks\.(\d{1,4})\."
    r"(?:_checkpoint_wrapped_module\.)?(?:self_attn|attn1)\.(?:attn_op\.|local_attn\.|attn_impl\.)*proj_l\.(weight|bias)"
)
#: Where training programs keep the state dict in what they save.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "adapter")


def read_published(
    path: Path, header: Header | None, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the projections of a published checkpoint under our names, fp32, and metadata for them.

    Args:
        path: the file.
        header: of a safetensors file; None: it was pickled.
        options: ``variant``, ``topk``, ``layers``, ``base_model``, ``feature_map``, ``block_q``, ``block_k``, ``smooth_k``,
            ``base_hash``, as far as they are known; see ``convert``.

    Raises:
        StrettoError: no such checkpoint, or something is missing that only the caller can say.
    """
    said: Mapping[str, Any] = {}
    if header is not None:
        tensors = {ours: read_tensor(header, theirs) for ours, theirs in _projections(path, header.entries).items()}
    else:
        document = _unpickle(path)
        if isinstance(document.get("state"), dict) and "settings" in document:
            tensors, said = _simpletuner(path, document, options.get("layers"))
        else:
            nested = (document[name] for name in _NESTED if isinstance(document.get(name), dict))
            document = next(nested, document)
            tensors = {ours: document[theirs] for ours, theirs in _projections(path, document).items()}
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in TRAINED:
            found = str(getattr(tensor, "dtype", tensor))[:40]
            raise StrettoError(f"{path}: {key} is {found}; expected fp32, fp16 or bf16")
    return {key: tensor.detach().float().clone() for key, tensor in tensors.items()}, _metadata(path, said, options)


def _metadata(path: Path, said: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
    """Return our metadata from what the caller and the file say, the caller first."""
    if options.get("variant") not in (ALL, COMPLEMENT):
        raise StrettoError(
            f"{path}: variant is {options.get('variant') or ''!r}; published checkpoints do not say theirs, so name it: all "
            "(TurboDiffusion, SageSLA, SLA's main branch) or complement (its SLA-1 branch)"
        )
    topk = options.get("topk") or said.get("topk")
    if not topk:
        raise StrettoError(
            f"{path}: topk is not in the file; expected the share of key blocks it was trained with, such as 0.1"
        )
    return {
        "format": FORMAT,
        "variant": options["variant"],
        "feature_map": str(options.get("feature_map") or said.get("feature_map") or "softmax"),
        "topk": str(topk),
        "block_q": str(options.get("block_q") or said.get("blkq") or 64),
        "block_k": str(options.get("block_k") or said.get("blkk") or 64),
        "smooth_k": "true" if options.get("smooth_k", True) else "false",
        "base_model": str(options.get("base_model") or ANY),
        "base_hash": str(options.get("base_hash") or ""),
        "source": path.name,
    }


def _projections(path: Path, keys: Iterable[Any]) -> dict[str, str]:
    """Return our key -> key of the checkpoint, for the projections of its self-attention."""
    found: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str) or "proj_l." not in key:
            continue
        match = _PROJECTION.fullmatch(key)
        if not match:
            raise StrettoError(f"{path}: {key[:120]!r} is a projection in a layout that is not known")
        ours = f"blocks.{int(match[1])}.proj_l.{match[2]}"
        if ours in found:
            raise StrettoError(f"{path}: {found[ours]!r} and {key!r} are the same layer's; expected one of them")
        found[ours] = key
    if not found:
        raise StrettoError(
            f"{path}: no attention weights that Stretto knows; expected SLA's proj_l, CLEAR's FLUX attention or {FORMAT}"
        )
    return found


def _unpickle(path: Path) -> dict[Any, Any]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise StrettoError(
            f"{path}: not a PyTorch checkpoint of tensors alone, or truncated ({reason[:120]})"
        ) from None
    if not isinstance(document, dict):
        raise StrettoError(f"{path}: holds a {type(document).__name__}; expected tensors by name")
    return document


def _simpletuner(
    path: Path, document: Mapping[str, Any], layers: int | None
) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Return SimpleTuner's one projection for every layer, and its settings."""
    if document.get("version") != 1:
        raise StrettoError(f"{path}: version is {document.get('version')!r}; expected 1")
    state, settings = document["state"], document["settings"]
    if len(state) != 1:
        held = ", ".join(map(str, state)) or "nothing"
        raise StrettoError(f"{path}: state has projections for {held}; expected one head size and dtype")
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise StrettoError(
            f"{path}: layers is {layers!r}; SimpleTuner keeps one projection for all of them, so name the model's number"
        )
    part = next(iter(state.values()))
    if not isinstance(part, dict) or not set(SLA_PARTS) <= set(part):
        raise StrettoError(f"{path}: state has no proj_l.weight and proj_l.bias")
    projections = {f"blocks.{index}.{name}": part[name] for index in range(layers) for name in SLA_PARTS}
    return projections, settings if isinstance(settings, dict) else {}
