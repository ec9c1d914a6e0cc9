"""Which key blocks every query block attends to, and what else decides about a pair of tokens.

Queries and keys are cut into consecutive blocks of ``q_block`` and ``kv_block`` tokens; only the last block of either may
be shorter. Notation of shapes: B batch rows, H heads, Hk key heads, N queries, M keys, d head size, Nq and Nk blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "BlockList", "Predicate", "Tail", "pool_blocks"]

#: Kinds of token predicates, and how many limits each takes.
KINDS = {"radius": 1, "band": 2, "box": 3}


@dataclass(frozen=True, eq=False)
class BlockList:
    """Key blocks by query block: the one sparse format of every backend.

    Attributes:
        index: int32 [B', H', Nq, K], where B' and H' may be 1 to serve all. Of a row, the first ``full`` ids, ascending,
            need no token predicate; ids ``full`` to ``count - 1``, ascending again, do. Later ids are fillers that
            nobody reads as keys (the last valid id, or 0).
        count: int32 [B', H', Nq]; 0 is allowed.
        full: int32 [B', H', Nq], or None where no id needs a predicate.
        q_block: queries in a block.
        kv_block: keys in a block.
    """

    index: Tensor
    count: Tensor
    full: Tensor | None
    q_block: int = 64
    kv_block: int = 64

    @classmethod
    def from_mask(cls, mask: Tensor, q_block: int = 64, kv_block: int = 64, full: Tensor | None = None) -> "BlockList":
        """Build the lists of a block mask.

        Args:
            mask: bool [B', H', Nq, Nk], True where a block is attended.
            q_block: queries in a block.
            kv_block: keys in a block.
            full: bool, broadcastable to ``mask``: blocks that need no token predicate. None: none needs one.

        On the CPU the lists are as long as the longest. Elsewhere reading that length would make the host wait, so they
        have room for all Nk blocks.
        """
        blocks = mask.shape[-1]
        count = mask.sum(-1, dtype=torch.int32)
        longest = max(int(count.max()), 1) if mask.device.type == "cpu" and count.numel() else max(blocks, 1)
        if full is None:
            number, place = None, mask.cumsum(-1, dtype=torch.int32) - 1
        else:
            whole = mask & full
            part = mask & ~full
            number = whole.sum(-1, dtype=torch.int32)
            place = torch.where(
                whole,
                whole.cumsum(-1, dtype=torch.int32) - 1,
                number[..., None] + part.cumsum(-1, dtype=torch.int32) - 1,
            )
        # One spare column takes the ids that are not kept; scattering distinct places is deterministic.
        place = torch.where(mask, place, longest).long()
        index = torch.zeros((*mask.shape[:-1], longest + 1), dtype=torch.int32, device=mask.device)
        ids = torch.arange(blocks, dtype=torch.int32, device=mask.device).expand(mask.shape)
        index.scatter_(-1, place, ids)
        columns = torch.arange(longest, device=mask.device)
        last = (count - 1).clamp_min(0).long()[..., None]
        index = index.gather(-1, torch.minimum(columns, last))  # fillers repeat the last id; 0 in an empty row
        index = torch.where((count > 0)[..., None], index, 0)
        return cls(index.contiguous(), count, number, q_block, kv_block)

    def to_mask(self, key_blocks: int) -> Tensor:
        """Return bool [B', H', Nq, key_blocks], True where a block is listed, with or without predicate."""
        return self._scatter(self.count, key_blocks)

    def full_mask(self, key_blocks: int) -> Tensor:
        """Return bool [B', H', Nq, key_blocks], True where a block is listed and needs no token predicate."""
        return self._scatter(self.count if self.full is None else self.full, key_blocks)

    def complement(self, key_blocks: int) -> "BlockList":
        """Return the lists of all blocks that are not listed. Partial blocks count as listed."""
        return self.from_mask(~self.to_mask(key_blocks), self.q_block, self.kv_block)

    def validate(self, queries: int, keys: int) -> None:
        """Check the lists against the lengths of the sequences. Waits for the device.

        Args:
            queries: N.
            keys: M.

        Raises:
            ValueError: with what is wrong, and where first.
        """
        shape_error = self.shape_error(queries)
        if shape_error:
            raise ValueError(shape_error)
        key_blocks = -(-keys // self.kv_block)
        if bool((self.count < 0).any()) or bool((self.count > min(key_blocks, self.index.shape[-1])).any()):
            low, high = int(self.count.min()), int(self.count.max())
            raise ValueError(
                f"a row may list 0 to {min(key_blocks, self.index.shape[-1])} key blocks, but counts go from {low} to {high}"
            )
        full = self.count if self.full is None else self.full
        if bool(((full < 0) | (full > self.count)).any()):
            raise ValueError("a row has more blocks without predicate than blocks: full must be 0 to count")
        columns = torch.arange(self.index.shape[-1], device=self.index.device)
        valid = columns < self.count[..., None]
        wrong = valid & ((self.index < 0) | (self.index >= key_blocks))
        if bool(wrong.any()):
            row = tuple(int(x) for x in wrong.nonzero()[0])
            found = int(self.index[row])
            raise ValueError(f"key block {found} is listed at {row}, but the keys have blocks 0 to {key_blocks - 1}")
        rises = self.index[..., 1:] > self.index[..., :-1]
        border = columns[1:] == full[..., None]  # the ascent starts anew where the partial blocks begin
        if bool((valid[..., 1:] & ~rises & ~border).any()):
            raise ValueError("key blocks must ascend within the full and within the partial part of a row")
        if self.full is not None and bool((self._times(key_blocks) > 1).any()):
            raise ValueError("a key block is listed twice in one row")

    def shape_error(self, queries: int) -> str | None:
        """Return what is wrong with shapes and dtypes for N ``queries``, or None. Looks at no value."""
        if self.q_block < 1 or self.kv_block < 1:
            return f"blocks must hold at least one token, got {self.q_block} and {self.kv_block}"
        query_blocks = -(-queries // self.q_block)
        if self.index.ndim != 4 or self.index.shape[2] != query_blocks:
            return (
                f"the lists must have shape [batch, heads, {query_blocks}, ids] for {queries} queries in blocks of "
                f"{self.q_block}, got {list(self.index.shape)}"
            )
        if self.index.shape[3] < 1:
            return "the lists need room for at least one id"
        for name in ("count", "full"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.index.shape[:3]:
                return f"{name} must have shape {list(self.index.shape[:3])}, got {list(tensor.shape)}"
            if tensor is not None and tensor.dtype != torch.int32:
                return f"{name} must be int32, got {tensor.dtype}"
        return None if self.index.dtype == torch.int32 else f"the ids must be int32, got {self.index.dtype}"

    def _scatter(self, number: Tensor, key_blocks: int) -> Tensor:
        columns = torch.arange(self.index.shape[-1], device=self.index.device)
        ids = torch.where(columns < number[..., None], self.index, key_blocks).long()
        mask = torch.zeros((*self.index.shape[:-1], key_blocks + 1), dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, ids, True)[..., :key_blocks]

    def _times(self, key_blocks: int) -> Tensor:
        columns = torch.arange(self.index.shape[-1], device=self.index.device)
        ids = torch.where(columns < self.count[..., None], self.index, key_blocks).long()
        times = torch.zeros((*self.index.shape[:-1], key_blocks + 1), dtype=torch.int32, device=self.index.device)
        return times.scatter_add_(-1, ids, torch.ones_like(ids, dtype=torch.int32))[..., :key_blocks]


@dataclass(frozen=True, eq=False)
class Predicate:
    """A test of token pairs inside partial blocks, by the tokens' coordinates. Queries and keys are the same tokens.

    Attributes:
        kind: ``radius``: same t, and dy^2 + dx^2 < limits[0] (CLEAR, arXiv 2412.16112). ``band``: limits[0] <= j - i <=
            limits[1], where i and j are the original positions of query and key, held in ``coordinates[:, 2]``.
            ``box``: |dt| <= limits[0], |dy| <= limits[1], |dx| <= limits[2].
        coordinates: int16 or int32 [N, 3] (t, y, x), in the order of the tokens. t < 0 marks an exempt token, such as
            text: every pair with it is kept.
        limits: as ``kind`` says; whole numbers.
    """

    kind: str
    coordinates: Tensor
    limits: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a predicate is one of {', '.join(KINDS)}, not {self.kind!r}")
        if len(self.limits) != KINDS[self.kind]:
            raise ValueError(f"a {self.kind} takes {KINDS[self.kind]} limits, got {len(self.limits)}")
        if self.coordinates.ndim != 2 or self.coordinates.shape[1] != 3:
            raise ValueError(f"coordinates must have shape [tokens, 3], got {list(self.coordinates.shape)}")
        if self.coordinates.dtype not in (torch.int16, torch.int32):
            raise ValueError(f"coordinates must be int16 or int32, got {self.coordinates.dtype}")

    def keeps(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return bool [..., Q, K]: whether pairs of tokens are kept.

        Args:
            queries: int64 [..., Q], positions of query tokens.
            keys: int64 [..., K], positions of key tokens.
        """
        wide = self.coordinates.int()
        query, key = wide[queries][..., :, None, :], wide[keys][..., None, :, :]
        gap = key - query
        if self.kind == "radius":
            kept = (gap[..., 0] == 0) & (gap[..., 1].square() + gap[..., 2].square() < self.limits[0])
        elif self.kind == "band":
            kept = (gap[..., 2] >= self.limits[0]) & (gap[..., 2] <= self.limits[1])
        else:
            t, y, x = self.limits
            kept = (gap[..., 0].abs() <= t) & (gap[..., 1].abs() <= y) & (gap[..., 2].abs() <= x)
        return kept | (query[..., 0] < 0) | (key[..., 0] < 0)


@dataclass(frozen=True, eq=False)
class Tail:
    """Pooled keys: every key block that a row does not list enters its softmax as one key (Sol-Attn, arXiv 2607.24027).

    Its logit is ``q . key * scale + log(size)``, so that a block counts as often as it has tokens.

    Attributes:
        keys: [B, Hk, Nk, d], mean key of each block.
        values: [B, Hk, Nk, d], mean value of each block.
        sizes: [Nk] or [B, Nk], valid tokens of each block; a block with 0 is ignored.
    """

    keys: Tensor
    values: Tensor
    sizes: Tensor


def pool_blocks(x: Tensor, block: int, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean of every block of tokens, and how many tokens it has.

    Args:
        x: [B, H, N, d].
        block: tokens in a block; the last one may have fewer.
        length: int [B], valid tokens of each batch row; None: all are.

    Returns:
        Means [B, H, Nb, d] in fp32 (fp64 for fp64 inputs), 0 for blocks without a valid token; and their sizes, int32
        [Nb], or [B, Nb] where ``length`` is given.
    """
    tokens = x.shape[2]
    blocks = -(-tokens // block)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    starts = torch.arange(blocks, device=x.device, dtype=torch.int32) * block
    valid = torch.tensor(tokens, device=x.device) if length is None else length.clamp(max=tokens)[:, None]
    sizes = (valid - starts).clamp(0, block).int()
    if length is not None:
        inside = torch.arange(tokens, device=x.device) < length[:, None]
        x = x.masked_fill(~inside[:, None, :, None], 0)
    whole = tokens // block
    parts = []
    if whole:
        parts.append(x[:, :, : whole * block].unflatten(2, (whole, block)).sum(3, dtype=wide))
    if whole < blocks:
        parts.append(x[:, :, whole * block :].sum(2, keepdim=True, dtype=wide))
    total = torch.cat(parts, 2) if parts else x.new_zeros((*x.shape[:2], 0, x.shape[3]), dtype=wide)
    divisor = sizes.clamp_min(1).to(wide)
    return total / (divisor[:, None, :, None] if length is not None else divisor[:, None]), sizes
