"""Where the tokens of a picture or clip stand in the sequence that a self-attention sees."""

from collections.abc import Sequence
from typing import Any

from ..evaluation import Attention, Call
from ..models import ModelDescriptor
from .geometry import Geometry


def locate(descriptor: ModelDescriptor, network: Any, call: Call, asked: Attention) -> Geometry | str:
    """Return the geometry of a self-attention, or why it is not known, in a user's words.

    Tokens that are not the target's own (text, reference pictures, sound) count as others, wherever they stand. The
    start is certain or refused: what the network says (``image_slice``), else its text's length, else, where nothing
    but text can stand beside the target, the side that its family puts text on.
    """
    grid = descriptor.grid(network, call.network_input.shape)
    visual, length = grid[0] * grid[1] * grid[2], asked.q.shape[2]
    others = length - visual
    if others < 0:
        return f"{length} tokens where the latent has {grid[0]} x {grid[1]} x {grid[2]}: not an attention over the picture"
    start = _start(descriptor, network, call, asked.image_slice, others)
    if start is None:
        return f"{others} tokens of text and reference pictures whose places are not known"
    return Geometry(grid, start, length)


def _start(
    descriptor: ModelDescriptor, network: Any, call: Call, image_slice: Sequence[int] | None, others: int
) -> int | None:
    """Return the index of the target's first token, None where it is not known."""
    if others == 0:
        return 0
    reference_first = descriptor.reference_first(network)
    side = descriptor.joint_text(network)
    if not side:  # whatever else there is are references
        return others if reference_first else 0
    if image_slice is not None:  # text first, image and references behind it
        text, references = image_slice[0], others - image_slice[0]
        return text + (references if reference_first else 0) if references >= 0 else None
    text = descriptor.joint_text_tokens(network, call.context_tokens) if call.context_tokens else 0
    if side == "last":
        if not (call.references and reference_first):
            return 0
        return others - text if 0 < text <= others else None
    if reference_first:
        return others  # text, references, target
    if not 0 < text <= others:
        return None if call.references else others
    return text  # behind the image there may be references, or what it was filled up with (Z-Image)
