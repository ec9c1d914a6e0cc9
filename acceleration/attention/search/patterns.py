"""Which blocks a head keeps, as a plan says it: patterns sized in shares of the tokens, so that they fit any resolution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..builders import Selection, arrow, band, best, force, frame_log_band, live_stripes, stripes
from ..methods.radial import band_width
from ..plan import Builder, View
from ..scores import Score, mean_pool, sub_block_lse

ROUTER = "router"
#: Kinds of patterns, and what their size means.
KINDS = {
    ROUTER: "tokens in a cell of the score (0: block means); each head's budget is the share of key blocks",
    "band": "half-width as a share of the visual tokens",
    "arrow": "half-width as a share of the visual tokens; everything with text besides",
    "frame band": "half-width, at every pair of frames, as a share of a frame's tokens",
    "radial": "decay of Radial Attention (arXiv 2506.19852)",
    "stripes": "share of the key blocks, those that a sample of each head's queries attends to most (Sparse-vDiT)",
    "first frames": "share of the visual tokens, from the first one on, that all attend to",
}


@dataclass(frozen=True)
class Pattern:
    """One pattern.

    Attributes:
        kind: key of :data:`KINDS`.
        size: what the kind says.

    Raises:
        ValueError: an unknown kind, or a size that is no number from 0 on.
    """

    kind: str = ROUTER
    size: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a pattern is one of {', '.join(KINDS)}, not {self.kind!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int | float) or not 0 <= self.size < 1e6:
            raise ValueError(f"a pattern's size is a number from 0 on, not {self.size!r}")

    @property
    def routed(self) -> bool:
        """Whether it takes a budget."""
        return self.kind == ROUTER

    @property
    def dynamic(self) -> bool:
        """Whether it looks at queries and keys."""
        return self.kind in (ROUTER, "stripes")

    def fits(self, view: View) -> bool:
        """Return whether it can be laid on a view's tokens."""
        raster = view.order.name == "identity"
        return raster and view.geometry.video if self.kind in ("frame band", "radial") else True

    def score(self, block: int) -> Score:
        """Return the router's score for key blocks of ``block`` tokens."""
        cell = int(self.size)
        return sub_block_lse(1, max(block // cell, 1)) if cell and block % cell == 0 else mean_pool()

    def builder(self) -> Builder:
        """Return the builder of a pattern that has its size of its own.

        Raises:
            ValueError: it is the router.
        """
        if self.routed:
            raise ValueError("a router needs a budget for every head")
        return lambda view: _sized(self, view)(view)

    def to_json(self) -> dict[str, Any]:
        """Return the pattern as JSON values."""
        return {"kind": self.kind, "size": self.size}


def per_head_top_k(scores: torch.Tensor, keep: Sequence[float]) -> torch.Tensor:
    """Return bool [B, H, nq, nk]: every row's ``round(keep[h] * nk)`` best blocks, at least one.

    Args:
        scores: of :mod:`..scores`.
        keep: share of the visual key blocks, by head.
    """
    blocks = scores.shape[-1]
    counts = [min(max(round(share * blocks), 1), blocks) for share in keep]
    mask = torch.ones_like(scores, dtype=torch.bool)
    for count in sorted(set(counts) - {blocks}):
        heads = [head for head, number in enumerate(counts) if number == count]
        mask[:, heads] = best(scores[:, heads], count)
    return mask & (scores != -torch.inf)


def head_selection(view: View, patterns: Sequence[Pattern], which: np.ndarray, keep: np.ndarray) -> Selection:
    """Return the lists of an attention whose heads follow different patterns and budgets; what must be kept is added.

    Args:
        view: queries and keys in the plan's order.
        patterns: of the plan.
        which: int [H], index of each head's pattern.
        keep: [H], budgets of the heads that are routed.
    """
    parts = []
    for index in np.unique(which):
        heads, pattern = [int(head) for head in np.flatnonzero(which == index)], patterns[index]
        if pattern.routed:
            mask = per_head_top_k(pattern.score(view.kv_block)(view)[:, heads], keep[heads])
            missing = view.key_blocks - mask.shape[-1], view.query_blocks - mask.shape[-2]
            mask = torch.nn.functional.pad(mask, (0, missing[0], 0, missing[1]))
        else:
            mask = pattern.builder()(view).mask
            mask = mask[:, heads] if mask.shape[1] > 1 else mask
        parts.append((heads, mask))
    batch = max(mask.shape[0] for _, mask in parts)
    merged = torch.zeros((batch, len(which), view.query_blocks, view.key_blocks), dtype=torch.bool, device=view.device)
    for heads, mask in parts:
        merged[:, heads] = mask
    return force(Selection(merged), view)


def candidates(video: bool, raster: bool = True) -> tuple[Pattern, ...]:
    """Return patterns worth trying beside the router: DiTFastAttnV2's arrows, stripes, and bands between frames."""
    found = [Pattern("arrow", share / 2) for share in (1 / 32, 1 / 16, 1 / 8)] + [Pattern("stripes", 0.1)]
    if video and raster:
        found += [Pattern("frame band", share) for share in (0.02, 0.06, 0.15)]
        found += [Pattern("radial", decay) for decay in (0.5, 2.0)]
    return tuple(found)


def _sized(pattern: Pattern, view: View) -> Builder:
    tokens, frame = view.geometry.visual, view.geometry.frame
    if pattern.kind in ("band", "arrow"):
        half = round(pattern.size * tokens)
        return arrow(half) if pattern.kind == "arrow" else band(-half, half)
    if pattern.kind == "frame band":
        return frame_log_band(lambda distance, size: round(pattern.size * frame))
    if pattern.kind == "stripes":
        return live_stripes(pattern.size)
    if pattern.kind == "radial":
        return frame_log_band(band_width(pattern.size))
    return stripes([(0, max(1, round(pattern.size * tokens)))])
