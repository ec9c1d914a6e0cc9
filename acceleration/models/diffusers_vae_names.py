"""Weights of VAEs under diffusers' names: TAESD as ``AutoencoderTiny``, Wan 2.1's as ``AutoencoderKLWan``."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StrettoError

#: What ComfyUI's SD3 latent format does before the network sees a latent z: (z - shift) * scale.
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
_WAN_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_WAN_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
#: Blocks of one resolution in Wan's decoder: three residual ones, and what enlarges.
_WAN_LEVEL = 4


def taesd_to_diffusers(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (config, weights) of an ``AutoencoderTiny`` for ComfyUI's TAESD beside an SD3 transformer.

    ComfyUI hands its latent z to the decoder as (z - vae_shift) * vae_scale; the config's scale and shift do both steps.

    Raises:
        StrettoError: a weight has no place there; the message names it.
    """
    left = dict(weights)
    scale, shift = (float(left.pop(name, default)) for name, default in (("vae_scale", 1.0), ("vae_shift", 0.0)))
    made = {}
    for name, tensor in left.items():
        found = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", name)
        if found is None:
            raise StrettoError(f"{name} is no weight of ComfyUI's TAESD")
        # Its decoder begins with a layer that only clamps, which diffusers keeps outside.
        made[f"{found[1]}.layers.{int(found[2]) - (found[1] == 'decoder')}.{found[3]}"] = tensor
    if "decoder.layers.0.weight" not in made:
        raise StrettoError("these are not the weights of a TAESD: taesd_decoder.1.weight is missing")
    config = {
        "latent_channels": made["decoder.layers.0.weight"].shape[1],
        "scaling_factor": SD3_SCALE / scale,
        "shift_factor": (SD3_SHIFT - shift) * scale,
    }
    return config, made


def wan_vae_to_diffusers(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (config, weights) of an ``AutoencoderKLWan`` for ComfyUI's VAE of Wan 2.1, of any width.

    Raises:
        StrettoError: a weight has no place there; the message names it.
    """
    made = {_wan_name(name): tensor for name, tensor in weights.items()}
    missing = [name for name in ("encoder.conv_in.weight", "post_quant_conv.weight") if name not in made]
    if missing:
        raise StrettoError(f"these are not the weights of Wan 2.1's VAE: {missing[0]} is missing")
    return {"base_dim": made["encoder.conv_in.weight"].shape[0], "z_dim": made["post_quant_conv.weight"].shape[0]}, made


def _wan_name(name: str) -> str:
    rules = (
        (r"conv1\.(.+)", lambda m: f"quant_conv.{m[1]}"),
        (r"conv2\.(.+)", lambda m: f"post_quant_conv.{m[1]}"),
        (r"(encoder|decoder)\.conv1\.(.+)", lambda m: f"{m[1]}.conv_in.{m[2]}"),
        (r"(encoder|decoder)\.head\.0\.(.+)", lambda m: f"{m[1]}.norm_out.{m[2]}"),
        (r"(encoder|decoder)\.head\.2\.(.+)", lambda m: f"{m[1]}.conv_out.{m[2]}"),
        (
            r"(encoder|decoder)\.middle\.([012])\.(.+)",
            lambda m: f"{m[1]}.mid_block.{_WAN_MIDDLE[m[2]]}.{_inside(m[3])}",
        ),
        (r"encoder\.downsamples\.(\d+)\.(.+)", lambda m: f"encoder.down_blocks.{m[1]}.{_inside(m[2])}"),
        (r"decoder\.upsamples\.(\d+)\.(.+)", lambda m: f"decoder.{_wan_level(int(m[1]))}.{_inside(m[2])}"),
    )
    for pattern, target in rules:
        found = re.fullmatch(pattern, name)
        if found:
            return target(found)
    raise StrettoError(f"{name} is no weight of ComfyUI's VAE of Wan 2.1")


def _wan_level(index: int) -> str:
    level, place = divmod(index, _WAN_LEVEL)
    return f"up_blocks.{level}." + ("upsamplers.0" if place == _WAN_LEVEL - 1 else f"resnets.{place}")


def _inside(name: str) -> str:
    found = re.fullmatch(r"residual\.([0236])\.(.+)", name)
    if found:
        return f"{_WAN_RESIDUAL[found[1]]}.{found[2]}"
    return name.replace("shortcut.", "conv_shortcut.", 1) if name.startswith("shortcut.") else name
