"""Safetensors files, read and written by hand: a header is checked before anything of it is believed or allocated."""

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...errors import StrettoError

MAX_HEADER = 16 << 20
#: Spellings of the safetensors format that hold trained numbers.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: spelling of its dtype, shape, and its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Checked header of a safetensors file."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        StrettoError: cannot be read, is no safetensors file, or is truncated; says what is wrong where.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, total - 8):
                raise StrettoError(
                    f"{path}: not a safetensors file, or truncated (its header would be {length} bytes long)"
                )
            raw = file.read(length)
    except OSError as error:
        raise StrettoError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: not a safetensors file ({error})") from None
    if not isinstance(document, dict):
        raise StrettoError(f"{path}: not a safetensors file (its header is no object)")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StrettoError(f"{path}: __metadata__ is {str(metadata)[:80]}; expected texts by name")
    entries = {key: _entry(path, key, value, 8 + length) for key, value in document.items()}
    position = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise StrettoError(f"{path}: {key} begins at byte {entry.begin}; expected {position}")
        position = entry.end
    if position != total:
        state = "truncated" if position > total else "longer than its header says"
        raise StrettoError(f"{path}: {state}; {total} bytes, expected {position}")
    return Header(path, MappingProxyType(entries), MappingProxyType(metadata))


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor; StrettoError where one holds no trained numbers."""
    for key, entry in header.entries.items():
        if entry.dtype not in DTYPES:
            raise StrettoError(f"{header.path}: {key} has dtype {entry.dtype}; expected one of {', '.join(DTYPES)}")
    return {key: entry.shape for key, entry in header.entries.items()}


def read_tensor(header: Header, key: str) -> torch.Tensor:
    """Return one tensor of a checked file, mapped from it where its bytes are aligned: pages are read when used.

    Raises:
        StrettoError: the file changed meanwhile, or the dtype holds no trained numbers.
    """
    entry = header.entries[key]
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise StrettoError(f"{header.path}: {key} has dtype {entry.dtype}; expected one of {', '.join(DTYPES)}")
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    try:
        mapped = torch.from_file(str(header.path), shared=False, size=entry.end, dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        raise StrettoError(f"{header.path}: cannot be read any more ({str(error).splitlines()[0]})") from None
    part = mapped[entry.begin : entry.end]
    if entry.begin % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).reshape(entry.shape)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all, and never over another one.

    Args:
        path: the file.
        tensors: fp32, fp16 or bf16; written in the order of their names.
        metadata: texts.

    Raises:
        StrettoError: the file exists, or cannot be written.
    """
    path = Path(path)
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in sorted(tensors):
        size = tensors[key].numel() * tensors[key].element_size()
        spelling = spelled[tensors[key].dtype]
        header[key] = {"dtype": spelling, "shape": list(tensors[key].shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            try:
                file.write(struct.pack("<Q", len(raw)) + raw)
                for key in sorted(tensors):
                    file.write(tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                file.close()
                os.link(file.name, path)  # unlike a check beforehand, this cannot lose a race
            finally:
                file.close()
                Path(file.name).unlink(missing_ok=True)
    except FileExistsError:
        raise StrettoError(f"{path}: exists already; pass another name") from None
    except OSError as error:
        raise StrettoError(f"{path}: cannot be written ({error.strerror})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, key: str, value: Any, start: int) -> Entry:
    fine = isinstance(value, dict) and {"dtype", "shape", "data_offsets"} <= set(value)
    fine = fine and all(isinstance(value[name], list) for name in ("shape", "data_offsets"))
    fine = fine and all(map(_is_count, (*value["shape"], *value["data_offsets"]))) and len(value["data_offsets"]) == 2
    if not fine or not isinstance(value["dtype"], str):
        raise StrettoError(f"{path}: {key} is {str(value)[:80]}; expected dtype, shape and data_offsets")
    begin, end = value["data_offsets"]
    # Dtypes we do not know are other people's tensors: their size is taken as it stands.
    size = math.prod(value["shape"]) * _ITEM_BYTES[value["dtype"]] if value["dtype"] in _ITEM_BYTES else end - begin
    if end - begin != size or size < 0:
        kind = f"{value['dtype']} {value['shape']}"
        raise StrettoError(f"{path}: {key} has {end - begin} bytes; expected {size} for {kind}")
    return Entry(value["dtype"], tuple(value["shape"]), start + begin, start + end)


def finite(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``; StrettoError unless all its numbers are finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise StrettoError(f"{path}: {key} has values that are not finite; expected finite numbers")
    return tensor


@dataclass(frozen=True)
class Meta:
    """Typed reading of metadata; every failure names the file, the field, its value and what was expected."""

    path: Path
    texts: Mapping[str, str]

    def need(self, name: str, read: Callable[[str], Any], fine: Callable[[Any], bool], expected: str) -> Any:
        """Return ``read`` of the text called ``name`` if it is ``fine``."""
        if name not in self.texts:
            raise StrettoError(f"{self.path}: metadata has no {name}; expected {expected}")
        try:
            value = read(self.texts[name])
            good = fine(value)
        except ValueError:
            good = False
        if not good:
            raise StrettoError(f"{self.path}: {name} is {self.texts[name][:80]!r}; expected {expected}")
        return value

    def choice(self, name: str, options: Sequence[str]) -> str:
        """Return a text that is one of ``options``."""
        return self.need(name, str, options.__contains__, "one of " + ", ".join(options))

    def count(self, name: str, least: int = 1, most: int = 4096) -> int:
        """Return a whole number."""
        return self.need(name, int, lambda n: least <= n <= most, f"a whole number from {least} to {most}")

    def share(self, name: str) -> float:
        """Return a number in (0, 1]."""
        return self.need(name, float, lambda x: 0 < x <= 1, "a number > 0 and <= 1")
