"""Orders of tokens: sequences in which neighbours on the grid share a block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry

ORDERS = ("identity", "tiles", "morton", "token-major")


@dataclass(frozen=True)
class OrderSpec:
    """How tokens are ordered before they are cut into blocks.

    Attributes:
        name: ``"identity"``: raster order. ``"tiles"``: tile by tile, raster order inside. ``"morton"``: along a Z-curve
            (bits of t, y and x interleaved). ``"token-major"``: all frames of one position, then the next position.
        tile: (t, y, x) size of a tile; tiles at the end of an axis are smaller. Read by ``"tiles"`` alone.

    Raises:
        ValueError: an unknown name, or a tile without tokens.
    """

    name: str = "identity"
    tile: tuple[int, int, int] = (1, 8, 8)

    def __post_init__(self) -> None:
        if self.name not in ORDERS:
            raise ValueError(f"a token order is one of {', '.join(ORDERS)}, not {self.name!r}")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"a tile needs three sizes of at least one token, got {self.tile}")


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of the sequence. Blocks are cut from it consecutively: nothing is padded.

    Attributes:
        name: of the order.
        permutation: int64 [N], position in the new order -> index in the sequence. Visual tokens come first, then all
            others as they stood: a key mask over text becomes a shorter sequence.
        inverse: int64 [N], index in the sequence -> position in the new order.
        coordinates: int16 [N, 3], (t, y, x) by position in the new order; -1 for tokens that are not visual.
        visual: number of visual tokens.
        identity: whether the permutation changes nothing, so that nobody needs to gather.
    """

    name: str
    permutation: Tensor
    inverse: Tensor
    coordinates: Tensor
    visual: int
    identity: bool

    def ordered(self, tensor: Tensor) -> Tensor:
        """Return [B, H, N, d] in the new order; itself where that changes nothing."""
        return tensor if self.identity else tensor.index_select(2, self.permutation)

    def as_given(self, out: Tensor) -> Tensor:
        """Return an output [B, H, N, d] in the network's own order of tokens."""
        if self.identity:
            return out
        batch, heads, tokens, size = out.shape
        given = out.new_empty(batch, tokens, heads, size)  # most networks go on with all heads of a token side by side
        given.index_copy_(1, self.permutation, out.transpose(1, 2))
        return given.transpose(1, 2)


def token_order(spec: OrderSpec, geometry: Geometry, device: torch.device | str = "cpu") -> TokenOrder:
    """Return the order of ``geometry``'s tokens; made on the CPU and moved to ``device``."""
    grid = _raster(geometry)
    visual = torch.argsort(_rank(spec, grid, geometry), stable=True)
    start, stop = geometry.start, geometry.start + geometry.visual
    permutation = torch.cat([visual + start, torch.arange(start), torch.arange(stop, geometry.length)])
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(geometry.length)
    coordinates = torch.full((geometry.length, 3), -1, dtype=torch.int16)
    coordinates[: geometry.visual] = grid[visual].to(torch.int16)
    identity = bool((permutation == torch.arange(geometry.length)).all())
    placed = (tensor.to(device) for tensor in (permutation, inverse, coordinates))
    return TokenOrder(spec.name, *placed, geometry.visual, identity)


def _raster(geometry: Geometry) -> Tensor:
    """Return int64 [visual, 3], the coordinates of the visual tokens in raster order."""
    axes = [torch.arange(size) for size in geometry.grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _rank(spec: OrderSpec, grid: Tensor, geometry: Geometry) -> Tensor:
    """Return int64 [visual]: tokens sorted by it stand in the order."""
    if spec.name == "tiles":
        tile = torch.tensor(spec.tile)
        return _lexicographic(torch.cat([grid // tile, grid % tile], -1))
    if spec.name == "morton":
        return _interleave(grid, geometry.grid)
    if spec.name == "token-major":
        return _lexicographic(grid[:, [1, 2, 0]])
    return _lexicographic(grid)


def _lexicographic(columns: Tensor) -> Tensor:
    rank = torch.zeros(len(columns), dtype=torch.int64)
    for column in columns.T:
        rank = rank * (int(column.max()) + 1) + column
    return rank


def _interleave(grid: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Interleave the axes' bits, x lowest. An axis gives as many bits as its size needs, so a short one runs out first."""
    rank, shift = torch.zeros(len(grid), dtype=torch.int64), 0
    bits = [(size - 1).bit_length() for size in sizes]
    for level in range(max(bits)):
        for axis in (2, 1, 0):
            if level < bits[axis]:
                rank |= (grid[:, axis] >> level & 1) << shift
                shift += 1
    return rank
