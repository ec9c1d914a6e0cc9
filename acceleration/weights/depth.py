"""Models of fewer blocks: dropped, renumbered so that ComfyUI counts them, and LoRAs renumbered with them.

TinyFusion (arXiv 2412.01199) and PPCL (arXiv 2511.16156) drop blocks and train what is left. Dropping alone is what this does; a
quality without that training is measured, not promised.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StrettoError
from ..quantization.architectures import find_architecture
from ..quantization.checkpoints import Checkpoint, open_checkpoint
from ..quantization.renaming import comfy_names
from ..quantization.writer import Spec, StreamWriter

Progress = Callable[[int, int, str], None]
METADATA_KEY = "pruned_from"
PRESETS = Path(__file__).resolve().parents[2] / "presets" / "depth"
#: Architecture -> lists of blocks that ComfyUI counts by their names, in the order in which they run.
LISTS: Mapping[str, tuple[str, ...]] = {
    "flux": ("double_blocks", "single_blocks"),
    "hunyuan_video": ("double_blocks", "single_blocks"),
    "qwen_image": ("transformer_blocks",),
    "wan": ("blocks",),
    "ltxv": ("transformer_blocks",),
}
#: Names of the same lists in diffusers, which many LoRAs use.
_ALSO = {
    ("flux", "double_blocks"): "transformer_blocks",
    ("flux", "single_blocks"): "single_transformer_blocks",
    ("hunyuan_video", "double_blocks"): "transformer_blocks",
    ("hunyuan_video", "single_blocks"): "single_transformer_blocks",
}
_ITEM = re.compile(r"(?:([a-z_]+):)?(\d+)(?:-(\d+))?")
_COPY = 16 << 20


@dataclass(frozen=True)
class Depth:
    """Which blocks of a model are left.

    Attributes:
        architecture: its name.
        kept: list of blocks -> old indices of those that are left, in order.
    """

    architecture: str
    kept: Mapping[str, tuple[int, ...]]

    def renamed(self, name: str) -> str | None:
        """Return the name of a tensor of the model after renumbering; None for one of a dropped block."""
        for blocks, kept in self.kept.items():
            found = re.match(rf"{blocks}\.(\d+)\.", name)
            if found:
                index = int(found[1])
                return f"{blocks}.{kept.index(index)}.{name[found.end():]}" if index in kept else None
        return name

    def renamed_lora(self, name: str) -> str | None:
        """Return the name of a LoRA's tensor after renumbering, in the naming of any trainer; None for a dropped block."""
        for blocks, kept in self.kept.items():
            for written in filter(None, (blocks, _ALSO.get((self.architecture, blocks)))):
                # blocks.4.  transformer.blocks.4.  lora_unet_blocks_4_   but not the end of another list's name
                found = re.search(rf"(?:^|[.]|lora_unet_|lora_transformer_|lycoris_){written}([._])(\d+)\1", name)
                if found:
                    index = int(found[2])
                    if index not in kept:
                        return None
                    return f"{name[:found.start(2)]}{kept.index(index)}{name[found.end(2):]}"
        return name

    def to_json(self) -> dict:
        """Return what is written into a file."""
        return {"architecture": self.architecture, "kept": {blocks: list(kept) for blocks, kept in self.kept.items()}}

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, str]) -> "Depth":
        """Read what a pruned file tells about itself.

        Raises:
            StrettoError: it is no such file.
        """
        try:
            document = json.loads(metadata[METADATA_KEY])
            kept = {str(name): tuple(map(int, indices)) for name, indices in document["kept"].items()}
            return cls(str(document["architecture"]), kept)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise StrettoError(f"{path}: does not say which blocks it was pruned of; it was not made by prune-depth") from None


def parse_drop(text: str, counts: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the blocks that a text names: ``4,6-8``, or ``double_blocks:3,single_blocks:10-12``; a list goes on until another.

    Raises:
        StrettoError: not such a text, or blocks that are not there.
    """
    lists = list(counts)
    current = lists[0] if len(lists) == 1 else None
    dropped: dict[str, set[int]] = {blocks: set() for blocks in lists}
    for item in filter(None, re.split(r"[\s,]+", text.strip())):
        found = _ITEM.fullmatch(item)
        if not found:
            raise StrettoError(f"blocks to drop: {item!r:.40} is neither a number nor a range such as 6-8")
        current = found[1] or current
        if current not in counts:
            raise StrettoError(f"blocks to drop: {item!r:.40} needs a list before it: {', '.join(f'{name}:' for name in lists)}")
        first, last = int(found[2]), int(found[3] or found[2])
        if first > last or last >= counts[current]:
            raise StrettoError(f"blocks to drop: {item!r:.40}; {current} has blocks 0 to {counts[current] - 1}")
        dropped[current] |= set(range(first, last + 1))
    return dropped


def find_depth(names: Iterable[str], drop: str | Mapping[str, set[int]]) -> Depth:
    """Return what is left of a model with tensors of these names.

    Raises:
        StrettoError: an architecture whose blocks ComfyUI does not count, nothing to drop, or nothing left.
    """
    names = list(names)
    architecture = find_architecture(names)
    if architecture is not None and architecture.name == "sd3":
        raise StrettoError("Stable Diffusion 3: ComfyUI takes the number of its blocks from their width, so none can be dropped")
    if architecture is None or architecture.name not in LISTS:
        known = ", ".join(sorted(LISTS))
        raise StrettoError(f"{architecture.title if architecture else 'this model'}: blocks can be dropped of {known}")
    counts = {
        blocks: 1 + max((int(m[1]) for name in names if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)
        for blocks in LISTS[architecture.name]
    }
    counts = {blocks: count for blocks, count in counts.items() if count}
    dropped = parse_drop(drop, counts) if isinstance(drop, str) else {blocks: set(drop.get(blocks, ())) for blocks in counts}
    if not any(dropped.values()):
        raise StrettoError("no blocks to drop are named; write for example 4,6-8")
    kept = {blocks: tuple(index for index in range(count) if index not in dropped[blocks]) for blocks, count in counts.items()}
    if not all(kept.values()):
        raise StrettoError(f"no block of {next(b for b in kept if not kept[b])} would be left")
    return Depth(architecture.name, kept)


def preset_drop(name: str) -> tuple[dict[str, set[int]], str]:
    """Return the blocks that a published model leaves out, by list, and where that was published.

    Raises:
        StrettoError: there is no such preset.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    if name not in known:
        raise StrettoError(f"preset {name!r:.60}; known are {', '.join(known)}")
    document = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    # The first block of an interval stands for all of it.
    dropped = {index for first, last in document["intervals"] for index in range(first + 1, last + 1)}
    return {document["list"]: dropped}, document["source"]


def prune_file(
    source: str | Path, drop: str | Mapping[str, set[int]], target: str | Path, replace: bool = False,
    progress: Progress | None = None, note: str = "",
) -> tuple[Depth, int, int]:
    """Write a copy of a checkpoint without some of its blocks; the source is only read.

    Returns:
        what is left, and the bytes of the source and of the result.

    Raises:
        StrettoError: says what is wrong with which file or block.
    """  # fmt: skip
    with open_checkpoint(source) as checkpoint:
        tensors, _ = comfy_names(checkpoint.tensors)
        depth = find_depth(tensors, drop)
        names = {name: made for name in tensors if (made := depth.renamed(name)) is not None}
        metadata = {**checkpoint.metadata, METADATA_KEY: json.dumps({**depth.to_json(), "note": note})}
        nbytes = _copy(checkpoint, tensors, names, target, metadata, replace, progress)
        return depth, checkpoint.nbytes, nbytes


def prune_lora(
    lora: str | Path, pruned: str | Path, target: str | Path, replace: bool = False, progress: Progress | None = None
) -> tuple[int, int]:
    """Write a copy of a LoRA of the whole model for one that :func:`prune_file` made.

    Returns:
        tensors that were renumbered or kept, and tensors of dropped blocks.

    Raises:
        StrettoError: says what is wrong with which file.
    """
    with open_checkpoint(pruned) as model:
        depth = Depth.from_metadata(Path(pruned), model.metadata)
    with open_checkpoint(lora) as checkpoint:
        names = {name: made for name in checkpoint.tensors if (made := depth.renamed_lora(name)) is not None}
        if not names:
            raise StrettoError(f"{lora}: every tensor belongs to a dropped block; nothing would be left")
        _copy(checkpoint, checkpoint.tensors, names, target, dict(checkpoint.metadata), replace, progress)
        return len(names), len(checkpoint.tensors) - len(names)


def _copy(
    checkpoint: Checkpoint, tensors: Mapping, names: Mapping[str, str], target: str | Path, metadata: Mapping[str, str],
    replace: bool, progress: Progress | None,
) -> int:  # fmt: skip
    """Copy tensors under other names, block by block; returns the bytes of the result."""
    target = Path(target)
    if target.exists() and any(target.samefile(path) for path in checkpoint.paths):
        raise StrettoError(f"{target}: is the source, which is never written over; name another file")
    specs = [Spec(made, tensors[name].dtype, tuple(tensors[name].shape)) for name, made in names.items()]
    total, done = sum(spec.nbytes for spec in specs), 0
    with StreamWriter(target, specs, metadata, replace) as writer:
        for name, made in names.items():
            for start, stop in tensors[name].blocks(_COPY):
                rows = tensors[name].read(start, stop)
                writer.write(made, rows, start)
                done += rows.nbytes
                if progress:
                    progress(done, total, made)
    return total


def intervals(indices: Sequence[int]) -> str:
    """Return block numbers in the shortest form: 3, 5-7."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
