"""Vocabulary rows read from files (T15): equal to the bit, in little memory, and refused where the file is another."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stretto.acceleration.embeddings.rows import DTYPES, FileRows, MemoryRows, embed, find_tables
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.quantization.checkpoints import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAME = "model.embed_tokens.weight"


def table(dtype=torch.float32, rows=512, width=24):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_equal_the_embedding_to_the_bit(tmp_path, dtype):
    weight = table(dtype)
    # An odd neighbour shifts the table to an offset that is no multiple of its width.
    save_file({NAME: weight, "a.bias": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "text.safetensors")
    ids = torch.randint(0, 512, (2, 77), generator=torch.Generator().manual_seed(4))
    ids[0, 40:] = 0  # padding, and rows asked for many times
    ids[1, :3] = torch.tensor([511, 0, 511])
    right = weight.view(torch.uint8)[ids].view(dtype)
    for rows in (FileRows.open(tmp_path / "text.safetensors", NAME), MemoryRows(weight)):
        assert same(embed(rows, ids), right)
        assert same(embed(rows, ids[:0]), right[:0])
        for bad in (-1, 512):
            with pytest.raises(IndexError, match=rf"token id {bad} is outside of a vocabulary of 512"):
                embed(rows, torch.tensor([[3, bad]]))
    if dtype == torch.float32:
        assert torch.equal(right, torch.nn.functional.embedding(ids, weight))


def _replace(path):
    save_file({NAME: table()}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _edit(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))


CHANGES = {
    "replaced": _replace,
    "edited": _edit,
    "truncated": lambda path: os.truncate(path, 400),
    "removed": os.remove,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_underneath_is_named(tmp_path, change):
    path = tmp_path / "text.safetensors"
    save_file({NAME: table()}, path)
    rows = FileRows.open(path, NAME)
    embed(rows, torch.tensor([1, 2]))
    CHANGES[change](path)
    with pytest.raises(StrettoError, match=r"text\.safetensors: was changed, replaced or removed .* load the model again"):
        embed(rows, torch.tensor([1, 2]))


def test_what_is_no_table_is_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "text.safetensors"
    save_file({NAME: table()[0], "ids": torch.zeros(4, 4, dtype=torch.int32)}, path)
    for name, words in ((NAME, r"is \[24\]"), ("ids", "rows are read of"), ("gone", "has no tensor")):
        with pytest.raises(StrettoError, match=words):
            FileRows.open(path, name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StrettoError, match="truncated"):
        FileRows.open(path, NAME)


def test_tables_are_found_by_the_names_encoders_use(tmp_path):
    names = ("shared.weight", NAME, "model.language_model.embed_tokens.weight", "encoder.embed_tokens.weight")
    other = ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "model.norm.weight")
    save_file({name: table(rows=4) for name in names + other}, tmp_path / "text.safetensors")
    with open_checkpoint(tmp_path / "text.safetensors") as checkpoint:
        assert set(find_tables(checkpoint.tensors)) == set(names)
        assert same(embed(FileRows.of(checkpoint.tensors[NAME]), torch.arange(4)), table(rows=4))


def test_a_table_of_two_gigabytes_takes_less_than_64_megabytes(tmp_path):
    """UMT5-XXL's size, as a sparse file; peak memory of a process of its own."""
    rows, width = 256384, 4096
    path, size = tmp_path / "umt5.safetensors", rows * width * 2
    header = json.dumps({"shared.weight": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
        file.seek(8 + len(header) + 77 * width * 2)
        file.write(torch.full((width,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    program = """
        import resource, sys, torch
        sys.path.insert(0, sys.argv[1])
        from load_pack import load_pack
        load_pack()
        from stretto.acceleration.embeddings.rows import FileRows, embed
        embed(FileRows.open(sys.argv[2], "shared.weight"), torch.arange(2))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        table = FileRows.open(sys.argv[2], "shared.weight")
        for seed in range(8):
            ids = torch.randint(0, 256384, (1, 512), generator=torch.Generator().manual_seed(seed))
            ids[0, 256:] = 77
            found = embed(table, ids)
            assert bool((found[0, 256:] == 1.5).all()) and found.shape == (1, 512, 4096)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(ROOT), str(path)], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) < 64 << 10
