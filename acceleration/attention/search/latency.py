"""What an attention costs by the share of blocks it keeps: measured once per shape, not derived from operations."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from ....kernels.block_sparse_attention import BlockList, block_sparse_attention
from ..geometry import Geometry
from ..order import OrderSpec, token_order
from ..plan import View
from .patterns import Pattern, head_selection

#: Shares of the blocks that are timed.
DENSITIES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one attention over all its heads, by the share of blocks that they keep on average.

    Attributes:
        densities: ascending, from 0 on.
        seconds: of the sparse path at each, routing and reordering included; made non-decreasing.
        dense: seconds of the best dense attention.

    Raises:
        ValueError: densities or seconds that cannot be.
    """

    densities: tuple[float, ...]
    seconds: tuple[float, ...]
    dense: float

    def __post_init__(self) -> None:
        if (
            len(self.densities) != len(self.seconds)
            or len(self.seconds) < 2
            or list(self.densities) != sorted(self.densities)
        ):
            raise ValueError("a latency table needs two or more ascending densities, and seconds for each")
        if min(self.seconds) < 0 or self.dense <= 0:
            raise ValueError(f"seconds must be positive, got {self.seconds} and {self.dense} dense")
        object.__setattr__(self, "seconds", tuple(float(x) for x in np.maximum.accumulate(self.seconds)))

    def relative(self, density: np.ndarray | float) -> np.ndarray:
        """Return what lists of ``density`` cost, in units of the best dense attention."""
        return np.interp(density, self.densities, self.seconds) / self.dense

    @property
    def break_even(self) -> float:
        """Largest density at which lists cost no more than dense attention; 0 where they always do."""
        grid = np.linspace(0, 1, 1001)
        cheap = grid[self.relative(grid) <= 1]
        return float(cheap.max()) if len(cheap) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {"densities": list(self.densities), "seconds": list(self.seconds), "dense": self.dense}


def ideal(overhead: float = 0.0, efficiency: float = 1.0) -> LatencyTable:
    """Return the table of a kernel that nobody has measured: dense 1, lists overhead + density / efficiency."""
    return LatencyTable((0.0, 1.0), (overhead, overhead + 1 / efficiency), 1.0)


def measure(
    sparse: Callable[[float], Callable[[], Any]],
    dense: Callable[[], Any],
    wait: Callable[[], None] = lambda: None,
    densities: Sequence[float] = DENSITIES,
    repeats: int = 5,
    warm_up: int = 1,
) -> LatencyTable:
    """Time one attention at several densities, interleaved, and return the medians.

    Args:
        sparse: density -> a function that computes the sparse path, routing included.
        dense: computes the best dense attention.
        wait: waits for the device.
        densities: shares of the blocks.
        repeats: rounds.
        warm_up: rounds that do not count.
    """
    runs = [dense, *(sparse(density) for density in densities)]
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(warm_up + repeats):
        for run, found in zip(runs, seconds):
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn >= warm_up:
                found.append(time.perf_counter() - start)
    first, *rest = (median(found) for found in seconds)
    return LatencyTable(tuple(densities), tuple(rest), first)


def of_attention(
    geometry: Geometry,
    order: OrderSpec,
    block: int,
    heads: int,
    kv_heads: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 3,
) -> LatencyTable:
    """Time attention of one guidance branch at one shape: reordering, routing and the sparse kernel, against torch's own.

    Args:
        geometry: of the tokens.
        order: that lists are laid in.
        block: tokens in a block.
        heads: of the queries.
        kv_heads: of keys and values.
        size: of a head.
        dtype: of queries, keys and values.
        device: where.
        repeats: rounds after a discarded one.
    """
    make = torch.Generator(device="cpu").manual_seed(0)
    q, k, v = (
        torch.randn(1, number, geometry.length, size, generator=make).to(device, dtype) for number in (heads, kv_heads, kv_heads)
    )
    laid, scale = token_order(order, geometry, device), size**-0.5

    def sparse(density: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            a, b, c = (laid.ordered(x) for x in (q, k, v))
            view = View(geometry, laid, block, block, a, b, None, scale, heads=heads)
            mask = head_selection(view, (Pattern(),), np.zeros(heads, int), np.full(heads, density)).mask
            return laid.as_given(block_sparse_attention(a, b, c, BlockList.from_mask(mask, block, block), scale=scale)[0])

        return run

    def dense() -> torch.Tensor:
        grouped = {"enable_gqa": True} if heads != kv_heads else {}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, **grouped)

    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    return measure(sparse, dense, wait, repeats=repeats)
