"""What a loader says it did: format, products, sizes, and how much faster a step could become."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels import quantized_linear
from .architectures import FREE, SELF_ATTENTION, Architecture
from .files import Stored
from .layouts import Fp8, Grid, Int8Rows, Packed


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and how.

    Attributes:
        path: the file.
        loader: Stretto or ComfyUI.
        why: why that loader.
        kind: format of the file, in words.
        layers: layers per format.
        kernels: products per format.
        nbytes: of the weights as loaded.
        nbytes_16: of the same weights in 16 bit.
        share: share of the arithmetic of a step in quantized layers, at ``tokens`` tokens; None where it is not known.
        tokens: see ``share``.
        notes: remarks.
    """

    path: str
    loader: str
    why: str
    kind: str
    layers: Mapping[str, int]
    kernels: Mapping[str, str]
    nbytes: int
    nbytes_16: int
    share: float | None = None
    tokens: int = 0
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return it in words, a line each."""
        lines = [f"{self.path}: {self.kind}, loaded by {self.loader} ({self.why})"]
        lines += [
            f"{count} layers {form}: {self.kernels.get(form, '')}".rstrip(": ") for form, count in self.layers.items()
        ]
        if self.nbytes_16:
            lines.append(f"weights {self.nbytes / 1e6:,.1f} MB; in 16 bit {self.nbytes_16 / 1e6:,.1f} MB")
        if self.share is not None:
            ceiling = 1 / (1 - self.share / 2)
            lines.append(
                f"quantized layers are {self.share:.0%} of a step's arithmetic at {self.tokens:,} tokens: with products twice as "
                f"fast a step can be at most {ceiling:.2f} times as fast"
            )
        return "\n".join([*lines, *self.notes])


#: Tokens at which the share of the arithmetic is given: 1024 x 1024 pixels, and 81 frames of 832 x 480.
_IMAGE_TOKENS, _VIDEO_TOKENS = 4096, 32760
_VIDEO = ("wan", "hunyuan_video", "ltxv")


def linear_share(
    architecture: Architecture | None, logical: Mapping[str, Stored], packed: Mapping[str, tuple[Packed, bool]]
) -> tuple[float | None, int]:
    """Share of a step's multiplications that quantized layers with fast products do."""
    if architecture is None or architecture.text:
        return None, 0
    tokens = _VIDEO_TOKENS if architecture.name in _VIDEO else _IMAGE_TOKENS
    linear = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in logical.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    free = {name: shape for name, shape in linear.items() if architecture.role(name) == FREE}
    # Of two streams (image and text) only one sees the image's tokens.
    text = ("txt_", "context_block", "add_", "to_add_out", "ff_context")
    work = {name: 2 * shape[0] * shape[1] for name, shape in free.items() if not any(part in name for part in text)}
    fast = sum(
        cost for name, cost in work.items()
        if name in packed and not packed[name][1] and isinstance(packed[name][0].layout, Int8Rows | Grid | Fp8)
    )  # fmt: skip
    blocks: dict[str, int] = {}
    for name, shape in free.items():
        if architecture.group(name) == SELF_ATTENTION:
            block = ".".join(name.split(".")[:2])
            blocks[block] = min(blocks.get(block, shape[0]), shape[0])
    attention = sum(4 * tokens * width for width in blocks.values())
    total = sum(work.values()) + attention
    return (fast / total if total else None), tokens


#: Rows that products are timed with, and the most weights of a layer that is.
_ROWS, _WEIGHTS, _TURNS = 256, 1 << 23, 3


def speed_words(items: Sequence[Packed], dtype: torch.dtype, device: torch.device) -> str:
    """Time the int8 product of the largest layer against the plain one, and return what came out in words; empty without any.

    Args:
        items: weights of a model.
        dtype: that the model computes in.
        device: that it computes on.
    """
    items = [item for item in items if isinstance(item.layout, Int8Rows | Grid)]
    if not items:
        return ""
    item = max(items, key=lambda each: each.shape[0] * each.shape[1])
    columns = item.shape[1]
    rows = min(item.shape[0], max(_WEIGHTS // columns, 16))
    x = torch.randn(_ROWS, columns, device=device).to(dtype)
    codes = torch.randint(-127, 128, (rows, columns), device=device).to(torch.int8)
    scale, weight = torch.ones(rows, device=device), codes.to(dtype)
    ours = _seconds(lambda: quantized_linear.int8_linear(x, codes, scale, None, item.layout.rotation), device)
    plain = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    where = f"{_ROWS} rows of {columns} to {rows} channels, in {str(dtype).removeprefix('torch.')}"
    if ours <= plain:
        return f"measured here: the int8 product is {plain / ours:.1f} times as fast as the plain one ({where})"
    return (
        f"measured here: the int8 product takes {ours / plain:.1f} times as long as the plain one ({where}), because rounding "
        "the input costs more than the product saves; larger layers and more rows gain, and memory is saved in any case"
    )


def _seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    times = []
    with torch.inference_mode():
        for turn in range(_TURNS + 1):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
    return statistics.median(times)
