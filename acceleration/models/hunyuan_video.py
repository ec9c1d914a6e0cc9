"""HunyuanVideo 1.0 and 1.5, and HunyuanImage 2.1: FLUX's blocks over three axes.

1.5 has double blocks only. A reference latent stands before the video's tokens.
"""

from typing import Any

from .descriptor import ModelDescriptor
from .flux import modulated_image
from .modules import FLUX_DOUBLE, FLUX_MODULATIONS, FLUX_SINGLE

#: (width, double blocks, single blocks, patch, input channels, output channels)
_VARIANTS = {
    (3072, 20, 40, (1, 2, 2), 16, 16): "1",
    (3072, 20, 40, (1, 2, 2), 33, 16): "1-i2v",
    (2048, 54, 0, (1, 1, 1), 65, 32): "1.5",
    (3584, 20, 40, (1, 1), 64, 64): "image-2.1",
}


def _variant(network: Any) -> str:
    sizes = network.hidden_size, len(network.double_blocks), len(network.single_blocks)
    return _VARIANTS.get((*sizes, tuple(network.patch_size), network.in_channels, network.out_channels), "")


def _joint_text(network: Any) -> str:
    """Before 0.14 ComfyUI's double blocks know themselves as flipped: image first."""
    return "last" if getattr(network.double_blocks[0], "flipped_img_txt", False) else "first"


def _joint_text_tokens(network: Any, tokens: int) -> int:
    """Versions that also read glyphs or see a picture add tokens of their own, how many is not told."""
    more = getattr(network, "byt5_in", None) is not None or getattr(network, "vision_in", None) is not None
    return 0 if more else tokens


HUNYUAN_VIDEO = ModelDescriptor(
    family="hunyuan_video",
    networks=("HunyuanVideo",),
    block_lists=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    hidden_size=lambda network: network.hidden_size,
    text_after_image=frozenset({"single_block"}),
    txt_out=frozenset({"double_block"}),
    in_place=True,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    reference_first=lambda network: True,
    tea_input=modulated_image,
    module_lists=(("double_block", "double_blocks", FLUX_DOUBLE), ("single_block", "single_blocks", FLUX_SINGLE)),
    joint_text=_joint_text,
    joint_text_tokens=_joint_text_tokens,
    modulations=FLUX_MODULATIONS,
    variant=_variant,
)
