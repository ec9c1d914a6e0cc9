"""CLEAR's published files (arXiv 2412.16112): FLUX attention weights that were fine-tuned for a radius.

Safetensors in diffusers' names: ``transformer_blocks.{i}.attn.{to_q,to_k,to_v,to_out.0}.{weight,bias}`` (the picture's stream;
the text's was not trained), ``single_transformer_blocks.{i}.attn.{to_q,to_k,to_v}.{weight,bias}``, and where keys are pooled
``....attn.processor.spatial_weight`` [1, 1, 1, f, 1, f, 1] in every block: the weight of each (y, x) in a patch of f x f
tokens, for the sum that makes one more key and value (after the rotation; no softmax over them). The radius stands in the
file's name alone: ``clear_local_<radius>[_down_<f>].safetensors``.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import StrettoError
from ...safetensors_header import Header, read_header
from .files import Meta, finite, read_tensor, shapes
from .format import CLEAR, AttentionWeights

KEY = re.compile(
    r"(?:transformer\.)?(single_transformer_blocks|transformer_blocks)\.(\d{1,4})\.attn\."
    r"(?:(to_q|to_k|to_v|to_out\.0)\.(weight|bias)|(?:processor\.)?(spatial_weight))"
)
_NAME = re.compile(r"clear_local_(\d{1,4})(?:_down_(\d{1,3}))?", re.IGNORECASE)
_PARTS = {"double": ("to_q", "to_k", "to_v", "to_out.0"), "single": ("to_q", "to_k", "to_v")}
_EXPECTED = "expected FLUX attention weights in diffusers' names"
#: stream -> block -> part -> shape.
_Seen = dict[str, dict[int, dict[str, tuple[int, ...]]]]


def read_clear(header: Header, reference: str, options: Mapping[str, Any]) -> AttentionWeights:
    """Check a CLEAR file and return what it is; of its tensors only the spatial weights are read.

    Args:
        header: of the file.
        reference: :attr:`~.format.AttentionWeights.path` of the result.
        options: ``radius`` for a file that was renamed.

    Raises:
        StrettoError: names the file, the tensor and what was expected.
    """
    path, seen = header.path, _Seen(double={}, single={})
    patches: dict[tuple[str, int], torch.Tensor] = {}
    for key, shape in shapes(header).items():
        match = KEY.fullmatch(key)
        if not match:
            raise StrettoError(f"{path}: unknown tensor {key[:80]!r}; {_EXPECTED}")
        stream, index = _stream(match), int(match[2])
        if not match[5]:
            seen[stream].setdefault(index, {})[f"{match[3]}.{match[4]}"] = shape
            continue
        side = shape[3] if len(shape) == 7 else 0
        if side < 2 or shape != (1, 1, 1, side, 1, side, 1):
            raise StrettoError(f"{path}: {key} has shape {list(shape)}; expected [1, 1, 1, f, 1, f, 1]")
        patches[stream, index] = finite(path, key, read_tensor(header, key).float().reshape(side, side).clone())
    width = _width(header, seen)
    double, single = len(seen["double"]), len(seen["single"])
    blocks = {("double", i) for i in range(double)} | {("single", i) for i in range(single)}
    sides = {len(weights) for weights in patches.values()}
    if patches and (len(sides) > 1 or set(patches) != blocks):
        raise StrettoError(
            f"{path}: {len(patches)} spatial weights; expected one in each of {len(blocks)} blocks, of one size"
        )
    down = sides.pop() if sides else 1
    depth = {"double": 0, "single": double}
    return AttentionWeights(
        reference, str(path), CLEAR, None, "flux", header.metadata, radius=_radius(header, down, options),
        down_factor=down, spatial={depth[stream] + index: weights for (stream, index), weights in patches.items()},
        double_blocks=double, single_blocks=single, width=width,
    )  # fmt: skip


def clear_tensors(weights: AttentionWeights) -> dict[tuple[str, int, str, str], torch.Tensor]:
    """Return CLEAR's attention weights by (``"double"`` or ``"single"``, block, diffusers' part, ``"weight"`` or ``"bias"``).

    Mapped from the file, so nothing is read before it is used.

    Raises:
        StrettoError: no CLEAR weights, or the file changed meanwhile.
    """
    if weights.variant != CLEAR:
        raise StrettoError(f"{weights.file}: it holds {weights.kind} weights; expected CLEAR")
    header = read_header(weights.file)
    matches = {key: KEY.fullmatch(key) for key in header.entries}
    return {
        (_stream(match), int(match[2]), match[3], match[4]): read_tensor(header, key)
        for key, match in matches.items()
        if match and not match[5]
    }


def _stream(match: re.Match[str]) -> str:
    return "single" if match[1].startswith("single") else "double"


def _width(header: Header, seen: _Seen) -> int:
    """Check that every block has its attention weights, all of one width; return the width."""
    path = header.path
    if not seen["double"]:
        raise StrettoError(f"{path}: it has no transformer_blocks; {_EXPECTED}")
    shapes_seen = (shape for blocks in seen.values() for parts in blocks.values() for shape in parts.values() if shape)
    width = next(iter(Counter(shape[0] for shape in shapes_seen).most_common(1)), (0,))[0]
    for stream, blocks in seen.items():
        expected = {f"{part}.weight": (width, width) for part in _PARTS[stream]}
        expected |= {f"{part}.bias": (width,) for part in _PARTS[stream]}
        for index in range(max(blocks, default=-1) + 1):
            found = blocks.get(index, {})
            for name in sorted(expected.keys() | found.keys()):
                if found.get(name) != expected.get(name) or not width:
                    held = f"has shape {list(found[name])}" if name in found else "is missing"
                    wanted = f"expected shape {list(expected[name])}" if name in expected else "unknown there"
                    raise StrettoError(f"{path}: {stream} block {index}: {name} {held}; {wanted}")
    return width


def _radius(header: Header, down: int, options: Mapping[str, Any]) -> int:
    """Return the radius in tokens from the options, the metadata or the file's name, in this order."""
    match = _NAME.search(header.path.name)
    texts = {"down_factor": str(down), **header.metadata}
    if match:
        texts = {"window_size": match[1], **texts, "down_factor": header.metadata.get("down_factor", match[2] or "1")}
    if options.get("radius"):
        texts["window_size"] = str(options["radius"])
    meta = Meta(header.path, texts)
    meta.need("down_factor", int, down.__eq__, f"{down}, the side of the spatial weights (1 where there are none)")
    expected = "the radius in tokens, which is otherwise read from names such as clear_local_16.safetensors"
    return meta.need("window_size", int, lambda n: 1 <= n <= 4096, expected)
