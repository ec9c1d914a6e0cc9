"""Stable Diffusion 3 and 3.5 (MMDiT)."""

from .descriptor import ModelDescriptor

SD3 = ModelDescriptor(
    family="sd3",
    networks=("OpenAISignatureMMDITWrapper",),
    block_lists=(("double_block", "joint_blocks"),),
    hidden_size=lambda network: network.hidden_size,
    hooks=frozenset({"block_replace", "attention_override"}),
)
