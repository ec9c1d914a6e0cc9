"""What the benchmarks of a GPU do without one: parts that fail or run too long lose nothing, and sums are right."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name, monkeypatch):
    """Import a benchmark as it runs: its neighbours lie beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def part(gpu, name, code, limit=30.0):
    return gpu.Part(name, ("-c", code), limit, ("-c", code))


@pytest.fixture
def gpu(monkeypatch):
    module = load("gpu", monkeypatch)
    monkeypatch.setattr(module, "machine", lambda: {"gpu": None})
    return module


def go(gpu, folder, parts, **options):
    args = argparse.Namespace(out=folder, comfyui=folder, dry=True, resume=False, limit=0.0, only=None)
    status = gpu.go(argparse.Namespace(**{**vars(args), **options}), parts)
    return status, json.loads((folder / "gpu.json").read_text())["parts"]


def test_a_part_that_fails_or_runs_too_long_loses_nothing(gpu, tmp_path):
    parts = (
        part(gpu, "good", "print('all is well')"),
        part(gpu, "bad", "raise SystemExit('out of luck')"),
        part(gpu, "slow", "import time; print('began', flush=True); time.sleep(60)", limit=2.0),
        part(gpu, "last", "print('still here')"),
    )
    status, book = go(gpu, tmp_path, parts)
    assert status == 1
    assert {name: row["status"] for name, row in book.items()} == {
        "good": gpu.DONE, "bad": gpu.FAILED, "slow": gpu.LATE, "last": gpu.DONE,
    }  # fmt: skip
    assert book["good"]["last_line"] == "all is well" and book["bad"]["last_line"] == "out of luck"
    assert "began" in (tmp_path / "slow.log").read_text()


def test_what_is_done_is_not_run_again(gpu, tmp_path):
    count = "import pathlib; p = pathlib.Path('count'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    parts = (part(gpu, "once", count), part(gpu, "fails", "raise SystemExit(3)"))
    go(gpu, tmp_path, parts)
    status, book = go(gpu, tmp_path, (parts[0], part(gpu, "fails", "print('now it works')")), resume=True)
    assert status == 0 and book["fails"]["status"] == gpu.DONE and (tmp_path / "count").read_text() == "x"


def test_without_a_gpu_the_command_says_so(gpu, tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, comfyui=tmp_path, dry=False, resume=False, limit=0.0, only=None)
    assert gpu.go(args, ()) == 2 and "no CUDA device" in capsys.readouterr().err


def test_every_script_that_the_parts_name_is_there(gpu):
    names = [word for each in gpu.PARTS for word in (*each.command, *each.dry) if word.endswith(".py")]
    assert names and all(Path(name.format(root=BENCHMARKS.parent)).is_file() for name in names)


def test_operators_are_told_by_name_and_positions_by_their_pairs(monkeypatch):
    operators = load("operators", monkeypatch)
    told = {
        ("aten::addmm", 2): operators.LINEAR,
        ("aten::_int_mm", 2): operators.LINEAR,
        ("aten::_scaled_dot_product_flash_attention", 4): operators.ATTENTION,
        ("stretto::block_sparse_attention", 4): operators.ATTENTION,
        ("aten::mul", 3): operators.NORM,
        ("aten::mul", 5): operators.ROPE,
        ("aten::cudnn_convolution", 4): operators.CONVOLUTION,
        ("aten::copy_", 3): operators.OTHER,
    }
    assert {key: operators.class_of(key[0], [key[1]]) for key in told} == told


def test_amdahls_bound(monkeypatch):
    operators = load("operators", monkeypatch)
    assert operators.at_most(0.75) == pytest.approx(4.0) and operators.at_most(0.5, 2.0) == pytest.approx(4 / 3)
    assert operators.at_most(1.0) == float("inf") and operators.shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}


def test_schedules_of_whole_runs_and_reduced_networks(monkeypatch):
    sizes = load("sizes", monkeypatch)
    mask = sizes.whole_mask(28)
    assert len(mask) == 28 and mask.startswith("####..#..#") and mask.endswith("#") and mask.count("#") == 12
    shape = sizes.SHAPES["flux-dev"]
    config = sizes.size_models.reduced(shape, 2, 0.25)
    assert shape.blocks == 57 and (config["depth"], config["depth_single_blocks"]) == (2, 2)
    assert config["num_heads"] == 6 and config["hidden_size"] == 768
    assert sizes.size_models.reduced(shape, 0, 1.0) == shape.config
