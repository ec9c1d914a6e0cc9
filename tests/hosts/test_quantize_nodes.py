"""The nodes that record statistics and make quantized files, on the demo image model."""

from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.hosts import comfy_quantization as host
from stretto.acceleration.hosts.comfy_quantization_statistics import record_statistics, runs
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.quality import psnr
from stretto.acceleration.quantization import command_line
from stretto.acceleration.quantization import statistics as files
from stretto.acceleration.quantization.planning import Wishes, plan_wishes
from stretto.acceleration.quantization.statistics import Statistics, load_statistics
from stretto.demo.text_encoder import load
from stretto.nodes import quantize as nodes
from stretto.nodes.profile import ProfiledRun

DEMO = Path(__file__).resolve().parents[2] / "demo" / "models"
IMAGE = DEMO / "diffusion_models" / "stretto-demo-image.safetensors"
LAYER = "joint_blocks.0.x_block.mlp.fc1"


@pytest.fixture(scope="module")
def job():
    encoder = load(DEMO / "text_encoders" / "stretto-demo-text.safetensors")

    def encode(words):
        states, pooled, _ = encoder.encode([words])
        return [[states, {"pooled_output": pooled}]]

    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    model = comfy.sd.load_diffusion_model(str(IMAGE))
    return SamplingJob(model, encode("fluent red apple"), encode(""), latent, 7, 6, 4.0, "euler", "simple")


@pytest.fixture(scope="module")
def recorded(job):
    ticks = []
    found = record_statistics(job, True, 2, tick=lambda: ticks.append(1))
    assert len(ticks) == runs(job, True) == 2 + 29 * 3
    return found


def quiet(job, model=None):
    return job(model, callback=lambda *_: None)


def test_statistics_are_the_largest_inputs_and_the_run_is_untouched(job, recorded):
    before = quiet(job)
    layer, largest = comfy.utils.get_attr(job.model.model.diffusion_model, LAYER), []
    handle = layer.register_forward_pre_hook(
        lambda module, inputs: largest.append(inputs[0].abs().reshape(-1, inputs[0].shape[-1]).amax(0))
    )
    assert torch.equal(quiet(job), before)
    handle.remove()
    assert torch.equal(recorded.maxima[LAYER], torch.stack(largest).amax(0).float().cpu())
    assert len(recorded.maxima) == 29 and "6 steps of euler" in recorded.words


def test_losses_fall_with_bits(recorded):
    by_format = {
        form: sum(cell.loss for cell in recorded.cells if cell.format == form) for form in ("w4a8", "w6a8", "int8")
    }
    assert by_format["w4a8"] > 3 * by_format["w6a8"] > 3 * by_format["int8"] > 0


def test_a_quantized_model_is_refused(job):
    model, _ = host.load_diffusion_model(str(IMAGE), "int8", host.STRETTO)
    with pytest.raises(StrettoError, match="quantized already"):
        record_statistics(SamplingJob(model, *[None] * 9), False, 1)


def test_statistics_files_are_read_back_and_wrong_ones_refused(recorded, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    recorded.save(path)
    again = load_statistics(path)
    assert again.cells == recorded.cells and again.words == recorded.words and again.digest() == recorded.digest()
    assert all(torch.equal(row, recorded.maxima[layer]) for layer, row in again.maxima.items())
    with pytest.raises(StrettoError, match="exists already"):
        recorded.save(path)
    with pytest.raises(StrettoError, match="no statistics"):
        load_statistics(IMAGE)
    monkeypatch.setattr(files, "VERSION", 2)
    recorded.save(tmp_path / "newer.safetensors")
    monkeypatch.setattr(files, "VERSION", 1)
    with pytest.raises(SchemaError, match="statistics are 2; this release reads 1"):
        load_statistics(tmp_path / "newer.safetensors")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"version": 1, "words": "", "cells": 5}', "its cells are 5"),
        ('{"version": 1, "words": "", "cells": [["a", "int8", 0, NaN]]}', "a cell is"),
        ('{"version": 1, "words": "", "cells": []}', "expected one fp32 number per channel"),
    ],
)
def test_damaged_statistics_are_refused_with_the_reason(tmp_path, document, words):
    save_file({"layer": torch.zeros(2, 2)}, tmp_path / "run.safetensors", {files.KEY: document})
    with pytest.raises(StrettoError, match=words):
        load_statistics(tmp_path / "run.safetensors")


def test_wishes_that_cannot_be_fulfilled_are_refused(recorded):
    with pytest.raises(StrettoError, match="balancing needs statistics"):
        plan_wishes(Wishes(IMAGE, balance=True))
    with pytest.raises(StrettoError, match="of another model"):
        plan_wishes(Wishes(IMAGE, balance=True, statistics=Statistics({"elsewhere": torch.ones(4)})))
    with pytest.raises(StrettoError, match=f"3 channels for {LAYER}"):
        plan_wishes(Wishes(IMAGE, balance=True, statistics=Statistics({LAYER: torch.ones(3)})))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(nodes, "path_of", lambda kind, name: str(IMAGE))
    return tmp_path


def make(**changes):
    wishes = {"model_name": IMAGE.name, "format": "w4a8", "budget": 0.0, "balance": False, "keep_ends": False, "keep": "",
              "name": ""}  # fmt: skip
    return nodes.StrettoQuantize.execute(**{**wishes, **changes}).args


def test_the_node_makes_a_file_once_and_never_writes_over_one(job, folders):
    before = IMAGE.read_bytes()
    model, path, report = make()
    assert Path(path).parent == folders / "output" / "diffusion_models" and "29 w4a8" in report
    assert psnr(quiet(job, model), quiet(job), 8.0) > 20
    stamp = Path(path).stat().st_mtime_ns
    _, again, report = make()
    assert again == path and Path(path).stat().st_mtime_ns == stamp and "made earlier" in report
    assert Path(make(keep_ends=True)[1]).name == "stretto-demo-image-w4a8-2.safetensors"
    assert Path(make(keep_ends=True)[1]).name == "stretto-demo-image-w4a8-2.safetensors"
    with pytest.raises(StrettoError, match="made otherwise; choose another name"):
        make(keep_ends=True, name="stretto-demo-image-w4a8")
    with pytest.raises(StrettoError, match="mixed needs a budget above 0"):
        make(format="mixed")
    with pytest.raises(StrettoError, match="use 1 to 64 letters"):
        make(name="../escape")
    assert IMAGE.read_bytes() == before


def test_mixed_precision_and_balancing_use_the_statistics(job, recorded, folders):
    link = nodes.Recorded(recorded, folders)
    _, path, report = make(format="mixed", budget=13.2, statistics=link)
    assert "sensitivity: measured, 29 layers" in report and " w4a8" in report and " w6a8" in report
    assert 13.0e6 < Path(path).stat().st_size <= 13.2e6 + 50_000  # and the header
    balanced, path, report = make(balance=True, statistics=link)
    assert "factors folded before" in report and "balanced" in Path(path).name
    plain, _, _ = make()
    right = quiet(job)
    assert psnr(quiet(job, balanced), right, 8.0) > psnr(quiet(job, plain), right, 8.0) - 1


def test_a_cancelled_run_leaves_nothing(folders, monkeypatch):
    def cancel():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make()
    assert not list((folders / "output").rglob("*.*"))


def test_the_statistics_node_saves_under_a_free_name_and_the_command_line_reads_it(job, folders, recorded, monkeypatch):
    monkeypatch.setattr(nodes, "record_statistics", lambda *_, **__: recorded)
    run = ProfiledRun(SimpleNamespace(about={"family": "sd3"}), job, None)
    first = nodes.StrettoQuantizationStatistics.execute(run, True, 2, "").args
    second = nodes.StrettoQuantizationStatistics.execute(run, True, 2, "").args
    assert first[0].path.name == "sd3-statistics.safetensors" and second[0].path.name == "sd3-statistics-2.safetensors"
    assert "Layers that mind 4 bits most" in first[1]
    arguments = SimpleNamespace(
        command="quantize", source=IMAGE, target=folders / "out.safetensors", recipe=None, format="w4a8", keep=[], safe=False,
        budget=None, sensitivity=None, statistics=first[0].path, balance=True, by_group=False, dry_run=False, list=False,
        replace=False, workers=1, no_hash=False,
    )  # fmt: skip
    said = []
    assert command_line.run_quantize(arguments, said.append, lambda *_: None) == 0
    assert any("factors folded before" in line for line in said) and any("balanced by" in line for line in said)
