"""What is kept between steps: keys and values per branch and attention, and what the inactive tokens go on with."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from ...kernels.token_rows import put_rows

#: Largest number of float8_e4m3fn.
_FP8_MOST = 448.0


class Kept:
    """Keys or values of one attention and of one or more branches in a row, in a format of their own.

    Args:
        like: what they look like: [B, N, D] or [B, H, N, d].
        dtype: how they are kept; None for as they are computed.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype | None):
        self.computed = like.dtype
        self.data = torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)
        scaled = dtype == torch.float8_e4m3fn
        self.scale = torch.empty([len(like), *[1] * (like.ndim - 1)], device=like.device) if scaled else None

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def fill(self, values: torch.Tensor, first: int = 0) -> None:
        """Write ``values`` into the batch rows from ``first`` on."""
        part = slice(first, first + len(values))
        if self.scale is not None:
            most = values.abs().amax(dim=tuple(range(1, values.ndim)), keepdim=True).float()
            self.scale[part] = (most / _FP8_MOST).clamp(min=1e-12)
        self.data[part] = self._packed(values, part)

    def put(self, values: torch.Tensor, rows: torch.Tensor, axis: int, first: int = 0) -> None:
        """Write ``values`` at the token ``rows`` of the batch rows from ``first`` on."""
        part = slice(first, first + len(values))
        packed, target = self._packed(values, part), self.data[part]
        if self.scale is not None:  # bytes: few operations know eight-bit floats
            packed, target = packed.view(torch.uint8), target.view(torch.uint8)
        put_rows(target, rows, packed, axis)

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return ``count`` batch rows from ``first`` on, as they are computed; a view where nothing needs converting."""
        part = slice(first, first + count)
        values = self.data[part].to(self.computed)
        return values if self.scale is None else values * self.scale[part].to(self.computed)

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
        bytes: taken now.
        peak_bytes: most ever taken.
    """

    dtype: torch.dtype | None = None
    bytes: int = 0
    peak_bytes: int = 0
    _shares: dict[tuple[Hashable, Hashable], _Share] = field(default_factory=dict, repr=False)

    def keep(self, branches: Sequence[Hashable], layer: Hashable, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the keys and values of all tokens of the ``branches`` of a call, as they stand in its batch."""
        rows = len(keys) // len(branches)
        shares = [self._shares.get((branch, layer)) for branch in branches]
        if not self._together(shares, rows, keys):
            made = Kept(keys, self.dtype), Kept(values, self.dtype)
            for index, branch in enumerate(branches):
                self._shares[branch, layer] = _Share(*made, index * rows)
            shares = [self._shares[branch, layer] for branch in branches]
            self._count()
        shares[0].keys.fill(keys)
        shares[0].values.fill(values)

    def has(self, branch: Hashable, layer: Hashable) -> bool:
        """Whether something is kept."""
        return (branch, layer) in self._shares

    def merged(
        self,
        branches: Sequence[Hashable],
        layer: Hashable,
        rows: torch.Tensor,
        axis: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite what is kept with ``keys`` and ``values`` of the tokens ``rows``, and return all tokens' of a call."""
        count = len(keys) // len(branches)
        shares = [self._shares[branch, layer] for branch in branches]
        for index, share in enumerate(shares):
            part = slice(index * count, (index + 1) * count)
            share.keys.put(keys[part], rows, axis, share.first)
            share.values.put(values[part], rows, axis, share.first)
        if self._together(shares, count, None):
            return shares[0].keys.read(0, len(keys)), shares[0].values.read(0, len(keys))
        found = [(share.keys.read(share.first, count), share.values.read(share.first, count)) for share in shares]
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

    Attributes:
        order: 0 repeats a token's last computed output, 1 continues the line through its last two.
        newest: last output, active tokens' as computed, [B, C, ...].
        sigma: noise levels it was computed at, broadcastable to it.
        before: the computed output before it, and its noise levels; None as long as there is none.
    """

    order: int
    newest: torch.Tensor
    sigma: torch.Tensor
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self.newest.nbytes + (self.before[0].nbytes if self.before else 0)

    def renew(self, output: torch.Tensor, sigma: float) -> None:
        """Take an output that was computed for every token."""
        if self.order:
            self.before = self.newest, self.sigma
        self.newest, self.sigma = output, torch.full_like(self.sigma, sigma)

    def patched(self, output: torch.Tensor, active: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return ``output`` with inactive tokens' own, and take note of the active ones'.

        Args:
            output: [B, C, ...], sensible at active tokens alone.
            active: bool, broadcastable to it.
            sigma: noise level.
        """
        stale = self.newest
        if self.before is not None:
            values, sigmas = self.before
            ahead = ((sigma - self.sigma) / (self.sigma - sigmas)).clamp(0.0, 2.0)
            stale = self.newest + torch.nan_to_num(ahead, nan=0.0) * (self.newest - values)
            self.before = torch.where(active, self.newest, values), torch.where(active, self.sigma, sigmas)
        made = torch.where(active, output, stale)
        if self.order:
            self.newest = torch.where(active, output, self.newest)
            self.sigma = torch.where(active, torch.full_like(self.sigma, sigma), self.sigma)
        else:
            self.newest = made
        return made


def with_rows(whole: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``whole`` [B, N, D] with ``part`` [B, n, D] at ``rows``."""
    return put_rows(whole.clone(memory_format=torch.contiguous_format), rows, part)
