"""fp8 e4m3 with one scale for the weight (any ComfyUI reads it), or one per row (the pack's own)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .base import PIECE, Layout, Part

LIMIT = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8(Layout):
    """``W = q * s`` with q in fp8 e4m3 and fp32 scales ``s = max|W| / 448``."""

    rows: bool = False
    words = "8-bit weights (fp8 e4m3)"

    @property
    def name(self) -> str:
        return "fp8_rows" if self.rows else "fp8"

    @property
    def key(self) -> str:
        return "stretto_float8_e4m3fn_rows" if self.rows else "float8_e4m3fn"

    @property
    def surveys(self) -> bool:
        return not self.rows

    def unfit(self, rows: int, columns: int) -> str | None:
        return None

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        shape, axis = ((rows, 1), 0) if self.rows else ((), None)
        return Part("weight", torch.float8_e4m3fn, (rows, columns)), Part("weight_scale", torch.float32, shape, axis)

    def marker(self) -> dict[str, Any]:
        return {"format": self.key}

    def survey(self, weight: torch.Tensor, so_far: Any = None) -> float:
        return max(so_far or 0.0, float(weight.abs().max()) if weight.numel() else 0.0)

    def encode(
        self, weight: torch.Tensor, survey: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        if self.rows:
            scale = (weight.abs().amax(-1, keepdim=True) / LIMIT).clamp_(min=1e-30)
        else:
            scale = torch.tensor(max(float(survey) / LIMIT, 1e-30), device=weight.device)
        steps = weight / scale
        if generator is not None:
            steps = _dithered(steps, generator)
        return {"weight": steps.clamp_(-LIMIT, LIMIT).to(torch.float8_e4m3fn), "weight_scale": scale}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes, scale = parts["weight"], parts["weight_scale"]
        if codes.device.type != "cpu":
            return codes.float() * scale
        # Processors have no fp8: its 256 numbers in a table are several times faster than torch's conversion, and the same.
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        weight = torch.empty(codes.shape)
        step = max(PIECE // max(codes.shape[1], 1), 1)
        for start in range(0, codes.shape[0], step):
            rows = codes[start : start + step].view(torch.uint8)
            factor = scale[start : start + step] if self.rows else scale
            torch.mul(numbers.index_select(0, rows.reshape(-1).int()).view(rows.shape), factor, out=weight[start : start + step])
        return weight


def _dithered(steps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round to a neighbour in fp8 e4m3 with the probability of the nearness: 3 bits behind the leading one."""
    exponent = torch.frexp(steps.abs().clamp(min=2.0**-6))[1] - 1
    step = torch.exp2((exponent - 3).float())
    return torch.floor(steps / step + torch.rand(steps.shape, generator=generator, device=steps.device)) * step
