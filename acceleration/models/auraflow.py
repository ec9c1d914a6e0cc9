"""AuraFlow: double layers on two streams, then single layers on text (register tokens first) and image together."""

from typing import Any

import torch

from .descriptor import ModelDescriptor
from .modulation import modulate, shift_and_scale
from .modules import ATTN, MLP, Layout

_DOUBLE = (Layout((ATTN,), ("attn",)), Layout((MLP,), ("mlpX", "mlpC")))
_SINGLE = (Layout((ATTN,), ("attn",)), Layout((MLP,), ("mlp",)))


def _width(network: Any) -> int:
    return network.init_x_linear.out_features


def _variant(network: Any) -> str:
    sizes = _width(network), len(network.double_layers), len(network.single_layers)
    return "6.8b" if sizes == (3072, 4, 32) else ""


def _modulated_image(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return ``normX1(img)`` under the first layer's shift and scale. No coefficients were published for it."""
    layer, image = network.double_layers[0], args["img"]
    return modulate(layer.normX1(image), *shift_and_scale(layer.modX(args["vec"]), image.shape[-1]))


AURAFLOW = ModelDescriptor(
    family="auraflow",
    networks=("MMDiT",),
    block_lists=(("double_block", "double_layers"), ("single_block", "single_layers")),
    hidden_size=_width,
    text_in_stream=frozenset({"single_block"}),
    txt_out=frozenset({"double_block"}),
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
    tea_input=_modulated_image,
    module_lists=(("double_block", "double_layers", _DOUBLE), ("single_block", "single_layers", _SINGLE)),
    joint_text=lambda network: "first",
    modulations=(("double_layers", ("modC", "modX")), ("single_layers", ("modCX",))),
    joint_text_tokens=lambda network, tokens: tokens + network.register_tokens.shape[1],
    variant=_variant,
)
