"""What a file of trained attention holds, and our own format for SLA, SLA2 and SALAD."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SchemaError, StrettoError
from ..linear import ALL, COMPLEMENT, FEATURES, SALAD, SLA2, VARIANTS, LayerBranch, LinearBranch
from .files import Meta, finite

if TYPE_CHECKING:
    from ...facts import Facts

FORMAT = "stretto_attention@1"
CLEAR = "clear"
#: What files of a variant are called.
KINDS = {COMPLEMENT: "SLA", ALL: "SLA", SLA2: "SLA", SALAD: "SALAD", CLEAR: "CLEAR"}
#: Base model of weights that do not say theirs.
ANY = "any"
MAX_LAYERS = 1000

OURS = re.compile(r"blocks\.(0|[1-9]\d{0,3})\.(.+)")
#: Second half of a key -> name of the part.
SLA_PARTS = {"proj_l.weight": "weight", "proj_l.bias": "bias"}
_SLA2_PARTS = {"alpha": "alpha", "router_q": "router_q", "router_k": "router_k"}
_SALAD_PARTS = {
    "salad.proj.weight": "weight", "salad.proj.bias": "bias", "salad.gate.scale": "scale",
    "salad.gate.weight": "gate_weight", "salad.gate.bias": "gate_bias",
}  # fmt: skip
_NEEDED = {COMPLEMENT: ("weight", "bias"), ALL: ("weight", "bias"), SLA2: ("alpha",), SALAD: ("weight",)}


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """What a file of trained attention holds.

    Attributes:
        path: what ``load_weights`` reads it from again: the file's path, or a JSON text with path and options.
        file: the file.
        variant: one of :data:`..linear.VARIANTS`, or ``"clear"``.
        branch: the linear branch; None for CLEAR.
        base_model: family, or family/variant, it was trained for; ``"any"`` where nobody said.
        metadata: the file's own, for reports.
        topk: share of key blocks it was trained with; None where its pattern has none.
        block_q: queries in a block (SLA).
        block_k: keys in a block (SLA).
        smooth_k: whether keys are centred before they are pooled for the routing (SLA).
        window: SALAD's window (t, y, x) in tokens, None where blocks are routed.
        routers: SLA2's maps of pooled queries and keys by layer, [d, d] each.
        radius: CLEAR's radius in tokens.
        down_factor: CLEAR's side of a pooled patch of keys; 1: no pooled keys.
        spatial: CLEAR's weights of the tokens of a patch, fp32 [f, f] (y, x), by attention layer in execution order.
        double_blocks: blocks on two streams (CLEAR).
        single_blocks: blocks on one (CLEAR).
        width: channels of all heads, C; 0 where the file does not say.
    """

    path: str
    file: str
    variant: str
    branch: LinearBranch | None = None
    base_model: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    topk: float | None = None
    block_q: int = 64
    block_k: int = 64
    smooth_k: bool = True
    window: tuple[int, int, int] | None = None
    routers: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    radius: int = 0
    down_factor: int = 1
    spatial: Mapping[int, torch.Tensor] = field(default_factory=dict)
    double_blocks: int = 0
    single_blocks: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        for name in ("metadata", "routers", "spatial"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def kind(self) -> str:
        """What the file is called: SLA, SALAD or CLEAR."""
        return KINDS[self.variant]

    @property
    def layers(self) -> int:
        """Attention layers the weights are for."""
        return self.double_blocks + self.single_blocks if self.branch is None else len(self.branch.layers)

    def words(self) -> str:
        """Return what it is, in a line for reports."""
        if self.branch is None:
            pooled = f", keys pooled {self.down_factor} x {self.down_factor}" if self.down_factor > 1 else ""
            return f"CLEAR, radius {self.radius}{pooled}, {self.layers} layers"
        active = sum(self.branch.active(layer) for layer in range(self.layers))
        return f"{self.kind} ({self.variant}), {active} of {self.layers} layers, heads of {self.branch.head_size}"

    def require(
        self, layers: int, heads: int, head_size: int, family: str = "", query_blocks: int | None = None
    ) -> None:
        """Refuse a model that the weights are not for.

        Args:
            layers: attention layers of the model.
            heads: its query heads.
            head_size: channels of a head.
            family: family of its architecture, where known.
            query_blocks: blocks of queries of the run, where known.

        Raises:
            StrettoError: names the file, what it is for and what the model has.
        """
        self._require_family(family)
        if self.branch is not None:
            wrong = self.branch.mismatch(layers, heads, head_size, query_blocks)
        elif layers != self.layers:
            wrong = f"the weights are for {self.layers} layers, the model has {layers}"
        else:
            wrong = None if self.width == heads * head_size else self._width_words(heads * head_size)
        if wrong:
            raise StrettoError(f"{self.file}: {wrong}")

    def require_facts(self, facts: "Facts") -> None:
        """Refuse the network of a run, as far as its sizes are known before it starts (StrettoError)."""
        network, descriptor = facts.network, facts.descriptor
        self._require_family(descriptor.family)
        layers, width = descriptor.module_blocks(network), descriptor.hidden_size(network)
        heads = getattr(network, "num_heads", None)
        if isinstance(heads, int) and heads > 0:
            self.require(layers, heads, width // heads)
        elif layers != self.layers:
            raise StrettoError(f"{self.file}: the weights are for {self.layers} layers, the model has {layers}")
        elif self.width and self.width != width:
            raise StrettoError(f"{self.file}: {self._width_words(width)}")

    def _require_family(self, family: str) -> None:
        own = self.base_model.split("/")[0].strip().lower()
        if family and own not in ("", ANY, family.lower()):
            raise StrettoError(f"{self.file}: base_model is {self.base_model!r}, the model is of the family {family}")

    def _width_words(self, width: int) -> str:
        return f"the weights are for {self.width} channels, the model has {width}"


def build(
    path: Path,
    reference: str,
    metadata: Mapping[str, str],
    sizes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], torch.Tensor],
) -> AttentionWeights:
    """Check the contents of a file of our format and build what it holds.

    Args:
        path: the file, for messages.
        reference: :attr:`AttentionWeights.path` of the result.
        metadata: the file's texts.
        sizes: shape of every tensor; all are checked before one is read.
        tensor: reads a tensor.

    Raises:
        SchemaError: a major version that this release does not read.
        StrettoError: names the file, the field and what was expected.
    """
    meta = Meta(path, metadata)
    version = meta.need("format", str, lambda text: text.startswith("stretto_attention@"), FORMAT)
    if version != FORMAT:
        raise SchemaError(f"{path}: format is {version!r}; this release reads {FORMAT}")
    variant, feature = meta.choice("variant", VARIANTS), meta.choice("feature_map", FEATURES)
    base = meta.need("base_model", str, lambda text: bool(text.strip()), "family, or family/variant, of the model")
    settings, gated = _salad_settings(meta) if variant == SALAD else (_sla_settings(meta), False)
    parts = {SALAD: _SALAD_PARTS, SLA2: _SLA2_PARTS}.get(variant, SLA_PARTS)
    names = _by_layer(path, sizes, parts)
    side = _check_shapes(path, names, sizes, variant, gated)
    # A projection of SLA is as wide as a head; the others' tensors do not tell.
    head_size = meta.count("head_size") if variant in (SALAD, SLA2) else side
    if variant == SLA2 and side not in (0, head_size):
        raise StrettoError(f"{path}: routers are for heads of {side} channels; expected {head_size}, as head_size says")
    if variant == SALAD and side % head_size:
        raise StrettoError(f"{path}: projections of {side} channels; expected a multiple of head_size, {head_size}")
    # Branches may be dropped after training, the last ones too, so SALAD's metadata counts the model's layers.
    count = meta.count("layers", max(names) + 1, MAX_LAYERS) if variant == SALAD else max(names) + 1
    layers: list[LayerBranch | None] = [None] * count
    routers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, keys in names.items():
        read = {part: finite(path, key, tensor(key)) for part, key in keys.items()}
        if "alpha" in read and bool(((read["alpha"] < 0) | (read["alpha"] > 1)).any()):
            raise StrettoError(f"{path}: {keys['alpha']} has values outside 0 to 1; expected shares")
        if "router_q" in read:
            routers[index] = read.pop("router_q").float(), read.pop("router_k").float()
        layers[index] = LayerBranch(**read)
    return AttentionWeights(
        reference, str(path), variant, LinearBranch(variant, feature, tuple(layers), head_size), base, metadata,
        routers=routers, width=side if variant == SALAD else 0, **settings,
    )  # fmt: skip


def _sla_settings(meta: Meta) -> dict[str, Any]:
    return {
        "topk": meta.share("topk"),
        "block_q": meta.count("block_q"),
        "block_k": meta.count("block_k"),
        "smooth_k": meta.choice("smooth_k", ("true", "false")) == "true",
    }


def _salad_settings(meta: Meta) -> tuple[dict[str, Any], bool]:
    """Return the pattern, and whether the gate reads its input."""
    hook = "an attention hook sees only q and k that are rotated already, and v"
    meta.need("rope_on_linear", str, "input".__eq__, f"input (features of rotated q and k): {hook}")
    gate = meta.need("gate_input", str, ("none", "value").__contains__, f"none or value: {hook}, no hidden states")
    if meta.choice("pattern", ("window", "topk")) == "topk":
        return {"topk": meta.share("topk")}, gate == "value"
    window = meta.need(
        "window",
        lambda text: tuple(int(part) for part in text.split(",")),
        lambda sides: len(sides) == 3 and min(sides) >= 1,
        "three whole numbers t,y,x of at least 1",
    )
    return {"window": window}, gate == "value"


def _by_layer(path: Path, keys: Iterable[str], parts: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """Return layer -> part -> key; unknown keys are refused."""
    found: dict[int, dict[str, str]] = {}
    expected = f"blocks.<layer>.{{{', '.join(parts)}}}"
    for key in keys:
        match = OURS.fullmatch(key)
        if not match or match[2] not in parts or int(match[1]) >= MAX_LAYERS:
            raise StrettoError(f"{path}: unknown tensor {key[:80]!r}; expected {expected}")
        found.setdefault(int(match[1]), {})[parts[match[2]]] = key
    if not found:
        raise StrettoError(f"{path}: it holds no tensor; expected {expected}")
    return found


def _check_shapes(
    path: Path, names: Mapping[int, Mapping[str, str]], sizes: Mapping[str, tuple[int, ...]], variant: str, gated: bool
) -> int:
    """Check presence and shape of every tensor; return the side of the square ones, 0 where there is none.

    SALAD may have layers without a branch; the others need all of them.
    """
    needed = _NEEDED[variant] + (("gate_weight",) if gated else ())
    squares = [sizes[keys[part]] for keys in names.values() for part in ("weight", "router_q") if part in keys]
    side = squares[0][0] if squares and squares[0] else 0
    shares = next((sizes[keys["alpha"]] for keys in names.values() if "alpha" in keys), ())
    expected = {
        "weight": (side, side), "router_q": (side, side), "router_k": (side, side),
        "bias": (side,), "gate_bias": (1,), "alpha": shares,
    }  # fmt: skip
    for index in names if variant == SALAD else range(max(names) + 1):
        keys = names.get(index, {})
        pair = ("router_q", "router_k") if "router_q" in keys or "router_k" in keys else ()
        missing = [part for part in (*needed, *pair) if part not in keys]
        if missing:
            raise StrettoError(f"{path}: layer {index} has no {missing[0]}; expected one in every layer")
        if not gated and ("gate_weight" in keys or "gate_bias" in keys):
            raise StrettoError(f"{path}: layer {index} has a gate that reads its input, but gate_input is 'none'")
        for part, key in keys.items():
            shape = sizes[key]
            wanted = expected.get(part, shape if len(shape) == 1 else ("n",))
            if shape != wanted or 0 in shape or not shape or len(shape) > 2:
                raise StrettoError(f"{path}: {key} has shape {list(shape)}; expected {list(wanted)}")
    return side
