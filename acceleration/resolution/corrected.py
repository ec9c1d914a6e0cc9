"""Predictions of a full run of which most are made at a smaller size: a full one now and again measures what those miss.

Two-grid defect correction (Brandt, Math. Comp. 31, 1977, section 5), with time instead of iterations: the sampler only ever
sees the full size, so its history, its fresh noise and masks need no care. A small prediction gives the low frequencies,
plus what full predictions had and small ones of the same latent had not; high frequencies are those of the full ones. Both
are continued along the line through the last two of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .noise_level import gain, to_small
from .spectral import Size, expand, shrink
from .stages import StagePlan

Full = Callable[[], torch.Tensor]
Small = Callable[[torch.Tensor, float, int], torch.Tensor]


@dataclass
class Anchor:
    """A prediction at full size.

    Attributes:
        position: where in the run, in steps.
        full: the prediction [B, C, (T,) H, W].
        defects: by size, what a small prediction misses of it, in units of the network's output, [B, C, (T,) h, w].
    """

    position: float
    full: torch.Tensor
    defects: dict[Size, torch.Tensor] = field(default_factory=dict)


@dataclass
class Correction:
    """What a corrected run keeps: its last two predictions at full size, and what small ones miss of them.

    Attributes:
        plan: stages; at its anchors, and where a stage has the full size, predictions are full.
    """

    plan: StagePlan
    _anchors: list[Anchor] = field(default_factory=list)

    def predict(self, x: torch.Tensor, sigma: float, full: Full, small: Small) -> torch.Tensor:
        """Return the prediction of the clean latent [B, C, (T,) H, W] for ``x`` at ``sigma``.

        Args:
            x: noisy latent at full size.
            sigma: its noise level.
            full: predicts at full size.
            small: predicts at the size of a stage, from a latent [B, C, (T,) h, w], its noise level and the stage's number.
        """
        position, step = self.plan.place_of(sigma)
        place = self.plan.small_stage(step)
        if place is None or not self._anchors or self.plan.stages[place].size not in self._anchors[0].defects:
            return self._anchor(x, sigma, full, small)
        stage = self.plan.stages[place]
        low, q = self._small(x, sigma, place, small)
        low = low + q * self._continued(position, lambda anchor: anchor.defects.get(stage.size))
        high = self._continued(position, lambda anchor: anchor.full)
        return expand(low * stage.r, high).to(high.dtype)

    def _anchor(self, x: torch.Tensor, sigma: float, full: Full, small: Small) -> torch.Tensor:
        """Predict at full size, and measure what a small prediction misses where some are to follow."""
        position, step = self.plan.place_of(sigma)
        anchor = Anchor(position, full())
        for place in self.plan.small_after(step):
            stage = self.plan.stages[place]
            low, q = self._small(x, sigma, place, small)
            # The network's output, (x - prediction) / sigma, changes less over a run than its prediction.
            anchor.defects[stage.size] = (shrink(anchor.full, stage.size) / stage.r - low) / q
        before = [old for old in self._anchors if old.position < position]  # a second evaluation replaces the first
        self._anchors = [anchor, *before[:1]] if anchor.defects else []
        return anchor.full

    def _continued(self, position: float, part: Callable[[Anchor], torch.Tensor | None]) -> torch.Tensor:
        """Return a part of the anchors at ``position``: the last one's, or the line through the last two."""
        newest = self._anchors[0]
        older = part(self._anchors[1]) if len(self._anchors) > 1 else None
        if older is None:
            return part(newest)
        ahead = (position - newest.position) / (newest.position - self._anchors[1].position)
        return part(newest) + ahead * (part(newest) - older)

    def _small(self, x: torch.Tensor, sigma: float, place: int, small: Small) -> tuple[torch.Tensor, float]:
        stage = self.plan.stages[place]
        q = to_small(sigma, stage.r)
        return small((shrink(x, stage.size) / gain(q, stage.r)).to(x.dtype), q, place), q
