"""Small random projections of features, from which distances between any two steps can be read later."""

from dataclasses import dataclass, field

import numpy as np
import torch

_MASK32 = 0xFFFFFFFF
#: Elements hashed at a time. Tensors up to this size keep their hash table (20 MiB); larger ones, such as a video's
#: hidden states, would need gigabytes, so they are hashed anew, piece by piece.
_PIECE = 1 << 22


@dataclass
class CountSketch:
    """CountSketch (Charikar, Chen and Farach-Colton 2002): each element, with a random sign, is added to one bucket.

    Sketches are linear and keep Euclidean distances to about ``sqrt(1 / size)`` relative error,
    however heavy the tails; a strided sample of as many elements errs by a quarter. Buckets and
    signs come from a hash of the element's index, so sketches of equal shapes, sizes and seeds
    compare across runs, devices and processes.

    Attributes:
        size: number of buckets.
        seed: of the hash, in [0, 2^32).
    """

    size: int = 4096
    seed: int = 0
    _tables: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.seed <= _MASK32:
            raise ValueError(f"a sketch needs size >= 1 and a seed in [0, 2^32), got {self.size} and {self.seed}")

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sketch [size] of ``tensor``, any shape and floating dtype, on its device.

        fp32, summed in one ``index_add`` pass (fp64 on the CPU and for fp64 inputs).
        """
        flat = tensor.detach().reshape(-1)
        wide = torch.float64 if flat.dtype == torch.float64 or flat.device.type == "cpu" else torch.float32
        total = torch.zeros(self.size, dtype=wide, device=flat.device)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            buckets, signs = self._table(start, piece.numel(), flat)
            total.index_add_(0, buckets, piece.to(wide) * signs.to(wide))
        return total.to(torch.float32)

    def clear(self) -> None:
        """Forget the hash table (5 bytes per element on the device)."""
        self._tables.clear()

    def _table(self, start: int, count: int, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bucket (int32) and sign (int8) of ``count`` elements from ``start``; every step asks again."""
        key = (count, str(flat.device))
        if start == 0 and key in self._tables:
            return self._tables[key]
        index = torch.arange(start, start + count, dtype=torch.int64, device=flat.device)
        hashed = _mix(index + self.seed * 0x9E3779B9)
        table = ((hashed >> 1) % self.size).to(torch.int32), ((hashed & 1) * 2 - 1).to(torch.int8)
        if flat.numel() <= _PIECE:
            self._tables = {key: table}
        return table


def distance(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> float:
    """Return an estimate of the Euclidean distance between the features behind two sketches [size]."""
    a, b = (torch.as_tensor(sketch).to(torch.float64) for sketch in (a, b))
    return float(torch.linalg.vector_norm(a - b))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 indices to 32 bits (the finaliser of MurmurHash3, written for a signed 64-bit type)."""
    x = x & _MASK32
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = x ^ (x >> shift)
        # The product of two 32-bit numbers may wrap in 64 bits; its low 32 bits are right all the same.
        x = (x * multiplier) & _MASK32
    return x ^ (x >> 16)
