"""What a recorded run tells of a model's linear layers: how large their inputs get, and how much each minds being rounded.

Kept in one safetensors file: ``<layer>`` is fp32 [K], the largest magnitude of every input channel; losses lie in the metadata.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import SchemaError, StrettoError
from .checkpoints import open_checkpoint
from .sensitivity import Cell, cell_of
from .writer import Spec, StreamWriter

KEY, VERSION = "stretto_statistics", 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """A recorded run.

    Attributes:
        maxima: fp32 [K] by layer, the largest magnitude of every input channel.
        cells: losses of layers in formats; empty where they were not measured.
        words: of what run.
    """

    maxima: Mapping[str, torch.Tensor] = field(repr=False)
    cells: tuple[Cell, ...] = ()
    words: str = ""

    def digest(self) -> str:
        """Return a short text that differs where the maxima do."""
        found = hashlib.sha256()
        for layer, row in sorted(self.maxima.items()):
            found.update(layer.encode() + row.float().contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    def save(self, path: str | Path, replace: bool = False) -> None:
        """Write the file (StrettoError: name taken, disk)."""
        document = {
            "version": VERSION, "words": self.words,
            "cells": [[cell.layer, cell.format, cell.range, cell.loss] for cell in self.cells],
        }  # fmt: skip
        specs = [Spec(layer, torch.float32, tuple(row.shape)) for layer, row in self.maxima.items()]
        with StreamWriter(Path(path), specs, {KEY: json.dumps(document)}, replace) as writer:
            for layer, row in self.maxima.items():
                writer.write(layer, row.float())


def load_statistics(path: str | Path) -> Statistics:
    """Read a file of :meth:`Statistics.save`.

    Raises:
        SchemaError: another version.
        StrettoError: says what is wrong with it.
    """
    with open_checkpoint(path) as checkpoint:
        if KEY not in checkpoint.metadata:
            raise StrettoError(f"{path}: no statistics (its header has no {KEY}); Stretto Quantization Statistics makes them")
        try:
            document = json.loads(checkpoint.metadata[KEY])
            version = document["version"]
            rows, words = document["cells"], str(document["words"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StrettoError(f"{path}: its statistics cannot be read ({str(error)[:80]})") from None
        if version != VERSION:
            raise SchemaError(f"{path}: statistics are {version!r:.40}; this release reads {VERSION}")
        if not isinstance(rows, list):
            raise StrettoError(f"{path}: its cells are {str(rows)[:40]}; expected a list")
        cells = tuple(cell_of(str(path), row) for row in rows)
        for layer, tensor in checkpoint.tensors.items():
            if tensor.dtype != torch.float32 or len(tensor.shape) != 1:
                raise StrettoError(f"{path}: {layer}: {tensor.dtype} {list(tensor.shape)}; expected one fp32 number per channel")
        return Statistics({layer: tensor.read() for layer, tensor in checkpoint.tensors.items()}, cells, words)
