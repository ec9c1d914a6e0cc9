"""Tables of modulations in a file, so that after a restart not even the first run reads their weights.

A file is named after a hash of all that its numbers depend on, and is used where that hash is found again. What is in memory is
hashed whole. Of weights in the model's file, whose reading is what this saves, some pages are, with the file's header, size and
time of change.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..quantization.files import FileTensor, OpenFile
from ..quantization.writer import Spec, StreamWriter
from ..safetensors_header import read_header
from .tables import Features, FeatureTables, each, nbytes

FORMAT = "stretto-temporal-features@1"
#: Identity of weights that no LoRA, hook or patch changes.
UNCHANGED = ("unchanged", ())
#: A file takes this much at most; features used longest ago are left out.
MOST_BYTES = 512 << 20
_PAGE, _PAGES = 4096, 4

log = logging.getLogger("stretto")


@dataclass
class SavedTables:
    """The file of a run's tables.

    Attributes:
        folder: where files lie.
        family: of the network.
        mode: how features are made; other modes round differently.
        layers: path from the network -> module.
        words: what became of the file, "" before anything did.
    """

    folder: Path
    family: str
    mode: str
    layers: Mapping[str, torch.nn.Module]
    words: str = ""
    _path: Path | None = None
    _identity: str = ""
    _known: int = 0

    def open(self, tables: FeatureTables, weights: Hashable, device: torch.device) -> None:
        """Read the file into ``tables``, once a run; anything that does not fit is refused in :attr:`words`."""
        if self.words:
            return
        if weights != UNCHANGED:
            self.words = "not used: a LoRA, a weight hook or a patch changes the model"
            return
        if not all(_left_in_file(layer) for layer in self.layers.values()):
            self.words = "not used: it saves something only where the feature weights are read from the file"
            return
        try:
            self._identity = identity(self.family, self.mode, self.layers, device)
            path = self.folder / f"{self.family}-{self._identity[:24]}.safetensors"
            if tables.origin != path and path.exists():
                self._read(path, tables, weights, device)
        except StrettoError as error:
            self.words = f"refused: {error}"
            return
        self.words = f"{path.name}: " + (f"{self._known} vectors read from it" if self._known else "begins with this run")
        if tables.origin == path:
            self.words = f"{path.name}: in memory since an earlier run"
        self._path = tables.origin = path

    def save(self, tables: FeatureTables) -> None:
        """Write what is in ``tables`` of the model as it is in its file; a disk that refuses is logged, not raised."""
        if self._path is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file that could not be read is nobody's to write over; one that was read is in the tables.
            write_tables(self._path, self._identity, self.layers, tables)
        except StrettoError as error:
            log.warning("Features were not saved. %s", error)
        except OSError as error:
            log.warning("Features were not saved. %s: cannot be written (%s)", self._path, error.strerror)

    def _read(self, path: Path, tables: FeatureTables, weights: Hashable, device: torch.device) -> None:
        found = read_tables(path, self._identity, self.layers, tables.budget_bytes)
        for mark, features in found.items():
            for layer, output in features.items():
                tables.keep((weights, mark), layer, _moved(output, device))
        self._known = len(found)


def identity(family: str, mode: str, layers: Mapping[str, torch.nn.Module], device: torch.device) -> str:
    """Return a hash of what features depend on, in hexadecimal digits: weights, layers, device and PyTorch.

    Raises:
        StrettoError: the model's file was changed after it was loaded.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(torch.get_num_threads())
    matmul = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    made = hashlib.blake2b(repr((FORMAT, family, mode, str(device), name, torch.__version__, matmul)).encode(), digest_size=32)
    files: dict[Path, bytes] = {}
    for path, layer in sorted(layers.items()):
        for inner, module in layer.named_modules():
            made.update(f"\n{path}|{inner}|{type(module).__module__}.{type(module).__qualname__}|{module!r}".encode())
            for name, tensor in sorted({**module._parameters, **module._buffers}.items()):
                if tensor is not None:
                    made.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    made.update(_bytes(tensor))
            source = getattr(module, "stretto_source", None)
            if source is not None:
                source.require_same()
                if source.file.path not in files:
                    files[source.file.path] = _file_mark(source)
                made.update(files[source.file.path])
                made.update(_weight_mark(source))
    return made.hexdigest()


def _file_mark(source: Any) -> bytes:
    """Header, size and time of change of a weight's file."""
    length = int.from_bytes(source.file.read(0, 8), "little")
    return bytes(source.file.read(0, 8 + length)) + repr(source.identity[2:]).encode()


def _weight_mark(source: Any) -> bytes:
    """Some pages of a weight, its first and last among them."""
    begin, last = source.entry.begin, max(source.entry.end - _PAGE, source.entry.begin)
    places = sorted({begin + (last - begin) * place // (_PAGES - 1) for place in range(_PAGES)})
    pages = (source.file.read(place, min(place + _PAGE, source.entry.end)) for place in places)
    return repr((source.dtype, source.shape, begin)).encode() + b"".join(map(bytes, pages))


def _left_in_file(layer: torch.nn.Module) -> bool:
    sources = [module for module in layer.modules() if getattr(module, "stretto_source", None) is not None]
    return bool(sources) and not any(module.weight.numel() for module in sources)


def read_tables(
    path: Path, wanted: str, layers: Mapping[str, torch.nn.Module], budget_bytes: int = MOST_BYTES
) -> dict[bytes, Features]:
    """Return features by the fingerprint of what the layers were given, on the CPU.

    Raises:
        StrettoError: a damaged or truncated file, another model's, no table at all, or one that is larger than the budget.
    """
    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise StrettoError(f"{path}: no table of features ({header.metadata.get('format', 'no format')!r:.60}); move it away")
    if header.metadata.get("identity") != wanted:
        raise StrettoError(f"{path}: a table of another model, device or PyTorch; move it away")
    if header.size > budget_bytes:
        raise StrettoError(f"{path}: {header.size / 1e6:,.1f} MB, tables may take {budget_bytes / 1e6:,.1f} MB now")
    layout = header.metadata.get("layout", "")
    file = OpenFile(header.path, header.size, header.modified_ns)
    tensors = [
        FileTensor(file, header.entries[name]).read() for name in map(str, range(len(header.entries))) if name in header.entries
    ]
    if len(tensors) != len(header.entries) or _checksum(layout, tensors) != header.metadata.get("checksum"):
        raise StrettoError(f"{path}: damaged (its checksum is wrong); move it away")
    try:
        return {
            bytes.fromhex(mark): {
                layer: _unpacked(spec, tensors, _dataclasses(layers[layer])) for layer, spec in features.items()
            }
            for mark, features in json.loads(layout).items()
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise StrettoError(f"{path}: its layout does not belong to this model ({str(error)[:60]}); move it away") from None


def write_tables(path: Path, mark: str, layers: Mapping[str, torch.nn.Module], tables: FeatureTables) -> None:
    """Write the features of ``layers`` with unchanged weights over ``path``, as the table of the model ``mark``.

    Raises:
        StrettoError: the disk has no room, or refuses.
    """
    tensors: list[torch.Tensor] = []
    layout, total = {}, 0
    for (weights, given), features in reversed(tables.entries.items()):
        mine = {layer: output for layer, output in features.items() if layer in layers}
        if weights != UNCHANGED or not mine:
            continue
        total += sum(map(nbytes, mine.values()))
        if total > MOST_BYTES:
            break
        layout[given.hex()] = {layer: _packed(output, tensors) for layer, output in mine.items()}
    text = json.dumps(dict(reversed(layout.items())), separators=(",", ":"))
    stored = [tensor.detach().cpu().contiguous() for tensor in tensors]
    metadata = {"format": FORMAT, "identity": mark, "layout": text, "checksum": _checksum(text, stored)}
    specs = [Spec(str(place), tensor.dtype, tuple(tensor.shape)) for place, tensor in enumerate(stored)]
    with StreamWriter(path, specs, metadata, replace=True) as writer:
        for place, tensor in enumerate(stored):
            writer.write(str(place), tensor)


def _packed(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """Return nested tuples, lists and dataclasses as JSON, tensors as their place in ``tensors``."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return len(tensors) - 1
    if isinstance(tree, tuple | list):
        return [type(tree).__name__, *(_packed(item, tensors) for item in tree)]
    if is_dataclass(tree):
        return {type(tree).__name__: {item.name: _packed(getattr(tree, item.name), tensors) for item in fields(tree)}}
    if tree is None:
        return None
    raise StrettoError(f"a layer returns {type(tree).__name__}, which files of features do not hold")


def _unpacked(spec: Any, tensors: list[torch.Tensor], known: Mapping[str, type]) -> Any:
    if spec is None:
        return None
    if isinstance(spec, dict):
        ((name, items),) = spec.items()
        return known[name](**{key: _unpacked(item, tensors, known) for key, item in items.items()})
    if isinstance(spec, list):
        return {"tuple": tuple, "list": list}[spec[0]](_unpacked(item, tensors, known) for item in spec[1:])
    return tensors[range(len(tensors))[spec]]


def _dataclasses(layer: torch.nn.Module) -> dict[str, type]:
    """The dataclasses that stand beside a layer's own class; a file names one, and never a module to import."""
    beside = vars(sys.modules[type(layer).__module__])
    return {name: item for name, item in beside.items() if isinstance(item, type) and is_dataclass(item)}


def _moved(tree: Any, device: torch.device) -> Any:
    return each(tree, lambda tensor: tensor.to(device))


def _checksum(layout: str, tensors: list[torch.Tensor]) -> str:
    made = hashlib.blake2b(layout.encode(), digest_size=32)
    for tensor in tensors:
        made.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        made.update(_bytes(tensor))
    return made.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()

