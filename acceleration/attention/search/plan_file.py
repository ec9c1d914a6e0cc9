"""Plans of calibrated attention as files: a safetensors file whose metadata is an attention_plan@1 document."""

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import SchemaError, StrettoError
from ...safetensors_header import SPELLINGS, Header, read_header
from ...schemas import require
from ..builders import Selection
from ..order import ORDERS, OrderSpec
from ..plan import View
from ..reuse import Mode, ModeTable, with_refreshes
from ..weights.files import finite, read_tensor, save_tensors
from .patterns import Pattern, head_selection

KIND = "attention_plan"
BLOCKS = (16, 32, 64, 128)
#: Tensors of a file and the dtype they are stored in: small whole numbers are exact in fp16.
_TENSORS = {
    "mode": torch.float16,
    "cfg": torch.float16,
    "pattern": torch.float16,
    "budget": torch.float32,
    "alpha": torch.float16,
}
_OPTIONAL = ("alpha",)
_MOST = {"layers": 1024, "heads": 1024, "steps": 10_000}
_FIELDS = (
    "schema", "model", "layers", "heads", "steps", "grid", "tokens", "sigma_edges", "refresh", "block", "order", "patterns",
    "rho_step", "curve", "provenance",
)  # fmt: skip


@dataclass(frozen=True)
class ModelTag:
    """Which model a plan is for.

    Attributes:
        family: architecture.
        variant: model within it, "" for any.
        hash: :func:`structure_hash`, "" for any.
    """

    family: str
    variant: str = ""
    hash: str = ""


@dataclass(frozen=True, eq=False)
class PlanFile:
    """What every head does at every noise level.

    Attributes:
        model: which model it is for.
        mode: uint8 [S, L, H] of :class:`~..reuse.Mode`.
        cfg: bool, likewise: guidance branches share.
        pattern: uint8, likewise: index into ``patterns``.
        budget: fp32, likewise: share of the visual key blocks of routed heads, in [0, 1].
        patterns: that heads follow.
        sigma_edges: S - 1 ascending noise levels; bucket 0 lies below the first.
        refresh: S periods of full steps, at ``steps`` steps; 0: as written, for plans with a bucket per step.
        steps: of the run it was made with.
        grid: (T, Y, X) likewise.
        tokens: of the sequence, likewise.
        block: (queries, keys) in a block.
        order: of the tokens.
        alpha: fp32 [S, L, H] or None: share of the lists, in heads that blend, beside the mean of what is left out.
        rho_step: lambda of Re-ttention.
        curve: (cost, error) pairs as predicted.
        achieved: numbers and words about this plan.
        provenance: likewise, of how it was made.

    Raises:
        ValueError: fields that do not fit each other.
    """

    model: ModelTag
    mode: np.ndarray
    cfg: np.ndarray
    pattern: np.ndarray
    budget: np.ndarray
    patterns: tuple[Pattern, ...]
    sigma_edges: tuple[float, ...]
    refresh: tuple[int, ...]
    steps: int
    grid: tuple[int, int, int]
    tokens: int
    block: tuple[int, int] = (64, 64)
    order: OrderSpec = field(default_factory=OrderSpec)
    alpha: np.ndarray | None = None
    rho_step: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    achieved: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = _misfit(self)
        if wrong:
            raise ValueError(f"attention plan: {wrong}")

    @property
    def buckets(self) -> int:
        """S."""
        return self.mode.shape[0]

    @property
    def layers(self) -> int:
        """L."""
        return self.mode.shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.mode.shape[2]

    def bucket(self, sigma: float) -> int:
        """Return the bucket of a noise level."""
        return bisect_right(self.sigma_edges, sigma)

    def require(self, family: str, layers: int, heads: int, hash: str = "") -> str:
        """Return a caution in words, or "", for a model the plan fits.

        Raises:
            StrettoError: the plan is another family's, or for other numbers of layers and heads.
        """
        if family != self.model.family:
            raise StrettoError(
                f"attention plan: made for {self.model.family}, this model is {family}; find a plan for it"
            )
        if (layers, heads) != (self.layers, self.heads):
            raise StrettoError(
                f"attention plan: has {self.layers} layers of {self.heads} heads, this model {layers} of {heads}; find a plan "
                "for it"
            )
        if hash and self.model.hash and hash != self.model.hash:
            return "the plan was made with another model of this family; its errors may differ"
        return ""

    def table(self, sigmas: Sequence[float]) -> ModeTable:
        """Return the modes of a run by its noise levels, whatever their number.

        Heads that reuse something are full first, and again as often, as a share of the run, as in the plan's own.

        Args:
            sigmas: noise level of every step, falling.
        """
        at = [self.bucket(sigma) for sigma in sigmas]
        ratio = len(sigmas) / self.steps
        periods = [max(2, round(self.refresh[bucket] * ratio)) if self.refresh[bucket] else 0 for bucket in at]
        alpha = None if self.alpha is None else self.alpha[at]
        table = ModeTable(with_refreshes(self.mode[at].astype(np.uint8), periods), self.cfg[at], alpha)
        table.check()
        return table

    def select(self, view: View, sigma: float) -> Selection:
        """Return the lists of one attention, for heads that follow lists at this noise level; others get some too."""
        at = self.bucket(sigma), view.layer
        return head_selection(view, self.patterns, self.pattern[at], self.budget[at])

    def static(self) -> bool:
        """Whether no list depends on queries and keys."""
        used = self.pattern[
            (self.mode != int(Mode.FULL)) & (self.mode != int(Mode.SHARE)) & (self.mode != int(Mode.ZERO))
        ]
        return not any(self.patterns[index].dynamic for index in np.unique(used))

    def to_json(self) -> dict[str, Any]:
        """Return the document of the file's metadata."""
        return {
            "schema": f"{KIND}@1",
            "model": {"family": self.model.family, "variant": self.model.variant, "hash": self.model.hash},
            "layers": self.layers,
            "heads": self.heads,
            "steps": self.steps,
            "grid": list(self.grid),
            "tokens": self.tokens,
            "sigma_edges": list(self.sigma_edges),
            "refresh": list(self.refresh),
            "block": list(self.block),
            "order": {"name": self.order.name, "tile": list(self.order.tile)},
            "patterns": [pattern.to_json() for pattern in self.patterns],
            "rho_step": self.rho_step,
            "curve": [list(point) for point in self.curve],
            "achieved": dict(self.achieved),
            "provenance": dict(self.provenance),
        }


def save_plan(path: str | os.PathLike[str], plan: PlanFile) -> None:
    """Write a plan, whole or not at all, and never over another file.

    Raises:
        StrettoError: the file exists, or cannot be written.
    """
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).to(dtype)
        for name, dtype in _TENSORS.items()
        if (value := getattr(plan, name)) is not None
    }
    save_tensors(path, tensors, {KIND: json.dumps(plan.to_json())})


def load_plan(path: str | os.PathLike[str]) -> PlanFile:
    """Read a plan. Everything about its tensors is checked before any is read.

    Raises:
        StrettoError: no plan, or a damaged one; the message names file, field and expectation.
        SchemaError: a plan of another major version.
    """
    header = read_header(path)
    document = _document(header)
    shape = len(document["sigma_edges"]) + 1, document["layers"], document["heads"]
    tensors = _tensors(header, shape)
    mode, pattern, budget = (tensors[name] for name in ("mode", "pattern", "budget"))
    _whole(header.path, "mode", mode, max(Mode))
    _whole(header.path, "cfg", tensors["cfg"], 1)
    _whole(header.path, "pattern", pattern, len(document["patterns"]) - 1)
    for name in ("budget", "alpha"):
        if name in tensors and bool(((tensors[name] < 0) | (tensors[name] > 1)).any()):
            raise StrettoError(f"{header.path}: {name} has values outside of 0 to 1; expected shares")
    try:
        return PlanFile(
            ModelTag(**document["model"]),
            mode.numpy().astype(np.uint8),
            tensors["cfg"].numpy() > 0,
            pattern.numpy().astype(np.uint8),
            budget.numpy(),
            tuple(Pattern(item["kind"], item["size"]) for item in document["patterns"]),
            tuple(float(edge) for edge in document["sigma_edges"]),
            tuple(document["refresh"]),
            document["steps"],
            tuple(document["grid"]),
            document["tokens"],
            tuple(document["block"]),
            OrderSpec(document["order"]["name"], tuple(document["order"]["tile"])),
            tensors["alpha"].numpy() if "alpha" in tensors else None,
            float(document["rho_step"]),
            tuple((float(cost), float(error)) for cost, error in document["curve"]),
            document.get("achieved", {}),
            document["provenance"],
        )
    except ValueError as error:
        raise StrettoError(f"{header.path}: {error}") from None


def from_steps(table: ModeTable, sigmas: Sequence[float], **fields: Any) -> PlanFile:
    """Return a plan with a bucket per step, as searches step by step find it; a run takes the nearest step's.

    Args:
        table: modes of every step.
        sigmas: noise level of every step, strictly falling.
        fields: of :class:`PlanFile`; ``pattern`` and ``budget`` by step, 0 and 1 where they are left out.
    """
    if len(sigmas) != table.steps or any(b >= a for a, b in pairwise(sigmas)):
        raise ValueError(f"{table.steps} steps need as many noise levels, strictly falling; got {list(sigmas)}")
    edges = tuple((a + b) / 2 for a, b in pairwise(sigmas))[::-1]
    pattern = fields.pop("pattern", np.zeros_like(table.modes))[::-1]
    budget = fields.pop("budget", np.ones(table.modes.shape, np.float32))[::-1]
    return PlanFile(
        mode=table.modes[::-1], cfg=table.cfg[::-1], pattern=pattern, budget=budget, sigma_edges=edges,
        refresh=(0,) * table.steps, steps=table.steps, **fields,
    )  # fmt: skip


def structure_hash(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return sha256 over names and shapes of a model's weights: the same for its fine-tunes."""
    lines = "\n".join(f"{name} {list(shapes[name])}" for name in sorted(shapes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _tensors(header: Header, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Check names, dtypes and shapes of all tensors, then read them as fp32."""
    path = header.path
    unknown = set(header.entries) - set(_TENSORS)
    if unknown:
        raise StrettoError(f"{path}: has a tensor {sorted(unknown)[0]!r}; expected {', '.join(_TENSORS)}")
    for name, dtype in _TENSORS.items():
        entry = header.entries.get(name)
        if entry is None:
            if name in _OPTIONAL:
                continue
            raise StrettoError(f"{path}: has no tensor {name}; expected one of shape {list(shape)}")
        if entry.dtype != dtype or entry.shape != shape:
            raise StrettoError(
                f"{path}: {name} is {SPELLINGS[entry.dtype]} {list(entry.shape)}; expected {SPELLINGS[dtype]} {list(shape)}"
            )
    return {name: finite(path, name, read_tensor(header, name).float()) for name in header.entries}


def _whole(path: Path, name: str, tensor: torch.Tensor, most: int) -> None:
    if bool(((tensor != tensor.round()) | (tensor < 0) | (tensor > most)).any()):
        raise StrettoError(f"{path}: {name} has values that are no whole numbers from 0 to {int(most)}; expected such")


def _document(header: Header) -> dict[str, Any]:
    """Return the checked document of the metadata."""
    path = header.path
    if KIND not in header.metadata:
        raise StrettoError(f"{path}: no attention plan; its metadata has no {KIND}")
    try:
        document = json.loads(header.metadata[KIND])
    except (ValueError, RecursionError) as error:
        raise StrettoError(f"{path}: {KIND} is no JSON ({str(error)[:80]})") from None
    try:
        require(document, KIND)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    missing = [name for name in _FIELDS if name not in document]
    if missing:
        raise StrettoError(f"{path}: {KIND} has no {missing[0]}; expected one")
    for name, (fine, expected) in _RULES.items():
        if not fine(document[name]):
            raise StrettoError(f"{path}: {name} is {str(document[name])[:80]}; expected {expected}")
    buckets = len(document["sigma_edges"]) + 1
    if len(document["refresh"]) != buckets:
        raise StrettoError(
            f"{path}: refresh has {len(document['refresh'])} entries; expected {buckets}, one per bucket"
        )
    for index, item in enumerate(document["patterns"]):
        try:
            Pattern(**item)
        except (TypeError, ValueError) as error:
            raise StrettoError(f"{path}: patterns[{index}] is {str(item)[:80]}; {error}") from None
    return document


def _count(value: Any, least: int = 1, most: int = 1 << 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= most
    )


def _counts(value: Any, length: int | None, least: int = 1, most: int = 1 << 40) -> bool:
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(_count(x, least, most) for x in value)
    )


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"family", "variant", "hash"}
        and all(isinstance(text, str) for text in value.values())
        and bool(value["family"].strip())
        and len(value["hash"]) in (0, 64)
    )


def _is_order(value: Any) -> bool:
    fine = isinstance(value, dict) and set(value) == {"name", "tile"}
    return fine and value["name"] in ORDERS and _counts(value["tile"], 3, 1, 1024)


def _is_edges(value: Any) -> bool:
    fine = isinstance(value, list) and len(value) < _MOST["steps"] and all(_number(x) for x in value)
    return fine and all(b > a for a, b in pairwise(value))


def _is_curve(value: Any) -> bool:
    pairs = isinstance(value, list) and len(value) <= 1000 and all(isinstance(x, list) and len(x) == 2 for x in value)
    return pairs and all(_number(x) for pair in value for x in pair)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 255 and all(isinstance(item, dict) for item in value)


_RULES = {
    "model": (_is_model, "family, variant and hash, in words"),
    **{
        name: (lambda value, most=most: _count(value, 1, most), f"a whole number from 1 to {most}")
        for name, most in _MOST.items()
    },
    "grid": (lambda value: _counts(value, 3), "three whole numbers: frames, rows, columns"),
    "tokens": (_count, "a whole number from 1 on"),
    "sigma_edges": (_is_edges, "ascending numbers from 0 on"),
    "refresh": (lambda value: _counts(value, None, 0, 10_000), "whole numbers from 0 on"),
    "block": (
        lambda value: _counts(value, 2) and all(size in BLOCKS for size in value),
        "two of " + ", ".join(map(str, BLOCKS)),
    ),
    "order": (_is_order, "name and tile of a token order"),
    "patterns": (_is_patterns, "1 to 255 objects with kind and size"),
    "rho_step": (lambda value: _number(value, 1), "a number from 0 to 1"),
    "curve": (_is_curve, "pairs of cost and error"),
    "provenance": (lambda value: isinstance(value, dict), "an object"),
}


def _misfit(plan: PlanFile) -> str:
    """Return what does not fit in a plan's fields, or ""."""
    shape = plan.mode.shape
    arrays = {name: getattr(plan, name) for name in _TENSORS}
    for name, array in arrays.items():
        if array is not None and (array.ndim != 3 or array.shape != shape):
            return f"{name} must have shape {list(shape)}, [buckets, layers, heads], got {list(array.shape)}"
    if not plan.mode.size or plan.mode.max() > max(Mode):
        return f"modes go from 0 to {int(max(Mode))}"
    if len(plan.sigma_edges) != shape[0] - 1 or any(b <= a for a, b in pairwise(plan.sigma_edges)):
        return f"{shape[0]} buckets need {shape[0] - 1} ascending sigma_edges, got {list(plan.sigma_edges)}"
    if len(plan.refresh) != shape[0] or min(plan.refresh) < 0:
        return f"{shape[0]} buckets need as many refresh periods, got {list(plan.refresh)}"
    if not plan.patterns or plan.pattern.max() >= len(plan.patterns):
        return f"pattern {int(plan.pattern.max())} is used, but there are {len(plan.patterns)}"
    if not np.isfinite(plan.budget).all() or plan.budget.min() < 0 or plan.budget.max() > 1:
        return "budgets must lie in 0 to 1"
    if plan.steps < 1 or any(size not in BLOCKS for size in plan.block):
        return f"steps must be positive and blocks among {BLOCKS}, got {plan.steps} and {plan.block}"
    return ""
