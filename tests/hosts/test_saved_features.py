"""Tables of modulations in files: used for the model they were made of, and for no other."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts import comfy_quantization as quantization
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.quantization import writer
from stretto.acceleration.safetensors_header import read_header
from stretto.acceleration.temporal_features import saved
from stretto.acceleration.temporal_features.saved import UNCHANGED, identity, read_tables
from stretto.acceleration.temporal_features.tables import FeatureTables

from .test_temporal_features import _lora, component, features, sampled
from .tiny_models import sample

DEMO = Path(__file__).resolve().parents[2] / "demo" / "models" / "diffusion_models" / "stretto-demo-image.safetensors"


@pytest.fixture
def source(tmp_path):
    """A model file that a test may change."""
    return Path(shutil.copy2(DEMO, tmp_path / "model.safetensors"))


def fresh(source, folder, kept=quantization.FEATURE_WEIGHTS[1]):
    """A model as after a restart: nothing but files is known of earlier runs."""
    model, _ = quantization.load_diffusion_model(str(source), features=kept)
    settings = {"mode": "exact", "prompt": True, "folder": str(folder)}
    return host.request(model, Request("temporal_features", settings))


def only(folder):
    (path,) = folder.iterdir()
    return path


def test_after_a_restart_weights_are_not_read_and_the_picture_is_the_same(source, tmp_path, monkeypatch):
    folder = tmp_path / "user" / "stretto"
    model = fresh(source, folder)
    plain = sampled(fresh(source, tmp_path / "other"))
    assert torch.equal(plain, sampled(model)) and "begins with this run" in features()["saved"]
    first = read_header(only(folder))
    again = fresh(source, folder)
    layer = next(m for m in again.model.diffusion_model.modules() if getattr(m, "stretto_source", None) is not None)
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.stretto_source), "whole", lambda _: pytest.fail("a weight was read"))
        assert torch.equal(plain, sampled(again))
    item = component("modulation")
    assert not item["computed"] and item["reused"] and "4 vectors read from it" in features()["saved"]
    # What is new joins what was there.
    longer = sampled(again, steps=5)
    assert component("modulation")["computed"] and "in memory since an earlier run" in features()["saved"]
    assert len(read_header(only(folder)).entries) > len(first.entries)
    both = fresh(source, folder)
    # Another shift of the noise levels, as many workflows have it, is no change of the network.
    both.add_object_patch("model_sampling", both.get_model_object("model_sampling"))
    assert torch.equal(plain, sampled(both)) and torch.equal(longer, sampled(both, steps=5))
    assert not component("modulation")["computed"]


def _other_weights(source):
    state, metadata = load_file(source), dict(read_header(source).metadata)
    name = next(name for name in state if "adaLN_modulation" in name and name.endswith("weight"))
    save_file({**state, name: state[name] + 1}, source, metadata=metadata)


def test_another_model_has_a_table_of_its_own(source, tmp_path):
    folder = tmp_path / "tables"
    before = sampled(fresh(source, folder))
    _other_weights(source)
    after = sampled(fresh(source, folder))
    assert not torch.equal(before, after) and component("modulation")["computed"]
    assert len(list(folder.iterdir())) == 2
    stock, _ = quantization.load_diffusion_model(str(source))
    assert torch.equal(after, sampled(stock))
    os.utime(source, ns=(1, 1))  # the same bytes, but nothing says so without reading them
    assert torch.equal(after, sampled(fresh(source, folder))) and component("modulation")["computed"]


def test_loras_and_loaded_weights_take_no_part(source, tmp_path):
    folder = tmp_path / "tables"
    model = fresh(source, folder)
    changed = _lora(model, "sd3")
    with_lora = sampled(changed)
    assert "a LoRA, a weight hook or a patch" in features()["saved"] and not folder.exists()
    plain = sampled(model)
    kept = only(folder).read_bytes()
    assert not torch.equal(plain, with_lora) and torch.equal(with_lora, sampled(_lora(fresh(source, folder), "sd3")))
    assert component("modulation")["computed"] and only(folder).read_bytes() == kept
    assert torch.equal(plain, sampled(fresh(source, folder, quantization.LOADED)))
    assert "only where the feature weights are read from the file" in features()["saved"]


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def _flipped(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def _rewritten(path, **changes):
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    save_file(tensors, path, metadata=metadata | changes)


BAD = {
    "truncated": (_truncated, "safetensors|bytes"),
    "a flipped bit": (_flipped, "checksum is wrong"),
    "no safetensors": (lambda path: path.write_bytes(b"hello"), "safetensors"),
    "a model": (lambda path: shutil.copy(DEMO, path), "no table of features"),
    "of another model": (lambda path: _rewritten(path, identity="0" * 64), "another model, device or PyTorch"),
    "another layout": (lambda path: _rewritten(path, layout="{}"), "checksum is wrong"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_not_this_models_tables_are_refused_and_left_alone(source, tmp_path, kind):
    folder = tmp_path / "tables"
    plain = sampled(fresh(source, folder))
    path = only(folder)
    damage, words = BAD[kind]
    damage(path)
    bad = path.read_bytes()
    assert torch.equal(plain, sampled(fresh(source, folder)))
    assert component("modulation")["computed"]
    said = features()["saved"]
    assert said.startswith("refused: ") and path.name in said
    assert any(word in said for word in words.split("|"))
    assert only(folder) == path and path.read_bytes() == bad


def test_a_disk_that_refuses_costs_nothing_but_the_file(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "tables"
    plain = sampled(fresh(source, tmp_path / "other"))
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with caplog.at_level(logging.WARNING, logger="stretto"):
        assert torch.equal(plain, sampled(fresh(source, folder)))
    assert "Features were not saved" in caplog.text and not list(folder.iterdir())
    folder.rmdir()
    folder.write_text("a file of the user's")
    assert torch.equal(plain, sampled(fresh(source, folder))) and folder.read_text() == "a file of the user's"


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sd3"])
def test_every_shape_of_output_comes_back_to_the_bit(tiny, family, tmp_path):
    """FLUX returns dataclasses, others tensors."""
    model = host.request(tiny(family), Request("temporal_features", {}))
    sample(model, family, steps=3)
    patch = next(item for item in model.object_patches.values() if hasattr(item, "part"))
    network = model.model.diffusion_model
    layers = {path: network.get_submodule(path) for path in describe(network).modulation_parts(network)}
    tables, made = patch.part.tables, tmp_path / "table.safetensors"
    assert {weights for weights, _ in tables.entries} == {UNCHANGED}
    mark = identity(family, "exact", layers, torch.device("cpu"))
    saved.write_tables(made, mark, layers, tables)
    found = read_tables(made, mark, layers)
    assert found.keys() == {given for _, given in tables.entries}
    again = FeatureTables()
    for given, outputs in found.items():
        assert outputs.keys() == tables.entries[UNCHANGED, given].keys()
        for layer, output in outputs.items():
            again.keep((UNCHANGED, given), layer, output)
            assert type(output) is type(tables.entries[UNCHANGED, given][layer])
    other = tmp_path / "again.safetensors"
    saved.write_tables(other, mark, layers, again)
    assert torch.equal(*(torch.cat([t.flatten().float() for t in load_file(p).values()]) for p in (made, other)))
    assert again.bytes == tables.bytes
    # A name of a class that the layer's own file does not have is no class.
    text = json.loads(read_header(made).metadata["layout"])
    given, path = next((given, path) for given in text for path in text[given])
    text[given][path] = {"Popen": {"args": 0}}
    forged = json.dumps(text)
    stored = load_file(made)
    ordered = [stored[str(place)] for place in range(len(stored))]
    _rewritten(made, layout=forged, checksum=saved._checksum(forged, ordered))
    with pytest.raises(saved.StrettoError, match="does not belong to this model"):
        read_tables(made, mark, layers)


def test_a_file_larger_than_the_budget_is_refused(source, tmp_path):
    folder = tmp_path / "tables"
    sampled(fresh(source, folder))
    path = only(folder)
    mark = read_header(path).metadata["identity"]
    with pytest.raises(saved.StrettoError, match="tables may take 0.0 MB"):
        read_tables(path, mark, {}, 10)
