"""Tensors read from files by rows, wherever their numbers come from."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import StrettoError
from ..safetensors_header import Entry


class Stored(ABC):
    """A tensor that can be read by rows, wherever its numbers come from.

    Attributes:
        dtype: of what :meth:`read` returns.
        shape: of the whole tensor.
        nbytes: bytes that the source stores for it, for progress.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) along the first axis; a tensor without axes is read whole."""

    def wide(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows as fp32, before any rounding to ``dtype``."""
        return self.read(start, stop).float()

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a tensor without axes."""
        return self.shape[0] if self.shape else 1

    def blocks(self, entries: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows of about ``entries`` numbers each, at least one row."""
        width = max(math.prod(self.shape[1:]), 1)
        step = max(entries // width, 1)
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class OpenFile:
    """A file opened for reading parts of it, which notices when the file is changed meanwhile."""

    def __init__(self, path: Path, size: int, modified_ns: int) -> None:
        self.path = path
        self._expected = (size, modified_ns)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None

    def read(self, begin: int, end: int) -> bytearray:
        """Return bytes [begin, end).

        Raises:
            StrettoError: the file has been changed since its header was read, or a disk error.
        """
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != self._expected:
            raise StrettoError(f"{self.path}: was changed while it was being read; start again")
        buffer = bytearray(end - begin)
        view, position = memoryview(buffer), begin
        try:
            while view:
                done = self._pread(view, position)
                if done == 0:
                    raise StrettoError(f"{self.path}: ended at byte {position} while it was being read; start again")
                view, position = view[done:], position + done
        except OSError as error:
            raise StrettoError(f"{self.path}: cannot be read ({error.strerror})") from None
        return buffer

    def _pread(self, view: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view[: 1 << 30]], position)
        self._file.seek(position)
        return self._file.readinto(view[: 1 << 30]) or 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, eq=False)
class FileTensor(Stored):
    """A tensor of a safetensors file."""

    file: OpenFile
    entry: Entry

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.end - self.entry.begin

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if not self.shape:
            return self._tensor(self.entry.begin, self.entry.end, ())
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._tensor(
            self.entry.begin + start * row, self.entry.begin + stop * row, (stop - start, *self.shape[1:])
        )

    def _tensor(self, begin: int, end: int, shape: tuple[int, ...]) -> torch.Tensor:
        if begin == end:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(self.file.read(begin, end), dtype=torch.uint8).view(self.dtype).view(shape)


@dataclass(frozen=True, eq=False)
class Joined(Stored):
    """Rows of several tensors, one after the other: a fused projection, or halves that change places."""

    pieces: Sequence[tuple[Stored, int, int]]

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(stop - start for _, start, stop in self.pieces), *self.pieces[0][0].shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes * (stop - start) // max(piece.rows, 1) for piece, start, stop in self.pieces)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = self.shape[0] if stop is None else stop
        return torch.cat([piece.read(low, high).to(self.dtype) for piece, low, high in self._within(start, stop)])

    def wide(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = self.shape[0] if stop is None else stop
        return torch.cat([piece.wide(low, high) for piece, low, high in self._within(start, stop)])

    def _within(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        position = 0
        for piece, first, last in self.pieces:
            low, high = max(start - position, 0), min(stop - position, last - first)
            if low < high:
                yield piece, first + low, first + high
            position += last - first


@dataclass(frozen=True, eq=False)
class Computed(Stored):
    """A tensor whose rows are made by a function: the dequantized form of one stored otherwise.

    ``make(start, stop)`` returns fp32; :meth:`read` rounds to ``dtype``.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[int, int], torch.Tensor] = field(repr=False)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.wide(start, stop).to(self.dtype)

    def wide(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.make(start, self.rows if stop is None else stop)
