"""Which quantized format a checkpoint is in, told from names, dtypes and markers; nothing else of it is read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import StrettoError
from .checkpoints import Checkpoint
from .files import Computed, Stored
from .layouts import Fp8, Layout, Packed, from_marker

METADATA_KEY = "_quantization_metadata"
MARKER = ".comfy_quant"
PLAIN, COMFY, SCALED_FP8, PLAIN_FP8, GGUF = "plain", "comfy", "scaled_fp8", "plain_fp8", "gguf"
NUNCHAKU, NF4, BARE_INT8 = "nunchaku", "nf4", "bare_int8"
TITLES = {
    PLAIN: "not quantized", COMFY: "ComfyUI's quantized format", SCALED_FP8: "scaled fp8 (older form)",
    PLAIN_FP8: "fp8 without scales",
    GGUF: "GGUF", NUNCHAKU: "SVDQuant (nunchaku)", NF4: "bitsandbytes NF4", BARE_INT8: "int8 with scales, without markers",
}  # fmt: skip
#: Formats that are recognised and cannot be read, with the way out.
UNREADABLE = {
    NUNCHAKU: "4-bit weights in nunchaku's tile order beside a 16-bit low-rank part. Load it with the ComfyUI-nunchaku pack, or "
    "quantize the original 16-bit checkpoint (format w4a8 has the same size).",
    NF4: "bitsandbytes' 4-bit code, for its own loader. Quantize the original 16-bit checkpoint instead.",
    BARE_INT8: "the file does not say whether its weights are rotated, and a wrong guess gives noise. If the tool that made it "
    "did not rotate, pass --assume-rotation 0 to transcode; for ConvRot files its group size, usually 256.",
}
_MAX_MARKER = 1 << 16
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One quantized layer of a checkpoint, checked against the arithmetic of its layout."""

    name: str
    layout: Layout
    shape: tuple[int, int]
    marker: Mapping[str, Any]
    tensors: Mapping[str, Stored] = field(repr=False)

    def read(self) -> Packed:
        """Return the packed weight, whole."""
        return self.layout.checked(self.shape, {suffix: tensor.read() for suffix, tensor in self.tensors.items()})

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return fp32 rows [start, stop) of the weight as it was before it was quantized, as far as it is known."""
        parts = {}
        for part in self.layout.parts(*self.shape):
            stored = self.tensors[part.suffix]
            if part.rows == 0:
                tensor = stored.read(start, stop)
            else:
                tensor = stored.read()
                tensor = tensor if part.rows is None else tensor.reshape(part.shape)[:, start:stop]
            parts[part.suffix] = tensor
        return self.layout.checked((stop - start, self.shape[1]), parts).dequantize()


@dataclass(frozen=True, eq=False)
class Found:
    """What a checkpoint was found to be.

    Attributes:
        kind: one of the names in :data:`TITLES`.
        layers: quantized layers by name, where they can be read.
        plain: tensors that belong to no quantized layer.
        notes: remarks for people.
    """

    kind: str
    layers: Mapping[str, QuantizedLayer]
    plain: Mapping[str, Stored]
    notes: tuple[str, ...] = ()

    def require_readable(self) -> "Found":
        """Return self, or refuse a format that cannot be read (StrettoError)."""
        if self.kind in UNREADABLE:
            raise StrettoError(f"{TITLES[self.kind]}: {UNREADABLE[self.kind]}")
        return self


def find_formats(
    checkpoint: Checkpoint, tensors: Mapping[str, Stored] | None = None, assume_rotation: int | None = None
) -> Found:
    """Tell the format of a checkpoint and check every quantized layer's tensors.

    Args:
        checkpoint: an open one.
        tensors: its tensors under other names, if they were renamed.
        assume_rotation: for int8 weights without markers: side of the rotated blocks, 0 for none.

    Raises:
        StrettoError: a marker cannot be read, its format is unknown, or tensors disagree with it: names the layer.
    """
    tensors = checkpoint.tensors if tensors is None else tensors
    source = str(checkpoint.paths[0])
    if checkpoint.paths[0].suffix.lower() == ".gguf":
        return Found(GGUF, {}, tensors)
    markers = _markers(source, checkpoint.metadata, tensors)
    if markers:
        return _layers(source, COMFY, tensors, markers)
    legacy = [name.removesuffix(".scale_weight") for name in tensors if name.endswith(".scale_weight")]
    if "scaled_fp8" in tensors or legacy:
        return _scaled_fp8(source, tensors, legacy)
    kind = _foreign(tensors)
    if kind == BARE_INT8 and assume_rotation is not None:
        marker: dict[str, Any] = {"format": "int8_tensorwise"}
        marker |= {"convrot": True, "convrot_groupsize": assume_rotation} if assume_rotation else {}
        bare = {
            n.removesuffix(".weight"): marker
            for n, t in tensors.items()
            if n.endswith(".weight") and t.dtype == torch.int8
        }
        return _layers(source, COMFY, tensors, bare)
    return Found(kind, {}, tensors)


def _foreign(tensors: Mapping[str, Stored]) -> str:
    names = set(tensors)
    if any(name.endswith(".qweight") for name in names) and any(name.endswith(".wscales") for name in names):
        return NUNCHAKU
    if any(".quant_state.bitsandbytes__" in name or name.endswith(".quant_map") for name in names):
        return NF4
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    if any(tensor.dtype in (torch.int8, torch.uint8) for tensor in weights.values()):
        return BARE_INT8
    return PLAIN_FP8 if any(tensor.dtype in _FP8 for tensor in weights.values()) else PLAIN


def _markers(source: str, metadata: Mapping[str, str], tensors: Mapping[str, Stored]) -> dict[str, Mapping[str, Any]]:
    """Markers of all layers; where the header has any, it decides (as in ComfyUI's convert_old_quants)."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.endswith(MARKER):
            layer = name.removesuffix(MARKER)
            if tensor.dtype != torch.uint8 or len(tensor.shape) != 1 or tensor.nbytes > _MAX_MARKER:
                raise StrettoError(
                    f"{source}: {layer}: its marker is {tensor.dtype} {list(tensor.shape)}; expected a text in bytes"
                )
            found[layer] = _json(source, layer, bytes(tensor.read().tolist()))
    if METADATA_KEY in metadata:
        document = _json(source, METADATA_KEY, metadata[METADATA_KEY].encode())
        layers = document.get("layers")
        if not isinstance(layers, dict):
            raise StrettoError(f"{source}: {METADATA_KEY} has no layers by name")
        for layer, marker in layers.items():
            # A guide of ComfyUI shows the format as a plain text, its code wants an object.
            found[layer] = {"format": marker} if isinstance(marker, str) else marker
    for layer, marker in found.items():
        if not isinstance(marker, dict):
            raise StrettoError(f"{source}: {layer}: its marker is {str(marker)[:80]}; expected an object with a format")
    return found


def _json(source: str, what: str, raw: bytes) -> Any:
    try:
        document = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StrettoError(f"{source}: {what}: its marker is no JSON ({str(error)[:80]})") from None
    if not isinstance(document, dict | str):
        raise StrettoError(f"{source}: {what}: its marker is {str(document)[:80]}; expected an object")
    return document


def _layers(
    source: str,
    kind: str,
    tensors: Mapping[str, Stored],
    markers: Mapping[str, Mapping[str, Any]],
    notes: tuple[str, ...] = (),
) -> Found:
    plain = dict(tensors)
    owned: dict[str, dict[str, Stored]] = {layer: {} for layer in markers}
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if layer in owned and suffix != "bias":
            owned[layer][suffix] = plain.pop(name)
    layers = {}
    for layer, marker in markers.items():
        parts = {suffix: tensor for suffix, tensor in owned[layer].items() if suffix != MARKER[1:]}
        if "pre_quant_scale" in parts:
            raise StrettoError(f"{source}: {layer}: has a pre_quant_scale, which belongs to a format that is not read")
        try:
            layout, shape = from_marker(marker, {suffix: (t.dtype, t.shape) for suffix, t in parts.items()})
            missing = [part.suffix for part in layout.parts(*shape) if part.suffix not in parts]
            if missing:
                raise ValueError(f"{layout.key} needs a tensor {missing[0]}, which is missing")
            layout.checked(shape, {s: torch.empty(t.shape, dtype=t.dtype, device="meta") for s, t in parts.items()})
        except ValueError as error:
            raise StrettoError(f"{source}: {layer}: {error}") from None
        layers[layer] = QuantizedLayer(layer, layout, shape, marker, parts)
    return Found(kind, layers, plain, notes)


def _scaled_fp8(source: str, tensors: Mapping[str, Stored], legacy: list[str]) -> Found:
    """Files from before markers: ``scale_weight`` beside an fp8 weight. Names are as ComfyUI's convert_old_quants maps them."""
    renamed, notes = {}, []
    for name, tensor in tensors.items():
        if name == "scaled_fp8":
            continue
        if name.endswith(".scale_input"):
            notes.append("scales of activations are dropped: they are found token by token")
            continue
        if name.endswith(".scale_weight"):
            name = name.removesuffix(".scale_weight") + ".weight_scale"
            tensor = Computed(torch.float32, (), tensor.nbytes, _scalar(tensor, source, name))
        renamed[name] = tensor
    e5m2 = next((layer for layer in legacy if tensors.get(f"{layer}.weight", None) is not None
                 and tensors[f"{layer}.weight"].dtype == torch.float8_e5m2), None)  # fmt: skip
    if e5m2 is not None:
        raise StrettoError(f"{source}: {e5m2}: scaled fp8 e5m2, which is not read; e4m3 is")
    # A layer with a scale and a 16-bit weight was left alone by the tool that made the file.
    markers = {
        layer: Fp8().marker() for layer in legacy
        if f"{layer}.weight" not in tensors or tensors[f"{layer}.weight"].dtype == torch.float8_e4m3fn
    }  # fmt: skip
    for layer in set(legacy) - set(markers):
        renamed.pop(f"{layer}.weight_scale", None)
    return _layers(source, SCALED_FP8, renamed, markers, tuple(dict.fromkeys(notes)))


def _scalar(tensor: Stored, source: str, name: str) -> Callable[[int, int], torch.Tensor]:
    if any(side != 1 for side in tensor.shape):
        raise StrettoError(f"{source}: {name}: a scale of shape {list(tensor.shape)}; one number is right")
    return lambda start, stop: tensor.read().float().reshape(())


def dequantized(found: Found, dtype: torch.dtype | None = None) -> dict[str, Stored]:
    """Return all tensors with every quantized weight as a floating one, computed row by row when it is read.

    Args:
        found: a readable checkpoint.
        dtype: of the weights; None for that of most of the other 16-bit tensors.
    """
    found.require_readable()
    tensors = dict(found.plain)
    halves = [tensor.dtype for tensor in tensors.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
    dtype = dtype or (torch.float16 if halves.count(torch.float16) > len(halves) / 2 else torch.bfloat16)
    for name, layer in found.layers.items():
        stored = sum(tensor.nbytes for tensor in layer.tensors.values())
        tensors[f"{name}.weight"] = Computed(dtype, layer.shape, stored, layer.rows)
    if found.kind == PLAIN_FP8:
        for name, tensor in tensors.items():
            if tensor.dtype in _FP8:
                tensors[name] = Computed(dtype, tensor.shape, tensor.nbytes, tensor.wide)
    return tensors
