"""4-bit weights with a scale and a zero per group, 16-bit activations: ComfyUI's ``awq_w4a16``.

For layers that see few rows at a time (modulation, text): the weights are read four times faster, nothing else is rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..packing import pack, row_bytes, unpack
from .base import Layout, Part


@dataclass(frozen=True)
class Awq(Layout):
    """``W = (q - 8) * s + z`` with q from 0 to 15 (AWQ, arXiv 2306.00978, without its search for scales).

    Attributes:
        group: input channels that share a scale and a zero.
        dtype: of scales and zeros; ComfyUI computes in it, so it is bf16 or fp16.
    """

    group: int = 64
    dtype: torch.dtype = torch.bfloat16
    name = "w4a16"
    key = "awq_w4a16"
    words = "4-bit weights in groups, 16-bit activations"

    def unfit(self, rows: int, columns: int) -> str | None:
        if columns % self.group:
            return f"{columns} input channels are no multiple of the group of {self.group}"
        return None

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        shape = (columns // self.group, rows)
        return (
            Part("weight", torch.int8, (rows, row_bytes(columns, 4))),
            Part("weight_scale", self.dtype, shape, 1),
            Part("weight_zeros", self.dtype, shape, 1),
        )

    def marker(self) -> dict[str, Any]:
        return {"format": self.key, "group_size": self.group}

    def encode(
        self, weight: torch.Tensor, survey: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        grouped = weight.view(rows, columns // self.group, self.group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        # Rounded first: the codes must be right for the numbers that are stored.
        scale = ((high - low) / 15).clamp_(min=2.0**-24).to(self.dtype)
        zeros = (low + 8 * scale.float()).to(self.dtype)
        steps = (grouped - zeros.float()) / scale.float() + 8
        if generator is None:
            steps = steps.round_()
        else:
            steps = steps.add_(torch.rand(steps.shape, generator=generator, device=steps.device)).floor_()
        codes = steps.clamp_(0, 15).to(torch.uint8).view(rows, columns)
        return {
            "weight": pack(codes, 4).view(torch.int8),
            "weight_scale": scale.squeeze(-1).t().contiguous(),
            "weight_zeros": zeros.squeeze(-1).t().contiguous(),
        }

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        groups, rows = parts["weight_scale"].shape
        codes = unpack(parts["weight"], groups * self.group, 4).view(rows, groups, self.group)
        scale, zeros = (parts[name].float().t().unsqueeze(-1) for name in ("weight_scale", "weight_zeros"))
        return ((codes.float() - 8) * scale + zeros).view(rows, -1)
