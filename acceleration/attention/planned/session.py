"""A plan at work: every attention asks the memory what its heads do, and leaves there what later steps need."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...evaluation import Attention, Call, Evaluation
from ..audit import Audit
from ..geometry import Geometry
from ..inside import AttentionWatcher
from ..order import TokenOrder, token_order
from ..plan import View
from ..reuse import NAMES, AttentionMemory, Mode, ModeTable, Policy
from ..search import PlanFile

#: What the report says of attentions whose heads are all full.
ALL_FULL = "all heads full"
#: One character per mode in reports, "." where no attention came by.
LETTERS = dict(zip(NAMES.values(), "FLSRHMZB", strict=True))


@dataclass
class PlannedSession(AttentionWatcher):
    """Implements :class:`~..run.Session`, and stands inside blocks and attention.

    Attributes:
        name: of the plan.
        make: number of heads -> plan; raises StrettoError where the plan is for another number.
        sigmas: noise level of every step.
        policy: how features are kept.
        budget_bytes: that they may take on the device.
        branches: guidance branches of an evaluation.
        interval: part of the run it may act in, as fractions of the steps.
        compare: whether three steps are compared with full attention.
    """

    name: str
    make: Callable[[int], PlanFile]
    sigmas: tuple[float, ...]
    policy: Policy
    budget_bytes: int
    branches: int = 2
    interval: tuple[float, float] = (0.0, 1.0)
    compare: bool = True
    section: str = "attention"
    audit: Audit = field(default_factory=Audit)
    dense: Counter = field(default_factory=Counter)
    _plan: PlanFile | None = None
    _memory: AttentionMemory | None = None
    _orders: dict[tuple[Geometry, torch.device], TokenOrder] = field(default_factory=dict)
    _now: tuple[float, int] = (float("inf"), 0)
    _kept: list[torch.Tensor] = field(default_factory=list)
    _missed: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of kept features now, wherever they are."""
        return 0 if self._memory is None else self._memory.bytes + self._memory.system_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were kept at a time."""
        return 0 if self._memory is None else self._memory.peak_bytes + self._memory.peak_system_bytes

    def begin(self, evaluation: Evaluation) -> None:
        """Open an evaluation; what no later step can use is dropped."""
        self._now = evaluation.sigma, evaluation.step
        if self._memory is not None:
            self._memory.begin(*self._now)
        self.audit.begin(self.compare and evaluation.step in self._compared())

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network; its attention comes by on its own."""
        denoised = compute()
        self.audit.end(call.evaluation)
        return denoised

    def attention(self, call: Call, asked: Attention) -> torch.Tensor | None:
        """Return the attention [B, H, N, d] as planned, None where all of it is full and nothing need be kept."""
        layer, found = call.attending.depth, self.place(call, asked)
        if isinstance(found, str):
            self.dense[found] += 1
            return None
        geometry, kv_length = found
        memory = self._ready(asked.q.shape[1])
        decision = memory.decide(layer, call.branches, asked.q.shape, asked.q)
        self._missed += decision.missed
        if decision.plain:
            self.dense[ALL_FULL] += 1
            return None
        order = self._order(geometry, asked.q.device)
        q, k, v = (order.ordered(x) for x in (asked.q, asked.k, asked.v))
        view = View(
            geometry, order, *self._plan.block, q, k, kv_length, asked.scale, layer, self._plan.layers, q.shape[1]
        )  # fmt: skip
        self._kept = []
        out = memory.compute(
            decision, q, k, v, lambda: self._plan.select(view, self._now[0]), self._plan.block,
            scale=asked.scale, kv_length=kv_length,
        )  # fmt: skip
        share = torch.stack(self._kept).mean(0)
        if bool((decision.modes[0] != int(Mode.FULL)).any()):
            self.audit.add(call, layer, [self.audit.look_at(call, view, v, out, share)])
        return order.as_given(out)

    def reset(self) -> None:
        """Forget everything: a new trajectory has begun."""
        if self._memory is not None:
            self._memory.reset()

    def close(self) -> None:
        """Free everything."""
        if self._memory is not None:
            self._memory.close()
        self._orders.clear()
        self._kept.clear()
        self.audit.close()

    def report(self) -> dict[str, Any]:
        """Return what the heads did, what it took, how far it was off, and what was left alone."""
        memory = self._memory
        modes = None
        if memory is not None:
            grid, letters = memory.grid(), {int(mode): letter for mode, letter in LETTERS.items()}
            modes = [["".join(letters.get(int(x), ".") for x in heads) for heads in layers] for layers in grid]
        return {
            "method": self.name,
            "first_sparse_step": 0 if modes is None else _first_with_less(modes),
            "plan": None if self._plan is None else _brief(self._plan),
            "backends": {},
            "dense": dict(self.dense),
            **self.audit.report(),
            **({} if memory is None else {"modes": modes, "memory": _memory_json(memory, self._missed)}),
        }

    def _ready(self, heads: int) -> AttentionMemory:
        """Return the memory, made at the first attention: only then the number of heads is known."""
        if self._memory is None:
            self._plan = self.make(heads)
            self._memory = AttentionMemory(
                _within(self._plan.table(self.sigmas), self.interval),
                self._plan.rho_step,
                self.policy,
                self.budget_bytes,
                self.branches,
                static=self._plan.static(),
                watch=lambda layer, share: self._kept.append(share),
            )
            self._memory.begin(*self._now)
        return self._memory

    def _order(self, geometry: Geometry, device: torch.device) -> TokenOrder:
        key = geometry, device
        if key not in self._orders:
            self._orders[key] = token_order(self._plan.order, geometry, device)
        return self._orders[key]

    def _compared(self) -> set[int]:
        """A third of the run, two thirds, and its last step are compared with full attention."""
        steps = len(self.sigmas)
        return {steps // 3, 2 * steps // 3, steps - 1}


def _memory_json(memory: AttentionMemory, missed: int) -> dict[str, Any]:
    names = ("heads", "policy", "peak_bytes", "peak_system_bytes")
    found = memory.report()
    return {**{name: found[name] for name in names}, "missed": missed}


def _within(table: ModeTable, interval: tuple[float, float]) -> ModeTable:
    """Return a table that is full outside of a part of the run."""
    modes, cfg = table.modes.copy(), table.cfg.copy()
    start, end = (table.steps * edge for edge in interval)
    for step in range(table.steps):
        if not start <= step < end:
            modes[step], cfg[step] = int(Mode.FULL), False
    return ModeTable(modes, cfg, table.alpha)


def _first_with_less(modes: list[list[str]]) -> int:
    """Return the first step at which a head was not full; the number of steps where all were."""
    return next((step for step, layers in enumerate(modes) if set("".join(layers)) - set("F.")), len(modes))


def _brief(plan: PlanFile) -> dict[str, Any]:
    """Return what a plan is, without its tables."""
    names = ("model", "steps", "grid", "tokens", "block", "order", "patterns", "achieved", "provenance")
    document = plan.to_json()
    return {name: document[name] for name in names}
