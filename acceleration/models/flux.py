"""FLUX.1 (double blocks on two streams, then single blocks on text and image together)."""

from .descriptor import ModelDescriptor

FLUX = ModelDescriptor(
    family="flux",
    networks=("Flux",),
    block_lists=(("double_block", "double_blocks"), ("single_block", "single_blocks")),
    hidden_size=lambda network: network.hidden_size,
    text_in_stream=frozenset({"single_block"}),
    in_place=True,
    hooks=frozenset({"block_replace", "diffusion_model", "attention_override"}),
)
