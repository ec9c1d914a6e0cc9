"""Quantized checkpoints in ComfyUI: loading them into its own model classes, and what LoRAs do to them.

ComfyUI builds a model from an operations class (``custom_operations``). Ours has a Linear whose weight is an arena (see
:mod:`..quantization.arena`). ComfyUI moves, pins, backs up and restores it like any weight, and its LoRA code reaches it through
``convert_weight`` and ``set_weight``, which it calls where they exist.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import comfy.float
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...kernels import quantized_linear
from ..embeddings.rows import FileRows, MemoryRows, Rows, find_tables, vocabulary_note
from ..errors import StrettoError
from ..quantization.architectures import find_architecture
from ..quantization.arena import (
    BRANCH,
    REQUANTIZE,
    FoldedBy,
    Kept,
    LayerState,
    Room,
    arena_linear,
    dequantize_arena,
    patched_arena,
    saved_tensors,
)
from ..quantization.balancing import COLUMNS, ROWS
from ..quantization.checkpoints import Checkpoint, open_checkpoint
from ..quantization.files import FileTensor, Stored
from ..quantization.formats import (
    COMFY,
    GGUF,
    METADATA_KEY,
    PLAIN,
    PLAIN_FP8,
    SCALED_FP8,
    TITLES,
    Found,
    dequantized,
    find_formats,
)
from ..quantization.inspecting import rotation_problem
from ..quantization.layouts import Awq, Fp8, Int8Rows, Packed
from ..quantization.load_report import LoadReport, linear_share, speed_words
from ..quantization.quantizing import BLOCK, plan_file, rotation_checks
from ..quantization.renaming import WAN_NAMES, comfy_names
from ..temporal_features.layers import feature_note, feature_weights
from .comfy_features import file_operations, file_placeholder
from .comfy_vocabulary import placeholder, row_operations

AS_IS = "as in the file"
AUTOMATIC, STRETTO, CORE = "automatic", "Stretto", "ComfyUI"
#: Bytes of decoded weights kept on a processor where nothing else is said.
KEEP = 1 << 30
#: Where the vocabulary table of a text encoder is kept.
LOADED, IN_FILE, IN_MEMORY = VOCABULARIES = ("loaded", "rows from the file", "rows from system memory")
#: Where weights that see the timestep or the prompt alone are kept.
FEATURE_WEIGHTS = (LOADED, "read from the file")
log = logging.getLogger("stretto")


def load_diffusion_model(
    path: str,
    format: str = AS_IS,
    loader: str = AUTOMATIC,
    lora: str = BRANCH,
    keep: int = KEEP,
    features: str = LOADED,
) -> tuple[Any, LoadReport]:
    """Load a diffusion model, quantized or to be quantized while loading.

    Args:
        path: safetensors, index of shards, folder of a diffusers transformer, or GGUF.
        format: :data:`AS_IS`, or a layout's name: free layers of a 16-bit or GGUF file get it while loading.
        loader: :data:`AUTOMATIC` leaves what ComfyUI loads best to it.
        lora: :data:`BRANCH` keeps LoRAs exact beside the weights, :data:`REQUANTIZE` rounds them into the weights.
        keep: bytes of decoded weights that are kept from step to step where the model runs on a processor.
        features: ``"read from the file"`` leaves weights that see the timestep or the prompt alone in the file.

    Returns:
        MODEL and the report.

    Raises:
        StrettoError: the file is damaged, in a format that cannot be read, or of an architecture that ComfyUI does not know.
    """
    if features not in FEATURE_WEIGHTS:
        raise StrettoError(f"feature weights {features!r:.40}: known are {', '.join(FEATURE_WEIGHTS)}")
    if features != LOADED and loader == CORE:
        raise StrettoError(f"loader {CORE!r} loads all weights; choose {AUTOMATIC!r}, or feature weights {LOADED!r}")
    with open_checkpoint(path) as checkpoint:
        prepared = _prepare(checkpoint, format, loader, keep=keep, features=features)
        if prepared.core:
            return comfy.sd.load_diffusion_model(str(checkpoint.paths[0])), prepared.report
        items = [item for item, full in prepared.packed.values() if not full]
        operations = quantized_operations(prepared.packed, lora, prepared.folds, keep)
        operations, taken = file_operations(operations)
        metadata = {key: value for key, value in checkpoint.metadata.items() if key != METADATA_KEY}
        model = comfy.sd.load_diffusion_model_state_dict(
            prepared.tensors, model_options={"custom_operations": operations}, metadata=metadata
        )
    if model is None:
        raise StrettoError(f"{path}: ComfyUI does not know the architecture of this file")
    _require_all_taken(path, prepared.packed)
    if len(taken) != len(prepared.sources):
        raise StrettoError(
            f"{path}: {len(prepared.sources) - len(taken)} weights left in the file found no place in ComfyUI's model; choose "
            f"feature weights {LOADED!r}"
        )
    if hasattr(model, "cached_patcher_init"):  # newer ComfyUI makes further copies of a model by loading it again
        model.cached_patcher_init = (_load_again, (path, format, loader, lora, keep, features))
    words = speed_words(items, _computes_in(model), comfy.model_management.get_torch_device())
    report = replace(prepared.report, notes=(*prepared.report.notes, *([words] if words else [])))
    log.info("%s", report.text())
    return model, report


def _computes_in(model: Any) -> torch.dtype:
    return getattr(model.model, "manual_cast_dtype", None) or model.model.get_dtype()


def _load_again(
    path: str, format: str, loader: str, lora: str, keep: int, features: str, disable_dynamic: bool = False
) -> Any:
    return load_diffusion_model(path, format, loader, lora, keep, features)[0]


def load_text_encoder(
    paths: Sequence[str],
    clip_type: str,
    format: str = AS_IS,
    loader: str = AUTOMATIC,
    embeddings: Any = None,
    vocabulary: str = LOADED,
) -> tuple[Any, tuple[LoadReport, ...]]:
    """Load the text encoders of a model as :func:`load_diffusion_model` loads a model; their products stay in 16 or 32 bit.

    Args:
        paths: one to four files, in the order of ComfyUI's own loaders.
        clip_type: a name of ``comfy.sd.CLIPType``, any case.
        format: see :func:`load_diffusion_model`.
        loader: see there.
        embeddings: folders of embeddings.
        vocabulary: :data:`LOADED` with the other weights, or its rows read when a prompt needs them: :data:`IN_FILE` or
            :data:`IN_MEMORY` of the system.

    Returns:
        CLIP and a report per file.

    Raises:
        StrettoError: as there, and for an unknown type.
    """
    kind = getattr(comfy.sd.CLIPType, clip_type.upper(), None)
    if kind is None:
        known = ", ".join(each.name.lower() for each in comfy.sd.CLIPType)
        raise StrettoError(f"text encoder type {clip_type!r}: this ComfyUI knows {known}")
    if vocabulary not in VOCABULARIES:
        raise StrettoError(f"vocabulary {vocabulary!r:.40}: known are {', '.join(VOCABULARIES)}")
    if vocabulary != LOADED and loader == CORE:
        raise StrettoError(f"loader {CORE!r} loads vocabularies whole; choose {AUTOMATIC!r}, or vocabulary {LOADED!r}")
    files = [_prepared_encoder(path, format, loader, vocabulary) for path in paths]
    if all(file.core for file in files):
        reports = tuple(file.report for file in files)
        return comfy.sd.load_clip(list(paths), embedding_directory=embeddings, clip_type=kind), reports
    files = [
        _prepared_encoder(path, format, STRETTO, vocabulary) if file.core else file for path, file in zip(paths, files)
    ]
    packed: dict[str, tuple[Packed, bool]] = {}
    for path, file in zip(paths, files):
        double = next((layer for layer in file.packed if layer in packed), None)
        if double is not None:
            raise StrettoError(
                f"{path}: {double} is quantized in another of these encoders too; quantize one of the two alone"
            )
        packed |= file.packed
    operations = quantized_operations(packed, REQUANTIZE)
    tables = [table for file in files for table in file.tables]
    if tables:
        operations, taken = row_operations(operations, tables)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [file.tensors for file in files],
        embedding_directory=embeddings,
        clip_type=kind,
        model_options={"custom_operations": operations},
    )
    _require_all_taken(", ".join(paths), packed)
    if tables and not taken:
        raise StrettoError(
            f"{', '.join(paths)}: ComfyUI's model has no place for a vocabulary by rows; choose vocabulary {LOADED!r}"
        )
    return clip, tuple(file.report for file in files)


def _prepared_encoder(path: str, format: str, loader: str, vocabulary: str) -> "_Prepared":
    with open_checkpoint(path) as checkpoint:
        return _prepare(checkpoint, format, loader, text=True, vocabulary=vocabulary)


@dataclass
class _Prepared:
    core: bool
    report: LoadReport
    tensors: dict[str, torch.Tensor]
    packed: dict[str, tuple[Packed, bool]]
    folds: dict[str, FoldedBy]
    tables: tuple[Rows, ...] = ()
    sources: tuple[FileRows, ...] = ()


def _prepare(
    checkpoint: Checkpoint,
    format: str,
    loader: str,
    text: bool = False,
    keep: int = 0,
    vocabulary: str = LOADED,
    features: str = LOADED,
) -> _Prepared:
    """Decide who loads, and read the file if it is us."""
    path = str(checkpoint.paths[0])
    stored, renamed = comfy_names(checkpoint.tensors)
    found = find_formats(checkpoint, stored).require_readable()
    if format != AS_IS and found.kind not in (PLAIN, GGUF):
        raise StrettoError(
            f"{path}: {TITLES[found.kind]} already; choose {AS_IS!r}, or load the original to quantize it as {format}"
        )
    logical = dequantized(found)
    architecture = find_architecture(logical)
    tables = find_tables(logical) if vocabulary != LOADED else ()
    core, why = _who(found, format, loader, len(checkpoint.paths) > 1, text)
    if core and renamed == WAN_NAMES:
        if loader == CORE:
            raise StrettoError(f"{path}: has {renamed}, which ComfyUI's own loader does not read; choose {AUTOMATIC!r}")
        core, why = False, f"ComfyUI does not read {renamed}"
    if core and tables:
        core, why = False, "ComfyUI loads vocabularies whole"
    lazy = feature_weights(architecture, found.plain) if features != LOADED else ()
    if core and lazy:
        core, why = False, "ComfyUI loads all weights"
    weights = sum(math.prod(tensor.shape) for tensor in logical.values())
    notes = (*checkpoint.notes, *([renamed] if renamed else []), *found.notes)
    if vocabulary != LOADED and not tables:
        notes = (*notes, vocabulary_note((), 0))
    if features != LOADED and not lazy:
        notes = (*notes, "no weights that see the timestep or the prompt alone: all are loaded")
    if core:
        layers = Counter(layer.layout.name for layer in found.layers.values())
        report = LoadReport(
            path, CORE, why, TITLES[found.kind], layers, {}, checkpoint.nbytes, 2 * weights, notes=notes
        )
        return _Prepared(True, report, {}, {}, {})
    if format != AS_IS:
        packed, rest = _quantized(checkpoint, format)
    elif (tables or lazy) and found.kind == PLAIN_FP8:
        packed, rest = {}, dict(found.plain)  # our operations cast them as ComfyUI's do
    else:
        packed, rest = _packed(path, checkpoint, found)
    folds = _folds(found, rest)
    floats = [tensor.dtype for tensor in rest.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
    dtype = torch.float16 if floats.count(torch.float16) * 2 > len(floats) else torch.bfloat16
    rows = {name: _rows(rest.pop(name), vocabulary) for name in tables if name in rest}
    left = sum(math.prod(table.shape) * table.dtype.itemsize for table in rows.values())
    if rows:
        notes = (*notes, vocabulary_note(rows.values(), left))
    sources = {
        name: FileRows.of(rest.pop(name)) for name in lazy if isinstance(rest.get(name), FileTensor)
    }
    if sources:
        notes = (*notes, feature_note(sources.values()))
    tensors = {name: tensor.read() for name, tensor in rest.items()}
    tensors |= {name: file_placeholder(source) for name, source in sources.items()}
    tensors |= {name: placeholder(table) for name, table in rows.items()}
    # ComfyUI tells an architecture by shapes: a placeholder without storage shows it the logical one.
    tensors |= {
        f"{layer}.weight": torch.empty(item.shape, dtype=dtype, device="meta") for layer, (item, _) in packed.items()
    }
    nbytes = sum(tensor.nbytes for tensor in rest.values()) + sum(item.nbytes for item, _ in packed.values())
    share, tokens = linear_share(architecture, logical, packed)
    report = LoadReport(
        path, STRETTO, why, TITLES[found.kind] if format == AS_IS else f"{TITLES[found.kind]}, quantized while loading",
        Counter(item.layout.name for item, _ in packed.values()), _kernels(packed, keep), nbytes, 2 * weights, share, tokens,
        notes,
    )  # fmt: skip
    return _Prepared(False, report, tensors, packed, folds, tuple(rows.values()), tuple(sources.values()))


def _rows(tensor: Stored, vocabulary: str) -> Rows:
    """The rows of a vocabulary table: in its file where it lies there as it is, else in system memory."""
    if vocabulary == IN_FILE and isinstance(tensor, FileTensor):
        return FileRows.of(tensor)
    return MemoryRows(tensor.read())


def _who(found: Found, format: str, loader: str, sharded: bool, text: bool) -> tuple[bool, str]:
    """Whether ComfyUI loads the file, and why."""
    core_formats = set(getattr(comfy.ops, "QUANT_ALGOS", {}))
    unknown = sorted({str(layer.marker.get("format")) for layer in found.layers.values()} - core_formats)
    can = format == AS_IS and not sharded and found.kind != GGUF and not (found.kind == COMFY and unknown)
    # Releases before nvfp4 pass the markers to few of their encoders; the others read the codes as if they were weights.
    deaf = text and found.kind == COMFY and "nvfp4" not in core_formats
    if deaf and not unknown:
        unknown, can = ["quantized text encoders in general"], False
    if loader == CORE:
        if not can:
            reason = f"does not know {', '.join(unknown)}" if unknown else "cannot load this, or not so"
            raise StrettoError(f"loader {CORE!r}: this ComfyUI {reason}; choose {AUTOMATIC!r}")
        return True, "asked for"
    if loader == STRETTO:
        return False, "asked for"
    if not can:
        return (
            False,
            f"this ComfyUI does not know {', '.join(unknown)}" if unknown else "ComfyUI does not read this by itself",
        )
    if found.kind in (PLAIN, PLAIN_FP8):
        return True, "nothing to add"
    device = comfy.model_management.get_torch_device()
    weight = next((layer.tensors["weight"] for layer in found.layers.values() if isinstance(layer.layout, Fp8)), None)
    if weight is not None and "nvfp4" not in core_formats:  # releases before it multiply such weights dequantized
        sample = torch.empty(32, 32, device=device)
        if quantized_linear.why_not_fp8(sample, sample.to(torch.float8_e4m3fn)) is None:
            return False, "this ComfyUI has no fp8 product for it, and the GPU has"
    return True, "ComfyUI knows the format"


def _packed(
    path: str, checkpoint: Checkpoint, found: Found
) -> tuple[dict[str, tuple[Packed, bool]], dict[str, Stored]]:
    """The file's own quantized layers, with their rotation checked (guard G1)."""
    if found.kind not in (COMFY, SCALED_FP8):
        return {}, dequantized(found)
    checks = rotation_checks(checkpoint.metadata)
    packed = {}
    for name, layer in found.layers.items():
        item = layer.read()
        if name in checks:
            problem = rotation_problem(name, layer.rows(0, 1), checks[name])
            if problem:
                raise StrettoError(f"{path}: {problem}")
        packed[name] = item, bool(layer.marker.get("full_precision_matrix_mult"))
    return packed, dict(found.plain)


def _quantized(checkpoint: Checkpoint, format: str) -> tuple[dict[str, tuple[Packed, bool]], dict[str, Stored]]:
    """Layers quantized now, by the recipe of the architecture."""
    plan = plan_file(checkpoint, format=format, transcode=True)
    rest, packed = dict(plan.tensors), {}
    for layer, choice in plan.quantized.items():
        tensor = rest.pop(f"{layer}.weight")
        weight = torch.cat([tensor.wide(start, stop) for start, stop in tensor.blocks(BLOCK)])
        try:
            packed[layer] = choice.layout.quantize(weight), bool(plan.marker(choice).get("full_precision_matrix_mult"))
        except ValueError as error:
            raise StrettoError(f"{checkpoint.paths[0]}: {layer}: {error}") from None
    return packed, rest


def _folds(found: Found, rest: dict[str, Stored]) -> dict[str, FoldedBy]:
    """Factors folded into weights, by layer; their tensors are taken out of ``rest``."""
    names = {name: tensor for name, tensor in rest.items() if name.endswith(("." + COLUMNS, "." + ROWS))}
    for name in names:
        del rest[name]
    for layer in found.layers.values():
        names |= {f"{layer.name}.{part}": layer.tensors[part] for part in (COLUMNS, ROWS) if part in layer.tensors}
    layers = {name.rpartition(".")[0] for name in names}
    read = {name: tensor.read() for name, tensor in names.items()}
    return {layer: FoldedBy(read.get(f"{layer}.{ROWS}"), read.get(f"{layer}.{COLUMNS}")) for layer in layers}


def _require_all_taken(path: str, packed: Mapping[str, Any]) -> None:
    if packed:
        left = ", ".join(list(packed)[:3])
        raise StrettoError(
            f"{path}: {len(packed)} quantized layers found no place in ComfyUI's model, among them {left}"
        )


def _kernels(packed: Mapping[str, tuple[Packed, bool]], keep: int) -> dict[str, str]:
    """The product that each format will use on the device that models run on, in words."""
    device = comfy.model_management.get_torch_device()
    once = f", decoded once and kept up to {keep / 1e6:,.0f} MB" if keep and device.type == "cpu" else ""
    words = {}
    for item, full in packed.values():
        layout = item.layout
        sample = torch.zeros(32, 32, device=device)
        why = quantized_linear.why_not_fp8(sample, sample.to(torch.float8_e4m3fn))
        if isinstance(layout, Fp8) and not full and why is None:
            words[layout.name] = "fp8 product (torch._scaled_mm)"
        elif full or isinstance(layout, Awq | Fp8):
            reason = f" ({why})" if isinstance(layout, Fp8) and not full else ""
            words[layout.name] = f"dequantized, then a 16- or 32-bit product{reason}{once}"
        else:
            reason = quantized_linear.why_not_int8(sample, sample.to(torch.int8))
            product = "int8 product (torch._int_mm)" if reason is None else f"reference product ({reason})"
            if device.type == "cuda":
                product = f"int8 product, the fastest for each shape of {', '.join(_ways(device))}"
            words[layout.name] = product if isinstance(layout, Int8Rows) else f"decoded to int8, then {product}{once}"
    return words


def _ways(device: torch.device) -> list[str]:
    x = torch.zeros(32, 256, device=device, dtype=torch.bfloat16)
    return list(quantized_linear.int8_ways(x, torch.zeros_like(x, dtype=torch.int8), x.new_ones(1), None, 256, None, None))


def quantized_operations(
    packed: dict[str, tuple[Packed, bool]],
    lora: str = BRANCH,
    folds: Mapping[str, FoldedBy] = MappingProxyType({}),
    keep: int = 0,
) -> type:
    """Return an operations class for ComfyUI's models, whose Linears take their weight out of ``packed`` where it has one.

    Args:
        packed: weight and whether its products stay in the activation's dtype, by layer; emptied as layers are loaded.
        lora: :data:`BRANCH` or :data:`REQUANTIZE`.
        folds: factors in weights, by layer; LoRAs get them too.
        keep: bytes of decoded weights that are kept from step to step on a processor.
    """
    room = Room(keep)
    choices = quantized_linear.Choices(Path(folder_paths.get_user_directory()) / "stretto")

    class QuantizedOperations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            stretto_state: LayerState | None = None
            stretto_fold: FoldedBy | None = None
            stretto_kept: Kept | None = None

            def _load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            ):
                found = packed.pop(prefix.removesuffix("."), None)
                self.stretto_fold = folds.get(prefix.removesuffix("."))
                if found is not None:
                    item, full_precision = found
                    if item.shape != (self.out_features, self.in_features):
                        raise StrettoError(
                            f"{prefix}weight: the file has {list(item.shape)}, ComfyUI's model "
                            f"{[self.out_features, self.in_features]}"
                        )
                    state_dict.pop(f"{prefix}weight", None)
                    self.stretto_state = LayerState(item.layout, item.shape, full_precision)
                    self.weight = torch.nn.Parameter(item.arena().to(self.weight.device), requires_grad=False)
                    self.stretto_kept = Kept(room) if keep else None
                super()._load_from_state_dict(
                    state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                )
                if found is not None and f"{prefix}weight" in missing_keys:
                    missing_keys.remove(f"{prefix}weight")

            def _save_to_state_dict(self, destination, prefix, keep_vars):
                super()._save_to_state_dict(destination, prefix, keep_vars)
                if self.stretto_state is not None:
                    destination.update(saved_tensors(self.stretto_state, self.weight, prefix))

            def forward(self, input, *args, **kwargs):
                if self.stretto_state is None:
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                return self.forward_comfy_cast_weights(input)

            def forward_comfy_cast_weights(self, input):
                if self.stretto_state is None:
                    return super().forward_comfy_cast_weights(input)
                return self.stretto_product(input)

            @torch.compiler.disable  # a compiler cannot take bytes for numbers, nor measure which product is fastest
            def stretto_product(self, input):
                weight, bias, stream = comfy.ops.cast_bias_weight(
                    self, input, dtype=self.weight.dtype, bias_dtype=input.dtype, offloadable=True
                )
                if weight.dtype != torch.uint8:  # a weight function has made it a floating one
                    output = quantized_linear.dequantized_linear(input, weight, bias)
                else:
                    kept = self.stretto_kept if weight is self.weight and weight.device.type == "cpu" else None
                    output = arena_linear(self.stretto_state, input, weight, bias, kept, choices)
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)
                return output

            def convert_weight(self, weight, inplace=False, **kwargs):
                if self.stretto_state is not None:
                    weight = dequantize_arena(self.stretto_state, weight)
                return weight if self.stretto_fold is None else self.stretto_fold.out_of(weight)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if self.stretto_fold is not None:
                    weight = self.stretto_fold.into(weight)
                if self.stretto_state is None:
                    made = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
                elif return_weight:
                    return weight  # used at once, so rounding it would only cost
                else:
                    # In place (hooks) the arena must keep its size, for it is restored in place as well.
                    made = patched_arena(
                        self.stretto_state, self.weight, weight, seed, REQUANTIZE if inplace_update else lora
                    )
                if return_weight:
                    return made
                if inplace_update:
                    self.stretto_kept = None  # a copy of what was before comes back in place too, unseen
                    self.weight.data.copy_(made)
                else:
                    self.weight = torch.nn.Parameter(made, requires_grad=False)

    return QuantizedOperations
