"""Reuse or forecast module by module from a table, inside blocks: gates, modulation and norms stay current."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.weighted_sum import weighted_sum
from ..evaluation import COMPUTED, FORECAST, REUSED, Call, Evaluation
from ..models import BlockSite, ModulePart, ModuleSite
from .masks import Table
from .session import Weights
from .store import SnapshotStore

#: Places in a call's scratch: decided modules, the best that was put in, and weights by positions.
_DECIDED, _MADE, _WEIGHTS = "modules", "made", "weights"


@dataclass(frozen=True)
class _Course:
    """What the table says about a module, per step: whether it is computed, and whether a later step needs that."""

    computed: tuple[bool, ...]
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class _Form:
    """What a part returns: the shape without batch, dtype and device of its tensors, and whether they come as a tuple."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    several: bool


@dataclass
class ModuleSession:
    """Module cache of one run (:class:`~..run.Session`, :class:`~..run.InsideBlocks`).

    A skipped module returns a forecast of what it returned, before gate and residual, at the steps that computed it; with
    a forecaster of depth 1 that is its last output (FORA, arXiv 2407.01425; PAB, arXiv 2408.12588; HarmoniCa,
    arXiv 2410.01723), with more TaylorSeer (arXiv 2503.06923). A module with something missing computes.

    Args:
        table: which modules are computed at each step; modules it does not name always are.
        weights: forecaster: coordinates (newest first) and target -> one weight per snapshot used.
        store: outputs, one per branch, layout, part and place in the part's result.
        blocks: blocks that the trace counts.
        keep_all: store what no step will use, too (exactness tests).
    """

    table: Table
    weights: Weights
    store: SnapshotStore
    blocks: int
    keep_all: bool = False
    _forms: dict[Hashable, _Form] = field(default_factory=dict)
    _courses: dict[str, _Course | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        return self.store.bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever stored in this run."""
        return self.store.peak_bytes

    def begin(self, evaluation: Evaluation) -> None:
        """Say what the table wants."""
        cells = [cell for block in self.table.rows[evaluation.step] for cell in block]
        evaluation.skip, evaluation.computed_share = not all(cells), sum(cells) / len(cells)
        evaluation.reason = f"{sum(cells)} of {len(cells)} modules by the table"

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network; its modules decide one by one."""
        denoised = compute()
        call.decisions = (call.scratch.get(_MADE, COMPUTED),) * len(call.branches)
        touched = {depth for depth, skipped in call.scratch.get(_DECIDED, {}).values() if skipped}
        call.blocks_computed = max(self.blocks - len(touched), 0)
        return denoised

    def depths(self, call: Call) -> frozenset[int] | None:
        """No block as a whole."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block."""
        return original(args)

    def module(self, call: Call, part: ModulePart, original: Callable[[], Any]) -> Any:
        """Run a part and keep what it returns, or put in what is kept."""
        course = self._course(part)
        if course is None or not call.skippable:
            return original()
        step, skipped = call.evaluation.step, self._skips(call, part.site, course)
        if part.inner:
            # Set anew by every part in front of an attention: no earlier module can leave it hollow.
            call.hollow = set(part.site.outputs) if skipped else set()
        if skipped:
            return self._hollow(call, part) if part.inner else self._put_in(call, part)
        out = original()
        if course.wanted[step]:
            self._keep(call, part, out)
        elif not part.inner:
            self._drop(call, part)
        return out

    def reset(self) -> None:
        """Forget all outputs."""
        self.store.clear()
        self._forms.clear()

    def close(self) -> None:
        """Free everything."""
        self.reset()

    def _course(self, part: ModulePart) -> _Course | None:
        """Return what the table says about a part's module; None where it says nothing and the module always runs."""
        if part.path not in self._courses:
            self._courses[part.path] = self._read(part.site)
        return self._courses[part.path]

    def _read(self, site: ModuleSite) -> _Course | None:
        if not all(name in self.table.modules for name in site.names):
            return None
        steps, depth = self.table.steps, self.store.depth
        computed = tuple(any(self.table.computed(step, site.depth, name) for name in site.names) for step in range(steps))
        # Needed where a step that skips the module follows before `depth` others have computed it anew.
        wanted = tuple(self.keep_all or not all(computed[step + 1 : step + 1 + depth]) for step in range(steps))
        return _Course(computed, wanted)

    def _skips(self, call: Call, site: ModuleSite, course: _Course) -> bool:
        """Decide about a module once per call: what it consists of is skipped as one."""
        decided: dict[str, tuple[int, bool]] = call.scratch.setdefault(_DECIDED, {})
        key = site.outputs[0]
        if key not in decided:
            decided[key] = site.depth, not course.computed[call.evaluation.step] and self._complete(call, site)
        return decided[key][1]

    def _complete(self, call: Call, site: ModuleSite) -> bool:
        """Whether everything that the module would have returned is known, for every branch."""
        forms = [self._forms.get((call.layout, path)) for path in site.paths]
        return all(form is not None for form in forms) and all(
            self.store.get(key) is not None
            for path in site.outputs
            for branch in call.branches
            for key in self._keys(call, path, branch.key)
        )

    def _keys(self, call: Call, path: str, branch: Hashable) -> list[Hashable]:
        form = self._forms.get((call.layout, path))
        return [(branch, call.layout, path, place) for place in range(len(form.shapes))] if form else []

    def _keep(self, call: Call, part: ModulePart, out: Any) -> None:
        """Store what a part returned; of an inner part only the form."""
        tensors = out if isinstance(out, tuple | list) else (out,)
        rows = call.rows * len(call.branches)
        if not all(isinstance(tensor, torch.Tensor) and tensor.shape[:1] == (rows,) for tensor in tensors):
            return  # nothing that splits into branches: the module will always compute
        first = tensors[0]
        form = _Form(tuple(tensor.shape[1:] for tensor in tensors), first.dtype, first.device, tensors is out)
        self._forms[call.layout, part.path] = form
        if part.inner:
            return
        for index, branch in enumerate(call.branches):
            for key, tensor in zip(self._keys(call, part.path, branch.key), tensors, strict=True):
                self.store.push(key, call.evaluation.position, call.part(tensor, index))

    def _drop(self, call: Call, part: ModulePart) -> None:
        for branch in call.branches:
            for key in self._keys(call, part.path, branch.key):
                self.store.drop(key)

    def _hollow(self, call: Call, part: ModulePart) -> torch.Tensor:
        """Return zeros in the shape of what an inner part would return; they take no memory and nobody sees them."""
        form = self._forms[call.layout, part.path]
        zero = torch.zeros((), dtype=form.dtype, device=form.device)
        return zero.expand(call.rows * len(call.branches), *form.shapes[0])

    def _put_in(self, call: Call, part: ModulePart) -> Any:
        """Return the forecast of what an output part would return, as tensors of their own: blocks write into some."""
        call.hollow.discard(part.path)
        form = self._forms[call.layout, part.path]
        made = tuple(self._forecast(call, part.path, place) for place in range(len(form.shapes)))
        return made if form.several else made[0]

    def _forecast(self, call: Call, path: str, place: int) -> torch.Tensor:
        histories = [self.store.get((branch.key, call.layout, path, place)) for branch in call.branches]
        weights = [self._weights(call, tuple(history.positions)) for history in histories]
        if not any(any(each[1:]) for each in weights):
            call.scratch.setdefault(_MADE, REUSED)
            return torch.cat([history.tensors[0] for history in histories])
        call.scratch[_MADE] = FORECAST
        parts = [
            weighted_sum([history.tensors[index] for index in range(len(each))], each)
            for history, each in zip(histories, weights, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _weights(self, call: Call, positions: tuple[float, ...]) -> list[float]:
        """Weights over snapshots at ``positions``; most modules of a call share them."""
        known = call.scratch.setdefault(_WEIGHTS, {})
        if positions not in known:
            known[positions] = self.weights(positions, call.evaluation.position)
        return known[positions]
