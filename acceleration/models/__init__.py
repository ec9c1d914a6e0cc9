"""One descriptor per architecture family: what the engine may know of a network."""

from .auraflow import AURAFLOW
from .descriptor import BlockSite, ModelDescriptor
from .flux import CHROMA, FLUX
from .hookless import COSMOS_PREDICT2, HIDREAM, LUMINA2, PIXART
from .hunyuan_video import HUNYUAN_VIDEO
from .ltxv import LTXV
from .mochi import MOCHI
from .modules import MODULE_NAMES, ModulePart, ModuleSite, TextPart
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import WAN, WAN_VACE

FAMILIES: tuple[ModelDescriptor, ...] = (
    SD3,
    WAN,
    WAN_VACE,
    FLUX,
    CHROMA,
    HUNYUAN_VIDEO,
    LTXV,
    QWEN_IMAGE,
    AURAFLOW,
    MOCHI,
    LUMINA2,
    PIXART,
    COSMOS_PREDICT2,
    HIDREAM,
)


def describe(network: object) -> ModelDescriptor | None:
    """Return the descriptor of ``network``, or None when no family claims its exact class.

    The match is by exact class name: a subclass may run blocks of its own (VACE, S2V)
    that a parent's descriptor knows nothing of.
    """
    name = type(network).__name__
    return next((family for family in FAMILIES if name in family.networks), None)


__all__ = ["FAMILIES", "MODULE_NAMES", "BlockSite", "ModelDescriptor", "ModulePart", "ModuleSite", "TextPart", "describe"]
