"""Files of trained attention: every published layout converts and loads, everything else is refused in words."""

import json
import pickle
import struct

import pytest
import torch

from stretto.acceleration.attention.linear import complete_rows
from stretto.acceleration.attention.weights import clear_tensors, convert, load_weights
from stretto.acceleration.attention.weights.files import read_tensor
from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.safetensors_header import read_header
from stretto.kernels.block_sparse_attention import BlockList, block_sparse_attention

safetensors = pytest.importorskip("safetensors.torch")

LAYERS, HEADS, SIZE, WIDTH = 3, 4, 8, 32
SLA = {
    "format": "stretto_attention@1", "variant": "all", "feature_map": "softmax", "topk": "0.1", "block_q": "16",
    "block_k": "16", "smooth_k": "true", "base_model": "wan/2.1-t2v-1.3b",
}  # fmt: skip
SLA2 = {**SLA, "variant": "sla2", "head_size": "8"}
SALAD = {
    "format": "stretto_attention@1", "variant": "salad", "feature_map": "relu", "base_model": "wan", "head_size": "8",
    "layers": "4", "pattern": "window", "window": "3,8,8", "rope_on_linear": "input", "gate_input": "value",
}  # fmt: skip


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def projections(dtype=torch.float32):
    return [(normal(SIZE, SIZE, seed=i).to(dtype), normal(SIZE, seed=50 + i).to(dtype)) for i in range(LAYERS)]


def state(pattern, prefix="", dtype=torch.float32):
    """Return a checkpoint of a whole small model with projections under ``pattern``."""
    found = {f"{prefix}patch_embedding.weight": normal(4, 4), f"{prefix}blocks.0.self_attn.q.weight": normal(WIDTH, WIDTH)}
    for index, (weight, bias) in enumerate(projections(dtype)):
        found[prefix + pattern.format(index) + ".weight"] = weight
        found[prefix + pattern.format(index) + ".bias"] = bias
    return found


TURBO = "blocks.{}.self_attn.attn_op.local_attn.proj_l"
FASTVIDEO = "blocks.{}.attn1.attn_impl.proj_l"


def sla_tensors(dtype=torch.float32):
    pairs = enumerate(projections(dtype))
    return {f"blocks.{i}.proj_l.{end}": x for i, pair in pairs for end, x in zip(("weight", "bias"), pair, strict=True)}


def sla2_tensors():
    found = {f"blocks.{i}.alpha": torch.rand(HEADS, generator=torch.Generator().manual_seed(i)) for i in range(LAYERS)}
    routers = {f"blocks.1.router_{x}": normal(SIZE, SIZE, seed=ord(x)) for x in "qk"}
    return found | routers


def salad_tensors(gate=True):
    found = {}
    for i in (0, 2):  # the branch of layer 1 and of the last one were dropped after training
        parts = {"proj.weight": normal(WIDTH, WIDTH, seed=i, scale=0.2), "proj.bias": normal(WIDTH, seed=i)}
        parts["gate.scale"] = torch.ones(HEADS)
        if gate:
            parts |= {"gate.weight": normal(WIDTH, seed=9), "gate.bias": torch.ones(1)}
        found |= {f"blocks.{i}.salad.{name}": part for name, part in parts.items()}
    return found


def save(path, tensors, metadata=None):
    safetensors.save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata)
    return path


def clear_state(width=WIDTH, double=2, single=2, down=1, dtype=torch.bfloat16):
    found, seed = {}, 0
    for name, count, parts in (
        ("transformer_blocks", double, ("to_q", "to_k", "to_v", "to_out.0")),
        ("single_transformer_blocks", single, ("to_q", "to_k", "to_v")),
    ):
        for index in range(count):
            for part in parts:
                seed += 1
                found[f"{name}.{index}.attn.{part}.weight"] = normal(width, width, seed=seed).to(dtype)
                found[f"{name}.{index}.attn.{part}.bias"] = normal(width, seed=100 + seed).to(dtype)
            if down > 1:
                patch = normal(1, 1, 1, down, 1, down, 1, seed=200 + seed).to(dtype)
                found[f"{name}.{index}.attn.processor.spatial_weight"] = patch
    return found


# ---------------------------------------------------------------------------------------------------- published layouts


def pickled(document):
    return lambda folder: (torch.save(document, folder / "model.pth"), folder / "model.pth")[1]


def written(tensors):
    return lambda folder: save(folder / "model.safetensors", tensors)


LAYOUTS = {
    "TurboDiffusion": pickled(state(TURBO)),
    "TurboDiffusion before its own conversion": pickled({"state_dict": state(TURBO, "net."), "iteration": 7}),
    "activation checkpointing": pickled(state("blocks.{}._checkpoint_wrapped_module.self_attn.attn_op.local_attn.proj_l")),
    "FastVideo": written(state(FASTVIDEO)),
    "diffusers": written(state("blocks.{}.attn1.attn_op.local_attn.proj_l", "transformer.")),
    "DiffSynth": written(state("blocks.{}.self_attn.proj_l", dtype=torch.bfloat16)),
    "LTX": written(state("transformer_blocks.{}.attn1.local_attn.proj_l")),
    "half": pickled(state(TURBO, dtype=torch.float16)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["all", "complement"])
def test_published_checkpoints_convert_and_compute_the_formula(tmp_path, layout, variant):
    source = LAYOUTS[layout](tmp_path)
    target = convert(source, tmp_path / "mine.safetensors", variant, topk=0.15, base_model="wan/2.1", block_q=16, block_k=16)
    loaded = load_weights(target)
    assert (loaded.kind, loaded.variant, loaded.layers, loaded.topk) == ("SLA", variant, LAYERS, 0.15)
    assert (loaded.block_q, loaded.block_k, loaded.smooth_k, loaded.base_model) == (16, 16, True, "wan/2.1")
    assert loaded.metadata["source"] == source.name
    assert {x.dtype for x in safetensors.load_file(target).values()} == {torch.float32}, "whatever it was trained in"
    straight = load_weights(source, variant=variant, topk=0.15)
    for weights in (loaded, straight, load_weights(straight.path)):
        assert_formula(weights, variant, {"DiffSynth": torch.bfloat16, "half": torch.float16}.get(layout, torch.float32))


def assert_formula(weights, variant, dtype):
    """Compare each layer's branch with O_s + W O_l + b, written in fp64."""
    q, k, v = (normal(1, HEADS, 60, SIZE, seed=seed) for seed in (1, 2, 3))
    mask = torch.rand(1, HEADS, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    mask |= torch.eye(4, dtype=torch.bool)
    mask[..., 3, 0] = False
    blocks = BlockList.from_mask(mask, 16, 16)
    pairs = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :60, :60]
    logits = (q.double() @ k.double().transpose(-1, -2) / SIZE**0.5).masked_fill(~pairs, -torch.inf)
    sparse = logits.softmax(-1) @ v.double()
    shares = q.double().softmax(-1) @ k.double().softmax(-1).transpose(-1, -2)
    shares = shares if variant == "all" else shares * ~pairs
    linear = shares @ v.double() / (shares.sum(-1, keepdim=True) + 1e-5)
    whole = complete_rows(blocks, 60, 60)[..., None]
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True)
    for layer, (weight, bias) in enumerate(projections(dtype)):
        expected = torch.where(whole, sparse, sparse + linear @ weight.double().T + bias.double())
        found = weights.branch.apply(layer, out, lse, q, k, v, blocks)
        assert (found.double() - expected).abs().max() < 1e-5
        assert (found - out).abs().max() > 0.1


def simpletuner(**changes):
    settings = {"topk": 0.2, "feature_map": "elu", "blkq": 32, "blkk": 64, "tie_feature_map_qk": True}
    weight, bias = projections()[0]
    part = {"proj_l.weight": weight, "proj_l.bias": bias}
    return {"settings": settings, "state": {"8:bf16": part}, "version": 1, **changes}


def test_simpletuner_keeps_one_projection_for_all_layers(tmp_path):
    torch.save(simpletuner(), tmp_path / "sla_attention.pt")
    target = convert(tmp_path / "sla_attention.pt", tmp_path / "out.safetensors", "all", base_model="flux", layers=5)
    loaded = load_weights(target)
    assert (loaded.layers, loaded.topk, loaded.block_q, loaded.block_k) == (5, 0.2, 32, 64)
    assert loaded.branch.feature == "elu"
    assert all(torch.equal(part.weight, projections()[0][0]) for part in loaded.branch.layers)
    for document, words in (
        (simpletuner(version=2), "version is 2; expected 1"),
        (simpletuner(state={}), "projections for nothing"),
        (simpletuner(state={"8:bf16": {}, "16:bf16": {}}), "8:bf16, 16:bf16; expected one"),
        (simpletuner(state={"8:bf16": {"proj_l.weight": torch.eye(8)}}), "no proj_l.weight and proj_l.bias"),
    ):
        torch.save(document, tmp_path / "bad.pt")
        with pytest.raises(StrettoError, match=words):
            load_weights(tmp_path / "bad.pt", variant="all", layers=5)
    with pytest.raises(StrettoError, match="layers is None; SimpleTuner keeps one projection"):
        load_weights(tmp_path / "sla_attention.pt", variant="all")


@pytest.mark.parametrize(
    ("down", "name", "radius"), [(1, "clear_local_16", 16), (4, "clear_local_8_down_4", 8), (1, "CLEAR_LOCAL_32 (1)", 32)]
)
def test_clear_files_say_radius_and_pooled_keys(tmp_path, down, name, radius):
    tensors = clear_state(down=down)
    loaded = load_weights(save(tmp_path / f"{name}.safetensors", tensors), kind="CLEAR")
    assert (loaded.kind, loaded.radius, loaded.down_factor, loaded.width) == ("CLEAR", radius, down, WIDTH)
    assert (loaded.double_blocks, loaded.single_blocks, loaded.layers) == (2, 2, 4)
    assert sorted(loaded.spatial) == ([0, 1, 2, 3] if down > 1 else [])
    if down > 1:
        patch = tensors["single_transformer_blocks.1.attn.processor.spatial_weight"]
        assert torch.equal(loaded.spatial[3], patch.float().reshape(down, down))
    read = clear_tensors(loaded)
    assert len(read) == 2 * 8 + 2 * 6
    assert torch.equal(read["double", 1, "to_out.0", "bias"], tensors["transformer_blocks.1.attn.to_out.0.bias"])
    assert torch.equal(read["single", 0, "to_v", "weight"], tensors["single_transformer_blocks.0.attn.to_v.weight"])


def test_a_renamed_clear_file_needs_its_radius(tmp_path):
    path = save(tmp_path / "flux_local.safetensors", clear_state(down=2))
    with pytest.raises(StrettoError, match="metadata has no window_size; expected the radius in tokens"):
        load_weights(path)
    loaded = load_weights(path, radius=12)
    assert (loaded.radius, loaded.down_factor) == (12, 2)
    assert load_weights(loaded.path).radius == 12, "the reference repeats the option"
    said = save(tmp_path / "said.safetensors", clear_state(), {"window_size": "9", "down_factor": "1"})
    assert load_weights(said).radius == 9


# ----------------------------------------------------------------------------------------------------------- our format


def test_our_formats_load(tmp_path):
    sla = load_weights(save(tmp_path / "a.safetensors", sla_tensors(torch.bfloat16), SLA), kind="SLA", variant="all")
    assert sla.path == str(tmp_path / "a.safetensors") and sla.branch.head_size == SIZE
    assert sla.words() == "SLA (all), 3 of 3 layers, heads of 8"
    sla2 = load_weights(save(tmp_path / "b.safetensors", sla2_tensors(), SLA2))
    assert (sla2.variant, sla2.kind, list(sla2.routers)) == ("sla2", "SLA", [1])
    assert torch.equal(sla2.routers[1][0], sla2_tensors()["blocks.1.router_q"])
    salad = load_weights(save(tmp_path / "c.safetensors", salad_tensors(), SALAD))
    assert (salad.kind, salad.layers, salad.window, salad.topk, salad.width) == ("SALAD", 4, (3, 8, 8), None, WIDTH)
    assert [salad.branch.active(i) for i in range(4)] == [True, False, True, False]
    changes = {"pattern": "topk", "topk": "0.1", "gate_input": "none"}
    static = load_weights(save(tmp_path / "d.safetensors", salad_tensors(gate=False), SALAD | changes))
    assert static.topk == 0.1 and static.window is None


def test_models_that_do_not_fit_are_refused(tmp_path):
    sla = load_weights(save(tmp_path / "a.safetensors", sla_tensors(), SLA))
    sla.require(LAYERS, 12, SIZE, "wan")
    for arguments, words in (
        ((30, 12, SIZE), "a.safetensors: the weights are for 3 layers, the model has 30"),
        ((LAYERS, 12, 128), "heads of 8 channels, the model's have 128"),
        ((LAYERS, 12, SIZE, "flux"), "base_model is 'wan/2.1-t2v-1.3b', the model is of the family flux"),
    ):
        with pytest.raises(StrettoError, match=words):
            sla.require(*arguments)
    salad = load_weights(save(tmp_path / "c.safetensors", salad_tensors(), SALAD))
    with pytest.raises(StrettoError, match="layer 0 projects 32 channels, the model has 96"):
        salad.require(4, 12, SIZE)
    sla2 = load_weights(save(tmp_path / "b.safetensors", sla2_tensors(), SLA2))
    with pytest.raises(StrettoError, match="shares for 4 heads, the model has 12"):
        sla2.require(LAYERS, 12, SIZE)
    clear = load_weights(save(tmp_path / "clear_local_8.safetensors", clear_state()))
    clear.require(4, HEADS, SIZE, "flux")
    with pytest.raises(StrettoError, match="4 layers, the model has 57"):
        clear.require(57, HEADS, SIZE)
    with pytest.raises(StrettoError, match="32 channels, the model has 3072"):
        clear.require(4, 24, 128)


def test_the_network_of_a_run_is_checked(tmp_path):
    class Descriptor:
        family = "wan"
        module_blocks = staticmethod(lambda network: network.layers)
        hidden_size = staticmethod(lambda network: network.dim)

    class Network:
        layers, dim, num_heads = LAYERS, WIDTH, HEADS

    class Run:
        network, descriptor = Network(), Descriptor()

    path = save(tmp_path / "a.safetensors", sla_tensors(), SLA)
    assert load_weights(path, Run()).layers == LAYERS
    Run.network.num_heads = 2
    with pytest.raises(StrettoError, match="the model's have 16"):
        load_weights(path, Run())
    Run.network.num_heads = None
    load_weights(path, Run())
    Run.network.layers = 40
    with pytest.raises(StrettoError, match="the model has 40"):
        load_weights(path, Run())
    Run.descriptor.family = "flux"
    with pytest.raises(StrettoError, match="of the family flux"):
        load_weights(path, Run())


def test_another_kind_or_variant_than_asked_for_is_refused(tmp_path):
    path = save(tmp_path / "a.safetensors", sla_tensors(), SLA)
    with pytest.raises(StrettoError, match="it holds SLA weights; expected SALAD"):
        load_weights(path, kind="SALAD")
    with pytest.raises(StrettoError, match="variant is 'all'; expected 'complement'"):
        load_weights(path, variant="complement")
    clear = load_weights(save(tmp_path / "clear_local_8.safetensors", clear_state()))
    with pytest.raises(StrettoError, match="it holds SLA weights; expected CLEAR"):
        clear_tensors(load_weights(path))
    with pytest.raises(StrettoError, match="it holds CLEAR weights; expected SLA"):
        load_weights(clear.path, kind="SLA")


@pytest.mark.parametrize("field", sorted(SLA))
def test_missing_metadata_is_named(tmp_path, field):
    path = save(tmp_path / "a.safetensors", sla_tensors(), {k: v for k, v in SLA.items() if k != field})
    with pytest.raises(StrettoError, match=f"a.safetensors: metadata has no {field}; expected "):
        load_weights(path)


@pytest.mark.parametrize("field", sorted({*SALAD} - {"format", "variant", "feature_map", "base_model"}))
def test_missing_metadata_of_salad_is_named(tmp_path, field):
    path = save(tmp_path / "a.safetensors", salad_tensors(), {k: v for k, v in SALAD.items() if k != field})
    with pytest.raises(StrettoError, match=f"metadata has no {field}; expected "):
        load_weights(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "changes", "words"),
    [
        (sla_tensors, SLA, {"format": "stretto_attention@2"}, "format is 'stretto_attention@2'; this release reads"),
        (sla_tensors, SLA, {"format": "other"}, "format is 'other'; expected stretto_attention@1"),
        (sla_tensors, SLA, {"variant": "sla3"}, "variant is 'sla3'; expected one of complement, all, sla2, salad"),
        (sla_tensors, SLA, {"feature_map": "hedgehog"}, "feature_map is 'hedgehog'; expected one of softmax, elu, relu"),
        (sla_tensors, SLA, {"topk": "0"}, "topk is '0'; expected a number > 0 and <= 1"),
        (sla_tensors, SLA, {"topk": "nan"}, "topk is 'nan'"),
        (sla_tensors, SLA, {"topk": "ten"}, "topk is 'ten'"),
        (sla_tensors, SLA, {"block_q": "64.0"}, "block_q is '64.0'; expected a whole number from 1 to 4096"),
        (sla_tensors, SLA, {"smooth_k": "yes"}, "smooth_k is 'yes'; expected one of true, false"),
        (sla_tensors, SLA, {"base_model": " "}, "base_model is ' '; expected family"),
        (sla_tensors, SALAD, {}, "unknown tensor 'blocks.0.proj_l.bias'; expected blocks.<layer>."),
        (sla2_tensors, SLA, {}, "unknown tensor 'blocks.0.alpha'"),
        (sla2_tensors, SLA2, {"head_size": "16"}, "routers are for heads of 8 channels; expected 16"),
        (salad_tensors, SALAD, {"gate_input": "hidden"}, "gate_input is 'hidden'; expected none or value: .*no hidden states"),
        (salad_tensors, SALAD, {"gate_input": "none"}, "layer 0 has a gate that reads its input"),
        (salad_tensors, SALAD, {"rope_on_linear": "true"}, "rope_on_linear is 'true'; expected input .*rotated already"),
        (salad_tensors, SALAD, {"window": "3,8"}, "window is '3,8'; expected three whole numbers"),
        (salad_tensors, SALAD, {"pattern": "stripes"}, "pattern is 'stripes'; expected one of window, topk"),
        (salad_tensors, SALAD, {"layers": "2"}, "layers is '2'; expected a whole number from 3"),
        (salad_tensors, SALAD, {"head_size": "7"}, "projections of 32 channels; expected a multiple of head_size, 7"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, tensors, metadata, changes, words):
    path = save(tmp_path / "a.safetensors", tensors(), metadata | changes)
    with pytest.raises(StrettoError, match=words):
        load_weights(path)


def test_a_later_format_is_another_kind_of_error(tmp_path):
    path = save(tmp_path / "a.safetensors", sla_tensors(), SLA | {"format": "stretto_attention@2"})
    with pytest.raises(SchemaError):
        load_weights(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.proj_l.weight": torch.eye(16)}, r"blocks.1.proj_l.weight has shape \[16, 16\]; expected \[8, 8\]"),
        ({"blocks.1.proj_l.weight": torch.ones(8, 4)}, r"has shape \[8, 4\]; expected \[8, 8\]"),
        ({"blocks.2.proj_l.bias": torch.ones(9)}, r"blocks.2.proj_l.bias has shape \[9\]; expected \[8\]"),
        ({"blocks.2.proj_l.bias": None}, "layer 2 has no bias; expected one in every layer"),
        ({"blocks.1.proj_l.bias": None, "blocks.1.proj_l.weight": None}, "layer 1 has no weight"),
        ({"blocks.0.proj_l.bias": torch.full((8,), torch.nan)}, "values that are not finite"),
        ({"blocks.0.proj_l.bias": torch.ones(8, dtype=torch.int32)}, "dtype I32; expected one of F32, F16, BF16"),
        ({"blocks.0.ffn.weight": torch.ones(8)}, "unknown tensor 'blocks.0.ffn.weight'"),
        ({"blocks.5000.proj_l.bias": torch.ones(8)}, "unknown tensor 'blocks.5000.proj_l.bias'"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, words):
    tensors = {key: x for key, x in (sla_tensors() | change).items() if x is not None}
    with pytest.raises(StrettoError, match=words):
        load_weights(save(tmp_path / "a.safetensors", tensors, SLA))


@pytest.mark.parametrize(
    ("tensors", "metadata", "change", "words"),
    [
        (sla2_tensors, SLA2, {"blocks.0.alpha": torch.tensor([0.1, 0.2, 0.3, 1.5])}, "values outside 0 to 1"),
        (sla2_tensors, SLA2, {"blocks.0.alpha": torch.ones(5)}, r"has shape \[4\]; expected \[5\]"),
        (sla2_tensors, SLA2, {"blocks.1.router_k": None}, "layer 1 has no router_k"),
        (sla2_tensors, SLA2, {"blocks.1.alpha": None}, "layer 1 has no alpha"),
        (salad_tensors, SALAD, {"blocks.2.salad.proj.weight": None}, "layer 2 has no weight"),
        (salad_tensors, SALAD, {"blocks.2.salad.gate.weight": None}, "layer 2 has no gate_weight"),
        (salad_tensors, SALAD, {"blocks.2.salad.gate.bias": torch.ones(2)}, r"gate.bias has shape \[2\]; expected \[1\]"),
        (salad_tensors, SALAD, {"blocks.2.salad.proj.weight": torch.eye(16)}, r"shape \[16, 16\]; expected \[32, 32\]"),
    ],
)
def test_wrong_tensors_of_other_methods_are_refused(tmp_path, tensors, metadata, change, words):
    kept = {key: x for key, x in (tensors() | change).items() if x is not None}
    with pytest.raises(StrettoError, match=words):
        load_weights(save(tmp_path / "a.safetensors", kept, metadata))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_blocks.1.attn.to_q.bias": None}, "double block 1: to_q.bias is missing; expected shape"),
        ({"transformer_blocks.1.attn.to_q.bias": torch.ones(3)}, r"to_q.bias has shape \[3\]; expected shape \[32\]"),
        ({"single_transformer_blocks.0.attn.to_out.0.bias": torch.ones(32)}, "single block 0: to_out.0.bias .*unknown"),
        ({"transformer_blocks.0.ff.net.0.proj.weight": torch.ones(3)}, "unknown tensor 'transformer_blocks.0.ff"),
        ({"transformer_blocks.5.attn.to_q.bias": torch.ones(32)}, "double block 2: to_k.bias is missing"),
        ({"transformer_blocks.0.attn.processor.spatial_weight": torch.ones(1, 1, 1, 4, 1, 4, 1)}, "1 spatial weights"),
        ({"transformer_blocks.0.attn.processor.spatial_weight": torch.ones(4, 4)}, r"expected \[1, 1, 1, f, 1, f, 1\]"),
    ],
)
def test_wrong_clear_files_are_refused(tmp_path, change, words):
    tensors = {key: x for key, x in (clear_state() | change).items() if x is not None}
    with pytest.raises(StrettoError, match=words):
        load_weights(save(tmp_path / "clear_local_8.safetensors", tensors))


def test_a_clear_file_whose_name_and_tensors_disagree_is_refused(tmp_path):
    with pytest.raises(StrettoError, match="down_factor is '4'; expected 1, the side of the spatial weights"):
        load_weights(save(tmp_path / "clear_local_8_down_4.safetensors", clear_state()))
    with pytest.raises(StrettoError, match="down_factor is '1'; expected 2"):
        load_weights(save(tmp_path / "clear_local_8.safetensors", clear_state(down=2)))


# ------------------------------------------------------------------------------------------------------- damaged, foreign


def damaged(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "truncated, or not a safetensors file"),
        (b"12345", "truncated, or not a safetensors file"),
        (damaged({}, length=1 << 60), "its header claims 1,152,921,504,606,846,976 bytes"),
        (damaged({"a": ONE}, bytes(8), length=999), "truncated"),
        (damaged(b"\xff\xfe{}"), "not a safetensors file"),
        (damaged(b"[1, 2]"), "its header is no object"),
        (damaged(b'{"a": 1, "a": 2}'), "a name stands in it twice"),
        (damaged(b"[" * 100000), "not a safetensors file"),
        (damaged({"a": ONE}, bytes(7)), "truncated; 72 bytes, expected 73|truncated"),
        (damaged({"a": ONE}, bytes(9)), "longer than its header says"),
        (damaged({"a": ONE, "b": ONE}, bytes(8)), "'b' overlaps the tensor before it .it begins at byte"),
        (damaged({"a": ONE | {"shape": [3]}}, bytes(8)), "'a' has 8 bytes; F32 .3. takes 12"),
        (damaged({"a": ONE | {"shape": [-2]}}, bytes(8)), "expected dtype, shape and data_offsets"),
        (damaged({"a": ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(8)), "'a' has 8 bytes; F32 .* takes "),
        (damaged({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)), "'a' has -8 bytes; F32 .2. takes 8"),
        (damaged({"a": ONE | {"data_offsets": [True, 8]}}, bytes(8)), "expected dtype, shape and data_offsets"),
        (damaged({"a": 3}, bytes(8)), "'a' is 3; expected dtype"),
        (damaged({"__metadata__": {"x": 3}}), "__metadata__ is .*expected texts"),
        (damaged({"something.else": ONE}, bytes(8)), "no attention weights that Stretto knows"),
        (damaged({}), "no attention weights that Stretto knows"),
        (damaged({"__metadata__": SLA}), "it holds no tensor"),
    ],
)
def test_damaged_and_foreign_files_are_refused_before_anything_is_allocated(tmp_path, raw, words, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: pytest.fail("a tensor was read"))
    with pytest.raises(StrettoError, match=words):
        load_weights(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    raw = save(tmp_path / "a.safetensors", sla_tensors(), SLA).read_bytes()
    for cut in (*range(0, 40, 7), len(raw) // 2, len(raw) - 1):
        (tmp_path / "b.safetensors").write_bytes(raw[:cut])
        with pytest.raises(StrettoError, match="b.safetensors"):
            load_weights(tmp_path / "b.safetensors")


def test_missing_files_and_folders_are_refused(tmp_path):
    for name in ("none.safetensors", "none.pth", ""):
        with pytest.raises(StrettoError, match="cannot be read"):
            load_weights(tmp_path / name)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint ran",))


@pytest.mark.parametrize("make", ["pickle", "torch", "text", "cut", "list", "tensor"])
def test_checkpoints_that_are_not_tensors_alone_are_refused(tmp_path, make):
    path = tmp_path / "model.pth"
    if make == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif make == "torch":
        torch.save({"blocks.0.self_attn.proj_l.weight": Bomb()}, path)
    elif make == "text":
        path.write_text("hello")
    elif make == "cut":
        torch.save(state(TURBO), path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        torch.save([torch.ones(2)] if make == "list" else torch.ones(2), path)
    with pytest.raises(StrettoError, match="model.pth"):
        load_weights(path, variant="all", topk=0.1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"blocks.0.cross_attn.proj_l.weight": torch.eye(8)}, "'blocks.0.cross_attn.proj_l.weight' is a projection in a layout"),
        ({"layers.0.sla.proj_l.weight": torch.eye(8)}, "a layout that is not known"),
        (state(TURBO) | state(FASTVIDEO), "are the same layer's; expected one of them"),
        (state(TURBO, "net.") | state(TURBO, "net_ema."), "are the same layer's"),
        ({"blocks.0.self_attn.q.weight": torch.eye(8)}, "no attention weights that Stretto knows"),
        (state(TURBO) | {TURBO.format(0) + ".weight": torch.ones(8, 8, dtype=torch.int8)}, "torch.int8; expected fp32"),
        (state(TURBO) | {TURBO.format(0) + ".weight": "text"}, "is text; expected fp32"),
    ],
)
def test_checkpoints_with_other_keys_are_refused(tmp_path, keys, words):
    torch.save(keys, tmp_path / "model.pth")
    with pytest.raises(StrettoError, match=words):
        convert(tmp_path / "model.pth", tmp_path / "out.safetensors", "all", topk=0.1, base_model="wan")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_what_a_checkpoint_does_not_say_must_be_said(tmp_path):
    source, target = LAYOUTS["TurboDiffusion"](tmp_path), tmp_path / "out.safetensors"
    for variant in ("", "sla2", "salad"):
        with pytest.raises(StrettoError, match=f"variant is '{variant}'; published checkpoints do not say theirs"):
            convert(source, target, variant, topk=0.1, base_model="wan")
    with pytest.raises(StrettoError, match="topk is not in the file"):
        convert(source, target, "all", base_model="wan")
    with pytest.raises(StrettoError, match="topk is '1.5'; expected a number > 0 and <= 1"):
        convert(source, target, "all", base_model="wan", topk=1.5)
    with pytest.raises(StrettoError, match="ends in .safetensors"):
        convert(source, tmp_path / "out.pth", "all", base_model="wan", topk=0.1)
    assert not target.exists()


# ------------------------------------------------------------------------------------------------------------ writing


def test_converting_never_overwrites(tmp_path):
    source, target = LAYOUTS["TurboDiffusion"](tmp_path), tmp_path / "out.safetensors"
    target.write_text("precious")
    with pytest.raises(StrettoError, match="exists already; pass another name"):
        convert(source, target, "all", topk=0.1, base_model="wan")
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "out.safetensors"]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    source = LAYOUTS["TurboDiffusion"](tmp_path)
    from stretto.acceleration.attention.weights import files

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("link",):
        monkeypatch.setattr(files.os, name, full)
    with pytest.raises(StrettoError, match="cannot be written .No space left on device"):
        convert(source, tmp_path / "out.safetensors", "all", topk=0.1, base_model="wan")
    with pytest.raises(StrettoError, match="cannot be written"):
        convert(source, tmp_path / "no folder" / "out.safetensors", "all", topk=0.1, base_model="wan")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    source = LAYOUTS["TurboDiffusion"](tmp_path)
    from stretto.acceleration.attention.weights import files

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out.safetensors", "all", topk=0.1, base_model="wan")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_others_read_what_we_write_and_we_read_what_others_write(tmp_path):
    target = convert(LAYOUTS["TurboDiffusion"](tmp_path), tmp_path / "out.safetensors", "all", topk=0.1, base_model="wan")
    tensors = safetensors.load_file(target)
    assert {key: x.dtype for key, x in tensors.items()} == dict.fromkeys(sla_tensors(), torch.float32)
    assert all(torch.equal(tensors[key], x) for key, x in sla_tensors().items())
    header = read_header(save(tmp_path / "b.safetensors", {"x": torch.zeros(0, 3), **sla_tensors(torch.bfloat16)}))
    assert all(torch.equal(read_tensor(header, key), x) for key, x in sla_tensors(torch.bfloat16).items())
    assert read_tensor(header, "x").shape == (0, 3)


def test_tensors_are_read_where_bytes_are_not_aligned(tmp_path):
    values = torch.arange(3, dtype=torch.float32)
    raw = damaged({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                   "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]}}, b"x" + values.numpy().tobytes())  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert torch.equal(read_tensor(read_header(tmp_path / "a.safetensors"), "b"), values)
    with pytest.raises(StrettoError, match="a has dtype U8"):
        read_tensor(read_header(tmp_path / "a.safetensors"), "a")


@pytest.mark.parametrize("text", ["{", "{}", '{"path": "a", "secret": 1}', '{"path": "a", "topk": "x"}', "{1}"])
def test_references_that_nobody_wrote_are_refused(text):
    with pytest.raises(StrettoError, match="attention weights"):
        load_weights(text)
