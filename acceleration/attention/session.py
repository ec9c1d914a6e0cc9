"""Sparse attention during a run: which attentions are sparse, by one plan over all layers, and what they kept."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import Attention, Call, Evaluation
from .audit import Audit, Seen
from .fit_run import FitRun
from .fitting import Fitting
from .geometry import Geometry
from .inside import AttentionWatcher
from .methods import METHODS
from .order import token_order
from .plan_run import Attended, PlanRun, pooled_by_layer, with_weights
from .ridge import RidgeFitting
from .settings import AttentionSettings
from .weights import AttentionWeights

DENSE_STEPS = "steps that stay dense"


@dataclass
class AttentionSession(AttentionWatcher):
    """Implements :class:`~..run.Session`, and stands inside blocks and attention.

    Attributes:
        settings: what the user asked for.
        steps: of the run.
        first: first step whose attention may be sparse.
        interval: part of the run it may act in, as fractions of the steps.
        weights: trained parts of a method, None without.
        bytes: memory of stored features: none.
        peak_bytes: likewise.
    """

    settings: AttentionSettings
    steps: int
    first: int
    interval: tuple[float, float] = (0.0, 1.0)
    weights: AttentionWeights | None = None
    section: str = "attention"
    bytes: int = 0
    peak_bytes: int = 0
    audit: Audit = field(default_factory=Audit)
    fit: FitRun = field(init=False)
    dense: Counter = field(default_factory=Counter)
    backends: Counter = field(default_factory=Counter)
    _plans: dict[tuple, PlanRun] = field(default_factory=dict)
    _sparse_step: bool = False
    _fitting: bool = False

    def __post_init__(self) -> None:
        self.fit = FitRun(fitting=RidgeFitting() if self.settings.fit == "map" else Fitting())

    def begin(self, evaluation: Evaluation) -> None:
        """Note whether attention may be sparse at this step, and whether it is to be looked at more closely."""
        start, end = (self.steps * edge for edge in self.interval)
        step = evaluation.step
        self._sparse_step = max(self.first, start) <= step < end
        self._fitting = not self._sparse_step and self.fit.wants(step, self.first)
        self.audit.begin(self._sparse_step and self.settings.probe and step in self._probed())

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network; its attention comes by on its own."""
        denoised = compute()
        self.audit.end(call.evaluation)
        return denoised

    def attention(self, call: Call, asked: Attention) -> torch.Tensor | None:
        """Return the sparse attention [B, H, N, d], None where it is to be computed as ever."""
        layer = call.attending.depth
        found = self._place(call, asked, layer)
        if isinstance(found, str):
            self.dense[found] += 1
            return None
        geometry, kv_length = found
        run = self._run(geometry, asked)
        if not self._sparse_step:
            self.dense[DENSE_STEPS] += 1
            if run.plan.correction.fitted:
                self.fit.observe(call, run, run.view(geometry, asked, layer, kv_length), asked.v)
            return None
        seen: list[Seen] = []

        def watch(made: Attended) -> None:
            if not seen:
                self.backends[made.backend] += 1
            seen.append(self.audit.look(call, made))

        fitted = self.fit.share(layer) if run.plan.correction.fitted else None
        out = run.attention(geometry, asked, layer, kv_length, fitted, watch)
        self.audit.add(call, layer, seen)
        return out

    def reset(self) -> None:
        """Nothing outlives a step."""

    def close(self) -> None:
        """Drop token orders, lists and sums."""
        self._plans.clear()
        self.audit.close()
        self.fit.close()

    def report(self) -> dict[str, Any]:
        """Return what was kept, by layer and head, how far it was off where it was looked at, and what stayed dense."""
        fitted = self.fit.report()
        return {
            "method": self.settings.method,
            "first_sparse_step": self.first,
            "plan": next((run.plan.to_json() for run in self._plans.values()), None),
            "backends": dict(self.backends),
            "dense": dict(self.dense),
            **self.audit.report(),
            **({"fitted": fitted} if fitted else {}),
        }

    def _place(self, call: Call, asked: Attention, layer: int) -> tuple[Geometry, torch.Tensor | None] | str:
        """Return where the tokens stand and how many keys are valid, or why attention stays as it is."""
        if not (self._sparse_step or self._fitting):
            return DENSE_STEPS
        return "layers that stay dense" if layer in self.settings.dense_layers else self.place(call, asked)

    def _run(self, geometry: Geometry, asked: Attention) -> PlanRun:
        """Return the plan for a geometry, made at its first attention.

        Raises:
            StrettoError: trained weights do not fit the heads of this model.
        """
        key = geometry, asked.q.shape[1], asked.q.device
        if key not in self._plans:
            layers = self.descriptor.module_blocks(self.network)
            plan = with_weights(METHODS[self.settings.method].plan(self.settings, geometry), self.weights, self.settings.keep)
            if self.weights is not None:
                heads, size = asked.q.shape[1], asked.q.shape[3]
                rows = -(-geometry.length // plan.q_block)
                self.weights.require(layers, heads, size, self.descriptor.family, rows)
            branch = plan.correction.linear
            self._plans[key] = PlanRun(
                plan,
                token_order(plan.order, geometry, asked.q.device),
                layers,
                branch.to(asked.q.device) if branch is not None else None,
                pooled_by_layer(plan, self.weights),
            )
            self.fit.wanted = plan.correction.fitted
        return self._plans[key]

    def _probed(self) -> set[int]:
        """The first, the middle and the last sparse step are compared with full attention."""
        return {self.first, (self.first + self.steps - 1) // 2, self.steps - 1}

