"""Latents with a frame schedule in files: nothing is lost, nothing overwritten, nothing believed unseen."""

import errno
import json
import os
import shutil
import struct

import folder_paths
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.frame_rate.schedule import LATENT_KEY, FrameRateSchedule, schedule_of_latent, with_schedule
from stretto.nodes.frame_rate_files import (
    TENSOR,
    VERSION,
    StrettoLoadScheduledLatent,
    StrettoSaveScheduledLatent,
    read_latent,
    write_latent,
)

SCHEDULE = FrameRateSchedule(31, (2, 1, 1, 4), restore="motion", fps=16.0)


def video(dtype=torch.float32):
    samples = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return with_schedule({"samples": samples}, SCHEDULE)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's output and input folders, for this test only."""
    for name in ("output", "input"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    return tmp_path / "output", tmp_path / "input"


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_nodes_save_and_load_to_the_bit_with_the_schedule(folders):
    output, given = folders
    latent = video() | {"noise_mask": torch.rand(1, 1, 5, 4, 6)}
    latent["samples"][0, 0, 0, 0, :2] = torch.tensor([-0.0, 1e-42])
    saved = StrettoSaveScheduledLatent.execute(latent, "latents/calm").ui["latents"]
    assert saved == [{"filename": "calm_00001_.latent", "subfolder": "latents", "type": "output"}]
    (output / "latents" / "calm_00001_.latent").rename(given / "calm_00001_.latent")
    assert StrettoLoadScheduledLatent.define_schema().inputs[0].options == ["calm_00001_.latent"]
    assert StrettoLoadScheduledLatent.validate_inputs("calm_00001_.latent") is True
    assert "no latent file gone" in StrettoLoadScheduledLatent.validate_inputs("gone.latent")
    (loaded,) = StrettoLoadScheduledLatent.execute("calm_00001_.latent").result
    assert torch.equal(bits(loaded["samples"]), bits(latent["samples"]))
    assert torch.equal(loaded["noise_mask"], latent["noise_mask"])
    assert schedule_of_latent(loaded) == SCHEDULE and loaded[LATENT_KEY] == latent[LATENT_KEY]
    assert names_in(output) == [], "no temporary file is left"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_latents_are_kept_as_they_are_and_come_back_as_floats(tmp_path, dtype):
    latent = video(dtype)
    latent["samples"] = latent["samples"].transpose(-1, -2)  # no contiguous one
    write_latent(tmp_path / "a.latent", latent)
    assert torch.equal(load_file(tmp_path / "a.latent")[TENSOR], latent["samples"])
    found = read_latent(tmp_path / "a.latent")["samples"]
    assert found.dtype == torch.float32 and torch.equal(found, latent["samples"].float())


def test_a_loaded_latent_does_not_hang_on_its_file(tmp_path):
    path, latent = tmp_path / "a.latent", video() | {"noise_mask": torch.rand(1, 1, 5, 4, 6)}
    write_latent(path, latent)
    loaded = read_latent(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded["samples"], latent["samples"]) and torch.equal(loaded["noise_mask"], latent["noise_mask"])


def test_comfyuis_own_nodes_read_ours_and_ours_reads_theirs(folders):
    import nodes as core

    output, given = folders
    StrettoSaveScheduledLatent.execute(video(), "ours")
    (output / "ours_00001_.latent").rename(given / "ours_00001_.latent")
    (theirs,) = core.LoadLatent().load("ours_00001_.latent")
    assert torch.equal(theirs["samples"], video()["samples"])
    core.SaveLatent().save(video(), "theirs", prompt={"1": {}})
    loaded = read_latent(output / "theirs_00001_.latent")
    assert torch.equal(loaded["samples"], video()["samples"]) and schedule_of_latent(loaded) is None


def test_the_oldest_files_are_scaled_as_comfyui_scales_them(tmp_path):
    save_file({TENSOR: torch.ones(1, 4, 8, 8)}, tmp_path / "old.latent")
    assert torch.equal(read_latent(tmp_path / "old.latent")["samples"], torch.ones(1, 4, 8, 8) * (1 / 0.18215))


def test_a_fingerprint_follows_what_is_in_the_file(folders):
    path = folders[1] / "a.latent"
    write_latent(path, video())
    first = StrettoLoadScheduledLatent.fingerprint_inputs("a.latent")
    assert first == StrettoLoadScheduledLatent.fingerprint_inputs("a.latent")
    path.unlink()
    write_latent(path, {"samples": video()["samples"]})
    assert StrettoLoadScheduledLatent.fingerprint_inputs("a.latent") != first


# Nothing of the user's is lost


def test_every_save_takes_a_name_of_its_own(folders):
    output, _ = folders
    for _ in range(2):
        StrettoSaveScheduledLatent.execute(video(), "calm")
    assert names_in(output) == ["calm_00001_.latent", "calm_00002_.latent"]


@pytest.mark.parametrize("beside", ["a.latent", "a.tmp", "a.latent.tmp"])
def test_no_file_beside_is_touched(tmp_path, beside):
    (tmp_path / beside).write_bytes(b"mine")
    if beside == "a.latent":
        with pytest.raises(StrettoError, match="a.latent exists already; choose another filename_prefix"):
            write_latent(tmp_path / "a.latent", video())
    else:
        write_latent(tmp_path / "a.latent", video())
    assert (tmp_path / beside).read_bytes() == b"mine"


def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    path, fsync = tmp_path / "a.latent", os.fsync

    def another_program_writes(handle):
        path.write_bytes(b"theirs")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", another_program_writes)
    with pytest.raises(StrettoError, match="exists already"):
        write_latent(path, video())
    assert path.read_bytes() == b"theirs" and names_in(tmp_path) == ["a.latent"]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StrettoError, match="on the disk, 0.00 GB are free"):
        write_latent(tmp_path / "a.latent", video())
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_disk_that_fills_up_and_an_interrupt_leave_nothing_behind(tmp_path, monkeypatch, error):
    """The second write fails: the header is on the disk by then."""
    pwrite, calls = os.pwrite, []

    def fails(*args):
        calls.append(args)
        if len(calls) > 1:
            raise error
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", fails)
    if isinstance(error, OSError):
        with pytest.raises(StrettoError, match="a.latent: cannot be written .No space left on device"):
            write_latent(tmp_path / "a.latent", video())
    else:
        with pytest.raises(KeyboardInterrupt):
            write_latent(tmp_path / "a.latent", video())
    assert len(calls) > 1 and names_in(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_really_full_device_is_told_in_words(tmp_path, monkeypatch):
    """The same with the kernel's own answer instead of one that the test made up."""
    pwrite = os.pwrite

    def onto_a_full_device(handle, data, position):
        with open("/dev/full", "wb", buffering=0) as full:
            return pwrite(full.fileno(), data, position)

    monkeypatch.setattr(os, "pwrite", onto_a_full_device)
    with pytest.raises(StrettoError, match="cannot be written"):
        write_latent(tmp_path / "a.latent", video())
    assert names_in(tmp_path) == []


def test_a_stale_schedule_and_a_nested_latent_never_get_into_a_file(tmp_path):
    with pytest.raises(StrettoError, match="stale"):
        write_latent(tmp_path / "a.latent", video() | {"samples": torch.zeros(1, 16, 9, 4, 6)})
    from comfy.nested_tensor import NestedTensor

    pair = NestedTensor([torch.zeros(1, 16, 5, 4, 6), torch.zeros(1, 8, 20)])
    with pytest.raises(StrettoError, match="is NestedTensor; only one of a single tensor"):
        write_latent(tmp_path / "a.latent", {"samples": pair})
    assert names_in(tmp_path) == []


# Damaged and foreign files


def damaged(path, change):
    """Write a good file to ``path`` and change its bytes."""
    write_latent(path, video())
    path.write_bytes(change(path.read_bytes()))


def relabelled(path, samples, **metadata):
    save_file({TENSOR: samples, VERSION: torch.tensor([])}, path, metadata=metadata)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: damaged(path, lambda raw: b""), "truncated, or not a safetensors file"),
        (lambda path: damaged(path, lambda raw: raw[:-4]), "truncated"),
        (lambda path: damaged(path, lambda raw: raw + b"more"), "longer than its header says"),
        (lambda path: damaged(path, lambda raw: struct.pack("<Q", 1 << 60) + raw[8:]), "header claims"),
        (lambda path: damaged(path, lambda raw: raw[:8] + b"\xff" + raw[9:]), "not a safetensors file"),
        (lambda path: damaged(path, lambda raw: raw.replace(b"[1,", b"[9,", 1)), "takes"),
        (lambda path: torch.save({TENSOR: torch.zeros(1)}, path), "pickle"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "header claims|not a safetensors file"),
        (
            lambda path: save_file({"model.weight": torch.zeros(4)}, path),
            "holds no latent_tensor; it is no latent file",
        ),
        (lambda path: relabelled(path, torch.zeros(1, 4, 8, 8, dtype=torch.int64)), r"is I64 \[1, 4, 8, 8\]; expected"),
        (lambda path: relabelled(path, torch.zeros(8, 8)), "3 to 5 axes"),
        (lambda path: relabelled(path, torch.zeros(1, 16, 0, 4, 4)), "none empty"),
        (
            lambda path: relabelled(path, torch.zeros(1, 16, 5, 4, 6), **{LATENT_KEY: "{"}),
            "schedule in a.latent is no JSON",
        ),
        (lambda path: relabelled(path, torch.zeros(1, 16, 5, 4, 6), **{LATENT_KEY: "[" * 100_000}), "is no JSON"),
        (lambda path: relabelled(path, torch.zeros(1, 16, 5, 4, 6), **{LATENT_KEY: "[]"}), "frame-rate-schedule"),
        (
            lambda path: relabelled(path, torch.zeros(1, 16, 9, 4, 6), **{LATENT_KEY: json.dumps(SCHEDULE.to_json())}),
            "stale: it describes 5 latent frames .* and the latent has 9 latent frames",
        ),
        (
            lambda path: relabelled(path, torch.zeros(1, 4, 8, 8), **{LATENT_KEY: json.dumps(SCHEDULE.to_json())}),
            "stale",
        ),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_words_before_a_tensor_is_read(tmp_path, monkeypatch, make, words):
    path = tmp_path / "a.latent"
    make(path)

    def must_not_open(*args, **kwargs):
        raise AssertionError("tensors were opened")

    monkeypatch.setattr(safetensors, "safe_open", must_not_open)
    with pytest.raises(StrettoError, match=words):
        read_latent(path)


def test_a_missing_file_and_a_folder_are_refused_in_words(tmp_path):
    for path in (tmp_path / "none.latent", tmp_path):
        with pytest.raises(StrettoError, match="cannot be read"):
            read_latent(path)
