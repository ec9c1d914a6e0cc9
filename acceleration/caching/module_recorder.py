"""A run with nothing skipped, of which every module's change per step and its time are written down."""

import re
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import StrettoError
from ..evaluation import Call, Evaluation
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..models import BlockSite, ModulePart, ModuleSite
from ..plan import Request
from .budget import budget_for
from .table_run import out_of_reach

#: Place of the recorded branch in a call's scratch.
_BRANCH = "module profile"
#: An evaluation this close to a step's noise level (in steps) is that step's own.
_AT_STEP = 1e-6
#: Share of the free memory that last outputs may take.
_SHARE = 0.5
#: The index of a block in a path.
_INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class ModuleProfileTechnique:
    """Record a plain run's modules (:class:`ModuleProfileSession`); the picture is unchanged to the bit."""

    name: str = "module_profile"
    exclusive_with: frozenset[str] = frozenset({"cache", "table", "profile", "module_profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto module profile"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` unless the request carries the token its record is found by."""
        token = request.settings.get("token")
        if not isinstance(token, str) or not token or set(request.settings) != {"token"}:
            raise StrettoError(f"{self.label(request)}: settings are {dict(request.settings)}; expected a token alone")

    def inside_blocks(self, request: Request) -> bool:
        """Return True: modules are what is recorded."""
        return True

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether the run can be recorded under ``facts``."""
        blocked = facts.obstacle() or out_of_reach(facts)
        if blocked:
            return Outcome(self.name, OFF, blocked)
        sites = facts.descriptor.module_sites(facts.network)
        budget = budget_for(facts, "blocks", len(sites), "as computed", _SHARE)
        if not budget.fits:
            return Outcome(self.name, OFF, budget.refusal())
        session = ModuleProfileSession(request.settings["token"], facts.schedule.steps, sites)
        reason = f"every step is computed, and {len(sites)} modules are recorded"
        return Outcome(
            self.name, ACTIVE, reason, session=session, needs_modules=True, reserve_bytes=budget.reserve // facts.branches
        )


@dataclass
class ModuleProfileSession:
    """Recorder of one run (:class:`~..run.Session`, :class:`~..run.InsideBlocks`). It computes everything.

    Of every step, at its own noise level and for the conditional branch, by how much each module's outputs differ from
    those of the step before: |F_t - F_t-1| / |F_t-1|, Euclidean, over all streams. And how long a module takes, with
    what lies between its parts.

    Args:
        token: what the record is found by.
        steps: steps of the run.
        sites: modules to record.
    """

    token: str
    steps: int
    sites: tuple[ModuleSite, ...]
    name: str = "module_profile"
    peak_bytes: int = 0
    _seen: set[int] = field(default_factory=set)
    _last: dict[str, tuple[Hashable, tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    _squares: dict[tuple[ModuleSite, int], list[torch.Tensor]] = field(default_factory=dict)
    _times: dict[tuple[ModuleSite, int], list[tuple[Any, Any]]] = field(default_factory=dict)
    _open: tuple[ModuleSite, Any] | None = None

    @property
    def bytes(self) -> int:
        """Bytes kept now to compare the next step with."""
        return sum(t.numel() * t.element_size() for _, tensors in self._last.values() for t in tensors)

    def begin(self, evaluation: Evaluation) -> None:
        """Compute."""
        evaluation.reason = "recorded: everything is computed"

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute, and record the conditional branch where the evaluation is a step's own and first one."""
        names, at = [branch.name for branch in call.branches], call.evaluation
        wanted = abs(at.position - at.step) < _AT_STEP and at.step not in self._seen
        if wanted and "cond" in names:
            call.scratch[_BRANCH] = names.index("cond")
        denoised = compute()
        if _BRANCH in call.scratch:
            self._seen.add(at.step)
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return denoised

    def depths(self, call: Call) -> frozenset[int] | None:
        """No block as a whole."""
        return frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run the block."""
        return original(args)

    def module(self, call: Call, part: ModulePart, original: Callable[[], Any]) -> Any:
        """Run a part, time it, and compare its output with the last one."""
        if _BRANCH not in call.scratch:
            return original()
        device, site = call.network_input.device, part.site
        times = self._times.setdefault((site, call.evaluation.step), [])
        start = _mark(device)
        if self._open is not None and self._open[0] == site:
            times.append((self._open[1], start))  # attention, between the projections into it and out of it
        out = original()
        end = _mark(device)
        times.append((start, end))
        self._open = (site, end) if part.inner else None
        if not part.inner:
            self._compare(call, part, out)
        return out

    def reset(self) -> None:
        """Forget what the next step would be compared with."""
        self._last.clear()

    def close(self) -> None:
        """Free everything."""
        self.reset()
        self._squares.clear()
        self._times.clear()
        self._open = None

    def record(self) -> dict[str, Any]:
        """Return JSON values: ``token``, ``units`` (fields of :class:`~.table_search.Unit`) and ``error``, one of them None."""
        missing = [step for step in range(self.steps) if step not in self._seen]
        if missing:
            why = f"{len(missing)} of {self.steps} steps could not be recorded, the first is step {missing[0]}"
            return {"token": self.token, "units": None, "error": why}
        seconds = self._seconds()
        units = [
            {
                "block": site.depth,
                "names": list(site.names),
                "cost": seconds.get(_kind(site), 0.0),
                "changes": [self._change(site, step) for step in range(self.steps)],
            }
            for site in self.sites
        ]
        return {"token": self.token, "units": units, "error": None}

    def _compare(self, call: Call, part: ModulePart, out: Any) -> None:
        index, tensors = call.scratch[_BRANCH], out if isinstance(out, tuple | list) else (out,)
        key = call.branches[index].key, call.layout
        mine = tuple(call.part(tensor, index).clone() for tensor in tensors)  # some blocks write into them
        before = self._last.get(part.path)
        self._last[part.path] = key, mine
        if before is not None and before[0] == key:
            squares = self._squares.setdefault((part.site, call.evaluation.step), [])
            for new, old in zip(mine, before[1], strict=True):
                squares.append(torch.stack((_square(new.float() - old.float()), _square(old.float()))))

    def _seconds(self) -> dict[str, float]:
        """Return the median seconds per kind of module: over blocks, which differ in weights alone, and over steps.

        The first step, which also pays for warm-up, counts only where it is the only one.
        """
        sums: dict[str, list[float]] = {}
        for (site, step), times in self._times.items():
            if step > 0 or self.steps == 1:
                sums.setdefault(_kind(site), []).append(sum(_between(*pair) for pair in times))
        return {kind: statistics.median(seconds) for kind, seconds in sums.items()}

    def _change(self, site: ModuleSite, step: int) -> float:
        """Return the relative change at a step; where nothing could be compared it counts as complete."""
        squares = self._squares.get((site, step))
        if squares is None:
            return 0.0 if step == 0 else 1.0
        moved, size = torch.stack(squares).double().sum(0).tolist()
        return (moved / size) ** 0.5 if size > 0 else float(moved > 0)


def _kind(site: ModuleSite) -> str:
    """Return what a module is called in every block of its list."""
    return _INDEX.sub(".", site.outputs[0], count=1)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor).square()


def _mark(device: torch.device) -> Any:
    """Return a time mark: on CUDA an event, which nothing waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Return the seconds between two marks; waits for the device."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000.0
