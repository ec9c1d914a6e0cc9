"""int8 rows, rotated: W8A8 without calibration data, ComfyUI's ``int8_tensorwise``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....kernels.rotate_quantize import SIZES, quantize_rows, rotate
from .base import PIECE, Layout, Part


@dataclass(frozen=True)
class Int8Rows(Layout):
    """``W = rotate(q * s)``: int8 codes and one fp32 scale per output row; activations are rounded token by token.

    Attributes:
        rotation: side of the Hadamard blocks over the input channels; 0: none.
        shared_scale: files of others may have one scale for the whole weight.
    """

    rotation: int = 256
    shared_scale: bool = False
    name = "int8"
    key = "int8_tensorwise"
    words = "8-bit weights and activations (int8), rotated"

    def unfit(self, rows: int, columns: int) -> str | None:
        return rotation_unfit(self.rotation, columns)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        scale = (
            Part("weight_scale", torch.float32, (), None)
            if self.shared_scale
            else Part("weight_scale", torch.float32, (rows, 1))
        )
        return Part("weight", torch.int8, (rows, columns)), scale

    def marker(self) -> dict[str, Any]:
        rotated = {"convrot": True, "convrot_groupsize": self.rotation} if self.rotation else {}
        return {"format": self.key, **rotated}

    def encode(
        self, weight: torch.Tensor, survey: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        if self.shared_scale:
            raise ValueError("int8 with one scale for the whole weight is read, not written")
        # A few rows at a time stay in a core's caches.
        pieces = [
            quantize_rows(rotate(piece, self.rotation), generator)
            for piece in weight.split(max(PIECE // max(weight.shape[1], 1), 1))
        ]
        codes, scale = zip(*pieces)
        return {"weight": torch.cat(codes), "weight_scale": torch.cat(scale)}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return rotate(parts["weight"].float() * parts["weight_scale"], self.rotation)


def rotation_unfit(size: int, columns: int) -> str | None:
    """Return why ``columns`` input channels cannot be rotated in blocks of ``size``, or None."""
    if size and size not in SIZES:
        return f"rotation size {size}; use one of {', '.join(map(str, SIZES))}, or 0 for none"
    if size and columns % size:
        return f"rotation size {size} does not divide the {columns} input channels"
    return None


def rotation_for(columns: int, largest: int = 256, smallest: int = 16) -> int:
    """Return the largest rotation size that divides ``columns``, or 0 where not even ``smallest`` does."""
    return next((size for size in SIZES if smallest <= size <= largest and columns % size == 0), 0)
