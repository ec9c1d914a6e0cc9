"""Weights of Wan under diffusers' names: the transformer's, and what sizes they tell.

The way back is that of quantized files (``quantization/renaming.py``), which reads diffusers' Wan.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StrettoError

_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _PARTS.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _PARTS.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
#: A weight that only Wan's transformers have.
TELLING = "blocks.0.self_attn.norm_q.weight"
#: Width of a head, of the time embedding's input and of every head's rotation, as published.
_HEAD, _FREQUENCIES, _POSITIONS = 128, 256, 1024


def wan_to_diffusers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ComfyUI's weights of Wan (text to video) under the names of diffusers' ``WanTransformer3DModel``.

    Raises:
        StrettoError: a weight has no place there; the message names it.
    """
    return {_theirs(name): tensor for name, tensor in weights.items()}


def _theirs(name: str) -> str:
    head, _, block = name.partition("blocks.")
    number, _, inside = block.partition(".")
    table, prefix, inside = (_BLOCK, f"blocks.{number}.", inside) if not head and block else (_OUTSIDE, "", name)
    for suffix in ("", ".weight", ".bias"):
        if inside.endswith(suffix) and inside.removesuffix(suffix) in table:
            return prefix + table[inside.removesuffix(suffix)] + suffix
    raise StrettoError(f"{name} is no weight of ComfyUI's Wan transformer for text to video")


def wan_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of ``WanTransformer3DModel`` for weights under ComfyUI's names.

    Raises:
        StrettoError: a weight that tells a size is missing, or a width is no multiple of a head's.
    """
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "head.head.weight", "blocks.0.ffn.0.weight", TELLING)
    missing = [name for name in needed if name not in weights]
    if missing:
        raise StrettoError(f"these are not the weights of a Wan transformer: {missing[0]} is missing")
    (width, channels, *patch), (_, text), (out, _), (inner, _) = (weights[name].shape for name in needed[:4])
    if width % _HEAD:
        raise StrettoError(
            f"patch_embedding.weight: width {width} is no multiple of {_HEAD}, the width of a head of Wan"
        )
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if numbers != {str(index) for index in range(len(numbers))}:
        raise StrettoError(
            "these are not the weights of a Wan transformer: no complete row of blocks.0, 1, ... in them"
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // _HEAD,
        "attention_head_dim": _HEAD,
        "in_channels": channels,
        "out_channels": out // (patch[0] * patch[1] * patch[2]),
        "text_dim": text,
        "freq_dim": _FREQUENCIES,
        "ffn_dim": inner,
        "num_layers": len(numbers),
        "cross_attn_norm": "blocks.0.norm3.weight" in weights,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": _POSITIONS,
    }
