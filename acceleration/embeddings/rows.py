"""Rows of a vocabulary table, read when a prompt asks for them.

One prompt touches some hundred of a vocabulary's rows (lexical locality, VocabTailor), and an embedding is a gather, no
product. So the table may stay in the file it came from, or in system memory, and only its rows travel.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..errors import StrettoError
from ..quantization.files import FileTensor, OpenFile, Stored
from ..safetensors_header import Entry, read_header

#: Dtypes of tables whose rows are numbers by themselves.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
#: Names of vocabulary tables in files of T5, UMT5, Llama, Qwen, Gemma and Mistral encoders.
_TABLE = re.compile(r"(?:.*\.)?(?:shared|embed_tokens)\.weight")
#: Rows that lie no further apart than this are read in one go, with what lies between them.
_GAP_BYTES = 16 << 10


class Rows(Protocol):
    """A vocabulary table whose rows can be had one by one.

    Attributes:
        shape: (rows, width).
        dtype: of the rows.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows [n, width] of ``ids`` [n], which are sorted, distinct, in range and on the CPU."""


@dataclass(frozen=True, eq=False)
class FileRows:
    """A table in a safetensors file.

    Attributes:
        file: the file, open.
        entry: the table in it.
        identity: device, inode, size and time of change of the file when it was opened.
    """

    file: OpenFile
    entry: Entry
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], name: str) -> "FileRows":
        """Open table ``name`` of the safetensors file ``path``; nothing of it is read but the header.

        Raises:
            StrettoError: a damaged or foreign file, no such tensor, no table, or a dtype whose rows are no numbers.
        """
        header = read_header(path)
        entry = header.entries.get(name)
        if entry is None:
            raise StrettoError(f"{path}: has no tensor {name!r:.100}")
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise StrettoError(f"{path}: {name!r:.100} is {list(entry.shape)}; a table has rows and a width")
        if entry.dtype not in DTYPES:
            raise StrettoError(
                f"{path}: {name!r:.100} is {entry.dtype}; rows are read of fp32, fp16, bf16 and fp8 tables"
            )
        return cls(OpenFile(header.path, header.size, header.modified_ns), entry, _identity(header.path))

    @classmethod
    def of(cls, tensor: FileTensor) -> "FileRows":
        """Return the rows of a table of an open checkpoint, which may be closed afterwards; raises as :meth:`open`."""
        header = read_header(tensor.file.path)
        name = next((name for name, entry in header.entries.items() if entry == tensor.entry), "")
        return cls.open(header.path, name)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.entry.dtype

    def whole(self) -> torch.Tensor:
        """Return all rows; raises as :meth:`gather`."""
        self.require_same()
        return FileTensor(self.file, self.entry).read()

    def require_same(self) -> None:
        """Raise :class:`~..errors.StrettoError` if the file is not the one that was opened any more."""
        if _identity(self.file.path) != self.identity:
            raise StrettoError(
                f"{self.file.path}: was changed, replaced or removed after the model was loaded, and parts of it are read when "
                "they are needed; load the model again"
            )

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows; see :class:`Rows`.

        Raises:
            StrettoError: the file is not the one that was opened any more.
        """
        self.require_same()
        stride = self.shape[1] * self.dtype.itemsize
        made = torch.empty(len(ids), stride, dtype=torch.uint8)
        wanted, first = ids.tolist(), 0
        while first < len(wanted):
            last = first
            while last + 1 < len(wanted) and (wanted[last + 1] - wanted[last] - 1) * stride <= _GAP_BYTES:
                last += 1
            start = wanted[first]
            raw = self.file.read(self.entry.begin + start * stride, self.entry.begin + (wanted[last] + 1) * stride)
            block = torch.frombuffer(raw, dtype=torch.uint8).view(-1, stride)
            made[first : last + 1] = block[ids[first : last + 1] - start]
            first = last + 1
        return made.view(self.dtype)


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """A table in system memory, for files whose rows cannot be read one by one (GGUF, quantized)."""

    table: torch.Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return tuple(self.table.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.table.dtype

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows; see :class:`Rows`."""
        raw = self.table.view(torch.uint8)  # fp8 has no gather of its own everywhere
        return raw.index_select(0, ids).view(self.dtype)


def embed(rows: Rows, ids: torch.Tensor) -> torch.Tensor:
    """Return the embedding [..., width] of token ids [...] on their device, in the table's dtype.

    Raises:
        IndexError: an id outside of the vocabulary, as :func:`torch.nn.functional.embedding` raises it.
        StrettoError: the file of the table is not the same any more.
    """
    unique, inverse = torch.unique(ids.detach().cpu().long(), return_inverse=True)
    if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < rows.shape[0]:
        raise IndexError(
            f"token id {int(unique[0] if unique[0] < 0 else unique[-1])} is outside of a vocabulary of {rows.shape[0]:,}"
        )
    found = rows.gather(unique).to(ids.device)
    raw = found.view(torch.uint8).index_select(0, inverse.flatten().to(ids.device))
    return raw.view(rows.dtype).view(*ids.shape, rows.shape[1])


def find_tables(tensors: Mapping[str, Stored]) -> tuple[str, ...]:
    """Return the names of the vocabulary tables among the tensors of a text encoder."""
    return tuple(
        name for name, tensor in tensors.items()
        if _TABLE.fullmatch(name) and len(tensor.shape) == 2 and tensor.dtype in DTYPES
    )  # fmt: skip


def vocabulary_note(tables: Collection[Rows], nbytes: int) -> str:
    """Return what became of the vocabulary of a file, in words."""
    if not tables:
        return "no vocabulary table that could be read by rows: loaded whole"
    shapes = ", ".join(f"{rows.shape[0]:,} x {rows.shape[1]:,}" for rows in tables)
    where = "the file" if all(isinstance(rows, FileRows) for rows in tables) else "system memory"
    return f"vocabulary {shapes} stays in {where}: {nbytes / 1e6:,.1f} MB not loaded with the model, equal to the bit"


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
