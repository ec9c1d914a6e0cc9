"""Combined checkpoints, searched coefficients and pruned depth (T16)."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.quantization import writer
from stretto.acceleration.quantization.checkpoints import open_checkpoint
from stretto.acceleration.weights import depth as depths
from stretto.acceleration.weights.combining import METADATA_KEY, open_combination, weighted, write_combination
from stretto.acceleration.weights.depth import (
    Depth,
    find_depth,
    intervals,
    parse_drop,
    preset_drop,
    prune_file,
    prune_lora,
)
from stretto.acceleration.weights.search import Search, SearchSettings

ROOT = Path(__file__).resolve().parents[2]


def tensors(seed, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    made = {f"blocks.{i}.weight": torch.randn(24, 16, generator=generator).to(dtype) for i in range(3)}
    made["bias"] = torch.randn(5, generator=generator).to(dtype)
    made["bias"][0] = -0.0
    made["scalar"] = torch.tensor(0.5 + seed, dtype=torch.float32)
    made["steps"] = torch.tensor([7], dtype=torch.int64)
    return made


def files(tmp_path, count=3, dtype=torch.float16):
    paths = []
    for seed in range(count):
        paths.append(tmp_path / f"epoch-{seed}.safetensors")
        save_file(tensors(seed, dtype), paths[-1], metadata={"modelspec.title": "toy"})
    return paths


def combine(paths, coefficients, target, **options):
    with open_combination(paths, coefficients, **options) as group:
        return load_file(write_combination(group, target))


def bits(state):
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [0, 2])
def test_one_hot_coefficients_reproduce_a_checkpoint_bit_for_bit(tmp_path, dtype, index):
    paths = files(tmp_path, dtype=dtype)
    made = combine(paths, [float(place == index) for place in range(3)], tmp_path / "made.safetensors")
    assert bits(made) == bits(load_file(paths[index]))


def test_combinations_are_exact_in_fp32_and_rounded_once(tmp_path, monkeypatch):
    paths, coefficients = files(tmp_path), (1.75, -1.25, 0.5)
    monkeypatch.setattr("stretto.acceleration.weights.combining.BLOCK", 48)  # several blocks per tensor
    made = combine(paths, coefficients, tmp_path / "made.safetensors")
    for name, tensor in made.items():
        sources = [load_file(path)[name] for path in paths]
        if tensor.dtype.is_floating_point:
            right = sum(value * source.double() for value, source in zip(coefficients, sources))
            assert torch.equal(tensor, right.float().to(tensor.dtype)) or torch.allclose(
                tensor.double(), right, rtol=2e-3 if tensor.dtype == torch.float16 else 1e-6, atol=1e-7
            )
        else:
            assert torch.equal(tensor, sources[0])
    exact = weighted((0.5, -0.25, 0.75), [torch.tensor([4.0]), torch.tensor([8.0]), torch.tensor([2.0])], torch.float32)
    assert exact.item() == 1.5
    with open_checkpoint(tmp_path / "made.safetensors") as found:
        assert found.metadata["modelspec.title"] == "toy"
        assert json.loads(found.metadata[METADATA_KEY]) == [[path.name, value] for path, value in zip(paths, coefficients)]


def test_the_same_checkpoint_thrice_is_itself(tmp_path):
    path = files(tmp_path, 1, torch.float32)[0]
    made = combine([path] * 3, [0.5, -0.25, 0.75], tmp_path / "made.safetensors")
    assert all(torch.allclose(made[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in load_file(path).items())


def test_what_does_not_fit_is_refused_and_nothing_is_touched(tmp_path, monkeypatch):
    paths = files(tmp_path)
    before = {path: path.read_bytes() for path in paths}
    target = tmp_path / "made.safetensors"
    with pytest.raises(StrettoError, match="3 files and 2 coefficients"):
        combine(paths, [0.5, 0.5], target)
    with pytest.raises(StrettoError, match="add up to 0.9"):
        combine(paths, [0.5, 0.2, 0.2], target)
    with pytest.raises(StrettoError, match="must be finite"):
        combine(paths, [float("nan"), 0.5, 0.5], target)
    with pytest.raises(StrettoError, match="not finite in torch.float16"):
        combine(paths, [60000.0, -59999.0, 0.0], target)
    other = tensors(5)
    for change, words in (
        (lambda t: t.pop("bias"), r"'bias' is in epoch-0.safetensors only"),
        (lambda t: t.update(bias=torch.zeros(6, dtype=torch.float16)), r"'bias' is \[6\]; epoch-0.safetensors has \[5\]"),
        (lambda t: t.update(steps=torch.tensor([8])), "whole numbers that differ"),
    ):
        state = dict(other)
        change(state)
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(StrettoError, match=words):
            combine([paths[0], tmp_path / "other.safetensors"], [0.5, 0.5], target)
    (tmp_path / "short.safetensors").write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(StrettoError, match=r"short.safetensors: truncated"):
        combine([paths[0], tmp_path / "short.safetensors"], [0.5, 0.5], target)
    with pytest.raises(StrettoError, match="is one of the sources"):
        combine(paths, [0.5, 0.25, 0.25], paths[0])
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(StrettoError, match="GB are free"):
        combine(paths, [0.5, 0.25, 0.25], target)
    assert not target.exists() and not list(tmp_path.glob(".*.part"))
    assert before == {path: path.read_bytes() for path in paths}


def lora(seed, rank, alpha):
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_unet_blocks_0_q.lora_down.weight": torch.randn(rank, 16, generator=generator),
        "lora_unet_blocks_0_q.lora_up.weight": torch.randn(24, rank, generator=generator),
        "lora_unet_blocks_0_q.alpha": torch.tensor(float(alpha)),
    }


def product(state, name="lora_unet_blocks_0_q"):
    down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
    return up.double() @ down.double() * float(state[f"{name}.alpha"]) / down.shape[0]


def test_of_loras_the_products_are_combined_not_the_factors(tmp_path):
    paths, states = [], [lora(1, 4, 4), lora(2, 8, 2), lora(3, 4, 8)]
    for place, state in enumerate(states):
        paths.append(tmp_path / f"lora-{place}.safetensors")
        save_file(state, paths[-1])
    coefficients = (0.75, -0.5, 0.25)
    made = combine(paths, coefficients, tmp_path / "made.safetensors")
    right = sum(value * product(state) for value, state in zip(coefficients, states))
    assert torch.allclose(product(made), right, rtol=1e-5, atol=1e-5)
    factors = sum(value * state["lora_unet_blocks_0_q.lora_up.weight"] for value, state in zip((0.75, 0.25), states[::2]))
    assert not torch.allclose(made["lora_unet_blocks_0_q.lora_up.weight"][:, :4], factors)
    assert bits(combine(paths, (0.0, 1.0, 0.0), tmp_path / "one.safetensors")) == bits(states[1])
    save_file({**states[0], "lora_unet_blocks_0_q.dora_scale": torch.ones(24)}, paths[0])
    with pytest.raises(StrettoError, match="belongs to no plain LoRA"):
        combine(paths[:1], (2.0,), tmp_path / "dora.safetensors")


def bowl(point):
    """A quadratic whose least value under sum 1 is 0, at a point with negative coefficients."""
    target = np.array([-0.3, -0.2, 0.4, 1.1])
    away = np.array(point) - target
    return float(away @ np.diag([1.0, 4.0, 2.0, 8.0]) @ away)


SETTINGS = SearchSettings(generations=20, population=12, spread=0.4)


def test_a_search_finds_signed_coefficients():
    search = Search.open(4, SETTINGS)
    point, value = search.run(bowl)
    assert value < 0.01 < min(bowl(corner) for corner in np.eye(4)) and point[0] < 0
    assert all(abs(sum(point) - 1) < 1e-9 for point, _ in search.points)
    assert search.curve == sorted(search.curve, reverse=True) and search.curve[-1] == value
    assert len(search.points) == 4 + 1 + 20 * 12


def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path):
    whole = Search.open(4, SETTINGS)
    whole.run(bowl)
    calls = []

    def tired(point):
        calls.append(point)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return bowl(point)

    with pytest.raises(KeyboardInterrupt):
        Search.open(4, SETTINGS, tmp_path / "search.json").run(tired)
    again = Search.open(4, SETTINGS, tmp_path / "search.json")
    assert len(again.points) == 69
    again.run(bowl)
    assert again.points == whole.points
    with pytest.raises(StrettoError, match="another search"):
        Search.open(5, SETTINGS, tmp_path / "search.json")
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(StrettoError, match="not a search that can be continued"):
        Search.open(4, SETTINGS, tmp_path / "search.json")
    with pytest.raises(StrettoError, match="counts start at 1"):
        SearchSettings(generations=0)


def test_metrics_that_are_not_finite_never_win():
    search = Search.open(3, SearchSettings(generations=2, population=4))
    point, value = search.run(lambda point: float("nan") if min(point) < 0 else sum(value**2 for value in point))
    assert np.isfinite(value) and min(point) >= 0


FLUX = [f"double_blocks.{i}.img_attn.norm.key_norm.scale" for i in range(4)] + [
    f"single_blocks.{i}.linear1.weight" for i in range(6)
] + ["img_in.weight"]  # fmt: skip
QWEN = [f"transformer_blocks.{i}.img_mod.1.weight" for i in range(60)] + ["txt_norm.weight"]


def test_blocks_are_named_by_numbers_ranges_and_lists():
    counts = {"double_blocks": 4, "single_blocks": 6}
    assert parse_drop("double_blocks:1, 3 single_blocks:2-4", counts) == {"double_blocks": {1, 3}, "single_blocks": {2, 3, 4}}
    assert parse_drop("0,2-3", {"blocks": 4}) == {"blocks": {0, 2, 3}}
    for text, words in (("1", "needs a list"), ("double_blocks:4", "has blocks 0 to 3"), ("double_blocks:x", "neither a number"),
                        ("heads:1", "needs a list"), ("double_blocks:3-1", "has blocks")):  # fmt: skip
        with pytest.raises(StrettoError, match=words):
            parse_drop(text, counts)
    for names, drop, words in ((FLUX, "double_blocks:0-3", "no block of double_blocks"), (FLUX, "", "no blocks to drop"),
                               (["x.weight"], "1", "blocks can be dropped of"),
                               (["joint_blocks.0.context_block.attn.qkv.weight"], "0", "from their width")):  # fmt: skip
        with pytest.raises(StrettoError, match=words):
            find_depth(names, drop)


def test_what_is_left_is_numbered_without_gaps():
    depth = find_depth(FLUX, "double_blocks:1 single_blocks:0,4-5")
    assert depth.kept == {"double_blocks": (0, 2, 3), "single_blocks": (1, 2, 3)}
    assert depth.renamed("double_blocks.2.img_mlp.0.weight") == "double_blocks.1.img_mlp.0.weight"
    assert depth.renamed("single_blocks.4.linear1.weight") is None and depth.renamed("img_in.weight") == "img_in.weight"
    for old, new in (
        ("lora_unet_double_blocks_3_img_attn_qkv.lora_up.weight", "lora_unet_double_blocks_2_img_attn_qkv.lora_up.weight"),
        ("diffusion_model.single_blocks.3.linear1.lora_A.weight", "diffusion_model.single_blocks.2.linear1.lora_A.weight"),
        ("transformer.transformer_blocks.2.attn.to_q.lora_A.weight", "transformer.transformer_blocks.1.attn.to_q.lora_A.weight"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", None),
        ("lora_unet_single_blocks_4_linear1.alpha", None),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1.alpha", "lora_te1_text_model_encoder_layers_3_mlp_fc1.alpha"),
    ):
        assert depth.renamed_lora(old) == new


def test_the_published_list_drops_25_of_60_blocks():
    dropped, source = preset_drop("ppcl-qwen-image")
    depth = find_depth(QWEN, dropped)
    assert len(depth.kept["transformer_blocks"]) == 35 and "published, not measured" in source
    assert intervals(dropped["transformer_blocks"])[:12] == "4, 6-7, 9-10"
    with pytest.raises(StrettoError, match="known are ppcl-qwen-image"):
        preset_drop("other")


def test_files_and_loras_are_pruned_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(depths, "_COPY", 64)
    wan = {f"blocks.{i}.self_attn.q.weight": torch.full((8, 8), float(i)) for i in range(5)}
    wan |= {"head.modulation": torch.ones(1, 2, 8)}
    save_file(wan, tmp_path / "wan.safetensors")
    source = (tmp_path / "wan.safetensors").read_bytes()
    depth, before, after = prune_file(tmp_path / "wan.safetensors", "1,3", tmp_path / "small.safetensors")
    assert depth.kept == {"blocks": (0, 2, 4)} and before - after == 2 * 8 * 8 * 4
    made = load_file(tmp_path / "small.safetensors")
    assert [made[f"blocks.{i}.self_attn.q.weight"][0, 0].item() for i in range(3)] == [0, 2, 4] and len(made) == 4
    with open_checkpoint(tmp_path / "small.safetensors") as found:
        assert Depth.from_metadata(tmp_path, found.metadata) == depth
    adapter = {f"lora_unet_blocks_{i}_self_attn_q.lora_up.weight": torch.full((8, 2), float(i)) for i in range(5)}
    save_file(adapter, tmp_path / "lora.safetensors")
    kept, gone = prune_lora(tmp_path / "lora.safetensors", tmp_path / "small.safetensors", tmp_path / "l2.safetensors")
    assert (kept, gone) == (3, 2)
    assert load_file(tmp_path / "l2.safetensors")["lora_unet_blocks_2_self_attn_q.lora_up.weight"][0, 0] == 4
    with pytest.raises(StrettoError, match="not made by prune-depth"):
        prune_lora(tmp_path / "lora.safetensors", tmp_path / "wan.safetensors", tmp_path / "l3.safetensors")
    with pytest.raises(StrettoError, match="is the source"):
        prune_file(tmp_path / "wan.safetensors", "1", tmp_path / "wan.safetensors", replace=True)
    with pytest.raises(StrettoError, match="exists already"):
        prune_file(tmp_path / "wan.safetensors", "1", tmp_path / "small.safetensors")
    assert (tmp_path / "wan.safetensors").read_bytes() == source


def command_line():
    """cli.py as a module."""
    spec = importlib.util.spec_from_file_location("stretto_cli_of_weights", ROOT / "cli.py")
    cli = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))
    try:
        spec.loader.exec_module(cli)
    finally:
        sys.path.remove(str(ROOT))
    return cli


def test_the_command_line_combines_and_prunes(tmp_path, capsys):
    cli = command_line()
    paths = [str(path) for path in files(tmp_path, 2)]
    out = str(tmp_path / "made.safetensors")
    assert cli.main(["combine", *paths, "--weights", "1.5", "-0.5", "--out", out]) == 0
    assert cli.main(["combine", *paths, "--weights", "1.5", "-0.5", "--out", out]) == 2
    told = capsys.readouterr()
    assert "+1.5" in told.out and "exists already" in told.err and "Traceback" not in told.err
    save_file({f"blocks.{i}.self_attn.q.weight": torch.ones(2, 2) for i in range(4)} | {"head.modulation": torch.ones(1)},
              tmp_path / "wan.safetensors")  # fmt: skip
    assert cli.main(["prune-depth", str(tmp_path / "wan.safetensors"), "--drop", "1-2"]) == 0
    assert "2 left, numbered 0 to 1 (without 1-2)" in capsys.readouterr().out
    assert (tmp_path / "wan-pruned.safetensors").exists()
    for bad in ([], ["--drop", "9"], ["--preset", "x"], ["--drop", "1", "--preset", "ppcl-qwen-image"]):
        assert cli.main(["prune-depth", str(tmp_path / "wan.safetensors"), *bad]) == 2
    assert "Traceback" not in capsys.readouterr().err


#: Prints how far the tensor "scalar" is from -0.25; needs Python alone, and can be told to fail at one evaluation.
METRIC = """
import json, pathlib, struct, sys
path, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
log.write_text((log.read_text() if log.exists() else "") + ".")
if len(log.read_text()) == int(sys.argv[3]):
    sys.exit("out of memory")
raw = path.read_bytes()
size = struct.unpack("<Q", raw[:8])[0]
begin, end = json.loads(raw[8 : 8 + size])["scalar"]["data_offsets"]
print("loss", abs(struct.unpack("<f", raw[8 + size + begin : 8 + size + end])[0] + 0.25))
"""


def searching(tmp_path, name, fail=0, **options):
    script = tmp_path / "metric.py"
    script.write_text(METRIC)
    metric = f"{sys.executable} -S {script} {{file}} {tmp_path / name}.log {fail}"
    settings = {"metric": metric, "generations": 3, "population": 4, "out": tmp_path / f"{name}.safetensors", **options}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def test_the_command_line_searches_with_a_command_and_goes_on_after_a_failure(tmp_path, capsys):
    cli, paths = command_line(), files(tmp_path, 3)
    before = [path.read_bytes() for path in paths]
    names = [str(path) for path in paths]
    options = searching(tmp_path, "one", fail=9, curve=tmp_path / "curve.svg")
    assert cli.main(["combine-search", *names, *options]) == 2
    told = capsys.readouterr()
    assert "status 1: out of memory" in told.err and "Traceback" not in told.err
    assert not (tmp_path / "one.safetensors").exists()
    document = json.loads((tmp_path / "one.search.json").read_text())
    assert len(document["points"]) == len(document["curve"]) == 8
    assert cli.main(["combine-search", *names, *options]) == 0
    told = capsys.readouterr()
    assert "18 evaluations, 8 known" in told.out and len((tmp_path / "one.log").read_text()) == 19
    assert cli.main(["combine-search", *names, *searching(tmp_path, "two")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.search.json").read_text()) for name in ("one", "two"))
    assert one["points"] == two["points"] and one["curve"][-1] < min(value for _, value in one["points"][:6])
    best = min(one["points"], key=lambda item: item[1])
    made = load_file(tmp_path / "one.safetensors")
    assert abs(float(made["scalar"]) + 0.25) == pytest.approx(best[1], abs=1e-6)
    assert bits(made) == bits(combine(paths, best[0], tmp_path / "same.safetensors"))
    assert "polyline" in (tmp_path / "curve.svg").read_text() and before == [path.read_bytes() for path in paths]
    assert not list(tmp_path.glob(".combine-search-*"))


def test_a_higher_metric_can_be_the_better_one(tmp_path, capsys):
    names = [str(path) for path in files(tmp_path, 3)]
    options = searching(tmp_path, "up", generations=1)
    assert command_line().main(["combine-search", *names, *options, "--maximize"]) == 0
    # Away from -0.25 as far as a generation gets; the last file alone has 2.75.
    assert "the best single file has 2.75" in capsys.readouterr().out
    assert float(load_file(tmp_path / "up.safetensors")["scalar"]) >= 2.5


def test_mistakes_with_a_metric_command_are_named(tmp_path, capsys, monkeypatch):
    cli, names = command_line(), [str(path) for path in files(tmp_path, 3)]
    python = f"{sys.executable} -S -c"
    for metric, words in {
        "": "--metric is empty",
        "'open": "a quotation mark is open",
        "/no/such/program": "'/no/such/program' cannot be run",
        f"{python} pass": "it printed nothing",
        f"{python} 'print(\"good\")'": "it printed 'good'",
    }.items():
        assert cli.main(["combine-search", *names, *searching(tmp_path, "bad", metric=metric)]) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told
    assert cli.main(["combine-search", names[0], *searching(tmp_path, "bad")]) == 2
    assert "name at least two" in capsys.readouterr().err
    assert cli.main(["combine-search", *names, *searching(tmp_path, "bad", scratch=tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    # A search belongs to its files and its metric.
    keep = {"keep": tmp_path / "keep.json", "generations": 1, "population": 1}
    assert cli.main(["combine-search", *names[:2], *searching(tmp_path, "first", **keep)]) == 0
    (tmp_path / "first.safetensors").write_bytes(b"mine")
    assert cli.main(["combine-search", *names[:2], *searching(tmp_path, "first", **keep)]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "first.safetensors").read_bytes() == b"mine"
    assert cli.main(["combine-search", *names[1:], *searching(tmp_path, "second", **keep)]) == 2
    assert "a search of other files or another metric" in capsys.readouterr().err

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("stretto.acceleration.weights.search_command.subprocess.run", stopped)
    assert cli.main(["combine-search", *names, *searching(tmp_path, "stop")]) == 130
    assert "goes on from there" in capsys.readouterr().out
