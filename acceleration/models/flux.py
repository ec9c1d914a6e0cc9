"""FLUX.1, FLUX.2, Kontext and Chroma: double blocks on two streams, then single blocks on text and image together.

FLUX.1 and FLUX.2 are one class. Reference pictures (Kontext, FLUX.2) follow the target's tokens.
"""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import modulate
from .modules import FLUX_DOUBLE, FLUX_MODULATIONS, FLUX_SINGLE

#: (width, double blocks, single blocks, patch side, input channels per pixel, guidance embedding). Kontext has the
#: sizes of FLUX.1 [dev].
VARIANTS = {
    (3072, 19, 38, 2, 16, True): "dev",
    (3072, 19, 38, 2, 16, False): "schnell",
    (3072, 19, 38, 2, 96, True): "fill",
    (3072, 19, 38, 2, 32, True): "control",
    (6144, 8, 48, 1, 128, True): "2-dev",
}


def _flux_variant(network: Any) -> str:
    patch = network.patch_size
    channels = network.in_channels // patch**2
    sizes = network.hidden_size, len(network.double_blocks), len(network.single_blocks), patch, channels
    return VARIANTS.get((*sizes, network.params.guidance_embed), "")


def _chroma_variant(network: Any) -> str:
    sizes = network.hidden_size, len(network.double_blocks), len(network.single_blocks), network.in_channels
    return "1" if sizes == (3072, 19, 38, 64) else ""


def _output_channels(network: Any) -> int:
    """The network counts the channels of a whole patch."""
    return network.out_channels // network.patch_size**2


def modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return ``img_norm1(img)`` under the first double block's shift and scale, what its attention will see.

    ``vec`` is a vector that the block makes its modulation from, or (FLUX.2, Chroma) the modulations themselves.
    """
    block, image, vec = network.double_blocks[0], args["img"], args["vec"]
    modulation = block.img_mod(vec)[0] if block.modulation else vec[0][0]
    normed, shift, scale = block.img_norm1(image), modulation.shift, modulation.scale
    ranges = args.get("modulation_dims_img")
    if ranges is None:
        # Newer versions may keep a second row, for references only, that the hook's arguments do not place.
        return modulate(normed, shift[: len(image), :1], scale[: len(image), :1])
    # Image to video: (first token, end, row of vec); the given frame has a timestep of its own.
    parts = [modulate(normed[:, a:b], shift[:, row : row + 1], scale[:, row : row + 1]) for a, b, row in ranges]
    return torch.cat(parts, dim=1)


FLUX = ModelDescriptor(
    family="flux",
    networks=("Flux",),
    block_lists=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    hidden_size=lambda network: network.hidden_size,
    text_in_stream=frozenset({"single_block"}),
    txt_out=frozenset({"double_block"}),
    in_place=True,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    output_channels=_output_channels,
    tea_input=modulated_image,
    module_lists=(("double_block", "double_blocks", FLUX_DOUBLE), ("single_block", "single_blocks", FLUX_SINGLE)),
    joint_text=lambda network: "first",
    modulations=FLUX_MODULATIONS,  # FLUX.2's three are shared by all blocks
    variant=_flux_variant,
)

CHROMA = ModelDescriptor(
    family="chroma",
    networks=("Chroma",),
    block_lists=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    hidden_size=lambda network: network.hidden_size,
    text_in_stream=frozenset({"single_block"}),
    txt_out=frozenset({"double_block"}),
    in_place=True,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    skip_lists=(("double_block", "skip_mmdit"), ("single_block", "skip_dit")),
    output_channels=_output_channels,
    tea_input=modulated_image,
    module_lists=(("double_block", "double_blocks", FLUX_DOUBLE), ("single_block", "single_blocks", FLUX_SINGLE)),
    joint_text=lambda network: "first",
    variant=_chroma_variant,
)
