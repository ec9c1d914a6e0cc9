"""Wan 2.1 and 2.2: text-to-video and image-to-video (the plain WanModel), and VACE. Not S2V, HuMo, Camera or Animate.

Wan 2.2's two experts are two networks of one size: each is a model of its own, with a sampler of its own.
"""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modules import ATTN, CROSS_ATTN, MLP, Layout

#: (width, blocks, feed-forward width, input channels, output channels, kind, first and last frame). Wan 2.2's text
#: experts have the sizes of Wan 2.1's 14B, and its models for 480p and 720p those of one another.
VARIANTS = {
    (1536, 30, 8960, 16, 16, "t2v", False): "2.1-t2v-1.3b",
    (5120, 40, 13824, 16, 16, "t2v", False): "2.1-t2v-14b",
    (5120, 40, 13824, 36, 16, "i2v", False): "2.1-i2v-14b",
    (5120, 40, 13824, 36, 16, "i2v", True): "2.1-flf2v-14b",
    (5120, 40, 13824, 36, 16, "t2v", False): "2.2-i2v-14b",  # without Wan 2.1's image embedding
    (3072, 30, 14336, 48, 48, "t2v", False): "2.2-ti2v-5b",
    (256, 8, 1024, 16, 16, "t2v", False): "stretto-demo-video",
}
#: (width, blocks, VACE blocks)
_VACE = {(1536, 30, 15): "2.1-1.3b", (5120, 40, 8): "2.1-14b"}
_MODULES = (Layout((ATTN,), ("self_attn",)), Layout((CROSS_ATTN,), ("cross_attn",)), Layout((MLP,), ("ffn",)))


#: Text, and the picture that image-to-video is given beside it, pass an embedding each and reach every block as they are.
_TEXT = (
    ("cross_attn.k", "cross_attn.norm_k"),
    ("cross_attn.v",),
    ("cross_attn.k_img", "cross_attn.norm_k_img"),
    ("cross_attn.v_img",),
)


def _wan_variant(network: Any) -> str:
    if network.ref_conv is not None:
        return ""  # Fun models
    frames = getattr(getattr(network, "img_emb", None), "emb_pos", None) is not None
    sizes = network.dim, len(network.blocks), network.ffn_dim, network.in_dim, network.out_dim
    return VARIANTS.get((*sizes, network.model_type, frames), "")


def _vace_variant(network: Any) -> str:
    return _VACE.get((network.dim, len(network.blocks), network.vace_layers), "")


def _time_embedding(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return e0, the projected time embedding [B, frames or 1, 6, dim].

    It does not depend on the data. TeaCache's coefficients for "retention" are fitted to it; the others to the
    embedding before its projection, which no hook sees.
    """
    return args["vec"]


WAN = ModelDescriptor(
    family="wan",
    networks=("WanModel",),
    block_lists=(("double_block", "blocks"),),
    hidden_size=lambda network: network.dim,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    output_channels=lambda network: network.out_dim,
    # A reference through ref_conv comes first; frames of other pictures (Phantom) follow the video's.
    reference_first=lambda network: network.ref_conv is not None,
    tea_input=_time_embedding,
    module_lists=(("double_block", "blocks", _MODULES),),
    text_projections=(("blocks", _TEXT),),
    variant=_wan_variant,
)

WAN_VACE = ModelDescriptor(
    family="wan_vace",
    networks=("VaceWanModel",),
    block_lists=(),
    no_blocks="VACE's own blocks run between Wan's and cannot be skipped with them",
    hidden_size=lambda network: network.dim,
    hooks=frozenset({"diffusion_model", "attention_override"}),
    output_channels=lambda network: network.out_dim,
    # Wan's own blocks: VACE's run once for every picture or clip they are given.
    module_lists=(("double_block", "blocks", _MODULES),),
    text_projections=(("blocks", _TEXT), ("vace_blocks", _TEXT)),
    variant=_vace_variant,
)
