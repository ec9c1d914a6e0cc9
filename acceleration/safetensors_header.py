"""Headers of safetensors files, checked before anything of them is believed or allocated."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .errors import StrettoError

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
