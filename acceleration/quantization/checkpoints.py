"""Checkpoints as they lie on disk: one file, shards with an index, names of ComfyUI or of diffusers, GGUF."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..errors import StrettoError
from ..safetensors_header import read_header
from .files import FileTensor, OpenFile, Stored

INDEX_SUFFIX = ".safetensors.index.json"
_MAX_INDEX = 32 << 20
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,200}\.safetensors")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
#: Prefixes of the diffusion model inside an all-in-one checkpoint; ComfyUI's own list (comfy/model_detection.py).
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint, ready to be read by rows.

    Attributes:
        paths: files they come from.
        tensors: by name, without the prefix of an all-in-one checkpoint.
        metadata: texts of the (first) header.
        notes: what was done to get here, in words.
    """

    paths: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    _files: tuple[OpenFile, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a safetensors file, an index of shards, a folder that holds either, or a GGUF file.

    All headers are checked before this returns; no tensor is read.

    Raises:
        StrettoError: says which file is wrong and how.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise StrettoError(f"{path}: there is no such file")
    if path.suffix.lower() in _PICKLES:
        raise StrettoError(
            f"{path}: a pickle. Loading one can run any program, so it is not opened; convert it to safetensors where you "
            "trust it."
        )
    if path.suffix.lower() == ".gguf":
        from .gguf_files import open_gguf

        return open_gguf(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _opened(shards(path))
    return _opened([path])


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder, as diffusers lays it out; of a whole pipeline's folder its transformer."""
    if (folder / "model_index.json").is_file():
        parts = sorted(path.name for path in folder.glob("transformer*") if path.is_dir())
        if len(parts) != 1:
            what = " and ".join(parts) or "no transformer"
            raise StrettoError(f"{folder}: a pipeline with {what}; name the folder of the one network that is meant")
        folder = folder / parts[0]
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    files = indices or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = ", ".join(file.name for file in files[:4]) or "no safetensors file"
        raise StrettoError(f"{folder}: holds {what}; name the one file or index that is meant")
    return files[0]


def shards(index: Path) -> list[Path]:
    """The shards that an index names: plain file names in its own folder, nothing else."""
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise StrettoError(
                f"{index}: {index.stat().st_size:,} bytes; no index of shards is larger than {_MAX_INDEX:,}"
            )
        document = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise StrettoError(f"{index}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{index}: not an index of shards ({str(error)[:120]})") from None
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise StrettoError(f"{index}: not an index of shards (it has no weight_map of file names)")
    for name in names.values():
        if not _SHARD.fullmatch(name) or ".." in name:
            raise StrettoError(
                f"{index}: names the shard {name!r:.120}; shards are .safetensors files in the same folder"
            )
    paths = [index.parent / name for name in sorted(set(names.values()))]
    for shard in paths:
        if not shard.is_file():
            raise StrettoError(f"{index}: its shard {shard.name} is missing")
    return paths


def _opened(paths: list[Path]) -> Checkpoint:
    headers = [read_header(path) for path in paths]
    files = tuple(OpenFile(header.path, header.size, header.modified_ns) for header in headers)
    tensors: dict[str, Stored] = {}
    for header, file in zip(headers, files):
        for name, entry in header.entries.items():
            if name in tensors:
                raise StrettoError(f"{header.path}: {name!r:.100} is in another shard as well")
            tensors[name] = FileTensor(file, entry)
    if not tensors:
        raise StrettoError(f"{paths[0]}: holds no tensor")
    metadata = headers[0].metadata
    notes = [f"{len(paths)} shards"] if len(paths) > 1 else []
    prefix = next((prefix for prefix in _PREFIXES if sum(name.startswith(prefix) for name in tensors) > 5), "")
    if prefix:
        kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        left = len(tensors) - len(kept)
        notes.append(f"the diffusion model of an all-in-one checkpoint; {left} other tensors are left out" if left else
                     f"names without {prefix}")  # fmt: skip
        tensors = kept
    return Checkpoint(tuple(paths), MappingProxyType(tensors), metadata, tuple(notes), files)
