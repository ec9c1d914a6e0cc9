"""Trained parts of attention methods: reading and checking files, and converting published checkpoints.

Our format is safetensors with metadata, one file for one model. Tensors are fp32, fp16 or bf16:

- SLA: ``blocks.{i}.proj_l.weight`` [d, d] and ``.bias`` [d] in every layer;
- SLA2: ``blocks.{i}.alpha`` [H] or [H, query blocks] in [0, 1] in every layer; optional ``blocks.{i}.router_q`` and
  ``router_k`` [d, d], what pooled queries and keys are routed with;
- SALAD: ``blocks.{i}.salad.proj.weight`` [C, C], optional ``.bias`` [C]; optional ``blocks.{i}.salad.gate.scale`` [1] or [H];
  with gate_input = value also ``.gate.weight`` [C_v] and optional ``.gate.bias`` [1]. A layer without these keys has no
  branch.

Metadata, all texts: ``format`` (stretto_attention@1), ``variant`` (complement, all, sla2, salad; see :mod:`..linear`),
``feature_map`` (softmax, elu, relu), ``base_model`` (family, family/variant, or any), and

- SLA and SLA2: ``topk`` (share of the key blocks, in (0, 1]), ``block_q``, ``block_k``, ``smooth_k`` (true, false);
- SALAD: ``pattern`` (window, with ``window`` t,y,x; or topk, with ``topk``), ``layers`` (of the model), ``rope_on_linear``
  (input), ``gate_input`` (none, value);
- SLA2 and SALAD: ``head_size``;
- optional: ``base_hash``, ``source``.

Published files: SLA's (:mod:`.published`) and CLEAR's (:mod:`.clear`). SLA2's and SALAD's weights are not public.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StrettoError
from ...safetensors_header import Header, read_header
from .clear import KEY as CLEAR_KEY
from .clear import clear_tensors, read_clear
from .files import read_tensor, save_tensors, shapes
from .format import ANY, FORMAT, OURS, AttentionWeights, build
from .published import PICKLED, read_published

if TYPE_CHECKING:
    from ...facts import Facts

__all__ = ["ANY", "FORMAT", "KINDS", "AttentionWeights", "clear_tensors", "convert", "load_weights"]

KINDS = ("SLA", "SALAD", "CLEAR")
#: What a caller may say of a published file, and its type.
_OPTIONS = {"variant": str, "topk": float, "radius": int, "layers": int, "base_model": str}


def load_weights(
    source: str | os.PathLike[str],
    facts: "Facts | None" = None,
    *,
    kind: str = "auto",
    variant: str = "",
    topk: float | None = None,
    radius: int = 0,
    layers: int | None = None,
    base_model: str = "",
) -> AttentionWeights:
    """Read a file of trained attention: ours, a published SLA checkpoint, or CLEAR's.

    Args:
        source: path; or :attr:`AttentionWeights.path` of weights read before, which repeats their options.
        facts: the run; the weights are checked against its network.
        kind: ``"auto"``, or one of :data:`KINDS`: another kind than the file's is refused.
        variant: for published SLA checkpoints, which do not say it: ``"all"`` or ``"complement"``. For our files,
            what is expected of them; empty: anything.
        topk: for published SLA checkpoints: share of key blocks they were trained with.
        radius: for CLEAR files that were renamed.
        layers: for SimpleTuner's files, which hold one projection: layers of the model.
        base_model: for published SLA checkpoints: family, or family/variant; empty: any.

    Raises:
        SchemaError: our format in a major version that this release does not read.
        StrettoError: cannot be read, is no such file, or does not fit; names file, field and expectation.
    """
    text = os.fspath(source)
    given = {
        "variant": variant,
        "topk": topk and float(topk),
        "radius": radius,
        "layers": layers,
        "base_model": base_model,
    }
    options = {name: value for name, value in given.items() if value}
    if text.lstrip().startswith("{"):
        text, remembered = _reference(text)
        options = remembered | options
    path = Path(text)
    weights = _read(path, json.dumps({"path": text, **options}, sort_keys=True) if options else text, options)
    if kind not in ("auto", weights.kind):
        raise StrettoError(f"{path}: it holds {weights.kind} weights; expected {kind}")
    if options.get("variant", weights.variant) != weights.variant:
        raise StrettoError(f"{path}: variant is {weights.variant!r}; expected {options['variant']!r}")
    if facts is not None:
        weights.require_facts(facts)
    return weights


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    variant: str,
    *,
    base_model: str,
    topk: float | None = None,
    feature_map: str | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    smooth_k: bool = True,
    layers: int | None = None,
    base_hash: str = "",
) -> Path:
    """Write a published SLA checkpoint's projections in our format, fp32; return the file's path.

    Args:
        source: TurboDiffusion's .pth or a relative of it, a safetensors file with such keys, or ``sla_attention.pt``.
        target: a new file, ``.safetensors``.
        variant: ``"all"`` (SLA's main branch, SageSLA, TurboDiffusion, FastVideo) or ``"complement"`` (its SLA-1 branch).
        base_model: family, or family/variant, such as ``"wan/2.1-t2v-1.3b"``.
        topk: share of key blocks, in (0, 1]; SimpleTuner's files bring their own.
        feature_map: softmax (what all of them use unless told otherwise), elu or relu.
        block_q: queries in a block; as the source says, else 64.
        block_k: keys in a block; as the source says, else 64.
        smooth_k: whether keys are centred before the routing; all published code does.
        layers: layers of the model, for SimpleTuner's single projection.
        base_hash: of the model's file, for the record.

    Raises:
        StrettoError: the source is not such a checkpoint, something is missing or out of range, the target exists or
            cannot be written. Nothing is left behind then.
    """
    path, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise StrettoError(f"{target}: expected a name that ends in .safetensors")
    options = {
        "variant": variant, "topk": topk, "layers": layers, "base_model": base_model, "feature_map": feature_map,
        "block_q": block_q, "block_k": block_k, "smooth_k": smooth_k, "base_hash": base_hash,
    }  # fmt: skip
    header = None if path.suffix.lower() in PICKLED else read_header(path)
    tensors, metadata = read_published(path, header, options)
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    build(path, str(path), metadata, sizes, tensors.__getitem__)  # what would not load again is not written
    save_tensors(target, tensors, metadata)
    return target


def _read(path: Path, reference: str, options: dict[str, Any]) -> AttentionWeights:
    """Read a file of whichever layout."""
    header = None if path.suffix.lower() in PICKLED else read_header(path)
    if header is not None and _is_ours(header):
        # It says everything itself; a copy, because mapped tensors would follow later changes of the file.
        return build(path, str(path), header.metadata, shapes(header), lambda key: read_tensor(header, key).clone())
    if header is not None and any(CLEAR_KEY.fullmatch(key) for key in header.entries):
        return read_clear(header, reference, options)
    tensors, metadata = read_published(path, header, options)
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return build(path, reference, metadata, sizes, tensors.__getitem__)


def _is_ours(header: Header) -> bool:
    """Whether a file claims our format, or has our keys and so lacks only the metadata."""
    keys = [OURS.fullmatch(key) for key in header.entries]
    known = ("proj_l.", "alpha", "router_", "salad.")
    return "format" in header.metadata or (bool(keys) and all(match and match[2].startswith(known) for match in keys))


def _reference(text: str) -> tuple[str, dict[str, Any]]:
    """Return path and options of :attr:`AttentionWeights.path`."""
    try:
        options = json.loads(text)
        path = options.pop("path")
    except (ValueError, KeyError):
        raise StrettoError(f"attention weights {text[:80]!r}: expected a path, or JSON with a path") from None
    for name, value in options.items():
        if not isinstance(value, _OPTIONS.get(name, ())) or isinstance(value, bool):
            raise StrettoError(f"attention weights: {name} is {value!r}; known options: {', '.join(_OPTIONS)}")
    return str(path), options
