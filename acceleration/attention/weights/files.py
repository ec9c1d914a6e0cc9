"""Tensors and metadata of safetensors files with trained attention, read and written."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import StrettoError
from ...safetensors_header import SPELLINGS, Header

#: What trained numbers are stored as.
TRAINED = (torch.float32, torch.float16, torch.bfloat16)


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor; StrettoError where one holds no trained numbers."""
    for key in header.entries:
        _trained(header, key)
    return {key: entry.shape for key, entry in header.entries.items()}


def _trained(header: Header, key: str) -> torch.dtype:
    dtype = header.entries[key].dtype
    if dtype not in TRAINED:
        known = ", ".join(SPELLINGS[item] for item in TRAINED)
        raise StrettoError(f"{header.path}: {key} has dtype {SPELLINGS[dtype]}; expected one of {known}")
    return dtype


def read_tensor(header: Header, key: str) -> torch.Tensor:
    """Return one tensor of a checked file, mapped from it where its bytes are aligned: pages are read when used.

    Raises:
        StrettoError: the file changed meanwhile, or the dtype holds no trained numbers.
    """
    entry, dtype = header.entries[key], _trained(header, key)
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
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in sorted(tensors):
        size = tensors[key].numel() * tensors[key].element_size()
        spelling = SPELLINGS[tensors[key].dtype]
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
