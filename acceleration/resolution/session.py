"""Progressive resolution as the run sees it: the stages are the host's work, this tells what they were."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import Call, Evaluation
from ..models import BlockSite
from .stages import StagePlan


@dataclass
class ResolutionSession:
    """Implements :class:`~..run.Session`; carries the stages to the host's sampler and into the trace.

    Attributes:
        plan: the stages.
    """

    plan: StagePlan
    section: str = "resolution"
    bytes: int = 0
    peak_bytes: int = 0

    def begin(self, evaluation: Evaluation) -> None:
        """Nothing to decide: the stage has been chosen."""

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network."""
        return compute()

    def depths(self, call: Call) -> frozenset[int]:
        """No block hooks are needed."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block."""
        return original(args)

    def reset(self) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        """Nothing is kept here."""

    def report(self) -> dict[str, Any]:
        """Return the stages as JSON values."""
        return self.plan.to_json()
