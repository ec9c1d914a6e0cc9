"""GGUF files: their header is read here, checked before anything is allocated; the ``gguf`` package decodes their blocks.

The package is optional (``pip install gguf``). Floating tensors are read without it.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from ..errors import StrettoError
from .checkpoints import Checkpoint
from .files import Computed, OpenFile, Stored

_VERSIONS = (2, 3)
_MAX_TENSORS, _MAX_FIELDS, _MAX_TEXT, _MAX_ITEMS = 1 << 16, 1 << 16, 1 << 22, 1 << 22
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
#: Names, and (weights, bytes) of a block, of the types that are decoded (ggml's ggml_type).
TYPES = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
_SHAPE_KEY = "comfy.gguf.orig_shape."


@dataclass(frozen=True, eq=False)
class GgufTensor(Stored):
    """A tensor of a GGUF file; blocks are decoded by rows.

    Attributes:
        kind: name of its type.
    """

    file: OpenFile
    shape: tuple[int, ...]
    kind: str
    begin: int
    nbytes: int
    row_bytes: int
    dtype: torch.dtype
    decode: Callable[[bytearray, int], torch.Tensor] = field(repr=False)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.wide(start, stop).to(self.dtype)

    def wide(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = self.rows if stop is None else stop
        raw = self.file.read(self.begin + start * self.row_bytes, self.begin + stop * self.row_bytes)
        return self.decode(raw, stop - start).float().view(stop - start, *self.shape[1:])


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; its header is checked, no tensor is read.

    Raises:
        StrettoError: damaged, truncated, of another version, or with a type that is not decoded: names the tensor.
    """
    try:
        with path.open("rb") as file:
            status = path.stat()
            fields, tensors, data = _header(path, file, status.st_size)
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    opened = OpenFile(path, status.st_size, status.st_mtime_ns)
    found: dict[str, Stored] = {}
    for name, shape, kind, offset in tensors:
        found[name] = _tensor(path, opened, name, shape, kind, data + offset, status.st_size, fields)
    if not found:
        raise StrettoError(f"{path}: holds no tensor")
    metadata = {key: value for key, value in fields.items() if isinstance(value, str) and len(value) < 4096}
    names = sorted({tensor.kind for tensor in tensors_of(found)})
    return Checkpoint(
        (path,), MappingProxyType(found), MappingProxyType(metadata), (f"GGUF: {', '.join(names)}",), (opened,)
    )


def tensors_of(found: dict[str, Stored]) -> list[GgufTensor]:
    """The tensors that are stored in the file as they are."""
    return [tensor for tensor in found.values() if isinstance(tensor, GgufTensor)]


def _tensor(
    path: Path,
    file: OpenFile,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    begin: int,
    size: int,
    fields: dict[str, Any],
) -> Stored:
    columns = shape[-1] if shape else 1
    if kind in _FLOATS:
        dtype = _FLOATS[kind]
        title, row = {0: "F32", 1: "F16", 30: "BF16"}[kind], columns * dtype.itemsize

        def decode(raw: bytearray, rows: int) -> torch.Tensor:
            return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)

    elif kind in TYPES:
        (title, block, block_bytes), dtype = TYPES[kind], torch.bfloat16
        if columns % block:
            raise StrettoError(f"{path}: {name!r:.100} has rows of {columns} numbers; {title} has blocks of {block}")
        row = columns // block * block_bytes

        def decode(raw: bytearray, rows: int) -> torch.Tensor:
            return _decoded(raw, kind, title)

    else:
        known = ", ".join(["F32", "F16", "BF16", *(entry[0] for entry in TYPES.values())])
        raise StrettoError(f"{path}: {name!r:.100} is of GGUF type {kind}; this release decodes {known}")
    count = math.prod(shape[:-1])
    if begin + count * row > size:
        raise StrettoError(f"{path}: truncated: {name!r:.100} ends at byte {begin + count * row}, the file at {size}")
    if len(shape) <= 1:  # one row of all numbers, which cannot be split
        whole = GgufTensor(file, (1, columns), title, begin, row, row, dtype, decode)
        return Computed(
            dtype,
            shape,
            row,
            lambda start, stop: whole.wide().view(shape)[start:stop] if shape else whole.wide().view(()),
        )
    line = row * math.prod(shape[1:-1])
    tensor = GgufTensor(file, shape, title, begin, count * row, line, dtype, decode)
    original = fields.get(_SHAPE_KEY + name)
    if (
        isinstance(original, tuple)
        and all(isinstance(side, int) and side > 0 for side in original)
        and original != shape
    ):
        if math.prod(original) != math.prod(shape):
            raise StrettoError(
                f"{path}: {name!r:.100} has shape {list(shape)} and claims to have been {list(original)}"
            )
        return Computed(dtype, original, tensor.nbytes, lambda start, stop: tensor.wide().view(original)[start:stop])
    return tensor


def _decoded(raw: bytearray, kind: int, title: str) -> torch.Tensor:
    try:
        import gguf.quants
        from gguf.constants import GGMLQuantizationType
    except ImportError:
        raise StrettoError(
            f"GGUF {title}: the package gguf decodes it and is not installed; pip install gguf"
        ) from None
    import numpy as np

    values = gguf.quants.dequantize(np.frombuffer(raw, dtype=np.uint8), GGMLQuantizationType(kind))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _header(
    path: Path, file: BinaryIO, size: int
) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    def take(form: str) -> Any:
        raw = file.read(struct.calcsize("<" + form))
        if len(raw) != struct.calcsize("<" + form):
            raise StrettoError(f"{path}: truncated in its header")
        return struct.unpack("<" + form, raw)[0]

    def count(limit: int, what: str) -> int:
        number = take("Q")
        if number > limit:
            raise StrettoError(
                f"{path}: claims {number:,} {what}; {limit:,} are the most that make sense. The file is damaged."
            )
        return number

    def text() -> str:
        length = count(min(_MAX_TEXT, size), "bytes in a text")
        raw = file.read(length)
        if len(raw) != length:
            raise StrettoError(f"{path}: truncated in its header")
        return raw.decode("utf-8", errors="replace")

    def value(kind: int, deep: int = 0) -> Any:
        if kind in _SCALARS:
            return take(_SCALARS[kind])
        if kind == _TEXT:
            return text()
        if kind != _LIST or deep > 2:
            raise StrettoError(f"{path}: a field of its header has type {kind}, which GGUF does not have")
        inner, length = take("I"), count(_MAX_ITEMS, "items in a list")
        if inner in _SCALARS and length * struct.calcsize("<" + _SCALARS[inner]) > size - file.tell():
            raise StrettoError(f"{path}: truncated in its header")
        return tuple(value(inner, deep + 1) for _ in range(length))

    if file.read(4) != b"GGUF":
        raise StrettoError(f"{path}: not a GGUF file")
    version = take("I")
    if version not in _VERSIONS:
        raise StrettoError(f"{path}: GGUF version {version}; this release reads {' and '.join(map(str, _VERSIONS))}")
    number, keys = count(_MAX_TENSORS, "tensors"), count(_MAX_FIELDS, "fields")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        name = text()
        fields[name] = value(take("I"))
    tensors, seen = [], set()
    for _ in range(number):
        name, axes = text(), take("I")
        if axes > 8 or name in seen:
            raise StrettoError(
                f"{path}: {name!r:.100} " + ("stands in it twice" if name in seen else f"has {axes} axes")
            )
        seen.add(name)
        dims = [count(1 << 40, "numbers along an axis") for _ in range(axes)]
        tensors.append((name, tuple(reversed(dims)), take("I"), take("Q")))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise StrettoError(f"{path}: general.alignment is {str(alignment)[:40]}; expected a small power of two")
    return fields, tensors, -(-file.tell() // alignment) * alignment
