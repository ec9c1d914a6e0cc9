"""Temporal and prompt features during a run: looked up, or computed once and kept."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import Call, Evaluation
from ..models import BlockSite
from .saved import SavedTables
from .tables import FeatureTables, each, fingerprint

#: Where a call's scratch holds its :class:`FeaturePass`.
FEATURES = "temporal features"
MODULATION, PROMPT = COMPONENTS = ("modulation", "prompt")
EXACT, BATCHED = MODES = ("exact", "batched")
#: A modulation that is given more than this sees tokens with timesteps of their own (diffusion forcing, image to video).
MOST_VECTOR_BYTES = 1 << 20

Layer = Callable[[torch.Tensor], Any]


@dataclass(frozen=True, eq=False)
class FeaturePart:
    """One layer whose output can be kept.

    Attributes:
        path: from the network.
        component: :data:`MODULATION` or :data:`PROMPT`.
        held: context in which a weight that is read from a file is read once.
        tables: of the model.
    """

    path: str
    component: str
    held: Callable[[], AbstractContextManager]
    tables: FeatureTables


@dataclass
class Counts:
    """How often layers of one component ran, were looked up, and were left alone."""

    computed: int = 0
    reused: int = 0
    left: int = 0


@dataclass
class FeatureSession:
    """Temporal features of one run.

    Args:
        levels: noise levels of the run.
        mode: :data:`EXACT` runs a layer once per noise level, in the shape of the call; :data:`BATCHED` once for all.
        rehearses: whether modulations of noise levels to come can be had at the first call.
        prompt: whether prompt features are kept too.
        budget_bytes: most that the model's tables may take.
        sizes: component -> (layers, bytes of their weights, bytes of these that are loaded).
        saved: file of modulations; None for none.
    """

    levels: tuple[float, ...]
    mode: str
    rehearses: bool
    prompt: bool
    budget_bytes: int
    sizes: dict[str, tuple[int, int, int]]
    saved: SavedTables | None = None
    section: str = "features"
    peak_bytes: int = 0
    counts: dict[str, Counts] = field(default_factory=lambda: {name: Counts() for name in COMPONENTS})
    _rehearsed: set[Hashable] = field(default_factory=set)
    _tables: FeatureTables | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the model's tables, which outlive the run."""
        return self._tables.bytes if self._tables else 0

    def begin(self, evaluation: Evaluation) -> None:
        """Nothing is decided per evaluation."""

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Let the layers of a call find their features; learn at its first one which are to come."""
        ahead: list[torch.Tensor] = []
        batch = call.weights, tuple(branch.key for branch in call.branches), call.rows
        if self.rehearses and call.rehearse is not None and batch not in self._rehearsed:
            self._rehearsed.add(batch)
            ahead = call.rehearse([level for level in self.levels if level != call.evaluation.sigma])
        call.scratch[FEATURES] = FeaturePass(self, call.weights, ahead)
        return compute()

    def depths(self, call: Call) -> frozenset[int]:
        """Blocks are not looked at."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Blocks run as ever."""
        return original(args)

    def used(self, tables: FeatureTables) -> None:
        """Note the tables that the run's layers belong to."""
        if self._tables is not tables:
            self._tables, tables.budget_bytes = tables, self.budget_bytes
        self.peak_bytes = max(self.peak_bytes, tables.bytes)

    def reset(self) -> None:
        """Features do not depend on the trajectory."""

    def report(self) -> dict[str, Any]:
        """Return what became of each component."""
        kept = self._tables.entries.values() if self._tables else ()
        return {
            "mode": self.mode,
            "table_bytes": self.bytes,
            "entries": len(kept),
            "saved": self.saved.words if self.saved else "",
            "components": [
                {
                    "name": name, "layers": layers, "weight_bytes": weights, "loaded_bytes": loaded,
                    "computed": counts.computed, "reused": counts.reused, "left": counts.left,
                    "exact": name == PROMPT or self.mode == EXACT,
                }
                for name, (layers, weights, loaded) in self.sizes.items() if layers
                for counts in (self.counts[name],)
            ],
        }  # fmt: skip

    def close(self) -> None:
        """The tables stay with the model, and in their file what is new; the run lets go of them."""
        if self.saved and self._tables and self.counts[MODULATION].computed:
            self.saved.save(self._tables)
        self._tables = None


class FeaturePass:
    """One network call."""

    def __init__(self, session: FeatureSession, weights: Hashable, ahead: list[torch.Tensor]) -> None:
        self._session, self._weights = session, weights
        # Held, so that no other tensor can come to lie in the same memory.
        self._seen: list[tuple[torch.Tensor, bytes]] = []
        self._ahead = [(self._print(given), given) for given in ahead]

    def __call__(self, part: FeaturePart, given: Any, layer: Layer) -> Any:
        """Return ``layer(given)``, or what it returned before."""
        session, counts = self._session, self._session.counts[part.component]
        wanted = isinstance(given, torch.Tensor) and (
            session.prompt if part.component == PROMPT else given.nbytes <= MOST_VECTOR_BYTES
        )
        if not wanted:
            counts.left += 1
            return layer(given)
        key = self._weights, self._print(given)
        if session.saved and part.component == MODULATION:
            session.used(part.tables)
            session.saved.open(part.tables, self._weights, given.device)
        found = part.tables.find(key, part.path)
        if found is not None:
            counts.reused += 1
            session.used(part.tables)
            return found
        session.used(part.tables)
        ahead = self._missing(part, given) if part.component == MODULATION else []
        with part.held():
            out = self._together(part, key, given, layer, ahead) if ahead and session.mode == BATCHED else layer(given)
            counts.computed += 1
            part.tables.keep(key, part.path, out)
            if session.mode == EXACT:
                for other, vector in ahead:
                    counts.computed += 1
                    part.tables.keep(other, part.path, layer(vector))
        session.used(part.tables)
        return out

    def _together(self, part: FeaturePart, key: Hashable, given: torch.Tensor, layer: Layer, ahead: list) -> Any:
        """One product for all vectors. Its rounding is that of another shape than the call's."""
        rows = given.shape[0]
        everything = layer(torch.cat([given, *(vector for _, vector in ahead)]))
        for place, (other, _) in enumerate([(key, given), *ahead]):
            mine = slice(place * rows, (place + 1) * rows)
            part.tables.keep(other, part.path, each(everything, lambda tensor, mine=mine: tensor[mine]))
        return each(everything, lambda tensor: tensor[:rows])

    def _missing(self, part: FeaturePart, given: torch.Tensor) -> list[tuple[Hashable, torch.Tensor]]:
        """The vectors to come that ``part`` has not been given yet."""
        keys = (((self._weights, mark), vector) for mark, vector in self._ahead if vector.shape == given.shape)
        return [(key, vector) for key, vector in keys if not part.tables.knows(key, part.path)]

    def _print(self, given: torch.Tensor) -> bytes:
        for tensor, mark in self._seen:
            if tensor is given:
                return mark
        mark = fingerprint(given)
        self._seen.append((given, mark))
        return mark
