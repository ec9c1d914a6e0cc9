"""Names of diffusers to names of ComfyUI, so that one recipe serves both and the result loads.

A rule maps a source name to a target, with the place of its rows where several source tensors make one target (q, k and v;
q, k, v and the MLP of FLUX's single blocks). Where diffusers stores shift before scale and ComfyUI scale after, the halves
change places. The maps are facts of the two formats; ComfyUI applies the same when it loads such files itself.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import StrettoError
from .files import Joined, Stored


@dataclass(frozen=True)
class Rule:
    """``pattern`` of a diffusers name to a ComfyUI ``target``; ``place`` orders the pieces of a fused target."""

    pattern: str
    target: str
    place: int | None = None
    swap: bool = False


def _qkv(source: str, target: str, names: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> list[Rule]:
    return [Rule(rf"{source}\.{name}\.(weight|bias)", target, place) for place, name in enumerate(names)]


def _plain(pairs: Mapping[str, str]) -> list[Rule]:
    return [Rule(source, target) for source, target in pairs.items()]


_WB = r"\.(weight|bias)"
_EMBEDDER = {
    rf"time_text_embed\.timestep_embedder\.linear_1{_WB}": r"time_in.in_layer.\1",
    rf"time_text_embed\.timestep_embedder\.linear_2{_WB}": r"time_in.out_layer.\1",
    rf"time_text_embed\.text_embedder\.linear_1{_WB}": r"vector_in.in_layer.\1",
    rf"time_text_embed\.text_embedder\.linear_2{_WB}": r"vector_in.out_layer.\1",
    rf"time_text_embed\.guidance_embedder\.linear_1{_WB}": r"guidance_in.in_layer.\1",
    rf"time_text_embed\.guidance_embedder\.linear_2{_WB}": r"guidance_in.out_layer.\1",
}
_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)", r"single_transformer_blocks\.(\d+)"
FLUX = [
    *_qkv(rf"{_DOUBLE}\.attn", r"double_blocks.\1.img_attn.qkv.\2"),
    *_qkv(rf"{_DOUBLE}\.attn", r"double_blocks.\1.txt_attn.qkv.\2", ("add_q_proj", "add_k_proj", "add_v_proj")),
    *_qkv(rf"{_SINGLE}\.attn", r"single_blocks.\1.linear1.\2"),
    Rule(rf"{_SINGLE}\.proj_mlp{_WB}", r"single_blocks.\1.linear1.\2", 3),
    *_plain({
        rf"{_DOUBLE}\.attn\.to_out\.0{_WB}": r"double_blocks.\1.img_attn.proj.\2",
        rf"{_DOUBLE}\.attn\.to_add_out{_WB}": r"double_blocks.\1.txt_attn.proj.\2",
        rf"{_DOUBLE}\.norm1\.linear{_WB}": r"double_blocks.\1.img_mod.lin.\2",
        rf"{_DOUBLE}\.norm1_context\.linear{_WB}": r"double_blocks.\1.txt_mod.lin.\2",
        rf"{_DOUBLE}\.ff\.net\.0\.proj{_WB}": r"double_blocks.\1.img_mlp.0.\2",
        rf"{_DOUBLE}\.ff\.net\.2{_WB}": r"double_blocks.\1.img_mlp.2.\2",
        rf"{_DOUBLE}\.ff_context\.net\.0\.proj{_WB}": r"double_blocks.\1.txt_mlp.0.\2",
        rf"{_DOUBLE}\.ff_context\.net\.2{_WB}": r"double_blocks.\1.txt_mlp.2.\2",
        rf"{_DOUBLE}\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
        rf"{_DOUBLE}\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
        rf"{_DOUBLE}\.attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
        rf"{_DOUBLE}\.attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
        rf"{_SINGLE}\.norm\.linear{_WB}": r"single_blocks.\1.modulation.lin.\2",
        rf"{_SINGLE}\.proj_out{_WB}": r"single_blocks.\1.linear2.\2",
        rf"{_SINGLE}\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
        rf"{_SINGLE}\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
        rf"proj_out{_WB}": r"final_layer.linear.\1",
        rf"x_embedder{_WB}": r"img_in.\1",
        rf"context_embedder{_WB}": r"txt_in.\1",
        **_EMBEDDER,
    }),
    Rule(rf"norm_out\.linear{_WB}", r"final_layer.adaLN_modulation.1.\1", swap=True),
]  # fmt: skip
SD3 = [
    *_qkv(rf"{_DOUBLE}\.attn", r"joint_blocks.\1.x_block.attn.qkv.\2"),
    *_qkv(rf"{_DOUBLE}\.attn", r"joint_blocks.\1.context_block.attn.qkv.\2", ("add_q_proj", "add_k_proj", "add_v_proj")),
    *_qkv(rf"{_DOUBLE}\.attn2", r"joint_blocks.\1.x_block.attn2.qkv.\2"),
    *_plain({
        rf"{_DOUBLE}\.attn\.to_out\.0{_WB}": r"joint_blocks.\1.x_block.attn.proj.\2",
        rf"{_DOUBLE}\.attn2\.to_out\.0{_WB}": r"joint_blocks.\1.x_block.attn2.proj.\2",
        rf"{_DOUBLE}\.attn\.to_add_out{_WB}": r"joint_blocks.\1.context_block.attn.proj.\2",
        rf"{_DOUBLE}\.norm1\.linear{_WB}": r"joint_blocks.\1.x_block.adaLN_modulation.1.\2",
        rf"{_DOUBLE}\.ff\.net\.0\.proj{_WB}": r"joint_blocks.\1.x_block.mlp.fc1.\2",
        rf"{_DOUBLE}\.ff\.net\.2{_WB}": r"joint_blocks.\1.x_block.mlp.fc2.\2",
        rf"{_DOUBLE}\.ff_context\.net\.0\.proj{_WB}": r"joint_blocks.\1.context_block.mlp.fc1.\2",
        rf"{_DOUBLE}\.ff_context\.net\.2{_WB}": r"joint_blocks.\1.context_block.mlp.fc2.\2",
        rf"{_DOUBLE}\.attn\.norm_q\.weight": r"joint_blocks.\1.x_block.attn.ln_q.weight",
        rf"{_DOUBLE}\.attn\.norm_k\.weight": r"joint_blocks.\1.x_block.attn.ln_k.weight",
        rf"{_DOUBLE}\.attn\.norm_added_q\.weight": r"joint_blocks.\1.context_block.attn.ln_q.weight",
        rf"{_DOUBLE}\.attn\.norm_added_k\.weight": r"joint_blocks.\1.context_block.attn.ln_k.weight",
        rf"{_DOUBLE}\.attn2\.norm_q\.weight": r"joint_blocks.\1.x_block.attn2.ln_q.weight",
        rf"{_DOUBLE}\.attn2\.norm_k\.weight": r"joint_blocks.\1.x_block.attn2.ln_k.weight",
        rf"context_embedder{_WB}": r"context_embedder.\1",
        rf"time_text_embed\.timestep_embedder\.linear_1{_WB}": r"t_embedder.mlp.0.\1",
        rf"time_text_embed\.timestep_embedder\.linear_2{_WB}": r"t_embedder.mlp.2.\1",
        rf"time_text_embed\.text_embedder\.linear_1{_WB}": r"y_embedder.mlp.0.\1",
        rf"time_text_embed\.text_embedder\.linear_2{_WB}": r"y_embedder.mlp.2.\1",
        r"pos_embed\.pos_embed": "pos_embed",
        rf"pos_embed\.proj{_WB}": r"x_embedder.proj.\1",
        rf"proj_out{_WB}": r"final_layer.linear.\1",
    }),
    Rule(rf"norm_out\.linear{_WB}", r"final_layer.adaLN_modulation.1.\1", swap=True),
]  # fmt: skip
WAN = _plain({
    **{
        rf"blocks\.(\d+)\.attn{number}\.to_{source}{_WB}": rf"blocks.\1.{name}.{target}.\2"
        for number, name in (("1", "self_attn"), ("2", "cross_attn"))
        for source, target in (("q", "q"), ("k", "k"), ("v", "v"), (r"out\.0", "o"))
    },
    **{
        rf"blocks\.(\d+)\.attn{number}\.norm_{part}\.weight": rf"blocks.\1.{name}.norm_{part}.weight"
        for number, name in (("1", "self_attn"), ("2", "cross_attn")) for part in "qk"
    },
    rf"blocks\.(\d+)\.attn2\.add_k_proj{_WB}": r"blocks.\1.cross_attn.k_img.\2",
    rf"blocks\.(\d+)\.attn2\.add_v_proj{_WB}": r"blocks.\1.cross_attn.v_img.\2",
    r"blocks\.(\d+)\.attn2\.norm_added_k\.weight": r"blocks.\1.cross_attn.norm_k_img.weight",
    rf"blocks\.(\d+)\.norm2{_WB}": r"blocks.\1.norm3.\2",
    rf"blocks\.(\d+)\.ffn\.net\.0\.proj{_WB}": r"blocks.\1.ffn.0.\2",
    rf"blocks\.(\d+)\.ffn\.net\.2{_WB}": r"blocks.\1.ffn.2.\2",
    r"blocks\.(\d+)\.scale_shift_table": r"blocks.\1.modulation",
    "scale_shift_table": "head.modulation",
    rf"proj_out{_WB}": r"head.head.\1",
    rf"patch_embedding{_WB}": r"patch_embedding.\1",
    rf"condition_embedder\.time_embedder\.linear_1{_WB}": r"time_embedding.0.\1",
    rf"condition_embedder\.time_embedder\.linear_2{_WB}": r"time_embedding.2.\1",
    rf"condition_embedder\.time_proj{_WB}": r"time_projection.1.\1",
    rf"condition_embedder\.text_embedder\.linear_1{_WB}": r"text_embedding.0.\1",
    rf"condition_embedder\.text_embedder\.linear_2{_WB}": r"text_embedding.2.\1",
    rf"condition_embedder\.image_embedder\.norm1{_WB}": r"img_emb.proj.0.\1",
    rf"condition_embedder\.image_embedder\.ff\.net\.0\.proj{_WB}": r"img_emb.proj.1.\1",
    rf"condition_embedder\.image_embedder\.ff\.net\.2{_WB}": r"img_emb.proj.3.\1",
    rf"condition_embedder\.image_embedder\.norm2{_WB}": r"img_emb.proj.4.\1",
})  # fmt: skip
#: HunyuanVideo as published: ComfyUI renames these while it loads, but not the markers of a header, so files are written
#: with the names that its modules have.
HUNYUAN = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."), ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."), ("_attn_qkv.", "_attn.qkv."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"), ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale"), ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."), ("_in.mlp.2.", "_in.out_layer."), ("_in.mlp.0.", "_in.in_layer."),
)  # fmt: skip
#: A name that only this family's diffusers files have.
_TELLING = (
    ("single_transformer_blocks.0.attn.norm_q.weight", FLUX, "FLUX"),
    ("transformer_blocks.0.attn.add_q_proj.weight", SD3, "SD3"),
    ("condition_embedder.time_proj.weight", WAN, "Wan"),
)
#: What :func:`comfy_names` says of Wan, whose diffusers names ComfyUI does not read itself.
WAN_NAMES = "names of diffusers' Wan"
#: Families whose names are the same in both (their ComfyUI class was written after diffusers').
_SAME = ("transformer_blocks.0.img_mod.1.weight", "adaln_single.emb.timestep_embedder.linear_1.bias")


def comfy_names(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], str | None]:
    """Return the tensors under ComfyUI's names, and what was renamed in words (None: nothing).

    Raises:
        StrettoError: a tensor of a diffusers checkpoint has no place in ComfyUI's, or a fused one lacks a piece.
    """
    if any(name in tensors for name in _SAME):
        return dict(tensors), None
    for telling, rules, family in _TELLING:
        if telling in tensors:
            return _renamed(tensors, rules, family), f"names of diffusers' {family}"
    if "double_blocks.0.img_attn_qkv.weight" in tensors and any(
        name.startswith("txt_in.individual") for name in tensors
    ):
        out = {}
        for name, tensor in tensors.items():
            for old, new in HUNYUAN:
                name = name.replace(old, new)
            out[name] = tensor
        return out, "names of HunyuanVideo as published"
    return dict(tensors), None


def comfy_place(name: str, names: Collection[str]) -> tuple[str, Rule | None]:
    """Return ComfyUI's name of one tensor of a diffusers network, and the rule that says where in it the tensor stands.

    Args:
        name: of the tensor.
        names: of all tensors of its kind in the network; they tell the family.

    Raises:
        StrettoError: the tensor has no place in ComfyUI's.
    """
    if any(known.rpartition(".")[0] + ".weight" in names for known in _SAME):
        return name, None
    for telling, rules, family in _TELLING:
        if telling in names or telling.replace("norm_q", "to_q") in names:
            last = max((int(match[1]) for match in (re.match(_DOUBLE, other) for other in names) if match), default=0)
            return _target(name, [(re.compile(rule.pattern), rule) for rule in rules], family, last)
    return name, None


def _renamed(tensors: Mapping[str, Stored], rules: list[Rule], family: str) -> dict[str, Stored]:
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    last = max((int(m[1]) for m in (re.match(_DOUBLE, name) for name in tensors) if m), default=0)
    pieces: dict[str, dict[int, Stored]] = {}
    out: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        target, rule = _target(name, compiled, family, last)
        if rule.swap and tensor.shape:
            half = tensor.rows // 2
            tensor = Joined([(tensor, half, tensor.rows), (tensor, 0, half)])
        if rule.place is None:
            out[target] = tensor
        else:
            pieces.setdefault(target, {})[rule.place] = tensor
    for target, found in pieces.items():
        wanted = 4 if ".linear1." in target else 3
        missing = [place for place in range(wanted) if place not in found]
        if missing:
            raise StrettoError(f"{target}: piece {missing[0] + 1} of {wanted} is missing in the diffusers checkpoint")
        ordered = [found[place] for place in range(wanted)]
        if len({(piece.dtype, piece.shape[1:]) for piece in ordered}) > 1:
            raise StrettoError(f"{target}: its pieces differ in dtype or width in the diffusers checkpoint")
        out[target] = Joined([(piece, 0, piece.rows) for piece in ordered])
    return out


def _target(name: str, compiled: list[tuple[re.Pattern, Rule]], family: str, last: int) -> tuple[str, Rule]:
    context = re.fullmatch(rf"{_DOUBLE}\.norm1_context\.linear\.(weight|bias)", name)
    if family == "SD3" and context:  # the last block's text half has scale and shift alone, in the other order
        target = f"joint_blocks.{context[1]}.context_block.adaLN_modulation.1.{context[2]}"
        return target, Rule(name, target, swap=int(context[1]) == last)
    for pattern, rule in compiled:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(rule.target), rule
    raise StrettoError(
        f"{name!r:.120} has no place among ComfyUI's names of {family}; is this a transformer of diffusers?"
    )
