"""What sparse attention kept, and how far off it was: numbers for the report, gathered while a run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.block_sparse_attention import BlockList
from ..evaluation import Call, Evaluation
from .plan import View
from .plan_run import Attended

#: Query blocks of a head that are compared with full attention, one in so many and at least one.
ONE_IN = 32
MOST_SAMPLED = 4
#: Pictures of masks: so many cells a side at most, of so many layers and heads.
CELLS, MOST_LAYERS, MOST_HEADS = 32, 8, 4
#: Grey levels of a picture's cell, as one character: the share of its blocks that were kept.
LEVELS = "0123456789"


@dataclass
class _Layer:
    """Sums over the sparse calls of a layer; tensors stay on the device until the run is over."""

    kept: torch.Tensor
    calls: int
    tokens: int
    blocks: tuple[int, int]


@dataclass
class Seen:
    """Some heads of one sparse attention.

    Attributes:
        share: of the key blocks, by head [h].
        tokens: of the sequence.
        blocks: of queries and of keys.
        picture: the mask drawn small [h, cells, cells]; None where nobody looks closely, like what follows.
        error: relative L2 distance to full attention [h].
        mass: share of the softmax's mass in kept blocks [h].
    """

    share: torch.Tensor
    tokens: int
    blocks: tuple[int, int]
    picture: torch.Tensor | None = None
    error: torch.Tensor | None = None
    mass: torch.Tensor | None = None


@dataclass
class _Sample:
    """One layer compared with full attention at one step."""

    step: int
    layer: int
    error: torch.Tensor
    mass: torch.Tensor | None


@dataclass
class Audit:
    """Counts what is kept always, and compares samples with full attention where it is asked to."""

    layers: dict[int, _Layer] = field(default_factory=dict)
    samples: list[_Sample] = field(default_factory=list)
    pictures: dict[int, torch.Tensor] = field(default_factory=dict)
    _closely: bool = False
    _kept: list[torch.Tensor] = field(default_factory=list)

    def begin(self, closely: bool) -> None:
        """Open an evaluation; ``closely`` asks for samples and pictures of it."""
        self._closely, self._kept = closely, []

    def end(self, evaluation: Evaluation) -> None:
        """Tell the evaluation what share of the blocks has been kept so far."""
        if self._kept:
            evaluation.attention_kept = torch.stack(self._kept).mean()

    def look(self, call: Call, made: Attended) -> Seen:
        """Return the numbers of some heads of one sparse attention, before its tensors go."""
        view, blocks, mask = made.view, made.blocks, made.selection.mask
        q, k = view.q, view.k
        size = -(-q.shape[2] // blocks.q_block), -(-k.shape[2] // blocks.kv_block)
        share = (blocks.count.float().mean(dim=(0, 2)) / size[1]).expand(q.shape[1])
        if not self._closely:
            return Seen(share, q.shape[2], size)
        row = _cond_row(call)
        length = k.shape[2] if view.kv_length is None else int(view.kv_length[row])
        pair = compared(q[row], k[row], made.v[row], made.out[row], mask, row, blocks, view.scale, length)
        picture = _shrunk(mask[min(row, mask.shape[0] - 1)]).expand(q.shape[1], -1, -1)
        return Seen(share, q.shape[2], size, picture, *pair)

    def look_at(self, call: Call, view: View, v: torch.Tensor, out: torch.Tensor, share: torch.Tensor) -> Seen:
        """Return the numbers of one attention whose heads do not all attend to lists.

        Args:
            call: it belongs to.
            view: queries and keys, in the plan's order.
            v: values likewise.
            out: what came of it, likewise.
            share: fp32 [H], of the key blocks that each head attended to.
        """
        size = view.query_blocks, view.key_blocks
        if not self._closely:
            return Seen(share, out.shape[2], size)
        row = _cond_row(call)
        length = view.k.shape[2] if view.kv_length is None else int(view.kv_length[row])
        blocks = _every(view)
        error, _ = compared(
            view.q[row], view.k[row], v[row], out[row], blocks.to_mask(size[1]), 0, blocks, view.scale, length
        )
        return Seen(share, out.shape[2], size, None, error, None)

    def add(self, call: Call, layer: int, seen: Sequence[Seen]) -> None:
        """Count one sparse attention; ``seen`` are its heads in order, in one or more pieces."""
        share = torch.cat([piece.share for piece in seen])
        self._kept.append(share.mean())
        known = self.layers.get(layer)
        if known is None:
            self.layers[layer] = _Layer(share.clone(), 1, seen[0].tokens, seen[0].blocks)
        elif known.kept.shape == share.shape:
            known.kept, known.calls = known.kept + share, known.calls + 1
        if not self._closely:
            return
        if seen[0].picture is not None:
            self.pictures[layer] = torch.cat([piece.picture for piece in seen])
        error, mass = (_joined([getattr(piece, name) for piece in seen]) for name in ("error", "mass"))
        self.samples.append(_Sample(call.evaluation.step, layer, error, mass))

    def report(self) -> dict[str, Any]:
        """Return everything as JSON values; see ``attention`` in trace@1."""
        return {
            "layers": [
                {
                    "layer": layer,
                    "tokens": item.tokens,
                    "blocks": list(item.blocks),
                    "calls": item.calls,
                    "kept": _numbers(item.kept / item.calls),
                }
                for layer, item in sorted(self.layers.items())
            ],
            "samples": [
                {
                    "step": item.step,
                    "layer": item.layer,
                    "relative_l2": _numbers(item.error),
                    "kept_mass": [] if item.mass is None else _numbers(item.mass),
                }
                for item in self.samples
            ],
            "pictures": self._pictures(),
        }

    def close(self) -> None:
        """Drop all tensors."""
        self.layers.clear()
        self.samples.clear()
        self.pictures.clear()
        self._kept = []

    def _pictures(self) -> list[dict[str, Any]]:
        chosen = _spread(sorted(self.pictures), MOST_LAYERS)
        return [
            {"layer": layer, "head": head, "rows": _rows(self.pictures[layer][min(head, len(self.pictures[layer]) - 1)])}
            for layer in chosen
            for head in _spread(range(len(self.layers[layer].kept)), MOST_HEADS)
        ]


def compared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor,
    row: int,
    blocks: BlockList,
    scale: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare sampled query blocks of one batch row with full attention.

    Args:
        q: [H, N, d]; ``k`` and ``v``: [Hk, M, d]; ``out``: what sparse attention made of them, [H, N, d].
        mask: kept blocks, bool [B', H', Nq, Nk].
        row: which batch row this is.
        blocks: for its block sizes.
        scale: factor of the logits.
        length: valid keys.

    Returns:
        Relative L2 distance to full attention, and share of the softmax's mass that kept blocks hold, each fp32 [H].
    """
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    keys, values = (tensor[:, :length].float() for tensor in (k, v))
    if group > 1:
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    kept = mask[min(row, mask.shape[0] - 1)].expand(heads, -1, -1)
    error, norm, mass, rows = (torch.zeros(heads, device=q.device) for _ in range(4))
    count = kept.shape[1]
    for block in _spread(range(count), min(MOST_SAMPLED, max(1, count // ONE_IN))):
        at = slice(block * blocks.q_block, min((block + 1) * blocks.q_block, q.shape[1]))
        weights = torch.softmax(q[:, at].float() @ keys.transpose(1, 2) * scale, dim=-1)
        full = weights @ values
        error += (out[:, at].float() - full).square().sum(dim=(1, 2))
        norm += full.square().sum(dim=(1, 2))
        tokens = kept[:, block].repeat_interleave(blocks.kv_block, dim=1)[:, :length]
        mass += (weights.sum(dim=1) * tokens).sum(dim=1)
        rows += at.stop - at.start
    return (error / norm.clamp_min(1e-30)).sqrt(), mass / rows


def _joined(pieces: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    return None if pieces[0] is None else torch.cat(list(pieces))


def _every(view: View) -> BlockList:
    """Return the list of a head that attends to everything."""
    mask = torch.ones((1, 1, view.query_blocks, view.key_blocks), dtype=torch.bool, device=view.q.device)
    return BlockList.from_mask(mask, view.q_block, view.kv_block)


def _cond_row(call: Call) -> int:
    """Return the first row of the prompt's own branch."""
    names = [branch.name for branch in call.branches]
    return (names.index("cond") if "cond" in names else 0) * call.rows


def _shrunk(mask: torch.Tensor) -> torch.Tensor:
    """[H', Nq, Nk] bool -> shares in cells, at most CELLS a side."""
    sides = [min(CELLS, size) for size in mask.shape[1:]]
    return torch.nn.functional.adaptive_avg_pool2d(mask.float()[:, None], sides)[:, 0]


def _rows(cells: torch.Tensor) -> list[str]:
    """One character a cell. Whatever holds a kept block is not "0"."""
    top = len(LEVELS) - 1
    return ["".join(LEVELS[max(round(value * top), int(value > 0))] for value in line) for line in cells.tolist()]


def _spread(items: Any, most: int) -> list[Any]:
    """Return at most so many of the items, evenly spread, the first and last included."""
    items = list(items)
    if len(items) <= most:
        return items
    if most == 1:
        return [items[len(items) // 2]]
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _numbers(tensor: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in tensor.tolist()]
