"""Reading, writing and refusing checkpoints: headers, shards, names, GGUF, markers, memory and the command line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.quantization.checkpoints import open_checkpoint
from stretto.acceleration.quantization.formats import COMFY, NF4, NUNCHAKU, SCALED_FP8, dequantized, find_formats
from stretto.acceleration.quantization.inspecting import inspect, verify
from stretto.acceleration.quantization.quantizing import plan_file, write_file
from stretto.acceleration.quantization.recipes import PRESETS, Recipe, Rule, load_recipe
from stretto.acceleration.quantization.writer import Spec, StreamWriter
from stretto.acceleration.safetensors_header import MAX_HEADER, read_header

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = 256


def seeded(*shape, seed=0, dtype=torch.bfloat16):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def flux_shapes(hidden=HIDDEN, depth=1):
    """Names and proportions of FLUX.1."""
    tensors = {"img_in.weight": (hidden, 64), "img_in.bias": (hidden,), "txt_in.weight": (hidden, 32),
               "final_layer.linear.weight": (64, hidden),
               "final_layer.adaLN_modulation.1.weight": (2 * hidden, hidden)}  # fmt: skip
    for index in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            tensors |= {
                f"{block}_mod.lin.weight": (6 * hidden, hidden), f"{block}_mod.lin.bias": (6 * hidden,),
                f"{block}_attn.qkv.weight": (3 * hidden, hidden), f"{block}_attn.qkv.bias": (3 * hidden,),
                f"{block}_attn.proj.weight": (hidden, hidden), f"{block}_attn.norm.query_norm.scale": (64,),
                f"{block}_attn.norm.key_norm.scale": (64,), f"{block}_mlp.0.weight": (4 * hidden, hidden),
                f"{block}_mlp.2.weight": (hidden, 4 * hidden),
            }  # fmt: skip
        tensors |= {
            f"single_blocks.{index}.linear1.weight": (7 * hidden, hidden), f"single_blocks.{index}.linear1.bias": (7 * hidden,),
            f"single_blocks.{index}.linear2.weight": (hidden, 5 * hidden),
            f"single_blocks.{index}.modulation.lin.weight": (3 * hidden, hidden),
            f"single_blocks.{index}.modulation.lin.bias": (3 * hidden,), f"single_blocks.{index}.norm.query_norm.scale": (64,),
        }  # fmt: skip
    return tensors


def flux(dtype=torch.bfloat16):
    """Tensors of a tiny FLUX.1."""
    return {
        name: seeded(*shape, seed=number, dtype=dtype) for number, (name, shape) in enumerate(flux_shapes().items())
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file(flux(), path, metadata={"modelspec.title": "a title", "config": "{}"})
    return path


def quantize(source, target, **settings):
    options = {
        name: settings.pop(name) for name in ("replace", "progress", "workers", "hash_source") if name in settings
    }
    plan = plan_file(source, **settings)
    with plan.checkpoint:
        return write_file(plan, target, **options)


# T10: the writer


def test_t10_the_header_is_aligned_and_others_read_the_file(tmp_path):
    specs = [Spec("a", torch.int8, (3, 5)), Spec("b", torch.float32, (2,)), Spec("c", torch.bfloat16, (7,)),
             Spec("d", torch.float8_e4m3fn, ()), Spec("e", torch.float32, (0, 4))]  # fmt: skip
    rows = torch.arange(15, dtype=torch.int8).view(3, 5)
    with StreamWriter(tmp_path / "x.safetensors", specs, {"note": "ä"}) as writer:
        writer.write("a", rows[2:], 2)
        writer.write("a", rows[:2])
        writer.write("b", torch.tensor([1.5, -2.0]))
        writer.write("c", torch.ones(7, dtype=torch.bfloat16))
        writer.write("d", torch.tensor(2.0).to(torch.float8_e4m3fn))
        with pytest.raises(ValueError, match="at row 2 of"):
            writer.write("a", rows[:2], 2)
        with pytest.raises(ValueError, match="float16"):
            writer.write("c", torch.ones(7, dtype=torch.float16))
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0 and len(raw) == writer.total
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"note": "ä"}
        assert torch.equal(file.get_tensor("a"), rows) and file.get_tensor("b").tolist() == [1.5, -2.0]
        assert file.get_tensor("d").float().item() == 2.0 and file.get_tensor("e").shape == (0, 4)
    offsets = {
        name: entry["data_offsets"][0]
        for name, entry in json.loads(raw[8 : 8 + length]).items()
        if name != "__metadata__"
    }
    assert offsets["b"] % 4 == 0 and offsets["c"] % 2 == 0 and offsets["a"] > offsets["c"] > offsets["b"]


def test_t10_an_interrupted_write_leaves_nothing(source, tmp_path):
    before = source.read_bytes()

    def stop(done, total, words):
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.safetensors", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux.safetensors"]
    assert source.read_bytes() == before


def test_t10_names_that_are_taken_the_source_and_full_disks_are_refused(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "out.safetensors")
    with pytest.raises(StrettoError, match="exists already"):
        quantize(source, tmp_path / "out.safetensors")
    with pytest.raises(StrettoError, match="is the source"):
        quantize(source, source, replace=True)
    quantize(source, tmp_path / "out.safetensors", replace=True, format="fp8")
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(StrettoError, match=r"needs 0\.\d+ GB on the disk"):
        quantize(source, tmp_path / "other.safetensors")
    with pytest.raises(StrettoError, match="no such folder"):
        quantize(source, tmp_path / "nowhere" / "x.safetensors")


MEASURE = """
import sys, time
def peak():  # resource's own figure starts at that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import torch
torch.set_num_threads(1)
from stretto.acceleration.quantization.quantizing import plan_file, write_file
warm = torch.randn(64, 256) @ torch.randn(256, 256)
base = peak()
plan = plan_file({source!r}, format={format!r})
start = time.perf_counter()
with plan.checkpoint:
    result = write_file(plan, {target!r}, workers=2)
seconds = time.perf_counter() - start
print((peak() - base) / 1024, plan.checkpoint.nbytes / 1e6 / seconds, result.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_t10_memory_stays_small_for_a_checkpoint_of_two_gigabytes(tmp_path):
    """A sparse file: 2 GB of zeros that take no room on the disk. Peak memory is that of a few blocks."""
    sized = flux_shapes(4608)
    header, offset = {}, 0
    for name, shape in sized.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    assert offset > 2e9
    code = MEASURE.format(root=str(ROOT), source=str(path), target=str(tmp_path / "out.safetensors"), format="int8")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    megabytes, rate, size = map(float, result.stdout.split())
    assert rate > 5  # other work shares the machine; benchmarks/quantization.py measures the speed
    assert 20 < megabytes < 1024
    assert size < 0.75 * offset


def test_both_carriers_and_the_provenance_are_in_the_file(source, tmp_path):
    result = quantize(source, tmp_path / "out.safetensors")
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
        header = json.loads(metadata["_quantization_metadata"])
        assert header["format_version"] == "1.0" and len(header["layers"]) == 10
        for layer, marker in header["layers"].items():
            assert json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").tolist())) == marker
            assert marker == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
            assert file.get_tensor(f"{layer}.weight").dtype == torch.int8
            rows = file.get_slice(f"{layer}.weight").get_shape()[0]
            assert file.get_slice(f"{layer}.weight_scale").get_shape() == [rows, 1]
        assert metadata["modelspec.title"] == "a title" and metadata["config"] == "{}"
        assert json.loads(metadata["stretto_recipe"])["name"] == "flux"
        provenance = json.loads(metadata["stretto_provenance"])
        import hashlib

        assert provenance["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert set(provenance["rotation_check"]) == set(header["layers"])
        assert torch.equal(
            file.get_tensor("double_blocks.0.img_mod.lin.weight"), flux()["double_blocks.0.img_mod.lin.weight"]
        )
    assert str(tmp_path) not in json.dumps(metadata)


# hostile files


def damaged(tmp_path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        ({"a": F4}, b"1234", MAX_HEADER + 1, "its header claims"),
        ({"a": F4}, b"1234", 1 << 62, "its header claims"),
        ({"a": F4}, b"1234", 4000, "truncated, or not"),
        ({"a": F4}, b"12", None, "truncated"),
        ({"a": F4}, b"123456", None, "longer than its header says"),
        ({"a": F4, "b": F4}, b"1234", None, "'b' overlaps the tensor before it"),
        ({"a": {**F4, "data_offsets": [4, 8]}}, b"12345678", None, "'a' leaves a gap"),
        ({"a": {**F4, "data_offsets": [0, 8]}}, b"12345678", None, "'a' has 8 bytes; F32 [1] takes 4"),
        ({"a": {**F4, "shape": [1 << 61, 1 << 61]}}, b"1234", None, "'a' has 4 bytes"),
        ({"a": {**F4, "shape": [-1]}}, b"1234", None, "expected dtype, shape"),
        ({"a": {**F4, "shape": [True]}}, b"1234", None, "expected dtype, shape"),
        ({"a": {**F4, "shape": [1] * 9}}, b"1234", None, "expected dtype, shape"),
        ({"a": {**F4, "dtype": "F33"}}, b"1234", None, "'a' has dtype 'F33'"),
        ({"a": 5}, b"1234", None, "'a' is 5"),
        ({"__metadata__": {"x": 1}, "a": F4}, b"1234", None, "__metadata__"),
        (b'{"a":{},"a":{}}', b"", None, "stands in it twice"),
        (b"[" * 4000, b"", None, "not a safetensors file"),
        (b"\xff\xff\xff\xff", b"", None, "not a safetensors file"),
        (b"[]", b"", None, "is no object"),
    ],
)
def test_damaged_headers_are_refused_with_the_tensor(tmp_path, header, data, length, words):
    with pytest.raises(StrettoError) as error:
        read_header(damaged(tmp_path, header, data, length))
    assert words in str(error.value) and "bad.safetensors" in str(error.value)


def test_pickles_and_other_files_are_never_opened(tmp_path):
    for name in ("a.ckpt", "a.pt", "a.bin"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(StrettoError, match="can run any program"):
            open_checkpoint(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.safetensors")
    with pytest.raises(StrettoError, match="pickle"):
        open_checkpoint(tmp_path / "zip.safetensors")
    with pytest.raises(StrettoError, match="no such file"):
        open_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..safetensors", "a\\b.safetensors", ""],
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StrettoError, match="names the shard"):
        open_checkpoint(index)


def edited(path, tmp_path, change):
    """The file with its header's layers or tensors changed."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, tmp_path / "edited.safetensors", metadata=metadata)
    return tmp_path / "edited.safetensors"


LAYER = "double_blocks.0.img_attn.qkv"


def drop(name):
    return lambda tensors, metadata: tensors.pop(f"{LAYER}.{name}")


def put(name, tensor):
    return lambda tensors, metadata: tensors.__setitem__(f"{LAYER}.{name}", tensor)


def marker(**values):
    def change(tensors, metadata):
        document = json.loads(metadata["_quantization_metadata"])
        document["layers"][LAYER] |= values
        metadata["_quantization_metadata"] = json.dumps(document)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("weight_scale"), "weight_scale, which is missing"),
        (drop("weight"), "no weight"),
        (put("weight_scale", torch.ones(5, 1)), "weight_scale has shape [5, 1]"),
        (put("weight_scale", torch.ones(768, 1).half()), "weight_scale has dtype torch.float16"),
        (put("weight", torch.ones(768, 256)), "weight has dtype torch.float32"),
        (marker(format="int3_magic"), "format is 'int3_magic'"),
        (marker(format=None), "format is 'None'"),
        (marker(convrot_groupsize=100), "rotation size 100"),
        (marker(convrot_groupsize="256"), "convrot_groupsize is '256'"),
        (put("pre_quant_scale", torch.ones(256)), "pre_quant_scale"),
        (put("comfy_quant", torch.ones(4)), "its marker is torch.float32"),
        (put("comfy_quant", torch.tensor([123, 1, 2], dtype=torch.uint8)), "no JSON"),
    ],
)
def test_wrong_markers_and_tensors_are_refused_with_layer_and_reason(source, tmp_path, change, words):
    path = edited(quantize(source, tmp_path / "q.safetensors").path, tmp_path, change)
    with open_checkpoint(path) as checkpoint, pytest.raises(StrettoError) as error:
        find_formats(checkpoint)
    assert words in str(error.value) and LAYER in str(error.value)


def test_g1_a_wrong_rotation_flag_is_named(source, tmp_path):
    written = quantize(source, tmp_path / "q.safetensors").path
    assert not any(check.problem for check in verify(written, source))
    for change in (marker(convrot=False), marker(convrot_groupsize=64)):
        problems = [check for check in verify(edited(written, tmp_path, change)) if check.problem]
        assert [check.layer for check in problems] == [LAYER] and "rotation" in problems[0].problem

    def flipped(tensors, metadata):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].flip(1)

    assert [c.layer for c in verify(edited(written, tmp_path, flipped), source) if c.problem] == [LAYER]


def test_values_that_are_not_finite_stop_the_work_and_name_the_layer(tmp_path):
    tensors = flux()
    tensors[f"{LAYER}.weight"][700, 3] = torch.inf
    save_file(tensors, tmp_path / "inf.safetensors")
    with pytest.raises(StrettoError, match=f"{LAYER}: has values that are not finite"):
        quantize(tmp_path / "inf.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_changes_while_it_is_read_is_noticed(source):
    with open_checkpoint(source) as checkpoint:
        source.write_bytes(source.read_bytes() + b" ")
        with pytest.raises(StrettoError, match="was changed while"):
            checkpoint.tensors["img_in.weight"].read()


# names and shards


def diffusers_flux():
    """The same weights as :func:`flux`, as diffusers names and splits them."""
    source, out = flux(), {}
    h = HIDDEN
    for stream, names, proj in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
    ):
        block, to = f"double_blocks.0.{stream}", "transformer_blocks.0"
        norm, ff = ("norm1", "ff") if stream == "img" else ("norm1_context", "ff_context")
        for end in ("weight", "bias"):
            for place, name in enumerate(names):
                out[f"{to}.attn.{name}.{end}"] = source[f"{block}_attn.qkv.{end}"][
                    place * h : (place + 1) * h
                ].contiguous()
            out[f"{to}.{norm}.linear.{end}"] = source[f"{block}_mod.lin.{end}"]
        out[f"{to}.attn.{proj}.weight"] = source[f"{block}_attn.proj.weight"]
        out[f"{to}.{ff}.net.0.proj.weight"] = source[f"{block}_mlp.0.weight"]
        out[f"{to}.{ff}.net.2.weight"] = source[f"{block}_mlp.2.weight"]
        for part, key in (("q", "query"), ("k", "key")):
            name = f"norm_{part}" if stream == "img" else f"norm_added_{part}"
            out[f"{to}.attn.{name}.weight"] = source[f"{block}_attn.norm.{key}_norm.scale"]
    to, block = "single_transformer_blocks.0", "single_blocks.0"
    for end in ("weight", "bias"):
        for place, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            stop = (place + 1) * h if place < 3 else 7 * h
            out[f"{to}.{name}.{end}"] = source[f"{block}.linear1.{end}"][place * h : stop].contiguous()
        out[f"{to}.norm.linear.{end}"] = source[f"{block}.modulation.lin.{end}"]
    out[f"{to}.proj_out.weight"] = source[f"{block}.linear2.weight"]
    out[f"{to}.attn.norm_q.weight"] = source[f"{block}.norm.query_norm.scale"]
    last = source["final_layer.adaLN_modulation.1.weight"]
    out |= {"x_embedder.weight": source["img_in.weight"], "x_embedder.bias": source["img_in.bias"],
            "context_embedder.weight": source["txt_in.weight"], "proj_out.weight": source["final_layer.linear.weight"],
            "norm_out.linear.weight": torch.cat([last[h:], last[:h]])}  # fmt: skip
    return out


def test_shards_and_names_of_diffusers_give_the_same_file(source, tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = diffusers_flux()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    one = quantize(source, tmp_path / "one.safetensors").path
    plan = plan_file(folder)
    assert any("diffusers' FLUX" in note for note in plan.notes) and "2 shards" in plan.notes
    with plan.checkpoint:
        two = write_file(plan, tmp_path / "two.safetensors").path
    with safe_open(one, "pt") as first, safe_open(two, "pt") as second:
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():
            a, b = first.get_tensor(name), second.get_tensor(name)
            assert a.dtype == b.dtype and torch.equal(a, b), name


def test_a_diffusers_checkpoint_that_lacks_a_piece_is_refused(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in diffusers_flux().items()}
    del tensors["transformer_blocks.0.attn.to_k.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(StrettoError, match=r"double_blocks.0.img_attn.qkv.weight: piece 2 of 3 is missing"):
        plan_file(tmp_path / "x.safetensors")
    tensors["strange.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(StrettoError, match=r"'strange.weight' has no place"):
        plan_file(tmp_path / "x.safetensors")


def test_g9_markers_of_an_all_in_one_checkpoint_are_relative_to_its_model(tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in flux().items()} | {"vae.x": torch.ones(3)}
    save_file(tensors, tmp_path / "all.safetensors")
    result = quantize(tmp_path / "all.safetensors", tmp_path / "out.safetensors")
    with safe_open(result.path, "pt") as file:
        assert (
            LAYER in json.loads(file.metadata()["_quantization_metadata"])["layers"]
            and f"{LAYER}.comfy_quant" in file.keys()
        )
        assert not any(name.startswith(("model.", "vae")) for name in file.keys())


# other formats


def test_scaled_fp8_is_read_and_transcoded(source, tmp_path):
    tensors = flux()
    weight = tensors[f"{LAYER}.weight"].float()
    scale = weight.abs().max() / 448
    tensors |= {f"{LAYER}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{LAYER}.scale_weight": scale.view(1),
                f"{LAYER}.scale_input": torch.ones(1), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}  # fmt: skip
    path = tmp_path / "scaled.safetensors"
    save_file(tensors, path)
    with open_checkpoint(path) as checkpoint:
        found = find_formats(checkpoint)
        assert found.kind == SCALED_FP8 and list(found.layers) == [LAYER]
        got = dequantized(found)[f"{LAYER}.weight"].wide()
    assert torch.allclose(got, (weight / scale).to(torch.float8_e4m3fn).float() * scale)
    with pytest.raises(StrettoError, match="already"):
        plan_file(path)
    result = quantize(path, tmp_path / "int8.safetensors", transcode=True)
    assert not any(check.problem for check in verify(result.path, path))


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "F16"])
def test_gguf_is_read_and_transcoded(tmp_path, form):
    gguf = pytest.importorskip("gguf", reason="the package gguf decodes GGUF blocks; it is optional")
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    expected = {}
    for name, tensor in flux(dtype=torch.float32).items():
        values = tensor.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            data = gguf.quants.quantize(values, kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
            expected[name] = tensor
    writer.add_array("comfy.gguf.orig_shape.img_in.bias", [HIDDEN])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensors[name].wide(), tensor), name
        assert torch.equal(checkpoint.tensors[f"{LAYER}.weight"].wide(3, 9), expected[f"{LAYER}.weight"][3:9])
    assert form in " ".join(inspect(tmp_path / "m.gguf").lines())
    result = quantize(tmp_path / "m.gguf", tmp_path / "out.safetensors", transcode=True)
    assert not any(check.problem for check in verify(result.path, tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GGUF" + struct.pack("<I", 9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "claims 1,099,511,627,776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50), "bytes in a text"),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 1, 0)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IQIQ", 1, 64, 0, 1 << 30),
            "'a' ends at byte",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 64, 99, 0),
            "'a' is of GGUF type 99",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1), "truncated"),
        (b"nope", "not a GGUF file"),
    ],
)
def test_damaged_gguf_is_refused(tmp_path, raw, words):
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(StrettoError) as error:
        open_checkpoint(tmp_path / "x.gguf")
    assert words in str(error.value)


def test_files_of_others_are_recognised_and_explained(tmp_path):
    svdq = {"transformer_blocks.0.qkv_proj.qweight": torch.zeros(8, 4, dtype=torch.int8),
            "transformer_blocks.0.qkv_proj.wscales": torch.ones(1, 8),
            "transformer_blocks.0.qkv_proj.smooth_factor": torch.ones(8)}  # fmt: skip
    nf4 = {
        "a.weight": torch.zeros(8, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(1),
        "a.weight.quant_state.bitsandbytes__nf4": torch.ones(3),
    }
    for tensors, kind, words in ((svdq, NUNCHAKU, "ComfyUI-nunchaku"), (nf4, NF4, "bitsandbytes")):
        save_file(tensors, tmp_path / "x.safetensors")
        assert inspect(tmp_path / "x.safetensors").kind == kind
        with open_checkpoint(tmp_path / "x.safetensors") as checkpoint, pytest.raises(StrettoError, match=words):
            find_formats(checkpoint).require_readable()
    bare = {name: tensor for name, tensor in flux().items() if LAYER not in name}
    bare |= {f"{LAYER}.weight": torch.ones(768, 256, dtype=torch.int8), f"{LAYER}.weight_scale": torch.ones(768, 1)}
    save_file(bare, tmp_path / "x.safetensors")
    with pytest.raises(StrettoError, match="--assume-rotation"):
        plan_file(tmp_path / "x.safetensors", transcode=True)
    plan = plan_file(tmp_path / "x.safetensors", transcode=True, assume_rotation=0)
    with plan.checkpoint:
        assert torch.equal(plan.tensors[f"{LAYER}.weight"].wide(0, 2), torch.ones(2, 256))


@pytest.mark.parametrize("form", ["int8", "w6a8", "w4a8", "fp8", "fp8_rows", "w4a16"])
def test_every_format_is_written_found_and_verified(source, tmp_path, form):
    result = quantize(source, tmp_path / "q.safetensors", format=form)
    assert {report.format for report in result.layers} == {form} and len(result.layers) == 10
    checks = verify(result.path, source)
    assert len(checks) == 10 and not any(check.problem for check in checks)
    found = inspect(result.path)
    assert found.kind == COMFY and found.formats[form] == 10 and found.architecture == "FLUX.1"
    assert found.parameters == sum(tensor.numel() for tensor in flux().values())


# recipes


def test_presets_are_recipes_of_architectures():
    for path in sorted(PRESETS.glob("*.json")):
        recipe = load_recipe(path)
        assert recipe.architecture == path.stem == recipe.name and recipe.source and recipe.safe


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"recipe": 2}, "reads 1"),
        ({}, "no field `recipe`"),
        ({"recipe": 1, "default": "int7"}, "'int7'"),
        ({"recipe": 1, "rules": [{"match": "(", "format": "keep"}]}, "no regular expression"),
        ({"recipe": 1, "rules": [{"match": "a"}]}, "expected match and format"),
        ({"recipe": 1, "colour": "red"}, "unknown field 'colour'"),
        ({"recipe": 1, "min_numel": "many"}, "expected int"),
        ({"recipe": 1, "weight_only": "w4a8"}, "weight_only"),
    ],
)
def test_wrong_recipes_are_refused_with_the_field(tmp_path, document, words):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(document))
    with pytest.raises((StrettoError, SchemaError)) as error:
        load_recipe(path)
    assert words in str(error.value) and "recipe.json" in str(error.value)


def test_rules_decide_in_order_and_illegal_layers_are_refused(source):
    recipe = Recipe(rules=(Rule("_mlp", "w6a8"), Rule("txt", "keep"), Rule("img_mod", "w4a16")), weight_only="keep")
    plan = plan_file(source, recipe)
    with plan.checkpoint:
        formats = {choice.layer: choice.layout.name for choice in plan.quantized.values()}
    assert formats["double_blocks.0.txt_mlp.0"] == "w6a8" and "double_blocks.0.txt_attn.qkv" not in formats
    assert formats["double_blocks.0.img_mod.lin"] == "w4a16" and formats[LAYER] == "int8" and "img_in" not in formats
    with pytest.raises(StrettoError, match="img_in, which has to stay"):
        plan_file(source, Recipe(layers={"img_in": "int8"}))
    with pytest.raises(StrettoError, match="'nothing', which the checkpoint does not have"):
        plan_file(source, Recipe(layers={"nothing": "int8"}))
    with pytest.raises(StrettoError, match="is for wan"):
        plan_file(source, Recipe(architecture="wan"))


def test_an_unknown_architecture_needs_rules(tmp_path):
    save_file({"layer.weight": seeded(256, 256), "other.weight": seeded(256, 20)}, tmp_path / "x.safetensors")
    with pytest.raises(StrettoError, match="no architecture that this release knows"):
        plan_file(tmp_path / "x.safetensors")
    plan = plan_file(tmp_path / "x.safetensors", Recipe(rules=(Rule("layer|other", "w4a8"),), min_numel=0))
    with plan.checkpoint:
        choices = {choice.layer: choice for choice in plan.choices}
    assert choices["layer"].layout.name == "w4a8"
    assert choices["other"].layout.name == "int8" and "no rotation size" in choices["other"].why


# the command line


@pytest.fixture
def cli():
    import importlib.util

    spec = importlib.util.spec_from_file_location("stretto_cli_under_test", ROOT / "cli.py")
    sys.path.insert(0, str(ROOT))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_command_line_quantizes_verifies_inspects_and_transcodes(cli, source, tmp_path, capsys):
    assert cli.main(["quantize", str(source), "--format", "mixed", "--budget", "4.1MB", "--list"]) == 0
    text = capsys.readouterr().out
    made = tmp_path / "flux-mixed.safetensors"
    assert "w6a8" in text and "written, relative weight error" in text and made.stat().st_size <= 4.1e6
    assert cli.main(["verify", str(made), "--source", str(source)]) == 0
    assert "10 quantized layers read, 0 wrong" in capsys.readouterr().out
    assert cli.main(["inspect", str(made), str(source)]) == 0
    assert "FLUX.1" in capsys.readouterr().out
    assert cli.main(["transcode", str(made), str(tmp_path / "t.safetensors"), "--format", "fp8"]) == 0
    assert cli.main(["quantize", str(source), "--dry-run"]) == 0
    assert cli.main(["quantize", str(made)]) == 2
    assert "use `transcode`" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), "--format", "mixed"]) == 2
    assert "--budget" in capsys.readouterr().err
    wrong = edited(
        made,
        tmp_path,
        lambda tensors, metadata: tensors.__setitem__(f"{LAYER}.weight", tensors[f"{LAYER}.weight"].flip(0)),
    )
    assert cli.main(["verify", str(wrong)]) == 1
    assert f"wrong: {LAYER}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "transcode", "compare", "panel"])
def test_every_command_has_help_and_needs_no_torch_for_it(command):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['cli.py', {!r}, '--help']; sys.path.insert(0, {!r}); "
    code = code.format(command, str(ROOT)) + "import cli; cli.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "usage: cli.py" in result.stdout, result.stderr
