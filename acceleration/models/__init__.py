"""One descriptor per architecture family: what the engine may know of a network."""

from .descriptor import BlockSite, ModelDescriptor
from .flux import FLUX
from .sd3 import SD3
from .wan import WAN

FAMILIES: tuple[ModelDescriptor, ...] = (SD3, WAN, FLUX)


def describe(network: object) -> ModelDescriptor | None:
    """Return the descriptor of ``network``, or None when no family claims its exact class.

    The match is by exact class name: a subclass may run blocks of its own (VACE, S2V)
    that a parent's descriptor knows nothing of.
    """
    name = type(network).__name__
    return next((family for family in FAMILIES if name in family.networks), None)


__all__ = ["FAMILIES", "BlockSite", "ModelDescriptor", "describe"]
