"""Families whose block loop has no replacement hook: a whole evaluation of them can be skipped, or modules inside blocks."""

from typing import Any

from .descriptor import ModelDescriptor
from .modules import ATTN, CROSS_ATTN, MLP, Layout

#: (width, layers)
_LUMINA = {(2304, 26): "2", (3840, 30): "z-image"}
#: (width, blocks, longest text, picture size as a condition). PixArt-alpha below 1024 pixels has no such condition.
_PIXART = {
    (1152, 28, 120, True): "alpha",
    (1152, 28, 120, False): "alpha",
    (1152, 28, 300, False): "sigma",
}
#: (width, blocks, input channels); a seventeenth channel marks given frames
_COSMOS = {
    (2048, 28, 16): "t2i-2b",
    (5120, 36, 16): "t2i-14b",
    (2048, 28, 17): "v2w-2b",
    (5120, 36, 17): "v2w-14b",
}

_LUMINA_MODULES = (Layout((ATTN,), ("attention",)), Layout((MLP,), ("feed_forward",)))
_PIXART_MODULES = (Layout((ATTN,), ("attn",)), Layout((CROSS_ATTN,), ("cross_attn",)), Layout((MLP,), ("mlp",)))
_COSMOS_MODULES = (Layout((ATTN,), ("self_attn",)), Layout((CROSS_ATTN,), ("cross_attn",)), Layout((MLP,), ("mlp",)))
#: Single blocks have no stream of text apart.
_HIDREAM_MODULES = (Layout((ATTN,), ("block.attn1",)), Layout((MLP,), ("block.ff_i", "block.ff_t")))


def _lumina_variant(network: Any) -> str:
    return _LUMINA.get((network.dim, len(network.layers)), "")


def _lumina_text(network: Any, tokens: int) -> int:
    """Z-Image fills its text up to a multiple."""
    return tokens + -tokens % (getattr(network, "pad_tokens_multiple", None) or 1)


def _pixart_variant(network: Any) -> str:
    text = network.y_embedder.y_embedding.shape[0]
    return _PIXART.get((network.hidden_size, len(network.blocks), text, network.micro_conditioning), "")


def _cosmos_variant(network: Any) -> str:
    return _COSMOS.get((network.model_channels, len(network.blocks), network.in_channels), "")


def _hidream_variant(network: Any) -> str:
    sizes = network.inner_dim, len(network.double_stream_blocks), len(network.single_stream_blocks)
    return "i1" if sizes == (2560, 16, 32) else ""


#: Lumina Image 2.0 and Z-Image are one class.
LUMINA2 = ModelDescriptor(
    family="lumina2",
    networks=("NextDiT",),
    block_lists=(),
    no_blocks="Lumina 2's and Z-Image's blocks have no replacement hook",
    hidden_size=lambda network: network.dim,
    hooks=frozenset({"diffusion_model", "attention_override"}),
    module_lists=(("layer", "layers", _LUMINA_MODULES),),
    joint_text=lambda network: "first",
    joint_text_tokens=_lumina_text,
    variant=_lumina_variant,
)

PIXART = ModelDescriptor(
    family="pixart",
    networks=("PixArtMS",),
    block_lists=(),
    no_blocks="PixArt's blocks have no replacement hook",
    hidden_size=lambda network: network.hidden_size,
    hooks=frozenset(),
    output_channels=lambda network: network.in_channels,  # the learned variance is cut off
    module_lists=(("block", "blocks", _PIXART_MODULES),),
    text_projections=(("blocks", (("cross_attn.kv_linear",),)),),
    text_tokens=300,
    variant=_pixart_variant,
)

COSMOS_PREDICT2 = ModelDescriptor(
    family="cosmos_predict2",
    networks=("MiniTrainDIT",),
    block_lists=(),
    no_blocks="Cosmos Predict2's blocks have no replacement hook",
    hidden_size=lambda network: network.model_channels,
    hooks=frozenset({"diffusion_model", "attention_override"}),
    patch_size=lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial),
    module_lists=(("block", "blocks", _COSMOS_MODULES),),
    # Keys are normed head by head, behind a change of shape: their norm runs as ever.
    text_projections=(("blocks", (("cross_attn.k_proj",), ("cross_attn.v_proj",))),),
    variant=_cosmos_variant,
)

HIDREAM = ModelDescriptor(
    family="hidream",
    networks=("HiDreamImageTransformer2DModel",),
    block_lists=(),
    no_blocks="HiDream's blocks have no replacement hook",
    hidden_size=lambda network: network.inner_dim,
    hooks=frozenset({"diffusion_model", "attention_override"}),
    module_lists=(
        ("double_block", "double_stream_blocks", _HIDREAM_MODULES),
        ("single_block", "single_stream_blocks", _HIDREAM_MODULES),
    ),
    joint_text=lambda network: "last",
    variant=_hidream_variant,
)
