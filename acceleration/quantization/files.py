"""Safetensors headers, checked before anything of them is believed or allocated, and tensors read from files by rows."""

import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import StrettoError

#: A header of 32 MiB names some 200,000 tensors; no model has a tenth of that.
MAX_HEADER = 32 << 20
MAX_AXES = 8
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SPELLINGS: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
#: What the first bytes of a file that is something else say.
_FOREIGN = (
    (b"PK\x03\x04", "a PyTorch archive (pickle)"),
    (b"\x80\x02", "a PyTorch file (pickle)"),
    (b"\x80\x04", "a pickle"),
    (b"GGUF", "a GGUF file"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype, shape, and its bytes [begin, end) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Checked header of a safetensors file."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int
    modified_ns: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        StrettoError: not a safetensors file, truncated, a header too long for any model, tensors that overlap or leave
            gaps, bytes that do not fit dtype and shape, an unknown dtype; says what is wrong with which tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(8)
            _refuse_foreign(path, start)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length > MAX_HEADER:
                raise StrettoError(
                    f"{path}: its header claims {length:,} bytes; no model needs more than {MAX_HEADER:,}. The file is damaged "
                    "or no safetensors file."
                )
            if length < 2 or length > status.st_size - 8:
                raise StrettoError(
                    f"{path}: truncated, or not a safetensors file (a header of {length} bytes in {status.st_size})"
                )
            raw = file.read(length)
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: not a safetensors file ({str(error)[:120]})") from None
    if not isinstance(document, dict):
        raise StrettoError(f"{path}: not a safetensors file (its header is no object)")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StrettoError(f"{path}: __metadata__ is {str(metadata)[:80]}; expected texts by name")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in document.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            how = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise StrettoError(f"{path}: {name!r:.100} {how} (it begins at byte {entry.begin}, {position} is right)")
        position = entry.end
    if position != status.st_size:
        state = "truncated" if position > status.st_size else "longer than its header says"
        raise StrettoError(f"{path}: {state}: {status.st_size} bytes, {position} are right")
    return Header(path, MappingProxyType(entries), MappingProxyType(metadata), status.st_size, status.st_mtime_ns)


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, words in _FOREIGN:
        # A safetensors file may begin with bytes like a pickle's where its header has that length; its ninth is a brace.
        if start.startswith(magic) and (len(magic) > 2 or start[4:8] != b"\0\0\0\0"):
            hint = (
                "Use it with a gguf reader: its name must end in .gguf." if magic == b"GGUF" else
                "Loading one can run any program, so it is not opened; convert it to safetensors where you trust it."
            )  # fmt: skip
            raise StrettoError(f"{path}: {words}, not a safetensors file. {hint}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    fine = isinstance(value, dict) and {"dtype", "shape", "data_offsets"} <= set(value)
    fine = fine and all(isinstance(value[part], list) for part in ("shape", "data_offsets"))
    fine = fine and all(map(_is_count, (*value["shape"], *value["data_offsets"]))) and len(value["data_offsets"]) == 2
    if not fine or not isinstance(value["dtype"], str) or len(value["shape"]) > MAX_AXES:
        raise StrettoError(f"{path}: {name!r:.100} is {str(value)[:80]}; expected dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise StrettoError(f"{path}: {name!r:.100} has dtype {value['dtype']!r:.40}; known are {', '.join(DTYPES)}")
    begin, end = value["data_offsets"]
    size = math.prod(value["shape"]) * dtype.itemsize
    if end - begin != size:
        raise StrettoError(
            f"{path}: {name!r:.100} has {end - begin} bytes; {value['dtype']} {value['shape']} takes {size}"
        )
    return Entry(dtype, tuple(value["shape"]), start + begin, start + end)


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
