"""What is kept between steps: keys and values per branch and attention, and what the inactive tokens go on with."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from ...kernels.token_rows import put_rows, take_rows

#: Largest number of float8_e4m3fn, and room above the largest value seen: later ones may be larger.
_FP8_MOST, _ROOM = 448.0, 2.0


class Kept:
    """Keys or values of one attention and of one or more branches in a row, in a format of their own.

    Args:
        like: what they look like: [B, N, D] or [B, H, N, d].
        axis: where the tokens are.
        dtype: how they are kept; None for as they are computed.
        order: 0 reads them as they were computed last; 1 continues each token's along the line through its last two.
    """

    def __init__(self, like: torch.Tensor, axis: int, dtype: torch.dtype | None = None, order: int = 0):
        self.computed, self.axis = like.dtype, axis
        self.data = torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)
        scaled = dtype == torch.float8_e4m3fn
        self.scale = torch.empty([len(like), *[1] * (like.ndim - 1)], device=like.device) if scaled else None
        self.before = torch.empty_like(self.data) if order else None
        #: Noise levels of the last and of the one before, by batch row and token; 0 for none yet.
        self.levels = torch.zeros(2, len(like), like.shape[axis], device=like.device) if order else None

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return sum(item.nbytes for item in (self.data, self.scale, self.before, self.levels) if item is not None)

    def fill(self, values: torch.Tensor, sigma: float) -> None:
        """Write ``values`` of all tokens of all batch rows, computed at noise level ``sigma``."""
        if self.scale is not None:
            most = values.abs().amax(dim=tuple(range(1, values.ndim)), keepdim=True).float()
            self.scale.copy_((_ROOM * most / _FP8_MOST).clamp(min=1e-12))
        if self.before is not None:
            self.before, self.data = self.data, self.before
            self.levels[1] = self.levels[0]
            self.levels[0] = sigma
        self.data.copy_(self._packed(values, slice(None)))

    def put(self, values: torch.Tensor, rows: torch.Tensor, sigma: float, first: int = 0) -> None:
        """Write ``values`` at the token ``rows`` of the batch rows from ``first`` on, computed at noise level ``sigma``."""
        part = slice(first, first + len(values))
        packed, target = self._packed(values, part), self.data[part]
        if self.before is not None:
            put_rows(self.before[part], rows, take_rows(target, rows, self.axis), self.axis)
            self.levels[1, part, rows] = self.levels[0, part, rows]
            self.levels[0, part, rows] = sigma
        if self.scale is not None:  # bytes: few operations know eight-bit floats
            packed, target = packed.view(torch.uint8), target.view(torch.uint8)
        put_rows(target, rows, packed, self.axis)

    def read(self, first: int, count: int, sigma: float) -> torch.Tensor:
        """Return ``count`` batch rows from ``first`` on at noise level ``sigma``; a view where nothing is to be done."""
        part = slice(first, first + count)
        values = self.data[part].to(self.computed)
        if self.scale is not None:
            return values * self.scale[part].to(self.computed)
        if self.before is None:
            return values
        last, older = self.levels[0, part], self.levels[1, part]
        ahead = torch.where((older > 0) & (older != last), (sigma - last) / (last - older), 0.0).clamp(0.0, 2.0)
        shape = [count, *[1] * (values.ndim - 1)]
        shape[self.axis] = -1
        change = values - self.before[part].to(self.computed)
        return torch.addcmul(values, change, ahead.reshape(shape).to(self.computed))

    def _packed(self, values: torch.Tensor, part: slice) -> torch.Tensor:
        if self.scale is not None:
            values = (values / self.scale[part]).clamp(-_FP8_MOST, _FP8_MOST)
        return values.to(self.data.dtype)


@dataclass(frozen=True, eq=False)
class _Share:
    """Where one branch's keys and values stand."""

    keys: Kept
    values: Kept
    first: int


@dataclass
class KeyStore:
    """Keys and values of all tokens, per branch and attention, overwritten in place where tokens are active.

    Attributes:
        dtype: how they are kept; None for as they are computed.
        order: see :class:`Kept`.
        bytes: taken now.
        peak_bytes: most ever taken.
    """

    dtype: torch.dtype | None = None
    order: int = 0
    bytes: int = 0
    peak_bytes: int = 0
    _shares: dict[tuple[Hashable, Hashable], _Share] = field(default_factory=dict, repr=False)

    def keep(
        self,
        branches: Sequence[Hashable],
        layer: Hashable,
        axis: int,
        sigma: float,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Keep the keys and values of all tokens of the ``branches`` of a call, as they stand in its batch."""
        rows = len(keys) // len(branches)
        shares = [self._shares.get((branch, layer)) for branch in branches]
        if not self._together(shares, rows, keys):
            made = (Kept(keys, axis, self.dtype, self.order), Kept(values, axis, self.dtype, self.order))
            for index, branch in enumerate(branches):
                self._shares[branch, layer] = _Share(*made, index * rows)
            shares = [self._shares[branch, layer] for branch in branches]
            self._count()
        shares[0].keys.fill(keys, sigma)
        shares[0].values.fill(values, sigma)

    def has(self, branch: Hashable, layer: Hashable) -> bool:
        """Whether something is kept."""
        return (branch, layer) in self._shares

    def merged(
        self,
        branches: Sequence[Hashable],
        layer: Hashable,
        rows: torch.Tensor,
        sigma: float,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite what is kept with ``keys`` and ``values`` of the tokens ``rows``, and return all tokens' of a call."""
        count = len(keys) // len(branches)
        shares = [self._shares[branch, layer] for branch in branches]
        for index, share in enumerate(shares):
            part = slice(index * count, (index + 1) * count)
            share.keys.put(keys[part], rows, sigma, share.first)
            share.values.put(values[part], rows, sigma, share.first)
        if self._together(shares, count, None):
            return shares[0].keys.read(0, len(keys), sigma), shares[0].values.read(0, len(keys), sigma)
        found = [
            (share.keys.read(share.first, count, sigma), share.values.read(share.first, count, sigma))
            for share in shares
        ]
        return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

    def clear(self) -> None:
        """Drop everything."""
        self._shares.clear()
        self.bytes = 0

    def _together(self, shares: Sequence[_Share | None], rows: int, like: torch.Tensor | None) -> bool:
        """Whether ``shares`` are one tensor, in the order of a batch, and nothing else is in it."""
        first = shares[0]
        if any(share is None or share.keys is not first.keys for share in shares):
            return False
        if like is not None and (first.keys.data.shape != like.shape or first.keys.computed != like.dtype):
            return False
        in_order = all(share.first == index * rows for index, share in enumerate(shares))
        return in_order and len(first.keys.data) == len(shares) * rows

    def _count(self) -> None:
        kept = {id(kept): kept.nbytes for share in self._shares.values() for kept in (share.keys, share.values)}
        self.bytes = sum(kept.values())
        self.peak_bytes = max(self.peak_bytes, self.bytes)


@dataclass
class Velocity:
    """Network output that the inactive tokens of one branch go on with, per latent pixel.

    Slopes come from the last two passes over all tokens alone: what active tokens were given between them was computed
    beside older keys, and a line through it would carry its error on.

    Attributes:
        order: 0 repeats a token's last output, 1 continues it along the slope.
        newest: last output of each token [B, C, ...]: computed, or with order 0 repeated.
        sigma: noise levels it belongs to, broadcastable to it.
        whole: last output that was computed for all tokens, and its noise level.
        slope: change of such outputs per noise level; None as long as there was one only.
    """

    order: int
    newest: torch.Tensor
    sigma: torch.Tensor
    whole: tuple[torch.Tensor, float]
    slope: torch.Tensor | None = None

    @classmethod
    def of(cls, output: torch.Tensor, sigma: float, order: int) -> "Velocity":
        """Return what tokens go on with after their first output [B, C, ...], at noise level ``sigma``."""
        return cls(order, output, torch.full_like(output[:1, :1], sigma, dtype=torch.float32), (output, sigma))

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self.newest.nbytes * (3 if self.order else 1)

    def renew(self, output: torch.Tensor, sigma: float) -> None:
        """Take an output that was computed for every token."""
        before, level = self.whole
        if self.order and sigma != level:
            self.slope = (output - before) / (sigma - level)
        self.newest, self.sigma, self.whole = output, torch.full_like(self.sigma, sigma), (output, sigma)

    def patched(self, output: torch.Tensor, active: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return ``output`` with inactive tokens' own, and take note of the active ones'.

        Args:
            output: [B, C, ...], sensible at active tokens alone.
            active: bool, broadcastable to it.
            sigma: noise level.
        """
        stale = self.newest if self.slope is None else self.newest + (sigma - self.sigma) * self.slope
        self.newest = torch.where(active, output, self.newest)
        self.sigma = torch.where(active, torch.full_like(self.sigma, sigma), self.sigma)
        return torch.where(active, output, stale)


def with_rows(whole: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``whole`` [B, N, D] with ``part`` [B, n, D] at ``rows``."""
    return put_rows(whole.clone(memory_format=torch.contiguous_format), rows, part)
