"""What every session that looks at a network's self-attentions does: keep track of whose turn it is, and find the tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import Attention, Call
from ..facts import Facts
from ..models import BlockSite, ModelDescriptor, ModulePart
from ..models.modules import ATTN
from .geometry import Geometry
from .key_mask import valid_keys
from .locate import locate

_HOOK = "attention_override"
_MASKS = "attention key masks"


@dataclass
class AttentionWatcher:
    """Base of sessions that stand around attention.

    Attributes:
        descriptor: the network's family.
        network: the network; only its sizes are read.
    """

    descriptor: ModelDescriptor
    network: Any

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network; its attention comes by on its own."""
        return compute()

    def depths(self, call: Call) -> frozenset[int]:
        """No block hooks are needed."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block."""
        return original(args)

    def module(self, call: Call, part: ModulePart, original: Callable[[], Any]) -> Any:
        """Run one part of a module, and keep track of whose self-attention comes next."""
        call.attending = part.site if ATTN in part.site.names else None
        result = original()
        if not part.site.inner:
            call.attending = None  # the attention was inside this part
        return result

    def place(self, call: Call, asked: Attention) -> tuple[Geometry, torch.Tensor | None] | str:
        """Return where the tokens stand and how many keys are valid, int32 [B] or None for all; or why nobody knows."""
        if asked.q.shape[2] != asked.k.shape[2]:
            return "attention to other tokens than its own"
        if asked.exact:
            return "the network asks for full precision"
        geometry = locate(self.descriptor, self.network, call, asked)
        if isinstance(geometry, str) or asked.mask is None:
            return geometry if isinstance(geometry, str) else (geometry, None)
        kv_length = self._key_mask(call, asked, geometry)
        return (geometry, kv_length) if kv_length is not None else "a mask that does not just shorten the keys"

    def _key_mask(self, call: Call, asked: Attention, geometry: Geometry) -> torch.Tensor | None:
        """Return how many keys, in the plan's order, are valid; None for masks of another kind. Read once a call."""
        known = call.scratch.setdefault(_MASKS, {})
        key = id(asked.mask), asked.q.shape[0], geometry
        if key not in known:
            # The mask is kept beside the answer: its id stays taken.
            known[key] = asked.mask, valid_keys(asked.mask, asked.q.shape[0], geometry)
        return known[key][1]


def unreachable(facts: Facts) -> str | None:
    """Return why attention cannot be reached in this network, or None."""
    descriptor = facts.descriptor
    if _HOOK not in descriptor.hooks:
        return f"{descriptor.family} computes its attention where no other can be put in its place"
    if not any(ATTN in site.names for site in descriptor.module_sites(facts.network)):
        return f"the self-attention of {descriptor.family} cannot be told from other attention"
    if not facts.modules_in_place:
        return "another pack has replaced modules inside the blocks, which tell one layer's attention from another's"
    return None


def too_short(facts: Facts, least: int) -> str | None:
    """Return why a run of so few tokens is left alone, or None."""
    tokens = facts.descriptor.tokens(facts.network, facts.latent_shape)
    if tokens >= least:
        return None
    return (
        f"{tokens:,} image tokens; below min_tokens = {least:,} ordinary attention is left alone "
        "(attention is a small part of such a run)"
    )
