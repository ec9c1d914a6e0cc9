"""Qwen-Image and Qwen-Image-Edit, whose pictures to edit follow the target's tokens."""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import modulate, shift_and_scale
from .modules import ATTN, MLP, Layout

_MODULES = (Layout((ATTN,), ("attn",)), Layout((MLP,), ("img_mlp", "txt_mlp")))


def _variant(network: Any) -> str:
    sizes = network.inner_dim, len(network.transformer_blocks), network.in_channels
    return "20b" if sizes == (3072, 60, 64) else ""


def _modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return ``img_norm1(img)`` under the first block's shift and scale. No coefficients were published for it."""
    block, image = network.transformer_blocks[0], args["img"]
    vec = args["vec"][: image.shape[0]]  # further rows, in newer versions, are for the references
    return modulate(block.img_norm1(image), *shift_and_scale(block.img_mod(vec), image.shape[-1]))


QWEN_IMAGE = ModelDescriptor(
    family="qwen_image",
    networks=("QwenImageTransformer2DModel",),
    block_lists=(("double_block", "transformer_blocks"),),
    hidden_size=lambda network: network.inner_dim,
    txt_out=frozenset({"double_block"}),
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    tea_input=_modulated_image,
    module_lists=(("double_block", "transformer_blocks", _MODULES),),
    joint_text=lambda network: "first",
    modulations=(("transformer_blocks", ("img_mod", "txt_mod")),),
    variant=_variant,
)
