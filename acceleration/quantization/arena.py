"""A quantized layer at work: its weight as one tensor of bytes, its product, and what LoRAs do to it.

An arena is one uint8 tensor with codes and scales and, after a LoRA that is kept beside the weights, two low-rank factors. So a
layer moves, pins, is backed up and restored as a whole, whoever does it.
"""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels import quantized_linear
from .layouts import ALIGNMENT, Fp8, Grid, Int8Rows, Layout, Packed, offsets

BRANCH, REQUANTIZE = "beside the weights", "in the weights"
#: Highest rank of all LoRAs of a layer together that is kept beside its weights.
MAX_RANK = 128
_FACTOR = torch.float16
_RESIDUAL = 2e-3
#: A change so weak that more would be needed is below a tenth of a step.
_MAX_GAIN = 8.0
#: Numbers of the rows that the strength of a change is tried on.
_SAMPLE = 1 << 18


@dataclass(frozen=True)
class LayerState:
    """How a Linear's arena is to be read.

    Attributes:
        layout: of the weight.
        shape: (N, K).
        full_precision: products in the activation's dtype, with the weight dequantized (text encoders).
    """

    layout: Layout
    shape: tuple[int, int]
    full_precision: bool = False


@dataclass(frozen=True, eq=False)
class FoldedBy:
    """Factors that were folded into a weight: ``W = W0 * rows[:, None] / columns``.

    Attributes:
        rows: fp32 [N], or None.
        columns: fp32 [K], or None.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def out_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight without the factors: the one that LoRAs were made for."""
        if self.rows is not None:
            weight = weight / self.rows.to(weight).view(-1, 1)
        return weight if self.columns is None else weight * self.columns.to(weight)

    def into(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the factors."""
        if self.rows is not None:
            weight = weight * self.rows.to(weight).view(-1, 1)
        return weight if self.columns is None else weight / self.columns.to(weight)


def arena_bytes(state: LayerState) -> int:
    """Bytes of an arena without low-rank factors."""
    part, offset = offsets(state.layout, state.shape)[-1]
    return offset + part.nbytes


def _split(state: LayerState, arena: torch.Tensor) -> tuple[Packed, torch.Tensor | None, torch.Tensor | None]:
    """The packed weight of an arena, and its low-rank factors [r, K] and [N, r], if any."""
    rows, columns = state.shape
    base = -(-arena_bytes(state) // ALIGNMENT) * ALIGNMENT
    packed = Packed.of_arena(state.layout, state.shape, arena)
    if arena.numel() <= base:
        return packed, None, None
    factors = arena[base:].view(_FACTOR)
    rank = factors.numel() // (rows + columns)
    return packed, factors[: rank * columns].view(rank, columns), factors[rank * columns :].view(rows, rank)


def arena_linear(
    state: LayerState,
    x: torch.Tensor,
    arena: torch.Tensor,
    bias: torch.Tensor | None,
    kept: "Kept | None" = None,
    choices: quantized_linear.Choices | None = None,
) -> torch.Tensor:
    """Return the layer's output, [..., N] in the dtype of ``x``.

    Args:
        state: of the layer.
        x: [..., K].
        arena: uint8, on the device of ``x``.
        bias: [N] or None.
        kept: what was decoded in an earlier call with the same arena, where there is room for it.
        choices: which integer product is fastest.
    """
    packed, down, up = _split(state, arena)
    layout, parts = state.layout, packed.parts

    def decoded(make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make() if kept is None else kept(arena, x.dtype, make)

    if isinstance(layout, Int8Rows | Grid) and not state.full_precision:
        if isinstance(layout, Int8Rows):
            codes, scale = parts["weight"], parts["weight_scale"]
        else:
            codes, scale = decoded(lambda: layout.int8(parts)), parts["weight_s_channel"]
        branch = None if down is None else (down, up)
        return quantized_linear.int8_linear(x, codes, scale, bias, layout.rotation, None, branch, choices)
    fp8 = isinstance(layout, Fp8) and not state.full_precision
    if fp8 and quantized_linear.why_not_fp8(x, parts["weight"]) is None:
        output = quantized_linear.fp8_linear(x, parts["weight"], parts["weight_scale"], bias)
    else:
        output = quantized_linear.dequantized_linear(x, decoded(lambda: packed.dequantize().to(x.dtype)), bias)
    if down is None:
        return output
    branch = torch.nn.functional.linear(torch.nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return output.add_(branch)


class Room:
    """Bytes that decoded weights of a model may take together. Who comes first has them: a run goes through the layers in the
    same order in every step, so putting the oldest out for the newest would find nothing again."""

    def __init__(self, nbytes: int) -> None:
        self.free = nbytes

    def take(self, nbytes: int) -> bool:
        """Whether there is room; it is taken then."""
        if nbytes > self.free:
            return False
        self.free -= nbytes
        return True


class Kept:
    """The decoded weight of one layer, as long as its arena is the same tensor."""

    def __init__(self, room: Room) -> None:
        self._room, self._decoded = room, None
        self._arena: weakref.ref[torch.Tensor] | None = None

    def __call__(self, arena: torch.Tensor, dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the decoded weight; ``make`` makes it where it is not kept.

        Args:
            arena: what it is decoded from.
            dtype: of the activation it is decoded for.
            make: decodes.
        """
        if self._arena is not None and self._arena() is arena and self._dtype == dtype:
            return self._decoded
        self.drop()
        decoded = make()
        if self._room.take(decoded.nbytes):
            self._arena, self._dtype, self._decoded = weakref.ref(arena), dtype, decoded
        return decoded

    def drop(self) -> None:
        """Forget it."""
        if self._decoded is not None:
            self._room.free += self._decoded.nbytes
        self._arena = self._decoded = None


def dequantize_arena(state: LayerState, arena: torch.Tensor) -> torch.Tensor:
    """Return the weight, fp32 [N, K], of an arena: uint8, or its bytes widened to a floating dtype, as patching does."""
    packed, down, up = _split(state, arena.to(torch.uint8))
    weight = packed.dequantize()
    return weight if down is None else weight.addmm_(up.float(), down.float())


def patched_arena(
    state: LayerState, arena: torch.Tensor, weight: torch.Tensor, seed: int | None, lora: str = BRANCH
) -> torch.Tensor:
    """Return the arena of a patched weight.

    In branch mode the change is kept in two fp16 factors behind the untouched weight where it is of low rank, as LoRAs
    are. Otherwise the weight is rounded again, to nearest, after the change has been made as much stronger as brings its
    size through the rounding (see :func:`gain`); one too weak for that is rounded with probabilities, which keep the mean.

    Rounding again adds an error as large as the first one, so a weight with a LoRA is up to sqrt(2) as far from its original as
    without: both errors are uniform within a step, and independent. Nothing that has the rounded weight alone can do better.

    Args:
        state: of the layer.
        arena: of the weight before.
        weight: patched, floating [N, K].
        seed: of random numbers.
        lora: :data:`BRANCH` or :data:`REQUANTIZE`.
    """
    before = arena.detach().to(weight.device)
    base, weight = dequantize_arena(state, before), weight.float()
    if lora == BRANCH:
        factors = low_rank(weight - base, seed)
        if factors is not None:
            kept = before[: arena_bytes(state)]
            padding = kept.new_zeros(-kept.numel() % ALIGNMENT)
            return torch.cat([kept, padding, *(factor.contiguous().view(-1).view(torch.uint8) for factor in factors)])
    factor = gain(state.layout, base, weight)
    if factor is None:
        generator = torch.Generator(device=weight.device).manual_seed(seed or 0)
        return state.layout.quantize(weight, generator).arena()
    return state.layout.quantize(torch.lerp(base, weight, factor)).arena()


def gain(layout: Layout, base: torch.Tensor, weight: torch.Tensor) -> float | None:
    """Return the factor g, at least 1, of a change so that rounding keeps its size: ``<Q(b + g d) - b, d> = <d, d>``.

    ``base`` lies on the grid, so rounding to nearest loses whatever moves a number by less than half a step. A factor makes
    the largest of these cross it, until they carry what the small ones lose. That adds far less noise than crossing by chance
    (stochastic rounding), which moves small and large ones alike. Tried on a sample of rows. None where not even
    :data:`_MAX_GAIN` does it.

    Args:
        layout: of the weight.
        base: fp32 [N, K], dequantized.
        weight: fp32 [N, K], changed.
    """
    step = -(-base.numel() // _SAMPLE)
    base, weight = base[::step], weight[::step]
    delta = weight - base
    size = float(delta.square().sum())

    def kept(factor: float) -> float:
        rounded = layout.quantize(torch.lerp(base, weight, factor)).dequantize()
        return float(((rounded - base) * delta).sum())

    if size == 0.0 or kept(1.0) >= 0.99 * size:
        return 1.0
    if kept(_MAX_GAIN) < size:
        return None
    low, high = 1.0, _MAX_GAIN
    for _ in range(8):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) < size else (low, middle)
    return high


def low_rank(delta: torch.Tensor, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return fp16 factors [r, K] and [N, r] whose product is ``delta``, or None where r would exceed :data:`MAX_RANK`.

    A randomised range finder (Halko, Martinsson and Tropp 2011) with growing rank; what remains is measured, not assumed.

    Args:
        delta: fp32 [N, K].
        seed: of the random directions.
    """
    size = float(delta.norm())
    if size == 0.0:
        return delta.new_zeros(0, delta.shape[1], dtype=_FACTOR), delta.new_zeros(delta.shape[0], 0, dtype=_FACTOR)
    generator = torch.Generator(device=delta.device).manual_seed(seed or 0)
    rank = 16
    while rank <= MAX_RANK and 2 * rank <= min(delta.shape):
        probe = torch.randn(delta.shape[1], rank, generator=generator, device=delta.device)
        basis = torch.linalg.qr(delta @ (delta.T @ (delta @ probe) / size**2))[0]
        inner = basis.T @ delta
        left, values, right = torch.linalg.svd(inner, full_matrices=False)
        keep = int((values > values[0] * 1e-4).sum())
        root = values[:keep].sqrt()
        up, down = (basis @ left[:, :keep]) * root, right[:keep] * root[:, None]
        if float((delta - up.to(_FACTOR).float() @ down.to(_FACTOR).float()).norm()) <= _RESIDUAL * size:
            return down.to(_FACTOR), up.to(_FACTOR)
        rank *= 2
    return None


def saved_tensors(state: LayerState, arena: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """Return what a layer writes into a state dict: its parts in ComfyUI's format, with the marker.

    A LoRA beside the weights is rounded into them, so that saving nodes write a complete file.
    """
    packed, down, _ = _split(state, arena.detach())
    if down is not None:
        packed = state.layout.quantize(dequantize_arena(state, arena.detach()))
    marker = dict(state.layout.marker(), **({"full_precision_matrix_mult": True} if state.full_precision else {}))
    tensors = {f"{prefix}{suffix}": tensor for suffix, tensor in packed.parts.items()}
    raw = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)
    return {**tensors, f"{prefix}comfy_quant": raw}
