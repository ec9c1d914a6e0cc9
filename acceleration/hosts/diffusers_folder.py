"""Folders of diffusers pipelines, checked before anything in them is loaded: names, classes, configurations, headers of weights.

Nothing is imported from a folder and nothing is allocated for it. Neither diffusers nor ComfyUI is needed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..quantization.checkpoints import INDEX_SUFFIX, shards
from ..safetensors_header import Header, read_header

INDEX = "model_index.json"
#: Libraries whose classes a component may be; anything else is code that a folder brings along.
LIBRARIES = ("diffusers", "transformers")
#: Parts of a file's name that say it holds all weights of a component.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_MAX_JSON = 4 << 20
_NAME, _CLASS, _VARIANT = (
    re.compile(r"[a-z][a-z0-9_]{0,63}"),
    re.compile(r"[A-Z][A-Za-z0-9]{0,127}"),
    r"[A-Za-z0-9_-]{1,32}",
)
#: Keys of a configuration that ask for code outside the two libraries.
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
#: No published network has as many layers, or a size as large.
_MOST_LAYERS, _LARGEST = 1024, 1 << 24
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Component:
    """A part of a pipeline.

    Attributes:
        name: its folder, and the pipeline's argument.
        library: ``"diffusers"`` or ``"transformers"``.
        class_name: a class of that library.
        folder: where it lies.
        config: its configuration; {} for tokenizers and processors.
        headers: checked headers of its weights, () for a component without.
    """

    name: str
    library: str
    class_name: str
    folder: Path
    config: Mapping[str, Any]
    headers: tuple[Header, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its weights by name."""
        return {name: entry.shape for header in self.headers for name, entry in header.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(entry.end - entry.begin for header in self.headers for entry in header.entries.values())

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that most of its weights have; None without weights."""
        sizes: dict[torch.dtype, int] = {}
        for header in self.headers:
            for entry in header.entries.values():
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.begin
        return max(sizes, key=sizes.get, default=None)


@dataclass(frozen=True)
class Folder:
    """A checked pipeline folder.

    Attributes:
        path: the folder.
        class_name: class of the pipeline.
        components: its parts, by name.
        absent: parts that the folder says are left out.
        variant: ending of the weights' names, such as ``"fp16"``; None for the plain ones.
    """

    path: Path
    class_name: str
    components: Mapping[str, Component]
    absent: tuple[str, ...]
    variant: str | None


def find_folders(base: Path, depth: int = 4) -> list[str]:
    """Return the pipeline folders below ``base``, as paths relative to it, in order."""
    found, level = [], [base]
    for _ in range(depth + 1):
        deeper: list[Path] = []
        for folder in level:
            try:
                if (folder / INDEX).is_file():
                    found.append(folder.relative_to(base).as_posix())
                else:
                    deeper += [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
            except OSError:
                continue  # a folder that may not be read holds nothing to offer
        level = deeper
    return sorted(name for name in found if name != ".")


def check_folder(path: str | Path, base: str | Path | None = None) -> Folder:
    """Check a pipeline folder and return what it holds.

    Args:
        path: the folder with model_index.json.
        base: folder that no file used may lie outside of; the pipeline's own by default.

    Raises:
        StrettoError: names the file, what is wrong with it, and what would be right.
    """
    path = Path(path)
    root = Path(base if base is not None else path).resolve()
    if not path.is_dir():
        raise StrettoError(f"{path}: there is no such folder")
    if not (path / INDEX).is_file():
        weights = any(path.glob("*.safetensors"))
        hint = "; this looks like one component: name the folder above it" if weights else ""
        raise StrettoError(f"{path}: holds no {INDEX}, so it is no diffusers pipeline{hint}")
    index = _json(path / INDEX, root)
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        raise StrettoError(f"{path / INDEX}: its pipeline is code of its own ({_short(class_name)}), which is not run")
    if not isinstance(class_name, str) or not _CLASS.fullmatch(class_name):
        raise StrettoError(
            f"{path / INDEX}: _class_name is {_short(class_name)}; expected a pipeline class of diffusers"
        )
    _refuse_code(index, path / INDEX)
    parts, absent = _parts(index, path / INDEX)
    if "unet" in parts and "transformer" not in parts:
        raise StrettoError(f"{path}: {class_name} has a U-Net; only pipelines with a transformer run here")
    if not any(name.startswith("transformer") for name in parts):
        raise StrettoError(f"{path / INDEX}: names no transformer. Expected a pipeline of a diffusion transformer")
    variant = _variant(path, parts)
    components = {name: _component(path, root, name, *value, variant) for name, value in parts.items()}
    return Folder(path, class_name, components, absent, variant)


def _json(file: Path, root: Path) -> dict[str, Any]:
    """Read a small JSON object that lies below ``root``."""
    file = _inside(file, root)
    try:
        if file.stat().st_size > _MAX_JSON:
            raise StrettoError(f"{file}: {file.stat().st_size:,} bytes; no configuration is larger than {_MAX_JSON:,}")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StrettoError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, StrettoError):
            raise
        raise StrettoError(f"{file}: is not valid JSON ({str(error)[:120]})") from None
    if not isinstance(document, dict):
        raise StrettoError(f"{file}: holds a {type(document).__name__}; expected an object")
    return document


def _inside(file: Path, root: Path) -> Path:
    """Return ``file`` unless a link leads out of ``root``."""
    try:
        real = file.resolve()
    except (OSError, RuntimeError) as error:
        raise StrettoError(f"{file}: cannot be followed ({error})") from None
    if not real.is_relative_to(root):
        raise StrettoError(f"{file}: is a link to {real}, outside of {root}; put the file itself there")
    return file


def _refuse_code(document: Mapping[str, Any], file: Path) -> None:
    named = [key for key in _CODE if document.get(key)]
    if named:
        raise StrettoError(
            f"{file}: {named[0]} asks for code from outside of diffusers and transformers, which is not run"
        )


def _parts(index: Mapping[str, Any], file: Path) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """Return (library, class) of each component, and the components that are left out on purpose."""
    parts, absent = {}, []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # a setting
        if not _NAME.fullmatch(name):
            raise StrettoError(f"{file}: {name!r:.80} is no name of a component")
        if value == [None, None]:
            absent.append(name)
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            if all(isinstance(part, int | float) for part in value):
                continue  # a setting that is a list of numbers
            raise StrettoError(f"{file}: {name} is {_short(value)}; expected a library and a class")
        library, class_name = value
        if library not in LIBRARIES:
            raise StrettoError(
                f"{file}: {name} is {library}.{class_name}, code from outside of diffusers and transformers, which is not run"
            )
        if not _CLASS.fullmatch(class_name):
            raise StrettoError(f"{file}: {name} is of class {class_name!r:.80}, which is no class of {library}")
        parts[name] = (library, class_name)
    return parts, tuple(absent)


def _variant(path: Path, parts: Mapping[str, tuple[str, str]]) -> str | None:
    """Return the variant whose weights a folder holds where it has no plain ones for its transformer."""
    name = next(name for name in parts if name.startswith("transformer"))
    names = [file.name for file in (path / name).glob("*.safetensors*")]
    if any(_is_plain(each) for each in names):
        return None
    found = {m[1] for each in names if (m := re.match(rf"[a-z_]+\.({_VARIANT})(-\d+-of-\d+)?\.safetensors", each))}
    found |= {m[1] for each in names if (m := re.match(rf"[a-z_]+\.safetensors\.index\.({_VARIANT})\.json", each))}
    return min(found) if len(found) == 1 else None


def _is_plain(name: str) -> bool:
    return any(name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}") for stem in _STEMS)


def _component(path: Path, root: Path, name: str, library: str, class_name: str, variant: str | None) -> Component:
    folder = path / name
    if not folder.is_dir():
        raise StrettoError(
            f"{folder}: the component is missing; {path.name}/{INDEX} says it is a {library}.{class_name}"
        )
    for file in sorted(folder.iterdir()):
        _inside(file, root)
    if class_name.endswith(("Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "ImageProcessor")):
        for file in folder.glob("*config.json"):
            _refuse_code(_json(file, root), file)
        return Component(name, library, class_name, folder, {})
    scheduler = class_name.endswith("Scheduler")
    file = folder / ("scheduler_config.json" if scheduler else "config.json")
    if not file.is_file():
        raise StrettoError(f"{folder}: {file.name} is missing, which tells how to build the {class_name}")
    config = _json(file, root)
    _refuse_code(config, file)
    _refuse_sizes(config, file)
    told = config.get("_class_name", class_name)
    if told != class_name and library == "diffusers" and not scheduler:
        raise StrettoError(f"{file}: is for {_short(told)}, but {INDEX} says {class_name}")
    if scheduler:
        return Component(name, library, class_name, folder, config)
    headers = tuple(read_header(_inside(file, root)) for file in _weights(folder, variant))
    _refuse_dtypes(headers)
    return Component(name, library, class_name, folder, config, headers)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files of a component."""
    middles = (f".{variant}", "") if variant else ("",)
    for middle in middles:
        for stem in _STEMS:
            index = folder / f"{stem}.safetensors.index{middle}.json"
            if index.is_file():
                return shards(index)
            whole = folder / f"{stem}{middle}.safetensors"
            if whole.is_file():
                return [whole]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICKLES)
    if pickles:
        raise StrettoError(
            f"{folder}: its weights are {pickles[0]}, a pickle. Loading one can run any program, so it is not opened; get the "
            "safetensors files"
        )
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    names = f"{', '.join(found[:3])} but not " if found else "no "
    raise StrettoError(
        f"{folder}: its weights are missing; there is {names}{_STEMS[0]}.safetensors or model.safetensors"
    )


def _refuse_dtypes(headers: tuple[Header, ...]) -> None:
    for header in headers:
        for name, entry in header.entries.items():
            if entry.dtype not in _DTYPES and len(entry.shape) > 1 and name.endswith("weight"):
                dtype = str(entry.dtype).removeprefix("torch.")
                raise StrettoError(
                    f"{header.path}: {name} is {dtype}; pipelines run in float32, float16 or bfloat16. Get the 16-bit files"
                )


def _refuse_sizes(config: Any, file: Path, key: str = "") -> None:
    """Refuse sizes that would only fill memory."""
    if isinstance(config, Mapping):
        for inner, value in config.items():
            _refuse_sizes(value, file, str(inner))
    elif isinstance(config, list):
        for value in config[:4096]:
            _refuse_sizes(value, file, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        most = _MOST_LAYERS if re.search(r"layers|blocks|depth", key) else _LARGEST
        if abs(config) > most and not key.endswith(("token_id", "seed")):
            raise StrettoError(f"{file}: {key} is {config:,}; no published model goes beyond {most:,}")


def _short(value: Any) -> str:
    return repr(value)[:100]
