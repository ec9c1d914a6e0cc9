"""What a layout of quantized weights is: which tensors it stores, and how rows get in and out of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

ITEM = {
    torch.int8: 1, torch.uint8: 1, torch.float8_e4m3fn: 1, torch.float8_e5m2: 1, torch.float16: 2, torch.bfloat16: 2,
    torch.float32: 4,
}  # fmt: skip
#: Entries worked on at a time: what the caches of a core hold.
PIECE = 1 << 17
#: Parts of an arena begin at multiples of this many bytes, which every dtype and every kernel accepts.
ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized weight.

    Attributes:
        suffix: what follows ``<layer>.`` in a file.
        dtype: of the stored numbers.
        shape: of the whole tensor.
        rows: axis along which the weight's output rows lie; None: shared by all rows.
    """

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int | None = 0

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * ITEM[self.dtype]


class Layout(ABC):
    """One way to store a weight [N, K]. Layouts are frozen dataclasses: equal settings are equal layouts.

    A weight is encoded from blocks of rows, so that a writer never holds all of it. Layouts that need to see the whole
    weight first say so by ``surveys`` and fold blocks into what :meth:`survey` returns.
    """

    #: Name that users choose, and the key of ComfyUI's file format (a ``stretto_`` key where ComfyUI has none).
    name: str
    key: str
    #: One line for people.
    words: str
    #: Whether blocks must be surveyed before the first one is encoded.
    surveys = False
    #: Side of the rotated blocks of input channels; 0: none. Layouts without rotation leave it.
    rotation: int = 0

    @abstractmethod
    def unfit(self, rows: int, columns: int) -> str | None:
        """Return why a weight of this shape cannot be stored so, or None."""

    @abstractmethod
    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """Return the stored tensors of a weight [rows, columns], the codes first."""

    @abstractmethod
    def marker(self) -> dict[str, Any]:
        """Return what ComfyUI's marker of a layer says of it."""

    @abstractmethod
    def encode(
        self, weight: torch.Tensor, survey: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the parts of rows ``weight`` (fp32 [n, K], finite) by suffix.

        Args:
            weight: a block of rows.
            survey: what :meth:`survey` made of the whole weight, where ``surveys``.
            generator: rounds with the probability of the fraction, so that small changes of a weight are kept in the mean.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return fp32 [n, K] of the parts of n rows: the weight as the layer's maker meant it, rotation undone."""

    def survey(self, weight: torch.Tensor, so_far: Any = None) -> Any:
        """Fold a block of rows into what is known of the weight."""
        return None

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the stored bytes of a weight [rows, columns], without the marker."""
        return sum(part.nbytes for part in self.parts(rows, columns))

    def quantize(self, weight: torch.Tensor, generator: torch.Generator | None = None) -> "Packed":
        """Return a whole weight [N, K] in this layout.

        Raises:
            ValueError: the shape does not fit, or a value is not finite.
        """
        if weight.dim() != 2:
            raise ValueError(f"{self.name}: a weight of shape {list(weight.shape)}; expected rows and columns")
        reason = self.unfit(*weight.shape)
        if reason:
            raise ValueError(f"{self.name}: {reason}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{self.name}: the weight has values that are not finite")
        wide = weight.float()
        survey = self.survey(wide) if self.surveys else None
        return Packed(self, tuple(weight.shape), self.encode(wide, survey, generator))

    def checked(self, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "Packed":
        """Return tensors of a file as a packed weight, after checking them against the layout's arithmetic.

        A scale per row may come as [N] or [N, 1], one scale as [] or [1]; codes as int8 or uint8.

        Raises:
            ValueError: a part is missing, or has another dtype or shape.
        """
        parts = {}
        for part in self.parts(*shape):
            tensor = tensors.get(part.suffix)
            if tensor is None:
                raise ValueError(f"{self.key} needs a tensor {part.suffix}, which is missing")
            if tensor.dtype != part.dtype and {tensor.dtype, part.dtype} <= _BYTES:
                tensor = tensor.view(part.dtype)
            if tensor.dtype != part.dtype:
                raise ValueError(f"{part.suffix} has dtype {tensor.dtype}; {self.key} stores {part.dtype}")
            if _squeezed(tensor.shape) != _squeezed(part.shape):
                raise ValueError(f"{part.suffix} has shape {list(tensor.shape)}; {self.key} stores {list(part.shape)}")
            parts[part.suffix] = tensor.reshape(part.shape)
        return Packed(self, shape, parts)


_BYTES = {torch.int8, torch.uint8, torch.float8_e4m3fn}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized weight in memory.

    Attributes:
        layout: how it is stored.
        shape: (N, K) of the weight.
        parts: stored tensors by suffix.
    """

    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, torch.Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.layout.nbytes(*self.shape)

    def dequantize(self) -> torch.Tensor:
        """Return the weight, fp32 [N, K]."""
        return self.layout.decode(self.parts)

    def arena(self) -> torch.Tensor:
        """Return all parts in one uint8 tensor, so that a layer moves, pins and is restored as one."""
        pieces, position = [], 0
        for part, offset in offsets(self.layout, self.shape):
            tensor = self.parts[part.suffix].contiguous().reshape(-1).view(torch.uint8)
            pieces += [tensor.new_zeros(offset - position), tensor]
            position = offset + part.nbytes
        return torch.cat(pieces)

    @classmethod
    def of_arena(cls, layout: Layout, shape: tuple[int, int], arena: torch.Tensor) -> "Packed":
        """Return the packed weight whose parts are views of ``arena`` (uint8, as :meth:`arena` made it)."""
        parts = {
            part.suffix: arena[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            for part, offset in offsets(layout, shape)
        }
        return cls(layout, shape, parts)


def offsets(layout: Layout, shape: tuple[int, int]) -> list[tuple[Part, int]]:
    """Return every part with its first byte in an arena."""
    placed, position = [], 0
    for part in layout.parts(*shape):
        placed.append((part, position))
        position += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return placed
