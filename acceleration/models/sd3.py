"""Stable Diffusion 3 and 3.5 (MMDiT)."""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import leading, modulate, shift_and_scale
from .modules import ATTN, MLP, Layout

#: (width, blocks, whether some blocks have a second attention over the image alone)
VARIANTS = {
    (1536, 24, False): "3-medium",
    (1536, 24, True): "3.5-medium",
    (2432, 38, False): "3.5-large",
    (256, 4, False): "stretto-demo-image",
}
#: SD3.5 medium's second attention over the image alone (attn2) is summed with the joint one: they go together.
_MODULES = (
    Layout(
        (ATTN,),
        ("x_block.attn.proj", "context_block.attn.proj", "x_block.attn2.proj"),
        ("x_block.attn.qkv", "context_block.attn.qkv", "x_block.attn2.qkv"),
    ),
    Layout((MLP,), ("x_block.mlp", "context_block.mlp")),
)


def _variant(network: Any) -> str:
    sizes = network.hidden_size, len(network.joint_blocks), bool(network.x_block_self_attn_layers)
    return VARIANTS.get(sizes, "")


def _modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return ``norm1(img)`` under the first block's shift and scale. No coefficients were published for it."""
    block, image = network.joint_blocks[0].x_block, args["img"]
    activation, projection = block.adaLN_modulation
    width = image.shape[-1]  # shift and scale come first, and are all that is asked for
    return modulate(block.norm1(image), *shift_and_scale(leading(projection, activation(args["vec"]), 2 * width), width))


SD3 = ModelDescriptor(
    family="sd3",
    networks=("OpenAISignatureMMDITWrapper",),
    block_lists=(("double_block", "joint_blocks"),),
    hidden_size=lambda network: network.hidden_size,
    txt_out=frozenset({"double_block"}),
    hooks=frozenset({"block_replace", "attention_override"}),
    tea_input=_modulated_image,
    module_lists=(("double_block", "joint_blocks", _MODULES),),
    joint_text=lambda network: "first",
    modulations=(("joint_blocks", ("x_block.adaLN_modulation", "context_block.adaLN_modulation")),),
    variant=_variant,
)
