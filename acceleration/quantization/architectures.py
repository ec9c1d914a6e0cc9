"""What may be quantized, what must stay, and what may be folded, per architecture. Names are ComfyUI's module names.

A linear layer is *free* (any format), *weight only* (it sees one row per step, so rounding its activation gains nothing and
4 bits cost little), or stays: embeddings, the first and last projection, norms, biases. Sources: ComfyUI's model classes,
ViDiT-Q's released configurations (arXiv 2406.02540), and what quantized files in circulation keep.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import StrettoError

FREE, WEIGHT_ONLY, STAYS = "free", "weight_only", "stays"
#: Groups in which ViDiT-Q ranks layers apart, because each harms something else (section 3.4 of the paper).
SELF_ATTENTION, CROSS_ATTENTION, TEMPORAL_ATTENTION, MLP, OTHER = (
    "self_attention", "cross_attention", "temporal_attention", "mlp", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Producer:
    """Rows of a tensor that scale with the channels of a consumer.

    Attributes:
        layer: name of the linear layer or norm.
        chunk: which of ``chunks`` equal parts of its rows.
        chunks: equal parts.
        one_plus: the consumer sees 1 + this (adaptive norms): scaling by m makes it m (1 + x) - 1.
    """

    layer: str
    chunk: int = 0
    chunks: int = 1
    one_plus: bool = False


@dataclass(frozen=True)
class Consumer:
    """Input channels of a linear layer that can be divided by what their producers are multiplied by."""

    layer: str
    chunk: int = 0
    chunks: int = 1


@dataclass(frozen=True)
class Fold:
    """A place where one factor per channel can move from the activation into weights, exactly.

    Everything that reads the producers is among the consumers; that is what makes it legal.
    """

    consumers: tuple[Consumer, ...]
    producers: tuple[Producer, ...]


@dataclass(frozen=True)
class Architecture:
    """One family of networks.

    Attributes:
        name: key of presets and recipes.
        title: for people.
        present: names that every such checkpoint has.
        absent: names that none has.
        free: pattern of layers that may take any format.
        weight_only: pattern of layers whose activations stay 16 bit.
        groups: group -> pattern, first match wins.
        foldable: patterns per block -> folds; see :meth:`folds`.
        unfoldable: what cannot be folded, and why, in words.
        text: a text encoder.
    """

    name: str
    title: str
    present: tuple[str, ...]
    free: str
    absent: tuple[str, ...] = ()
    weight_only: str = r"(?!)"
    groups: Mapping[str, str] = field(default_factory=dict)
    foldable: Callable[[Mapping[str, tuple[int, ...]]], Iterator[Fold]] | None = None
    unfoldable: str = ""
    text: bool = False

    def matches(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are this architecture's."""
        names = names if isinstance(names, Mapping | set | frozenset) else set(names)
        return all(name in names for name in self.present) and not any(name in names for name in self.absent)

    def role(self, layer: str) -> str:
        """Return what may happen to the linear layer: :data:`FREE`, :data:`WEIGHT_ONLY` or :data:`STAYS`."""
        if re.fullmatch(self.weight_only, layer):
            return WEIGHT_ONLY
        return FREE if re.fullmatch(self.free, layer) else STAYS

    def group(self, layer: str) -> str:
        """Return the group in which the layer's sensitivity is ranked."""
        return next((group for group, pattern in self.groups.items() if re.search(pattern, layer)), OTHER)

    def folds(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Fold, ...]:
        """Return the legal folds of a checkpoint.

        Args:
            shapes: of its tensors by name; they tell how many blocks there are.
        """
        if self.foldable is None:
            return ()
        return tuple(
            fold for fold in self.foldable(shapes)
            if all(f"{part.layer}.weight" in shapes for part in (*fold.consumers, *(p for p in fold.producers if p.one_plus)))
        )  # fmt: skip


def blocks(shapes: Iterable[str], pattern: str) -> list[str]:
    """Return the prefixes, in order of their numbers, that ``pattern`` with one number finds at the start of names."""
    found = {match[0]: int(match[1]) for match in (re.match(pattern, name) for name in shapes) if match}
    return sorted(found, key=found.__getitem__)


def _modulated(layer: str, shift: int, scale: int, chunks: int) -> tuple[Producer, ...]:
    return Producer(layer, shift, chunks), Producer(layer, scale, chunks, one_plus=True)


def _fold(consumers: str | Iterable[str], producers: Iterable[Producer]) -> Fold:
    consumers = (consumers,) if isinstance(consumers, str) else consumers
    return Fold(tuple(Consumer(name) for name in consumers), tuple(producers))


def _flux_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    modulated = "double_blocks.0.img_mod.lin.weight" in shapes
    for block in blocks(shapes, r"double_blocks\.(\d+)\."):
        yield _fold(
            [f"{block}{s}_attn.proj" for s in ("img", "txt")],
            [Producer(f"{block}{s}_attn.qkv", 2, 3) for s in ("img", "txt")],
        )
        for stream in ("img", "txt") if modulated else ():
            yield _fold(f"{block}{stream}_attn.qkv", _modulated(f"{block}{stream}_mod.lin", 0, 1, 6))
            yield _fold(f"{block}{stream}_mlp.0", _modulated(f"{block}{stream}_mod.lin", 3, 4, 6))
    for block in blocks(shapes, r"single_blocks\.(\d+)\."):
        first, second = shapes.get(f"{block}linear1.weight"), shapes.get(f"{block}linear2.weight")
        if first and second and first[0] == 7 * second[0] and second[1] == 5 * second[0]:  # q, k, v and a GELU of 4
            yield Fold((Consumer(f"{block}linear2", 0, 5),), (Producer(f"{block}linear1", 2, 7),))
        if modulated:
            yield _fold(f"{block}linear1", _modulated(f"{block}modulation.lin", 0, 1, 3))


def _sd3_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for block in blocks(shapes, r"joint_blocks\.(\d+)\."):
        streams = [s for s in ("context", "x") if f"{block}{s}_block.attn.proj.weight" in shapes]
        yield _fold(
            [f"{block}{s}_block.attn.proj" for s in streams],
            [Producer(f"{block}{s}_block.attn.qkv", 2, 3) for s in ("context", "x")],
        )
        for stream in ("context", "x"):
            layer = f"{block}{stream}_block"
            shape = shapes.get(f"{layer}.adaLN_modulation.1.weight")
            chunks = shape[0] // shape[1] if shape else 0
            if chunks not in (2, 6, 9):
                continue
            yield _fold(f"{layer}.attn.qkv", _modulated(f"{layer}.adaLN_modulation.1", 0, 1, chunks))
            if chunks >= 6:
                yield _fold(f"{layer}.mlp.fc1", _modulated(f"{layer}.adaLN_modulation.1", 3, 4, chunks))
            if chunks == 9:
                yield _fold(f"{layer}.attn2.qkv", _modulated(f"{layer}.adaLN_modulation.1", 6, 7, 9))
                yield _fold(f"{layer}.attn2.proj", [Producer(f"{layer}.attn2.qkv", 2, 3)])


def _qwen_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for block in blocks(shapes, r"transformer_blocks\.(\d+)\."):
        for stream, qkv in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            yield _fold([f"{block}attn.{name}" for name in qkv], _modulated(f"{block}{stream}_mod.1", 0, 1, 6))
            yield _fold(f"{block}{stream}_mlp.net.0.proj", _modulated(f"{block}{stream}_mod.1", 3, 4, 6))
        yield _fold(
            [f"{block}attn.{name}" for name in ("to_out.0", "to_add_out")],
            [Producer(f"{block}attn.{name}") for name in ("to_v", "add_v_proj")],
        )


def _wan_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for block in blocks(shapes, r"blocks\.(\d+)\."):
        yield _fold(f"{block}self_attn.o", [Producer(f"{block}self_attn.v")])
        values = [name for name in ("v", "v_img") if f"{block}cross_attn.{name}.weight" in shapes]
        yield _fold(f"{block}cross_attn.o", [Producer(f"{block}cross_attn.{name}") for name in values])
        if f"{block}norm3.weight" in shapes:
            yield _fold(f"{block}cross_attn.q", [Producer(f"{block}norm3")])


def _lumina_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for block in blocks(shapes, r"(?:layers|noise_refiner|context_refiner)\.(\d+)\."):
        yield _fold(f"{block}attention.qkv", [Producer(f"{block}attention_norm1")])
        yield _fold([f"{block}feed_forward.w1", f"{block}feed_forward.w3"], [Producer(f"{block}ffn_norm1")])
        yield _fold(f"{block}feed_forward.w2", [Producer(f"{block}feed_forward.w3")])
        qkv, out = shapes.get(f"{block}attention.qkv.weight"), shapes.get(f"{block}attention.out.weight")
        if qkv and out and qkv[0] == 3 * out[1]:  # as many heads of v as of q
            yield _fold(f"{block}attention.out", [Producer(f"{block}attention.qkv", 2, 3)])


def _ltx_folds(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Fold]:
    for block in blocks(shapes, r"transformer_blocks\.(\d+)\."):
        for attention in ("attn1", "attn2"):
            yield _fold(f"{block}{attention}.to_out.0", [Producer(f"{block}{attention}.to_v")])


_FLUX_FREE = r"(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])"
_FLUX_GROUPS = {MLP: r"_mlp\.", SELF_ATTENTION: r"_attn\.|linear[12]"}
_GELU = "what a GELU feeds cannot be scaled before it"
#: In the order in which they are tried.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "hunyuan_video", "HunyuanVideo", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",), _FLUX_FREE,
        weight_only=r"(double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin)", groups=_FLUX_GROUPS,
        foldable=_flux_folds, unfoldable=_GELU,
    ),
    Architecture(
        "chroma", "Chroma", ("double_blocks.0.img_attn.norm.key_norm.scale", "distilled_guidance_layer.in_proj.weight"),
        _FLUX_FREE,
        groups=_FLUX_GROUPS, foldable=_flux_folds, unfoldable="one approximator makes every modulation; " + _GELU,
    ),
    Architecture(
        "flux2", "FLUX.2", ("double_blocks.0.img_attn.norm.key_norm.scale", "double_stream_modulation_img.lin.weight"),
        _FLUX_FREE,
        groups=_FLUX_GROUPS, foldable=_flux_folds, unfoldable="three modulations are shared by all blocks",
    ),
    Architecture(
        "flux", "FLUX.1", ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"), _FLUX_FREE,
        weight_only=r"(double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin)", groups=_FLUX_GROUPS,
        foldable=_flux_folds, unfoldable=_GELU,
    ),
    Architecture(
        "qwen_image", "Qwen-Image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))",
        weight_only=r"transformer_blocks\.\d+\.(img|txt)_mod\.1", groups={MLP: r"_mlp\.", SELF_ATTENTION: r"\.attn\."},
        foldable=_qwen_folds, unfoldable=_GELU,
    ),
    Architecture(
        "sd3", "Stable Diffusion 3", ("joint_blocks.0.context_block.attn.qkv.weight",),
        r"joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])",
        weight_only=r"joint_blocks\.\d+\.(x|context)_block\.adaLN_modulation\.1",
        groups={MLP: r"\.mlp\.", SELF_ATTENTION: r"\.attn2?\."}, foldable=_sd3_folds, unfoldable=_GELU,
    ),
    Architecture(
        "wan", "Wan 2.x", ("head.modulation", "blocks.0.self_attn.q.weight"),
        r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.[02])",
        weight_only=r"(blocks\.\d+\.cross_attn\.(k|v)(_img)?|time_projection\.1)",
        groups={MLP: r"\.ffn\.", CROSS_ATTENTION: r"\.cross_attn\.", SELF_ATTENTION: r"\.self_attn\."},
        foldable=_wan_folds, unfoldable="self-attention and feed-forward read a modulation that all blocks share",
    ),
    Architecture(
        "z_image", "Lumina 2, Z-Image", ("cap_embedder.1.weight", "layers.0.attention.qkv.weight"),
        r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])",
        weight_only=r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.[01]",
        groups={MLP: r"feed_forward", SELF_ATTENTION: r"attention"}, foldable=_lumina_folds,
    ),
    Architecture(
        "ltxv", "LTX-Video", ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"),
        r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(q|out\.0)|ff\.net\.(0\.proj|2))",
        weight_only=r"transformer_blocks\.\d+\.attn2\.to_[kv]",
        groups={MLP: r"\.ff\.", CROSS_ATTENTION: r"attn2", SELF_ATTENTION: r"attn1"},
        foldable=_ltx_folds, unfoldable="one modulation is shared by all blocks; " + _GELU,
    ),
    Architecture(
        "hidream", "HiDream", ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight"),
        r"(double|single)_stream_blocks\.\d+\.block\.(attn1\.to_(q|k|v|out)(_t)?|ff_[it](\.shared_experts|\.experts\.\d+)?\.w[123])",
        weight_only=r"(double|single)_stream_blocks\.\d+\.block\.adaLN_modulation\.1",
        groups={MLP: r"\.ff_", SELF_ATTENTION: r"attn1"},
    ),
    Architecture(
        "t5", "T5, UMT5", ("encoder.block.0.layer.0.SelfAttention.q.weight",), r"(?!)",
        weight_only=r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi(_[01])?|wo))", text=True,
    ),
    Architecture(
        "llama", "Llama, Qwen, Gemma, Mistral", ("model.layers.0.self_attn.q_proj.weight",), r"(?!)",
        weight_only=r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", text=True,
    ),
    Architecture(
        "clip", "CLIP text", ("text_model.encoder.layers.0.mlp.fc1.weight",), r"(?!)",
        weight_only=r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])", text=True,
    ),
)  # fmt: skip


def find_architecture(names: Iterable[str]) -> Architecture | None:
    """Return the architecture that tensors of these names are of, or None."""
    names = set(names)
    return next((architecture for architecture in ARCHITECTURES if architecture.matches(names)), None)


def architecture(name: str) -> Architecture:
    """Return an architecture by its name.

    Raises:
        StrettoError: there is none of that name.
    """
    for candidate in ARCHITECTURES:
        if candidate.name == name:
            return candidate
    raise StrettoError(f"architecture {name!r:.60}; known are {', '.join(a.name for a in ARCHITECTURES)}")
