"""Quantized weights in a transformer of diffusers: Linears whose weight is an arena (..quantization.arena), while it lasts.

    with quantized_weights(pipe.transformer, "wan2.2-int8.safetensors"):
        pipe("a lighthouse")

Files have ComfyUI's names, where some layers of diffusers are one (q, k and v): such a layer's rows are shared out. What is
replaced waits outside of the network and comes back as it was, so a pipeline moved to a GPU inside takes the small weights along.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import StrettoError
from ..quantization.arena import LayerState, arena_linear
from ..quantization.balancing import COLUMNS, ROWS
from ..quantization.checkpoints import open_checkpoint
from ..quantization.formats import COMFY, SCALED_FP8, TITLES, Found, QuantizedLayer, find_formats
from ..quantization.inspecting import rotation_problem
from ..quantization.layouts import Packed
from ..quantization.quantizing import rotation_checks
from ..quantization.renaming import comfy_names, comfy_place


class QuantizedLinear(torch.nn.Module):
    """A Linear with a quantized weight; LoRAs do not reach it.

    Args:
        packed: weight [N, K].
        bias: [N] or None.
        full_precision: whether products stay in the activation's dtype.
    """

    def __init__(self, packed: Packed, bias: torch.nn.Parameter | None, full_precision: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.state = LayerState(packed.layout, packed.shape, full_precision)
        self.register_buffer("arena", packed.arena())
        self.bias = bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., N] for an input [..., K], in its dtype."""
        return arena_linear(self.state, input, self.arena, self.bias)


@contextlib.contextmanager
def quantized_weights(transformer: torch.nn.Module, path: str | Path) -> Iterator[int]:
    """Run a transformer with the quantized layers of a file; yields how many layers have them.

    Args:
        transformer: a transformer of diffusers that has the weights which the file was made from.
        path: a file that Stretto or ComfyUI has quantized.

    Raises:
        StrettoError: the file is damaged, not quantized, of another model, or carries factors that belong to its other weights.
    """
    made = _made(transformer, path)
    before: dict[str, torch.nn.Module] = {}
    try:
        for name, layer in made.items():
            before[name] = transformer.get_submodule(name)
            _put(transformer, name, layer)
        yield len(made)
    finally:
        for name, layer in before.items():
            if transformer.get_submodule(name) is made[name]:
                _moved(layer, made[name])
                _put(transformer, name, layer)


def _made(transformer: torch.nn.Module, path: str | Path) -> dict[str, QuantizedLinear]:
    """Return the layers that take the places of Linears, by path in the network."""
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    with open_checkpoint(path) as checkpoint:
        stored, _ = comfy_names(checkpoint.tensors)
        found = find_formats(checkpoint, stored).require_readable()
        _require_plain_factors(path, found)
        checks = rotation_checks(checkpoint.metadata)
        places = _places(linears, found)
        left = sorted(set(found.layers) - {layer for layer, _, _ in places.values()})
        if left:
            raise StrettoError(
                f"{path}: {left[0]} has no place in {type(transformer).__name__}; is it quantized from another model?"
            )
        packed = {name: _read(path, layer, checks) for name, layer in found.layers.items()}
    made = {}
    for name, (layer, start, stop) in places.items():
        linear, (item, full) = linears[name], packed[layer]
        rows = item.shape[0] if stop is None else stop
        if (rows - start, item.shape[1]) != (linear.out_features, linear.in_features) or rows > item.shape[0]:
            raise StrettoError(
                f"{path}: {layer} has {list(item.shape)}, rows {start} to {rows} of which should be "
                f"{[linear.out_features, linear.in_features]} in {type(transformer).__name__}"
            )
        part = item if (start, rows) == (0, item.shape[0]) else _rows(path, layer, item, start, rows)
        made[name] = QuantizedLinear(part, linear.bias, full).to(linear.weight.device)
    return made


def _require_plain_factors(path: str | Path, found: Found) -> None:
    if found.kind not in (COMFY, SCALED_FP8):
        raise StrettoError(f"{path}: {TITLES[found.kind]}; expected quantized layers")
    folded = [name for name in found.plain if name.endswith((f".{COLUMNS}", f".{ROWS}"))]
    folded += [layer.name for layer in found.layers.values() if {COLUMNS, ROWS} & set(layer.tensors)]
    if folded:
        raise StrettoError(
            f"{path}: {folded[0]} carries factors that are in its other weights too, which stay as they are here; "
            "quantize without balancing"
        )


def _places(linears: dict[str, torch.nn.Linear], found: Found) -> dict[str, tuple[str, int, int | None]]:
    """Return where in the file each Linear's weight is: (layer, first row, end; None for all of them)."""
    names = {f"{name}.weight": linear.out_features for name, linear in linears.items()}
    targets = {name: comfy_place(name, names) for name in names}
    out: dict[str, tuple[str, int, int | None]] = {}
    for name, (target, rule) in targets.items():
        layer, place = target.removesuffix(".weight"), None if rule is None else rule.place
        if layer not in found.layers:
            continue
        if rule is not None and rule.swap:
            raise StrettoError(f"{layer} has its halves in another order in diffusers, so it cannot be quantized there")
        pieces = {at.place: names[other] for other, (same, at) in targets.items() if same == target and at is not None}
        start = 0 if place is None else sum(rows for at, rows in pieces.items() if at < place)
        out[name.removesuffix(".weight")] = layer, start, None if place is None else start + names[name]
    return out


def _read(path: str | Path, layer: QuantizedLayer, checks: dict[str, Any]) -> tuple[Packed, bool]:
    if layer.name in checks:
        problem = rotation_problem(layer.name, layer.rows(0, 1), checks[layer.name])
        if problem:
            raise StrettoError(f"{path}: {problem}")
    return layer.read(), bool(layer.marker.get("full_precision_matrix_mult"))


def _rows(path: str | Path, layer: str, packed: Packed, start: int, stop: int) -> Packed:
    """Return rows [start, stop) of a packed weight, in tensors of their own."""
    shape = (stop - start, packed.shape[1])
    unfit = packed.layout.unfit(*shape)
    if unfit:
        raise StrettoError(f"{path}: {layer} cannot be shared out to the layers of diffusers: {unfit}")
    parts = {}
    for part in packed.layout.parts(*packed.shape):
        tensor = packed.parts[part.suffix]
        if part.rows is not None:
            tensor = tensor.narrow(part.rows, start, stop - start).clone()
        parts[part.suffix] = tensor
    return packed.layout.checked(shape, parts)


def _put(network: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def _moved(original: torch.nn.Module, stood_in: QuantizedLinear) -> None:
    """Follow a network that was moved, or given another dtype, in between."""
    original.to(device=stood_in.arena.device, dtype=None if stood_in.bias is None else stood_in.bias.dtype)
