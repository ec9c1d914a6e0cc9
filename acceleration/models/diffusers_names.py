"""Weights of SD3 under ComfyUI's names and under diffusers', both ways: renamed, queries, keys and values apart or in one."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StrettoError

#: Width of a head of ComfyUI's SD3.
_HEAD = 64
_OUTSIDE = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SPLIT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _pairs(blocks: int) -> list[tuple[str, tuple[str, ...], bool]]:
    """Return (ComfyUI's module, diffusers' modules, whether shift and scale change places) of a network of ``blocks``."""
    pairs = [(name, (other,), name == "final_layer.adaLN_modulation.1") for name, other in _OUTSIDE.items()]
    for index in range(blocks):
        ours, theirs = f"joint_blocks.{index}.", f"transformer_blocks.{index}."
        for name, other in _BLOCK.items():
            # Text ends in the last block: its norm has no gates there, and diffusers keeps such norms scale first.
            swapped = name == "context_block.adaLN_modulation.1" and index == blocks - 1
            pairs.append((ours + name, (theirs + other,), swapped))
        pairs += [(ours + name, tuple(theirs + other for other in parts), False) for name, parts in _SPLIT.items()]
    return pairs


def to_diffusers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ComfyUI's SD3 weights under the names of diffusers' ``SD3Transformer2DModel``; parts are views.

    Raises:
        StrettoError: these are not the weights of an SD3 transformer; the message names one that has no place.
    """
    left, made = dict(weights), {}
    for ours, theirs, swapped in _pairs(_count(weights, "joint_blocks.")):
        for suffix in ("", ".weight", ".bias"):
            tensor = left.pop(ours + suffix, None)
            if tensor is None:
                continue
            parts = tensor.chunk(len(theirs)) if len(theirs) > 1 else (_swap(tensor) if swapped else tensor,)
            made.update({name + suffix: part for name, part in zip(theirs, parts, strict=True)})
    _refuse_rest(left, "ComfyUI's")
    return made


def from_diffusers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of :func:`to_diffusers`.

    Raises:
        StrettoError: these are not the weights of diffusers' ``SD3Transformer2DModel``.
    """
    left, made = dict(weights), {}
    for ours, theirs, swapped in _pairs(_count(weights, "transformer_blocks.")):
        for suffix in ("", ".weight", ".bias"):
            parts = [left.pop(name + suffix) for name in theirs if name + suffix in left]
            if len(parts) not in (0, len(theirs)):
                raise StrettoError(f"weights of {theirs[0]} are there, but not all of {', '.join(theirs)}")
            if parts:
                tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
                made[ours + suffix] = _swap(tensor) if swapped else tensor
    _refuse_rest(left, "diffusers'")
    return made


def sd3_config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of ``SD3Transformer2DModel`` for weights under ComfyUI's names.

    Raises:
        StrettoError: a weight that tells a size is missing.
    """
    needed = (
        "x_embedder.proj.weight",
        "context_embedder.weight",
        "y_embedder.mlp.0.weight",
        "final_layer.linear.weight",
    )
    missing = [name for name in (*needed, "pos_embed") if name not in weights]
    if missing:
        raise StrettoError(f"these are not the weights of an SD3 transformer: {missing[0]} is missing")
    patch, text, pooled, head = (weights[name].shape for name in needed)
    blocks = _count(weights, "joint_blocks.")
    side = math.isqrt(weights["pos_embed"].shape[1])
    return {
        "sample_size": side * patch[2],
        "patch_size": patch[2],
        "in_channels": patch[1],
        "out_channels": head[0] // patch[2] ** 2,
        "num_layers": blocks,
        "attention_head_dim": _HEAD,
        "num_attention_heads": text[0] // _HEAD,
        "joint_attention_dim": text[1],
        "caption_projection_dim": text[0],
        "pooled_projection_dim": pooled[1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            index for index in range(blocks) if f"joint_blocks.{index}.x_block.attn2.qkv.weight" in weights
        ),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in weights else None,
    }


def _count(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    if not numbers or numbers != {str(index) for index in range(len(numbers))}:
        raise StrettoError(
            f"these are not the weights of an SD3 transformer: no complete row of {prefix}0, 1, ... in them"
        )
    return len(numbers)


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _refuse_rest(left: Mapping[str, torch.Tensor], whose: str) -> None:
    if left:
        raise StrettoError(f"{next(iter(left))} is no weight of {whose} SD3 transformer")
