"""Tables of what a layer returned, found again by what it was given, bit by bit."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

#: Everything that belongs to one vector or text: layer -> its output.
Features = dict[str, Any]


def each(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return nested tuples, lists and dataclasses with ``change`` applied to every tensor in them."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(each(item, change) for item in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{item.name: each(getattr(tree, item.name), change) for item in fields(tree)})
    return tree


def nbytes(tree: Any) -> int:
    """Return the bytes of all tensors in ``tree``."""
    found = []
    each(tree, lambda tensor: found.append(tensor.nbytes) or tensor)
    return sum(found)


def fingerprint(given: torch.Tensor) -> bytes:
    """Return 256 bits of hash over dtype, shape, device and every bit of a tensor. One host synchronisation."""
    raw = given.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    made = hashlib.blake2b(digest_size=32, key=f"{given.dtype}{tuple(given.shape)}{given.device}".encode()[:64])
    made.update(raw)
    return made.digest()


@dataclass
class FeatureTables:
    """Tables of one model, for as long as somebody holds it. Those used longest ago make room for others.

    Attributes:
        entries: (weights, fingerprint of what the layers were given) -> features.
        bytes: of all of them.
        budget_bytes: most that they may take.
        origin: the file that they were read from, or are written to.
    """

    entries: OrderedDict[Hashable, Features] = field(default_factory=OrderedDict)
    bytes: int = 0
    budget_bytes: int = 1 << 30
    origin: Path | None = None

    def find(self, key: Hashable, layer: str) -> Any | None:
        """Return a copy of what ``layer`` returned (the network may write into it), None where that is not known."""
        features = self.entries.get(key)
        if features is None or layer not in features:
            return None
        self.entries.move_to_end(key)
        return each(features[layer], torch.Tensor.clone)

    def knows(self, key: Hashable, layer: str) -> bool:
        """Whether :meth:`find` would find something."""
        return layer in self.entries.get(key, ())

    def keep(self, key: Hashable, layer: str, output: Any) -> None:
        """Keep a copy of what ``layer`` returned, unless there is no room for it beside its own vector's features."""
        size = nbytes(output)
        if size > self.budget_bytes or self.knows(key, layer):
            return
        while self.bytes + size > self.budget_bytes:
            oldest = next(iter(self.entries))
            if oldest == key:
                return
            self.bytes -= sum(map(nbytes, self.entries.pop(oldest).values()))
        features = self.entries.setdefault(key, {})
        self.entries.move_to_end(key)
        # Contiguous by itself: a view would hold on to what it is a view of.
        features[layer] = each(output, torch.Tensor.clone)
        self.bytes += size

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self.bytes = 0
