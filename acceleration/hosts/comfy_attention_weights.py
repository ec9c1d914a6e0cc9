"""How ComfyUI models get attention weights: CLEAR's as ordinary weight patches, reversible and per clone."""

from typing import Any

import torch

from ..attention.weights import AttentionWeights, clear_tensors
from ..errors import StrettoError
from ..models import describe

#: Key of a patch: a weight's name, or with (dimension, start, length) a part of it.
PatchKey = str | tuple[str, tuple[int, int, int]]
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}


def patch_key(stream: str, block: int, part: str, end: str, width: int) -> PatchKey:
    """Return where ComfyUI's FLUX keeps an attention weight that diffusers calls ``part``.

    Queries, keys and values are one matrix there, [3 C, C], and in single blocks the first 3 C rows of ``linear1``, which
    holds the MLP's too.

    Args:
        stream: ``"double"`` (the picture's stream) or ``"single"``.
        block: number of the block in its list.
        part: ``"to_q"``, ``"to_k"``, ``"to_v"`` or ``"to_out.0"``.
        end: ``"weight"`` or ``"bias"``.
        width: channels of all heads, C.
    """
    name = f"diffusion_model.{stream}_blocks.{block}."
    if part not in _QKV:
        return f"{name}img_attn.proj.{end}"
    joint = "img_attn.qkv" if stream == "double" else "linear1"
    return f"{name}{joint}.{end}", (0, _QKV[part] * width, width)


def apply_clear(model: Any, weights: AttentionWeights) -> Any:
    """Return a clone of MODEL ``model`` whose FLUX attention has CLEAR's weights.

    They replace the model's own and stand before every other patch of the same weights, so that LoRAs add to them
    wherever their loader stands in the workflow.

    Raises:
        StrettoError: no FLUX, or one of other sizes, or the file changed meanwhile.
    """
    network = model.model.diffusion_model
    descriptor = describe(network)
    if descriptor is None or descriptor.family != "flux":
        raise StrettoError(f"{weights.file}: CLEAR's weights are for FLUX.1; the model is {type(network).__name__}")
    found = len(network.double_blocks), len(network.single_blocks), network.hidden_size
    wanted = weights.double_blocks, weights.single_blocks, weights.width
    if found != wanted:
        words = "{} double and {} single blocks of {} channels"
        raise StrettoError(f"{weights.file}: it is for {words.format(*wanted)}; the model has {words.format(*found)}")
    tensors = clear_tensors(weights)
    patches: dict[PatchKey, tuple[str, tuple[torch.Tensor]]] = {
        patch_key(*place, weights.width): ("set", (tensor,)) for place, tensor in tensors.items()
    }
    names = {key if isinstance(key, str) else key[0] for key in patches}
    missing = names - set(model.model.state_dict())
    if missing:
        raise StrettoError(f"{weights.file}: the model has no {min(missing)}; CLEAR's weights are for FLUX.1")
    clone = model.clone()
    clone.add_patches(patches)
    for name in names:
        clone.patches[name].sort(key=lambda patch: not _sets(patch))
    return clone


def _sets(patch: tuple) -> bool:
    """Whether a patch puts a weight in the place of the old one, ``(strength, ("set", ...), ...)``."""
    kind = patch[1][0] if isinstance(patch[1], tuple) and patch[1] else None
    return isinstance(kind, str) and kind == "set"
