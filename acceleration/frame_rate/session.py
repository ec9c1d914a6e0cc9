"""A short video's run: global layers are handed original positions, and the trace tells what was kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import Call, Evaluation
from ..models import BlockSite
from .positions import global_table, tokens_of
from .schedule import FrameRateSchedule


@dataclass
class FrameRateSession:
    """Implements :class:`~..run.Session`.

    Attributes:
        schedule: what every latent of the run stands for.
        layers: depths of the blocks that see original positions.
        network: whose part makes rotary tables.
        seconds: what the work before this run took, by name; only reported.
    """

    schedule: FrameRateSchedule
    layers: frozenset[int]
    network: Any
    seconds: dict[str, float] = field(default_factory=dict)
    section: str = "frame_rate"
    bytes: int = 0
    peak_bytes: int = 0
    _table: tuple[torch.Tensor, torch.Tensor | None] | None = field(default=None, repr=False)
    _refused: bool = False

    def begin(self, evaluation: Evaluation) -> None:
        """Nothing to decide."""

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network."""
        return compute()

    def depths(self, call: Call) -> frozenset[int]:
        """Only global layers are touched."""
        return self.layers

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block, a global layer with other positions."""
        table = args.get("pe")
        if site.depth not in self.layers or not isinstance(table, torch.Tensor):
            return original(args)
        moved = self._moved(table, call)
        return original(args if moved is None else {**args, "pe": moved})

    def reset(self) -> None:
        """Positions belong to the schedule, not to a trajectory."""

    def close(self) -> None:
        """Drop the table."""
        self._table = None
        self.bytes = 0

    def report(self) -> dict[str, Any]:
        """Return the schedule, the global layers and seconds as JSON values."""
        return {
            "schedule": self.schedule.to_json(),
            "global_layers": sorted(self.layers),
            "positions_refused": self._refused,
            "seconds": self.seconds,
        }

    def _moved(self, table: torch.Tensor, call: Call) -> torch.Tensor | None:
        """Return the table of original positions, made once for a given one; None where it is not the network's own."""
        if self._table is None or self._table[0] is not table:
            grid = tokens_of(self.network, tuple(call.network_input.shape))
            moved = global_table(self.network, table, grid, self.schedule.kept)
            self._table = table, moved
            self._refused |= moved is None
            self.bytes = 0 if moved is None else moved.numel() * moved.element_size()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return self._table[1]
