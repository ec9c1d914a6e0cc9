"""Reuse block by block from a table: each skipped block adds what it added when it was computed last."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import COMPUTED, REUSED, Call, Evaluation
from ..models import BlockSite, ModelDescriptor
from .masks import Table
from .store import SnapshotStore

#: Slot of the residual in the text stream.
_TEXT = "text"


@dataclass
class TableSession:
    """Block cache of one run, after HarmoniCa's static tables (arXiv 2410.01723) and FORA (arXiv 2407.01425).

    A skipped block returns its input plus the residual of its last computed evaluation, in the image and in the text
    stream; embeddings, head and every other block run at the current step.

    Args:
        table: which blocks are computed at each step.
        store: residuals, one per branch, block and stream.
        descriptor: the network's family.
        keep_all: store what no step will use, too (exactness tests).
    """

    table: Table
    store: SnapshotStore
    descriptor: ModelDescriptor
    keep_all: bool = False

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        return self.store.bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever stored in this run."""
        return self.store.peak_bytes

    def begin(self, evaluation: Evaluation) -> None:
        """Say what the table wants."""
        row = self.table.rows[evaluation.step]
        evaluation.skip, evaluation.computed_share = not all(row), sum(row) / len(row)
        evaluation.reason = f"{sum(row)} of {len(row)} blocks by the table"

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network; its blocks decide one by one."""
        denoised = compute()
        decision = REUSED if call.scratch.get("reused") else COMPUTED
        call.decisions = (decision,) * len(call.branches)
        return denoised

    def depths(self, call: Call) -> frozenset[int] | None:
        """All blocks where any may be skipped; otherwise those that the next step will reuse."""
        if not call.skippable:
            return frozenset()
        step = call.evaluation.step
        if call.evaluation.skip:
            return None
        return frozenset(depth for depth in range(self.table.blocks) if self._wanted_later(step, depth))

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run a block and keep what it added, or add what is kept."""
        if not call.skippable:
            return original(args)
        step, apart = call.evaluation.step, site.kind in self.descriptor.txt_out
        if not self.table.computed(step, site.depth):
            reused = self._reuse(call, site, args, apart)
            if reused is not None:
                call.scratch["reused"] = True
                return reused
        if not self._wanted_later(step, site.depth):
            return original(args)
        image = args["img"].clone()  # some blocks write into their input
        text = args["txt"].clone() if apart and args.get("txt") is not None else None
        out = original(args)
        self._keep(call, site, "", out["img"] - image)
        if text is not None and out.get("txt") is not None:
            self._keep(call, site, _TEXT, out["txt"] - text)
        return out

    def reset(self) -> None:
        """Forget the residuals."""
        self.store.clear()

    def close(self) -> None:
        """Free everything."""
        self.reset()

    def _wanted_later(self, step: int, depth: int) -> bool:
        """Whether the step after ``step`` reuses the block: nothing else needs to be kept."""
        return self.keep_all or (step + 1 < self.table.steps and not self.table.computed(step + 1, depth))

    def _keep(self, call: Call, site: BlockSite, stream: str, residual: torch.Tensor) -> None:
        for index, branch in enumerate(call.branches):
            key = (branch.key, site.depth, stream)
            self.store.push(key, call.evaluation.position, call.part(residual, index))

    def _reuse(self, call: Call, site: BlockSite, args: dict, apart: bool) -> dict | None:
        """Return the block's input plus its residuals; None where a branch has none that fits."""
        image = self._residual(call, site, "", args["img"])
        if image is None:
            return None
        out: dict[str, Any] = {"img": args["img"] + image}
        if apart:
            text = args.get("txt")
            residual = None if text is None else self._residual(call, site, _TEXT, text)
            out["txt"] = text if residual is None else text + residual
        return out

    def _residual(self, call: Call, site: BlockSite, stream: str, like: torch.Tensor) -> torch.Tensor | None:
        parts = [self.store.get((branch.key, site.depth, stream)) for branch in call.branches]
        if any(history is None for history in parts):
            return None
        residual = torch.cat([history.tensors[0] for history in parts])
        return residual if residual.shape == like.shape else None
