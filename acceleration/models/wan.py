"""Wan 2.1 and 2.2 text-to-video and image-to-video (the plain WanModel, not VACE, S2V or Animate)."""

from .descriptor import ModelDescriptor

WAN = ModelDescriptor(
    family="wan",
    networks=("WanModel",),
    block_lists=(("double_block", "blocks"),),
    hidden_size=lambda network: network.dim,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
)
