"""4- and 6-bit codes that decode to int8: W4A8 and W6A8 with ordinary int8 products, ComfyUI's ``asym_w4a8_int8``.

Every group of 16 input channels has a scale in fp8, and every row one in fp32. A code stands for a level; level times
group scale, rounded, is the int8 weight. The codes are chosen against that very grid, so decoding loses nothing more, and
nothing is rescaled inside a product. Refitting a group's scale to its codes is least squares, ``s = <w, c> / <c, c>``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....kernels.quantized_linear import decode_grid
from ....kernels.rotate_quantize import LIMIT, rotate
from ..packing import pack, row_bytes, unpack
from .base import PIECE, Layout, Part
from .int8 import rotation_unfit

#: Levels of 4-bit codes: Lloyd's and Max's for a normal distribution whose groups of 16 are scaled to a largest value of 1.
#: ComfyUI's fastest decoder has exactly these numbers built in (comfy-kitchen 0.2.40), so files carry them to the digit.
LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
GROUP = 16
#: 6-bit codes are whole numbers from -31 to 31, stored with 32 added.
_SIX = 31
_FLOOR = 1e-8
_E4M3_LARGEST = 0x7E
#: Rounds of choosing codes and refitting scales. More change the error by less than a thousandth.
_REFITS = 2


@dataclass(frozen=True)
class Grid(Layout):
    """``W = rotate(int8(level[code] * s_rel) * s_row)``.

    Attributes:
        bits: 4 or 6.
        rotation: side of the Hadamard blocks; this format always rotates.
        group: input channels that share a scale.
        codebook: whether the 4-bit levels are a table; files of others may have uniform ones, code - 8.
    """

    bits: int = 4
    rotation: int = 256
    group: int = GROUP
    codebook: bool = True
    key = "asym_w4a8_int8"

    @property
    def name(self) -> str:
        return f"w{self.bits}a8"

    @property
    def words(self) -> str:
        return f"{self.bits}-bit weights in groups of {self.group}, 8-bit activations (int8), rotated"

    @property
    def has_table(self) -> bool:
        """Whether a table of levels is stored."""
        return self.bits == 4 and self.codebook

    def unfit(self, rows: int, columns: int) -> str | None:
        if self.bits not in (4, 6):
            return f"{self.bits} bits; this format has 4 and 6"
        if self.group < 4 or (self.group % 16 and 16 % self.group) or (self.bits == 6 and self.group % 16):
            return f"groups of {self.group} input channels; use 16, or a multiple of it"
        if not self.rotation:
            return f"this format rotates, and no rotation size from 16 to 256 divides the {columns} input channels"
        side = max(self.group, 32 if self.bits == 6 else 16)
        if columns % side:
            return f"{columns} input channels are no multiple of {side}"
        return rotation_unfit(self.rotation, columns)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        parts = (
            Part("weight", torch.int8, (rows, row_bytes(columns, self.bits))),
            Part("weight_s_rel", torch.float8_e4m3fn, (rows, columns // self.group)),
            Part("weight_s_channel", torch.float32, (rows,)),
        )
        return (*parts, Part("weight_codebook", torch.float32, (16,), None)) if self.has_table else parts

    def marker(self) -> dict[str, Any]:
        return {"format": self.key, "group_size": self.group, "convrot_groupsize": self.rotation}

    def encode(
        self, weight: torch.Tensor, survey: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        if self.bits == 4 and not self.codebook:
            raise ValueError("4-bit codes with uniform levels are read, not written")
        step = max(PIECE // max(weight.shape[1], 1), 1)
        pieces = [self._encode(piece, generator) for piece in weight.split(step)]
        parts = {suffix: torch.cat([piece[suffix].view(torch.uint8) for piece in pieces]) for suffix in pieces[0]}
        parts = {
            part.suffix: parts[part.suffix].view(part.dtype)
            for part in self.parts(*weight.shape)
            if part.suffix in parts
        }
        return {**parts, "weight_codebook": self._levels(weight.device)} if self.has_table else parts

    def _encode(self, weight: torch.Tensor, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        # [group, rows * groups]: what is found per group runs over whole vectors, several times faster than over 16 numbers each.
        grouped = rotate(weight, self.rotation).view(-1, self.group).t().contiguous()
        levels = _Levels(self._levels(weight.device), self.bits)
        scale = self._fitted(grouped, levels)
        # The largest weight that the codes can reach becomes 127 steps of the row.
        row = (scale.view(rows, -1).amax(-1) * (levels.values.abs().max() / LIMIT)).clamp_(min=_FLOOR)
        wide = row.view(-1, 1).expand(rows, columns // self.group).reshape(-1)
        target, relative = grouped / wide, (scale / wide).to(torch.float8_e4m3fn)
        if self.bits == 6:
            relative = self._best_neighbour(target, relative)
        codes = self._codes(target, relative.float(), levels, generator)
        codes = codes.t().contiguous().view(rows, columns)
        packed = pack(codes, self.bits).view(torch.int8)
        return {"weight": packed, "weight_s_rel": relative.view(rows, -1), "weight_s_channel": row}

    def int8(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the rotated weight on the int8 grid, [n, K]; times ``weight_s_channel`` it is the weight."""
        rows, groups = parts["weight_s_rel"].shape
        table = parts["weight_codebook"].float() if self.has_table else None
        decoded = decode_grid(parts["weight"], parts["weight_s_rel"], table, self.group, self.bits)
        if decoded is not None:
            return decoded
        step = max(PIECE // max(groups * self.group, 1), 1) if parts["weight"].device.type == "cpu" else max(rows, 1)
        pieces = [
            self._int8(parts["weight"][at : at + step], parts["weight_s_rel"][at : at + step], table)
            for at in range(0, rows, step)
        ]
        return torch.cat(pieces)

    def _int8(self, packed: torch.Tensor, relative: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        rows, groups = relative.shape
        if table is None:
            values = unpack(packed, groups * self.group, self.bits).float().sub_(1 << (self.bits - 1))
        else:
            values = _pick(_pairs(table), packed.view(torch.uint8).int()).view(torch.float32)
        grid = values.view(rows, groups, self.group).mul_(relative.float().unsqueeze(-1)).round_().clamp_(-LIMIT, LIMIT)
        return grid.view(rows, -1).to(torch.int8)

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rotate(self.int8(parts).float() * parts["weight_s_channel"].view(-1, 1), self.rotation)

    def _levels(self, device: torch.device) -> torch.Tensor:
        if self.bits == 6:
            return torch.arange(-_SIX, _SIX + 1, dtype=torch.float32, device=device)
        return torch.tensor(LEVELS if self.codebook else range(-8, 8), dtype=torch.float32, device=device)

    def _fitted(self, grouped: torch.Tensor, levels: "_Levels") -> torch.Tensor:
        """Return the group scales [groups] after alternating least squares."""
        scale = (grouped.abs().amax(0) / max(round(levels.values.max().item()), 1)).clamp_(min=_FLOOR)
        for _ in range(_REFITS):
            chosen = levels.nearest(grouped / scale)
            power = (chosen * chosen).sum(0)
            scale = (chosen.mul_(grouped).sum(0) / power.clamp_(min=_FLOOR)).clamp_(min=_FLOOR)
        return scale

    def _best_neighbour(self, target: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        """Return for every group that of the fp8 scale and its two neighbours which the group fits best through the grid."""
        raw = relative.view(torch.uint8).to(torch.int16)
        best, least = relative, None
        for step in (0, -1, 1):
            trial = (raw + step).clamp_(1, _E4M3_LARGEST).to(torch.uint8).view(torch.float8_e4m3fn)
            factor = trial.float()
            codes = (target / factor).round_().clamp_(-_SIX, _SIX)
            error = codes.mul_(factor).round_().clamp_(-LIMIT, LIMIT).sub_(target).square_().sum(0)
            if least is None:
                best, least = trial, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, trial.view(torch.uint8), best.view(torch.uint8)).view(torch.float8_e4m3fn)
        return best

    def _codes(
        self, target: torch.Tensor, factor: torch.Tensor, levels: "_Levels", generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return stored codes like ``target``, uint8, each the level whose int8 value is nearest its target."""

        def grid(index: torch.Tensor) -> torch.Tensor:
            return levels.pick(index).mul_(factor).round_().clamp_(-LIMIT, LIMIT)

        first = levels.index(target / factor)
        residual = grid(first).neg_().add_(target)
        if generator is not None:
            # The grid is sorted, so the level below a target is the first guess or a neighbour of it.
            below = first.sub_((residual < 0).to(first.dtype)).clamp_(0, levels.last - 1)
            low, high = grid(below), grid(below + 1)
            point = low + (high - low) * torch.rand(target.shape, generator=generator, device=target.device)
            return (below + (target > point) + levels.first_code).to(torch.uint8)
        # Rounding to the grid may bring the neighbour on the target's side nearer; the other one lies farther.
        step = residual.sign()
        error = grid((first + step).clamp_(0, levels.last)).sub_(target).abs_()
        better = residual.abs_().sub_(error).sign_().clamp_(min=0)
        return first.addcmul_(step, better).clamp_(0, levels.last).add_(levels.first_code).to(torch.uint8)


_FINE = 1024


class _Levels:
    """The levels that codes stand for, ascending, and the one nearest a ratio. Indices are whole numbers in fp32.

    For a table, the index is looked up at the ratio in steps of 1/1024: a fourth of the time of searching, and what that gets
    wrong within 1/1024 of a tie costs nothing.
    """

    def __init__(self, values: torch.Tensor, bits: int) -> None:
        """Prepare.

        Args:
            values: fp32, ascending.
            bits: 6: the levels are -31 to 31, 4: any 16.
        """
        self.values, self.last = values, values.numel() - 1
        self.first_code = 1 if bits == 6 else 0
        self._index = None
        if bits == 4:
            ticks = torch.linspace(-1, 1, 2 * _FINE + 1, device=values.device)
            self._index = torch.bucketize(ticks, (values[1:] + values[:-1]) / 2)
            self._nearest = values[self._index]

    def nearest(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the level nearest each ratio, which is used up."""
        if self._index is None:
            return ratio.round_().clamp_(-_SIX, _SIX)
        return _pick(self._nearest, _ticks(ratio))

    def index(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the index of the level nearest each ratio, which is used up."""
        if self._index is None:
            return ratio.round_().clamp_(-_SIX, _SIX).add_(_SIX)
        return _pick(self._index.float(), _ticks(ratio))

    def pick(self, index: torch.Tensor) -> torch.Tensor:
        """Return the levels of indices."""
        return index - _SIX if self._index is None else _pick(self.values, index.int())


def _ticks(ratio: torch.Tensor) -> torch.Tensor:
    return ratio.add_(1).mul_(_FINE).round_().clamp_(0, 2 * _FINE).int()


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """Return both levels of every byte of two 4-bit codes, [256], as one number of 64 bits: one look-up for two levels."""
    codes = unpack(torch.arange(256, dtype=torch.uint8, device=table.device).view(-1, 1), 2, 4)
    return table[codes.int()].view(torch.int64).view(-1)


def _pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.view(-1)).view(index.shape)
