"""How ComfyUI's blocks and attention are given fewer tokens: one attention override, and object patches on blocks."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import Call
from ..models import BlockSite, describe
from ..plan import Plan
from ..region.session import REGION, RegionSession
from ..region.tokens import STREAMS, sites_of
from ..run import RunState

#: Returns the network call in progress, None outside of one.
Current = Callable[[], Call | None]


def with_kept_keys(options: dict[str, Any], run: RunState, current: Current) -> None:
    """Chain an override into model options that attends from active tokens to all, where the run has a region session.

    Whatever computes the attention is asked as ever, with fewer queries than keys.
    """
    session = next((session for session in run.sessions if isinstance(session, RegionSession)), None)
    if session is None:
        return
    transformer_options = options.setdefault("transformer_options", {})
    previous = transformer_options.get("optimized_attention_override")

    @torch.compiler.disable
    def attention(
        func: Callable,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        call = current()
        if call is not None and REGION in call.scratch:
            axis = 2 if kwargs.get("skip_reshape") else 1
            found = session.keys(call, q.shape[axis], k, v, axis)
            if found is not None:
                k, v, places, length = found
                mask = _of_queries(mask, places, length)
        if previous is not None:
            return previous(func, q, k, v, heads, mask, *args, **kwargs)
        return func(q, k, v, heads, mask, *args, **kwargs)

    transformer_options["optimized_attention_override"] = attention


def _of_queries(mask: torch.Tensor | None, places: torch.Tensor, length: int) -> torch.Tensor | None:
    """Return the rows of an attention mask [..., queries, keys] that belong to the active tokens."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] != length:
        return mask
    return mask.index_select(mask.ndim - 2, places)


@dataclass(frozen=True, eq=False)
class BlockPatch:
    """Object patch in the place of a block's ``forward``: passes through, unless the call in progress leaves tokens out.

    Attributes:
        site: the block.
        original: the ``forward`` it stands before.
        names: names of the arguments that hold tokens and their positions.
        current: the network call in progress.
    """

    site: BlockSite
    original: Callable
    names: tuple[str, str]
    current: Current

    @torch.compiler.disable  # how many tokens are active is decided outside of a compiled network's graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.current()
        passage = None if call is None else call.scratch.get(REGION)
        if passage is None:
            return self.original(*args, **kwargs)
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        tokens, positions = self.names

        def run(arguments: dict[str, Any]) -> dict[str, Any]:
            swapped = {**given, tokens: arguments["img"], positions: arguments["pe"]}
            return {"img": self.original(**swapped)}

        told = {"img": given[tokens], "pe": given.get(positions)}
        return passage.session.block(call, self.site, told, run)["img"]


def reach_blocks(clone: Any, plan: Plan, current: Current) -> None:
    """Patch the blocks of a network that has no hooks for them, where ``plan`` leaves tokens out; once only."""
    network = clone.model.diffusion_model
    descriptor = describe(network)
    if not plan.of("region") or descriptor is None or descriptor.family not in STREAMS:
        return
    patched = STREAMS[descriptor.family].patched
    if patched is None:
        return
    attribute, *names = patched
    for site in sites_of(descriptor, network):
        name = f"diffusion_model.{attribute}.{site.index}.forward"
        original = clone.get_model_object(name)
        if isinstance(original, BlockPatch) or not set(names) <= set(inspect.signature(original).parameters):
            continue
        clone.add_object_patch(name, BlockPatch(site, original, tuple(names), current))
