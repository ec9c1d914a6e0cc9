"""What a method decides: token order, key blocks, and what is added back. One plan serves every layer of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.block_sparse_attention import BlockList
from .builders import Selection, force
from .geometry import Geometry
from .order import OrderSpec, TokenOrder, token_order

if TYPE_CHECKING:
    from .linear import LinearBranch
    from .methods.clear import PooledKeys


@dataclass(frozen=True, eq=False)
class View:
    """What a builder may look at: one self-attention, its tokens in the new order.

    Attributes:
        geometry: where the visual tokens stand in the sequence.
        order: the new order; its device is the selection's.
        q_block: queries in a block.
        kv_block: keys in a block.
        q: [B, H, N, d] in the new order, None where only static builders look.
        k: [B, Hk, N, d], H a multiple of Hk; None likewise.
        kv_length: int32 [B], keys from there on are masked; None: none is.
        scale: factor of the logits.
        layer: which attention of the network this is, from 0.
        layers: how many there are.
        heads: H.
    """

    geometry: Geometry
    order: TokenOrder
    q_block: int = 64
    kv_block: int = 64
    q: Tensor | None = None
    k: Tensor | None = None
    kv_length: Tensor | None = None
    scale: float = 1.0
    layer: int = 0
    layers: int = 1
    heads: int = 1

    @property
    def query_blocks(self) -> int:
        """Nq: blocks of the whole sequence."""
        return -(-self.geometry.length // self.q_block)

    @property
    def key_blocks(self) -> int:
        """Nk: blocks of the whole sequence."""
        return -(-self.geometry.length // self.kv_block)

    @property
    def visual_query_blocks(self) -> int:
        """Query blocks with a visual token; the last of them may hold others too."""
        return -(-self.geometry.visual // self.q_block)

    @property
    def visual_key_blocks(self) -> int:
        """Key blocks with a visual token; the last of them may hold others too."""
        return -(-self.geometry.visual // self.kv_block)

    @property
    def device(self) -> torch.device:
        """Where selections are made."""
        return self.order.coordinates.device


Builder = Callable[[View], Selection]


@dataclass(frozen=True)
class Correction:
    """What stands in for the key blocks that are left out.

    Attributes:
        tail: each of them enters the softmax as one pooled key.
        linear: a trained linear branch beside the softmax.
        fitted: an untrained branch may be fitted per head, and is used where it has proved itself.
    """

    tail: bool = False
    linear: "LinearBranch | None" = None
    fitted: bool = False


@dataclass(frozen=True)
class AttentionPlan:
    """One method at one geometry.

    Attributes:
        name: of the method.
        order: how tokens are ordered.
        builder: which key blocks each query block attends to.
        dynamic: whether the builder looks at queries and keys, and so at every call.
        q_block: queries in a block.
        kv_block: keys in a block.
        correction: what stands in for the rest.
        extra_keys: pooled keys that visual queries see besides (CLEAR); None: no such.
        diagonal: blocks on either side of a query block's own that are always kept; -1: not even its own.
        sink_frames: first frames that are always kept as keys.
        skip_heads: heads whose output is zero (Sparse-vDiT).
        parameters: the numbers behind the builder, for traces.
    """

    name: str
    order: OrderSpec
    builder: Builder
    dynamic: bool
    q_block: int = 64
    kv_block: int = 64
    correction: Correction = Correction()
    extra_keys: "PooledKeys | None" = None
    diagonal: int = -1
    sink_frames: int = 0
    skip_heads: tuple[int, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def view(self, geometry: Geometry, device: torch.device | str = "cpu", **call: Any) -> View:
        """Return the view of a call: ``call`` are fields of :class:`View`; none are needed for a static plan."""
        return View(geometry, token_order(self.order, geometry, device), self.q_block, self.kv_block, **call)

    def selection(self, view: View) -> Selection:
        """Return what is kept: the builder's choice, and what must be kept in any case (:func:`~.builders.force`).

        What a static plan keeps is the same for every call, so it may list keys that a call masks; kernels do not
        attend to them.

        Raises:
            ValueError: the builder needs queries and keys, and the view has none.
        """
        seen = view if self.dynamic else replace(view, q=None, k=None, kv_length=None)
        chosen = force(self.builder(seen), seen, self.diagonal, self.sink_frames)
        if not self.skip_heads:
            return chosen
        alive = torch.ones(view.heads, dtype=torch.bool, device=view.device)
        alive[[head for head in self.skip_heads if head < view.heads]] = False
        return Selection(chosen.mask & alive[:, None, None], chosen.full, chosen.predicate)

    def blocks(self, view: View) -> BlockList:
        """Return :meth:`selection` as lists for the kernel."""
        chosen = self.selection(view)
        return BlockList.from_mask(chosen.mask, self.q_block, self.kv_block, chosen.full)

    def to_json(self) -> dict[str, Any]:
        """Return what the plan is as JSON values."""
        order: dict[str, Any] = {"name": self.order.name}
        if self.order.name == "tiles":
            order["tile"] = list(self.order.tile)
        return {
            "method": self.name,
            "order": order,
            "dynamic": self.dynamic,
            "q_block": self.q_block,
            "kv_block": self.kv_block,
            "parameters": dict(self.parameters),
            "correction": {
                "tail": self.correction.tail,
                "linear": self.correction.linear is not None,
                "fitted": self.correction.fitted,
            },
            "extra_keys": None if self.extra_keys is None else self.extra_keys.factor,
            "diagonal": self.diagonal,
            "sink_frames": self.sink_frames,
            "skip_heads": list(self.skip_heads),
        }
