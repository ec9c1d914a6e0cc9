"""A branch without weights, fitted during the dense steps of the same run (:mod:`.fitting`)."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.block_sparse_attention import BlockList, block_sparse_attention
from ..evaluation import Call
from .fitting import Fitting, sampled_blocks, sampled_rows, take_blocks
from .linear import SALAD, LinearBranch
from .plan import View
from .plan_run import Fitted, PlanRun

#: The last dense steps that are learned from, and query blocks of a layer that are looked at in each.
STEPS, SAMPLED = 4, 4


@dataclass
class FitRun:
    """Learns, per layer and head, how far to trust a linear branch beside the kept blocks.

    Attributes:
        wanted: whether the plan has a branch to fit; known at its first attention.
        branch: the branch: SALAD's form, ReLU features over all keys.
        fitting: what has been learned.
    """

    wanted: bool = True
    branch: LinearBranch = field(default_factory=lambda: LinearBranch(SALAD, "relu"))
    fitting: Fitting = field(default_factory=Fitting)

    def wants(self, step: int, first: int) -> bool:
        """Whether a dense step is to be learned from; ``first`` is the first sparse one."""
        return self.wanted and first - STEPS <= step < first

    def observe(self, call: Call, run: PlanRun, view: View, v: torch.Tensor) -> None:
        """Learn from one attention that the network computes densely; ``v`` as the network gives it."""
        if view.geometry.length < view.q_block:
            return  # a single block, and it is ragged
        blocks = run.select(view)[1]
        chosen = sampled_blocks(view.query_blocks, SAMPLED, call.evaluation.step)
        v = run.order.ordered(v)
        rows = sampled_rows(chosen, view.q_block, v.device)
        q, some = view.q.index_select(2, rows), take_blocks(blocks, chosen)
        every = BlockList.from_mask(
            torch.ones(1, 1, len(chosen), view.key_blocks, dtype=torch.bool, device=v.device), view.q_block, view.kv_block
        )
        shared: dict[str, Any] = {"scale": view.scale, "kv_length": view.kv_length}
        full = block_sparse_attention(q, view.k, v, every, **shared)[0]
        sparse = block_sparse_attention(q, view.k, v, some, **shared)[0]
        other = self.branch.linear(q, view.k, v, some, view.kv_length)
        for index, branch in enumerate(call.branches):
            parts = (call.part(tensor, index) for tensor in (full, sparse, other))
            self.fitting.observe(view.layer, branch.key, call.evaluation.step, *parts)

    def share(self, layer: int) -> Fitted | None:
        """Return the branch and what blends it with the sparse output, None where it has not proved itself."""
        blend = self.fitting.blend(layer)
        return None if blend is None else (self.branch, blend)

    def report(self) -> dict[str, Any] | None:
        """Return what was learned as JSON values, None where nothing was."""
        found = self.fitting.report()
        return found if found["layers"] else None

    def close(self) -> None:
        """Forget everything."""
        self.fitting = type(self.fitting)()
