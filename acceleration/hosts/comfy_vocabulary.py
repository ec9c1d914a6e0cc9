"""Vocabulary tables of ComfyUI's text encoders that are not loaded: an Embedding whose rows come from elsewhere.

A placeholder without storage stands for the table in the state dict, so that ComfyUI tells the architecture as ever; the
Embedding that is given it takes the rows that the placeholder carries, under whatever name ComfyUI has put it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch

from ..embeddings.rows import Rows, embed
from ..errors import StrettoError

_ROWS = "stretto_rows"
_ANCHOR = "stretto_anchor"


@dataclass(frozen=True)
class AbsentTable:
    """What stands where a table's weight would: device, dtype and shape, and no numbers."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the vocabulary table was left where it is, so its {name!r} cannot be had (an encoder that also writes text needs "
            "it); load the text encoder with vocabulary 'loaded'"
        )


def placeholder(rows: Rows) -> torch.Tensor:
    """Return a tensor without storage that tells ComfyUI's loaders dtype and shape, and carries ``rows``."""
    tensor = torch.empty(rows.shape, dtype=rows.dtype, device="meta")
    setattr(tensor, _ROWS, rows)
    return tensor


def row_operations(base: type, tables: Sequence[Rows]) -> tuple[type, list[Rows]]:
    """Return operations like ``base`` whose Embeddings take rows of ``tables`` where they are given a placeholder.

    The list returned with it gets every table that found its place.
    """
    taken: list[Rows] = []
    shapes = {tuple(rows.shape) for rows in tables}

    class RowOperations(base):
        class Embedding(base.Embedding):
            stretto_rows: Rows | None = None

            def __init__(self, num_embeddings, embedding_dim, *args, **kwargs):
                self._wanted_device = kwargs.get("device")
                if (num_embeddings, embedding_dim) in shapes:
                    kwargs["device"] = "meta"  # it may never be needed
                super().__init__(num_embeddings, embedding_dim, *args, **kwargs)

            def _load_from_state_dict(self, state_dict, prefix, *args):
                given = state_dict.get(f"{prefix}weight")
                rows = getattr(given, _ROWS, None)
                if rows is None:
                    if self.weight.is_meta:
                        self.weight = torch.nn.Parameter(
                            torch.empty_like(self.weight, device=self._wanted_device or "cpu"), requires_grad=False
                        )
                    return super()._load_from_state_dict(state_dict, prefix, *args)
                if tuple(rows.shape) != (self.num_embeddings, self.embedding_dim):
                    raise StrettoError(
                        f"{prefix}weight: the file has {list(rows.shape)}, ComfyUI's model "
                        f"{[self.num_embeddings, self.embedding_dim]}"
                    )
                state_dict.pop(f"{prefix}weight")
                self.stretto_rows, dtype = rows, self._parameters.pop("weight").dtype
                # Follows the model from device to device, and is no part of what is saved or counted.
                anchor = torch.empty(0, dtype=dtype, device=self._wanted_device or "cpu")
                self.register_buffer(_ANCHOR, anchor, persistent=False)
                taken.append(rows)

            def __getattr__(self, name):
                anchor = self.__dict__.get("_buffers", {}).get(_ANCHOR)
                if name == "weight" and anchor is not None:
                    return AbsentTable(
                        anchor.device, anchor.dtype, torch.Size((self.num_embeddings, self.embedding_dim))
                    )
                return super().__getattr__(name)

            def forward(self, input, out_dtype=None):
                if self.stretto_rows is None:
                    return super().forward(input, out_dtype=out_dtype)
                comfy.ops.run_every_op()
                # ComfyUI rounds a table to the model's dtype when it loads it, and to the asked one when it looks it up.
                found = embed(self.stretto_rows, input).to(self.weight.dtype)
                return found if out_dtype is None else found.to(out_dtype)

    return RowOperations, taken
