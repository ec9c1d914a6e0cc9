"""Quantizing a checkpoint into a file, block by block: read, fold, rotate, round, write."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from .architectures import WEIGHT_ONLY, Architecture, find_architecture
from .balancing import COLUMNS, ROWS, Edit
from .checkpoints import Checkpoint, open_checkpoint
from .files import Stored
from .formats import MARKER, METADATA_KEY, PLAIN, TITLES, dequantized, find_formats
from .layouts import FOLDED, Layout
from .recipes import Choice, Recipe, choose, preset_for
from .renaming import comfy_names
from .writer import Spec, StreamWriter

FORMAT_VERSION = "1.0"
RECIPE_KEY, PROVENANCE_KEY = "stretto_recipe", "stretto_provenance"
TOOL = "stretto 0.1"
#: Numbers of a block of rows; fp32, its copies and its codes take some 30 bytes for each.
BLOCK = 1 << 21
_CHECK_ROWS = 16
_HASH_BLOCK = 4 << 20
#: Stands in the header until the source has been read to its end.
_HASH_LATER = "0" * 62 + "zz"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        layer: its name.
        format: name of the layout.
        error: ``|W' - W| / |W|`` over the first rows.
        nbytes: in the file.
        before: in the source.
    """

    layer: str
    format: str
    error: float
    nbytes: int
    before: int


@dataclass(frozen=True)
class Plan:
    """What quantizing will do, known from headers alone.

    Attributes:
        checkpoint: the open source.
        tensors: by ComfyUI's names.
        architecture: or None, where it is not known.
        recipe: as used.
        choices: for every linear layer.
        notes: renaming, parts left out, and such.
        edits: folds, by tensor name.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Stored]
    architecture: Architecture | None
    recipe: Recipe
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    edits: Mapping[str, Edit] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, Choice]:
        """Choices that quantize, by layer."""
        return {choice.layer: choice for choice in self.choices if choice.layout is not None}

    def nbytes(self) -> int:
        """Bytes of all tensors of the file to be."""
        return sum(spec.nbytes for spec in self.specs())

    def marker(self, choice: Choice) -> dict[str, Any]:
        """Return the marker of a quantized layer."""
        marker = choice.layout.marker()
        if (
            self.architecture
            and self.architecture.role(choice.layer) == WEIGHT_ONLY
            and choice.layout.name in ("int8", "fp8")
        ):
            marker["full_precision_matrix_mult"] = True
        if (
            self.edits.get(f"{choice.layer}.weight") is not None
            and self.edits[f"{choice.layer}.weight"].columns is not None
        ):
            # Loaders that know nothing of folds must refuse the layer: LoRAs would be applied to it wrongly.
            marker["format"] = FOLDED + marker["format"]
        return marker

    def specs(self) -> list[Spec]:
        """Return the tensors of the file to be, in the order of the source."""
        specs, quantized = [], self.quantized
        for name, tensor in self.tensors.items():
            choice = quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            specs += [Spec(*spec) for spec in fold_specs(name, tensor.shape, self.edits.get(name))]
            if choice is None:
                specs.append(Spec(name, tensor.dtype, tensor.shape))
                continue
            specs += [
                Spec(f"{choice.layer}.{part.suffix}", part.dtype, part.shape)
                for part in choice.layout.parts(*choice.shape)
            ]
            specs.append(Spec(choice.layer + MARKER, torch.uint8, (len(_bytes(self.marker(choice))),)))
        return specs


@dataclass(frozen=True)
class Result:
    """What was written."""

    path: Path
    nbytes: int
    layers: tuple[LayerReport, ...]

    @property
    def error(self) -> float:
        """Root of the mean squared relative error of the layers."""
        return math.sqrt(sum(r.error**2 for r in self.layers) / len(self.layers)) if self.layers else 0.0


def plan_file(
    source: str | Path | Checkpoint,
    recipe: Recipe | None = None,
    *,
    format: str | None = None,
    keep: Sequence[str] = (),
    safe: bool = False,
    transcode: bool = False,
    assume_rotation: int | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> Plan:
    """Decide what becomes of every layer of a checkpoint; reads headers and markers only.

    Args:
        source: path of a safetensors file, an index of shards, a folder of diffusers, a GGUF file; or an open checkpoint.
        recipe: None for the shipped one of the architecture.
        format: other format than the recipe's default.
        keep: patterns of layers to keep.
        safe: keep the first and last blocks.
        transcode: allow sources that are quantized already; they are dequantized block by block.
        assume_rotation: see :func:`.formats.find_formats`.
        edits: folds, see :mod:`.balancing`.

    Raises:
        StrettoError: says what is wrong with which file, layer or setting.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    try:
        tensors, renamed = comfy_names(checkpoint.tensors)
        found = find_formats(checkpoint, tensors, assume_rotation)
        notes = [*checkpoint.notes, *([renamed] if renamed else []), *found.notes]
        if found.kind != PLAIN:
            if not transcode:
                raise StrettoError(
                    f"{checkpoint.paths[0]}: {TITLES[found.kind]} already. Quantizing it again loses twice; start from the "
                    "original, or use `transcode` if there is none."
                )
            tensors = dequantized(found)
            notes.append(f"from {TITLES[found.kind]}: its rounding stays in the result")
        architecture = find_architecture(tensors)
        recipe = preset_for(architecture) if recipe is None else recipe
        recipe = recipe.changed(format, keep, safe)
        if architecture is None and not recipe.rules and not recipe.layers:
            raise StrettoError(
                f"{checkpoint.paths[0]}: no architecture that this release knows, so nothing says which layers may be quantized. "
                "Pass a recipe with rules."
            )
        floating = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
        choices = choose(recipe, architecture, floating)
        if not any(choice.layout for choice in choices):
            raise StrettoError(f"{checkpoint.paths[0]}: the recipe {recipe.name!r} quantizes no layer of it")
    except BaseException:
        if not isinstance(source, Checkpoint):
            checkpoint.close()
        raise
    return Plan(checkpoint, tensors, architecture, recipe, tuple(choices), tuple(notes), dict(edits or {}))


def write_file(
    plan: Plan,
    target: str | Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    workers: int = 2,
    hash_source: bool = True,
) -> Result:
    """Write the planned file. The source is only read; memory stays below 150 MB per worker for any model.

    Args:
        plan: from :func:`plan_file`.
        target: the file.
        replace: write over a file of that name.
        progress: called with bytes done, bytes in all, and the layer; what it raises ends the work.
        workers: layers done at a time.
        hash_source: put the source's SHA-256 into the file (read once more beside the work).

    Raises:
        StrettoError: disk, names, or a layer with values that are not finite; no file is left then.
    """
    target = Path(target)
    if any(target.resolve() == path.resolve() for path in plan.checkpoint.paths):
        raise StrettoError(f"{target}: is the source; name another file")
    hashing = _Hash(plan.checkpoint.paths) if hash_source else None
    total = sum(tensor.nbytes for tensor in plan.tensors.values())
    checks = {choice.layer: _CHECK_LATER for choice in plan.quantized.values()}
    job = _Job(plan, progress, total)
    reports: list[LayerReport] = []
    with StreamWriter(target, plan.specs(), _metadata(plan, checks, hash_source), replace) as writer:
        quantized = plan.quantized
        tasks = [
            (name, tensor, quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None)
            for name, tensor in plan.tensors.items()
        ]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            running = set()
            try:
                for task in tasks:
                    if len(running) > workers:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        reports += [report for report in (future.result() for future in done) if report]
                    running.add(pool.submit(job.tensor, writer, *task))
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    reports += [report for report in (future.result() for future in done) if report]
            except BaseException:
                job.stopped.set()
                raise
        for layer, value in job.checks.items():
            writer.patch_metadata(_check_text(layer, _CHECK_LATER), _check_text(layer, value))
        if hashing is not None:
            writer.patch_metadata(_HASH_LATER, hashing.result())
    order = {choice.layer: index for index, choice in enumerate(plan.choices)}
    return Result(target, writer.total, tuple(sorted(reports, key=lambda report: order[report.layer])))


def fold_specs(name: str, shape: tuple[int, ...], edit: Edit | None) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return the tensors that tell a loader of the factors folded into a weight, so that LoRAs can be folded alike (G7)."""
    if edit is None or len(shape) != 2 or not name.endswith(".weight"):
        return []
    layer, found = name.removesuffix(".weight"), []
    if edit.columns is not None:
        found.append((f"{layer}.{COLUMNS}", torch.float32, shape[1:]))
    if edit.rows is not None:
        found.append((f"{layer}.{ROWS}", torch.float32, shape[:1]))
    return found


def rotation_check(rows: torch.Tensor) -> str:
    """Return the text that tells a wrongly rotated layer: the dot product of its first dequantized row with fixed signs.

    Args:
        rows: fp32 [n, K], n at least 1.

    The signs are those of a fixed linear congruence, so they are the same everywhere.
    """
    columns = rows.shape[1]
    index = torch.arange(columns, dtype=torch.int64)
    signs = ((index * 1103515245 + 12345) >> 7 & 1).double() * 2 - 1
    return f"{float((rows[0].cpu().double() * signs).sum() / math.sqrt(columns)):+.6e}"


def rotation_checks(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the rotation checks that a file's metadata hold, by layer; none where we did not write it."""
    try:
        checks = json.loads(metadata.get(PROVENANCE_KEY, "{}")).get("rotation_check", {})
    except (ValueError, RecursionError, AttributeError):
        return {}
    return checks if isinstance(checks, dict) else {}


_CHECK_LATER = "+0.000000e+00"


def _check_text(layer: str, value: str) -> str:
    # As it stands in the header: a JSON text inside a JSON text.
    return json.dumps(json.dumps({layer: value}, ensure_ascii=False)[1:-1], ensure_ascii=False)[1:-1]


class _Hash:
    """SHA-256 of the source's files, one after the other, in a thread of its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._digest, self._error = paths, hashlib.sha256(), None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self._paths:
                with path.open("rb", buffering=0) as file:
                    while block := file.read(_HASH_BLOCK):
                        self._digest.update(block)
        except OSError as error:
            self._error = error

    def result(self) -> str:
        self._thread.join()
        if self._error is not None:
            raise StrettoError(f"{self._paths[0]}: cannot be read ({self._error.strerror})")
        return self._digest.hexdigest()


class _Job:
    """One run: what the threads share."""

    def __init__(self, plan: Plan, progress: Progress | None, total: int) -> None:
        self.plan, self.total = plan, total
        self.checks: dict[str, str] = {}
        self.stopped = threading.Event()
        self._progress, self._done, self._lock = progress, 0, threading.Lock()

    def tensor(self, writer: StreamWriter, name: str, tensor: Stored, choice: Choice | None) -> LayerReport | None:
        """Write one tensor of the source, quantized if there is a choice."""
        edit = self.plan.edits.get(name)
        for key, _, _ in fold_specs(name, tensor.shape, edit):
            writer.write(key, edit.columns if key.endswith(COLUMNS) else edit.rows)
        if choice is not None:
            return self._layer(writer, name, tensor, choice, edit)
        for start, stop in tensor.blocks(BLOCK):
            block = tensor.read(start, stop)
            if edit is not None:
                block = edit.apply(block.float(), start, stop).to(tensor.dtype)
            writer.write(name, block, start)
            self._advance(tensor, start, stop, name)
        return None

    def _layer(self, writer: StreamWriter, name: str, tensor: Stored, choice: Choice, edit: Edit | None) -> LayerReport:
        layout, layer = choice.layout, choice.layer
        survey = None
        if layout.surveys:
            for start, stop in tensor.blocks(BLOCK):
                survey = layout.survey(self._block(tensor, start, stop, edit, layer), survey)
        whole = {part.suffix: [] for part in layout.parts(*choice.shape) if part.rows == 1}
        error = 0.0
        for start, stop in tensor.blocks(BLOCK):
            block = self._block(tensor, start, stop, edit, layer)
            parts = layout.encode(block, survey)
            for part in layout.parts(*choice.shape):
                if part.rows == 0:
                    writer.write(f"{layer}.{part.suffix}", parts[part.suffix], start)
                elif part.rows == 1:
                    whole[part.suffix].append(parts[part.suffix])
                elif start == 0:
                    writer.write(f"{layer}.{part.suffix}", parts[part.suffix])
            if start == 0:
                error = self._check(layout, choice, block, parts)
            self._advance(tensor, start, stop, layer)
        for suffix, pieces in whole.items():
            writer.write(f"{layer}.{suffix}", torch.cat(pieces, 1))
        marker = _bytes(self.plan.marker(choice))
        writer.write(layer + MARKER, torch.frombuffer(bytearray(marker), dtype=torch.uint8))
        return LayerReport(layer, layout.name, error, layout.nbytes(*choice.shape) + len(marker), tensor.nbytes)

    def _check(self, layout: Layout, choice: Choice, block: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> float:
        """Decode the first rows again: their relative error, and what guards the rotation flag."""
        rows = min(_CHECK_ROWS, block.shape[0])
        first = {
            part.suffix: parts[part.suffix][:rows] if part.rows == 0 else
            parts[part.suffix][:, :rows] if part.rows == 1 else parts[part.suffix]
            for part in layout.parts(*choice.shape)
        }  # fmt: skip
        decoded = layout.decode(first)
        with self._lock:
            self.checks[choice.layer] = rotation_check(decoded)
        size = float(block[:rows].norm())
        return float((decoded - block[:rows]).norm()) / size if size else 0.0

    def _block(self, tensor: Stored, start: int, stop: int, edit: Edit | None, layer: str) -> torch.Tensor:
        block = tensor.wide(start, stop)
        if edit is not None:
            block = edit.apply(block, start, stop)
        if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
            raise StrettoError(
                f"{self.plan.checkpoint.paths[0]}: {layer}: has values that are not finite; nothing is written"
            )
        return block

    def _advance(self, tensor: Stored, start: int, stop: int, words: str) -> None:
        if self.stopped.is_set():
            raise StrettoError("stopped")
        with self._lock:
            self._done += tensor.nbytes * (stop - start) // max(tensor.rows, 1)
            if self._progress is not None:
                self._progress(self._done, self.total, words)


def _bytes(marker: Mapping[str, Any]) -> bytes:
    return json.dumps(marker).encode()


def _metadata(plan: Plan, checks: Mapping[str, str], hash_source: bool) -> dict[str, str]:
    kept = {key: value for key, value in plan.checkpoint.metadata.items()
            if key not in (METADATA_KEY, RECIPE_KEY, PROVENANCE_KEY) and not key.startswith("stretto_")}  # fmt: skip
    layers = {choice.layer: plan.marker(choice) for choice in plan.quantized.values()}
    provenance = {
        "tool": TOOL,
        "torch": torch.__version__,
        "source": [path.name for path in plan.checkpoint.paths],
        "source_bytes": sum(os.stat(path).st_size for path in plan.checkpoint.paths),
        "source_sha256": _HASH_LATER if hash_source else "",
        "architecture": plan.architecture.name if plan.architecture else "",
        "notes": list(plan.notes),
        "rotation_check": dict(checks),
    }
    return {
        **kept,
        METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, "layers": layers}),
        RECIPE_KEY: json.dumps(plan.recipe.document()),
        PROVENANCE_KEY: json.dumps(provenance, ensure_ascii=False),
    }
