"""Queries, keys and values of four kinds of heads, as attention really has them.

Independent noise would not do: its attention is uniform, and every pattern looks equally bad. Positions enter through
random Fourier features of a length scale by axis, whose inner products fall with distance as a Gaussian's; content through
labels that vary smoothly over the grid; a sink through a few keys that all queries like.
"""

from dataclasses import dataclass

import torch

from stretto.acceleration.attention.builders import force
from stretto.acceleration.attention.geometry import Geometry
from stretto.acceleration.attention.order import token_order
from stretto.acceleration.attention.plan import View

GRID, SIZE, SINKS = (4, 32, 32), 64, 16


@dataclass(frozen=True)
class Head:
    """One head on the grid, tokens in raster order: q, k, v fp32 [N, d], to be scored with scale 1/sqrt(d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def heads(seed=0, grid=GRID, size=SIZE):
    """Return the heads by name: ``local``, ``temporal``, ``content`` and ``sink``."""
    random = torch.Generator().manual_seed(seed)
    place = positions(grid)
    made = {}
    for name, (features, gain) in {
        "local": (fourier(place, (1.0, 4.0, 4.0), size, random), 9.0),
        "temporal": (fourier(place, (40.0, 1.5, 1.5), size, random), 12.0),
        "content": (content(place, 12, size, random), 9.0),
        "sink": (fourier(place, (4.0, 8.0, 8.0), size, random), 8.0),
    }.items():
        # A token's logit with itself is gain^2 / sqrt(d) before noise; noise is a quarter of a feature's size.
        q, k = (gain * (features + 0.25 * normal(features.shape, random) / size**0.5) for _ in range(2))
        if name == "sink":  # the first tokens: half a row, in tiles of 8 x 8 one row of each of two blocks
            liked = torch.nn.functional.normalize(normal((size,), random), dim=0)
            k[:SINKS] = k[:SINKS] * 0.3 + liked * 13.0
            q = q + liked * 6.0
        v = fourier(place, (1.0, 2.5, 2.5), size, random) * size**0.5 + 0.3 * normal((len(place), size), random)
        made[name] = Head(q, k, v)
    return made


def positions(grid):
    """Return fp32 [N, 3], (t, y, x) in raster order."""
    axes = [torch.arange(n, dtype=torch.float32) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def fourier(place, lengths, size, random):
    """Return unit features [N, size] whose inner product is about exp(-|difference / lengths|^2 / 2)."""
    frequency = normal((3, size // 2), random) / torch.tensor(lengths)[:, None]
    phase = place @ frequency
    return torch.cat([phase.cos(), phase.sin()], -1) / (size // 2) ** 0.5


def content(place, labels, size, random):
    """Return unit features [N, size]: the embedding of one of ``labels``, whose regions are smooth over the grid."""
    fields = fourier(place, (3.0, 5.0, 5.0), 256, random) @ normal((256, labels), random)
    embedding = torch.nn.functional.normalize(normal((labels, size), random), dim=-1)
    return torch.nn.functional.normalize((fields * 3).softmax(-1) @ embedding, dim=-1)


def normal(shape, random):
    return torch.randn(shape, generator=random)


class Trial:
    """One head in one token order, measured on a sample of its query blocks.

    Attributes:
        view: what builders get; blocks of 64.
    """

    def __init__(self, head, spec, rows=16):
        geometry = Geometry(GRID, 0, len(head.q))
        order = token_order(spec, geometry)
        q, k, v = (x[order.permutation] for x in (head.q, head.k, head.v))
        self.view = View(geometry, order, 64, 64, q[None, None], k[None, None], None, SIZE**-0.5)
        step = len(q) // 64 // rows
        self.blocks = torch.arange(rows) * step + torch.arange(rows) % step  # not always the same column of tiles
        sampled = q.unflatten(0, (-1, 64))[self.blocks].flatten(0, 1)
        logits = sampled @ k.T * SIZE**-0.5
        peak = logits.amax(1, keepdim=True)
        self.weights, self.v = (logits - peak).exp(), v
        self.full = self.weights @ v / self.weights.sum(1, keepdim=True)
        pooled = k.unflatten(0, (-1, 64)).mean(1)
        self.tail = (sampled @ pooled.T * SIZE**-0.5 - peak).exp() * 64  # a pooled key counts 64 times
        self.tail_v = v.unflatten(0, (-1, 64)).mean(1)

    def measure(self, builder, tail=False):
        """Return (relative L2 error of the output, kept share of the softmax, share of kept blocks)."""
        mask = force(builder(self.view), self.view).mask[0, 0]
        rows = mask[self.blocks].repeat_interleave(64, 0)
        kept = (self.weights.unflatten(1, (-1, 64)) * rows[:, :, None]).flatten(1)
        numerator, denominator = kept @ self.v, kept.sum(1, keepdim=True)
        share = float((denominator / self.weights.sum(1, keepdim=True)).mean())
        if tail:
            rest = self.tail * ~rows
            numerator, denominator = numerator + rest @ self.tail_v, denominator + rest.sum(1, keepdim=True)
        error = (numerator / denominator - self.full).norm() / self.full.norm()
        return float(error), share, float(mask.float().mean())

    def oracle(self, view):
        """Score by the true share of the softmax, which no cheap score can beat in kept mass; sampled blocks alone."""
        shares = self.weights / self.weights.sum(1, keepdim=True)
        scores = torch.zeros(view.visual_query_blocks, view.visual_key_blocks)
        scores[self.blocks] = shares.unflatten(1, (-1, 64)).sum(2).unflatten(0, (-1, 64)).sum(1)
        return scores[None, None]
