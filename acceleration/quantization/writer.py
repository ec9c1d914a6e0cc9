"""A safetensors file written header first: every size is known before the first number, so nothing has to be kept."""

import json
import math
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..safetensors_header import MAX_HEADER, SPELLINGS

#: Left free on the disk beside the file itself.
_SLACK = 64 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamWriter:
    """Writes one safetensors file: whole under its name, or not at all.

    Use as a context manager. Rows may be written in any order and from several threads. Leaving without an error renames
    the temporary file; leaving with one removes it.
    """

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str], replace: bool = False) -> None:
        """Check name and disk, then write the header.

        Args:
            path: the file.
            specs: its tensors; wide dtypes are placed first, which keeps every tensor aligned.
            metadata: texts.
            replace: write over a file of that name.

        Raises:
            StrettoError: the file exists, the folder does not, or the disk has no room.
        """
        self.path, self._replace = Path(path), replace
        if self.path.exists() and not replace:
            raise StrettoError(f"{self.path}: exists already; name another file, or say that it may be replaced")
        if not self.path.parent.is_dir():
            raise StrettoError(f"{self.path.parent}: there is no such folder")
        document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, tuple[Spec, int]] = {}
        offset = 0
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            if spec.name in self._places:
                raise StrettoError(f"{spec.name!r:.100}: would be written twice")
            self._places[spec.name] = spec, offset
            document[spec.name] = {
                "dtype": SPELLINGS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes],
            }  # fmt: skip
            offset += spec.nbytes
        raw = json.dumps(document, ensure_ascii=False).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        if len(raw) > MAX_HEADER:
            raise StrettoError(f"{self.path}: its header would take {len(raw):,} bytes; {MAX_HEADER:,} are allowed")
        self.total = 8 + len(raw) + offset
        self._start = 8 + len(raw)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.total + _SLACK:
            raise StrettoError(
                f"{self.path}: needs {(self.total + _SLACK) / 1e9:.2f} GB on the disk, {free / 1e9:.2f} GB are free"
            )
        self._header, self._file = raw, None
        self._temporary: Path | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "StreamWriter":
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name[:100]}.", suffix=".part")
            self._temporary, self._file = Path(name), os.fdopen(handle, "r+b", buffering=0)
            self._temporary.chmod(0o644)  # as other programs make files; a temporary one is for its owner alone
            self._at(0, struct.pack("<Q", len(self._header)) + self._header)
            self._file.truncate(self.total)
        except OSError as error:
            self._drop()
            raise StrettoError(f"{self.path}: cannot be written ({error.strerror})") from None
        return self

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write rows of a tensor, from ``row`` on.

        Raises:
            StrettoError: the disk refuses.
            ValueError: dtype, width or number of rows are not what the header says.
        """
        spec, offset = self._places[name]
        width = math.prod(spec.shape[1:])
        rows = tensor.shape[0] if tensor.dim() else 1
        if (
            tensor.dtype != spec.dtype
            or tuple(tensor.shape[1:]) != spec.shape[1:]
            or row + rows > max([*spec.shape[:1], 1])
        ):
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} at row {row} of {spec.dtype} {list(spec.shape)}"
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._at(self._start + offset + row * width * spec.dtype.itemsize, data)
        except OSError as error:
            raise StrettoError(f"{self.path}: cannot be written ({error.strerror})") from None

    def patch_metadata(self, placeholder: str, value: str) -> None:
        """Put ``value`` in the place of a text of the same length that stands once in the header."""
        old, new = placeholder.encode(), value.encode()
        if len(old) != len(new) or self._header.count(old) != 1:
            raise ValueError("a placeholder must stand once in the header, and its value be as long")
        self._at(8 + self._header.index(old), new)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._drop()
            return
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            if self._replace:
                os.replace(self._temporary, self.path)
            else:
                self._take_name()
        except FileExistsError:
            self._drop()
            raise StrettoError(
                f"{self.path}: exists already; name another file, or say that it may be replaced"
            ) from None
        except OSError as error:
            self._drop()
            raise StrettoError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _take_name(self) -> None:
        """Give the finished file its name unless another file has it."""
        try:
            os.link(self._temporary, self.path)  # unlike a check beforehand, this cannot lose a race
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if self.path.exists():
                raise FileExistsError(str(self.path)) from None
            os.rename(self._temporary, self.path)
        else:
            self._temporary.unlink()

    def _at(self, position: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            if hasattr(os, "pwrite"):
                done = os.pwrite(self._file.fileno(), view[: 1 << 30], position)
            else:
                with self._lock:
                    self._file.seek(position)
                    done = self._file.write(view[: 1 << 30])
            view, position = view[done:], position + done

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
