"""A run whose attention is computed as ever, and looked at on the way."""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch

from ...evaluation import Attention, Call, Evaluation
from ...run import Clock, wall_clock
from ..geometry import Geometry
from ..inside import AttentionWatcher
from ..order import OrderSpec, TokenOrder, token_order
from ..plan import View
from ..search import Probe, curves_json


@dataclass
class ProbeSession(AttentionWatcher):
    """Implements :class:`~..run.Session` and :class:`~..run.Recorder`, and stands inside blocks and attention.

    Attributes:
        token: that whoever asked finds the record by.
        probe: gathers the curves.
        order: of the tokens.
        block_size: tokens in a block.
        sigmas: noise level of every step.
        about: what else the record is to say.
    """

    token: str
    probe: Probe
    order: OrderSpec
    block_size: int
    sigmas: tuple[float, ...]
    about: dict[str, Any]
    clock: Clock = wall_clock
    name: str = "attention_probe"
    bytes: int = 0
    peak_bytes: int = 0
    _sigma: float = float("inf")
    _bucket: int = -1
    _looks: int = 0
    _orders: dict[Geometry, TokenOrder] = field(default_factory=dict)
    _seen: dict[str, Any] = field(default_factory=dict)
    _left: set[str] = field(default_factory=set)
    _seconds: float = 0.0

    def begin(self, evaluation: Evaluation) -> None:
        """Note the noise level. Each part of the run is looked at for as many steps as reuse would go on without a full one."""
        bucket = bisect_right(self.probe.edges, evaluation.sigma)
        if bucket != self._bucket:
            self.probe.forget()  # steps are compared with the one before, not with one of another part
            self._bucket, self._looks = bucket, 0
        self._looks += evaluation.sigma != self._sigma
        self._sigma = evaluation.sigma

    def attention(self, call: Call, asked: Attention) -> torch.Tensor | None:
        """Look at the prompt's own branch; return None, so that attention is computed as ever."""
        if self._looks > self.probe.period:
            return None
        read = self.clock()
        found = self.place(call, asked)
        if isinstance(found, str):
            self._left.add(found)
            return None
        geometry, kv_length = found
        index = next((i for i, branch in enumerate(call.branches) if branch.name == "cond"), 0)
        if call.branches[index].name == "uncond":
            return None
        if geometry not in self._orders:
            self._orders[geometry] = token_order(self.order, geometry, asked.q.device)
        order = self._orders[geometry]
        q, k, v = (order.ordered(call.part(x, index)) for x in (asked.q, asked.k, asked.v))
        length = None if kv_length is None else call.part(kv_length, index)
        layer = call.attending.depth
        layers = self.descriptor.module_blocks(self.network)
        view = View(geometry, order, self.block_size, self.block_size, q, k, length, asked.scale, layer, layers, q.shape[1])
        self.probe.observe(view, v, call.branches[index].key, self._sigma)
        self._seen = {
            "layers": layers, "heads": q.shape[1], "kv_heads": k.shape[1], "size": q.shape[3], "tokens": geometry.length,
            "grid": list(geometry.grid), "rows": asked.q.shape[0],
        }  # fmt: skip
        self._seconds += read()
        return None

    def reset(self) -> None:
        """A new trajectory: nothing that was seen before it is compared with what comes."""
        self.probe.forget()

    def record(self) -> dict[str, Any]:
        """Return the curves and what they were read off, or why there are none."""
        document = {"token": self.token, "about": self.about, "seconds": self._seconds, "error": None, **self._seen}
        try:
            curves = self.probe.curves(self._seen.get("layers", 1), self._seen.get("heads", 1))
        except ValueError as error:
            why = "; ".join(sorted(self._left)) or f"{error}: the picture has too few tokens for blocks of {self.block_size}"
            return {**document, "error": why}
        return {**document, "curves": curves_json(curves), "sigmas": list(self.sigmas)}

    def close(self) -> None:
        """Drop everything."""
        self.probe.close()
        self._orders.clear()
