"""LTX-Video 0.9 (not LTX-2, whose blocks carry sound beside the picture). Keyframes are frames of the latent itself."""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import modulate, rms_norm
from .modules import ATTN, CROSS_ATTN, MLP, Layout

#: (width, blocks)
_VARIANTS = {(2048, 28): "2b", (4096, 48): "13b"}
_MODULES = (Layout((ATTN,), ("attn1",)), Layout((CROSS_ATTN,), ("attn2",)), Layout((MLP,), ("ff",)))


def _variant(network: Any) -> str:
    return _VARIANTS.get((network.inner_dim, len(network.transformer_blocks)), "")


def _modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return the normed ``img`` under the first block's shift and scale; ``vec`` is [B, 1 or N, 6 * width]."""
    image, vec = args["img"], args["vec"]
    table = network.transformer_blocks[0].scale_shift_table.to(device=image.device, dtype=image.dtype)
    shift, scale = (table + vec.reshape(*vec.shape[:2], *table.shape)).unbind(dim=2)[:2]
    return modulate(rms_norm(image), shift, scale)


LTXV = ModelDescriptor(
    family="ltxv",
    networks=("LTXVModel",),
    block_lists=(("double_block", "transformer_blocks"),),
    hidden_size=lambda network: network.inner_dim,
    in_place=True,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    patch_size=lambda network: network.patchifier.patch_size,
    tea_input=_modulated_image,
    module_lists=(("double_block", "transformer_blocks", _MODULES),),
    # The text passes an embedding that knows nothing of the timestep, and reaches every block as it is.
    text_projections=(("transformer_blocks", (("attn2.to_k", "attn2.k_norm"), ("attn2.to_v",))),),
    text_tokens=128,
    variant=_variant,
)
