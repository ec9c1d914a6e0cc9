"""Mochi 1 (AsymmDiT). Its text stream is narrower than its image stream."""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import rms_norm
from .modules import ATTN, MLP, Layout

_MODULES = (Layout((ATTN,), ("attn",)), Layout((MLP,), ("mlp_x", "mlp_y")))


def _variant(network: Any) -> str:
    return "1" if (network.hidden_size_x, len(network.blocks)) == (3072, 48) else ""


def _modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return the normed ``img`` under the first block's scale; Mochi has no shift."""
    scale = network.blocks[0].mod_x(torch.nn.functional.silu(args["vec"])).chunk(4, dim=1)[0]
    return rms_norm(args["img"]) * (1 + scale.unsqueeze(1))


MOCHI = ModelDescriptor(
    family="mochi",
    networks=("AsymmDiTJoint",),
    block_lists=(("double_block", "blocks"),),
    hidden_size=lambda network: network.hidden_size_x,
    txt_out=frozenset({"double_block"}),
    hooks=frozenset({"block_replace", "attention_override"}),
    tea_input=_modulated_image,
    module_lists=(("double_block", "blocks", _MODULES),),
    joint_text=lambda network: "last",
    variant=_variant,
)
