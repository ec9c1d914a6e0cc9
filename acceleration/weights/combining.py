"""Signed linear combinations of checkpoints or LoRAs, tensor by tensor, in little memory.

LCSC (arXiv 2404.02241) finds coefficients a_i, negative ones among them, with sum 1, so that sum a_i theta_i of one training's
checkpoints is better than any of them and than their moving average. Products are summed in fp32.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import StrettoError
from ..quantization.checkpoints import Checkpoint, open_checkpoint
from ..quantization.files import Stored
from ..quantization.formats import PLAIN, TITLES, find_formats
from ..quantization.writer import Spec, StreamWriter

Progress = Callable[[int, int, str], None]
#: Numbers per block: 16 MiB of fp32 for the sum and as much for what is added.
BLOCK = 4 << 20
#: Coefficients of checkpoints add up to 1 this closely.
SUM_TOLERANCE = 1e-4
METADATA_KEY = "stretto_combination"
_DOWN, _UP = (".lora_down.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_B.weight")
_ADAPTER = re.compile(r"\.(lora_|hada_|lokr_|dora_scale|oft_|diff(_b)?$|alpha$|magnitude)")


@dataclass(frozen=True, eq=False)
class Combination:
    """Files that fit together, and how much of each is taken.

    Attributes:
        checkpoints: open, of equal names and shapes; of LoRAs, any ranks.
        coefficients: one per checkpoint.
        lora: whether they are LoRAs, whose products are combined and not their factors.
    """

    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    lora: bool

    @property
    def single(self) -> int | None:
        """Index of the only checkpoint that is taken, whole; None otherwise."""
        taken = [index for index, value in enumerate(self.coefficients) if value]
        return taken[0] if len(taken) == 1 and self.coefficients[taken[0]] == 1 else None

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> "Combination":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def specs(self) -> list[Spec]:
        """Tensors of the result. Dtypes are the first checkpoint's."""
        first = self.checkpoints[0 if self.single is None else self.single].tensors
        if not self.lora or self.single is not None:
            return [Spec(name, tensor.dtype, tensor.shape) for name, tensor in first.items()]
        return [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._factors()]

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows) of a tensor of the result.

        Raises:
            StrettoError: whole numbers differ between the files, or the sum is not finite.
        """
        if self.single is not None:
            tensor = self.checkpoints[self.single].tensors[name]
            for start, stop in tensor.blocks(BLOCK):
                yield start, tensor.read(start, stop)
            return
        taken = [(value, found.tensors[name]) for value, found in zip(self.coefficients, self.checkpoints) if value]
        first = self.checkpoints[0].tensors[name]
        for start, stop in first.blocks(BLOCK):
            if not first.dtype.is_floating_point:
                rows = first.read(start, stop)
                if any(not torch.equal(rows, tensor.read(start, stop)) for _, tensor in taken):
                    raise StrettoError(f"{name}: whole numbers that differ between the files; they cannot be combined")
                yield start, rows
                continue
            yield start, weighted([value for value, _ in taken], [t.wide(start, stop) for _, t in taken], first.dtype, name)

    def loras(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of combined LoRAs: factors side by side, so that their product is the sum of the products."""
        yield from self._factors()

    def _factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        first = self.checkpoints[0].tensors
        for name, tensor in first.items():
            layer = next((name.removesuffix(end) for end in _DOWN if name.endswith(end)), None)
            if layer is None:
                if not name.endswith((*_UP, ".alpha")):
                    yield name, _same(name, [found.tensors[name] for found in self.checkpoints])
                continue
            up_name = layer + _UP[_DOWN.index(name.removeprefix(layer))]
            downs, ups = [], []
            for value, found in zip(self.coefficients, self.checkpoints):
                if not value:
                    continue
                down, up, alpha = found.tensors[name], found.tensors[up_name], found.tensors.get(f"{layer}.alpha")
                scale = value * (float(alpha.wide().reshape(-1)[0]) / down.shape[0] if alpha is not None else 1.0)
                downs.append(down.wide())
                ups.append(up.wide() * scale)
            down, up = torch.cat(downs), torch.cat(ups, dim=1)
            yield name, down.to(tensor.dtype)
            yield up_name, _finite(up.to(first[up_name].dtype), up_name)
            # ComfyUI scales a product by alpha over rank: as much as the rank leaves it as it is.
            if f"{layer}.alpha" in first:
                yield f"{layer}.alpha", torch.tensor(float(down.shape[0]), dtype=first[f"{layer}.alpha"].dtype)


def weighted(
    coefficients: Sequence[float], tensors: Sequence[torch.Tensor], dtype: torch.dtype, name: str = "tensor"
) -> torch.Tensor:
    """Return the sum of ``coefficients`` times ``tensors``, in fp32, rounded once to ``dtype``.

    Raises:
        StrettoError: the sum does not fit the dtype.
    """
    total = tensors[0].float() * coefficients[0]
    for value, tensor in zip(coefficients[1:], tensors[1:]):
        total.add_(tensor.float(), alpha=value)
    return _finite(total.to(dtype), name)


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor.float()).all():
        raise StrettoError(f"{name}: the combination is not finite in {tensor.dtype}; use smaller coefficients or fp32 files")
    return tensor


def _same(name: str, tensors: Sequence[Stored]) -> torch.Tensor:
    """A tensor that all files share: one that is no factor of a LoRA."""
    first = tensors[0].read()
    if any(not torch.equal(first, tensor.read()) for tensor in tensors[1:]):
        raise StrettoError(f"{name}: no factor of a LoRA, and it differs between the files; it cannot be combined")
    return first


def open_combination(paths: Sequence[str | Path], coefficients: Sequence[float], any_sum: bool = False) -> Combination:
    """Open the files of a combination and check that they fit together; reads headers only.

    Raises:
        StrettoError: says which file or coefficient does not fit, and how.
    """
    if len(paths) != len(coefficients) or not paths:
        raise StrettoError(f"{len(paths)} files and {len(coefficients)} coefficients; every file needs one")
    if not all(math.isfinite(value) for value in coefficients) or not any(coefficients):
        raise StrettoError(f"coefficients are {list(coefficients)}; they must be finite, and not all 0")
    with ExitStack() as stack:
        found = tuple(stack.enter_context(open_checkpoint(path)) for path in paths)
        for checkpoint in found:
            kind = find_formats(checkpoint, dict(checkpoint.tensors)).kind
            if kind != PLAIN:
                raise StrettoError(
                    f"{checkpoint.paths[0]}: {TITLES[kind]}; combine 32- or 16-bit files, and quantize the result"
                )
        lora = any(name.endswith(_DOWN) for name in found[0].tensors)
        for other in found:
            _require_alike(found[0], other, lora)
        total = sum(coefficients)
        if not lora and not any_sum and abs(total - 1) > SUM_TOLERANCE:
            raise StrettoError(
                f"coefficients add up to {total:.6g}; those of checkpoints must add up to 1, or all weights change size"
            )
        stack.pop_all()
    return Combination(found, tuple(map(float, coefficients)), lora)


def _require_alike(first: Checkpoint, other: Checkpoint, lora: bool) -> None:
    """Raise unless two files have the same tensors."""
    path, missing = other.paths[0], sorted(set(first.tensors) ^ set(other.tensors))
    if missing:
        owner = first.paths[0].name if missing[0] in first.tensors else path.name
        raise StrettoError(
            f"{path}: not of the same model as {first.paths[0].name}: {missing[0]!r:.100} is in {owner} only "
            f"({len(missing)} such tensors)"
        )
    if lora:
        odd = next((name for name in first.tensors if _ADAPTER.search(name) and not _plain_lora(name)), None)
        if odd is not None:
            raise StrettoError(f"{path}: {odd!r:.100} belongs to no plain LoRA; only LoRAs of two factors can be combined")
    for name, tensor in first.tensors.items():
        theirs = other.tensors[name].shape
        mine, theirs = (_without_rank(name, shape) if lora else tuple(shape) for shape in (tensor.shape, theirs))
        if mine != theirs:
            raise StrettoError(f"{path}: {name!r:.100} is {list(theirs)}; {first.paths[0].name} has {list(mine)}")


def _plain_lora(name: str) -> bool:
    return name.endswith((*_DOWN, *_UP, ".alpha"))


def _without_rank(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = 0 if name.endswith(_DOWN) else 1 if name.endswith(_UP) else None
    return tuple(size for place, size in enumerate(shape) if place != axis)


def write_combination(
    combination: Combination, target: str | Path, replace: bool = False, progress: Progress | None = None
) -> Path:
    """Write the result: whole under its name, or not at all. The sources are only read.

    Raises:
        StrettoError: the target exists or is a source, the disk is full, a source changed, or tensors cannot be combined.
    """
    target = Path(target)
    sources = [path for checkpoint in combination.checkpoints for path in checkpoint.paths]
    if target.exists() and any(target.samefile(path) for path in sources):
        raise StrettoError(f"{target}: is one of the sources, which are never written over; name another file")
    specs = combination.specs()
    total, done = sum(spec.nbytes for spec in specs), 0
    with StreamWriter(target, specs, _metadata(combination, sources), replace) as writer:
        if combination.lora and combination.single is None:
            for name, tensor in combination.loras():
                writer.write(name, tensor)
                done += tensor.nbytes
                if progress:
                    progress(done, total, name)
            return target
        for spec in specs:
            for row, rows in combination.parts(spec.name):
                writer.write(spec.name, rows, row)
                done += rows.nbytes
                if progress:
                    progress(done, total, spec.name)
    return target


def _metadata(combination: Combination, sources: Sequence[Path]) -> Mapping[str, str]:
    first = combination.checkpoints[0 if combination.single is None else combination.single]
    recipe = [[path.name, value] for path, value in zip((c.paths[0] for c in combination.checkpoints), combination.coefficients)]
    return {**first.metadata, METADATA_KEY: json.dumps(recipe)}
