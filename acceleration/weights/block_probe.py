"""What each block is worth: its damage to the network's output when it is left out, or when its last residual stands in.

At a few steps the network call is repeated, once per block and question, on the same input; the picture itself is unchanged to
the bit. Output damage at a step sees everything behind the block, unlike the block's own residual, and costs no run per block.
Training-free pruning does not predict what training after it recovers (TinyFusion, arXiv 2412.01199).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..caching.budget import budget_for
from ..errors import StrettoError
from ..evaluation import COMPUTED, Call, Evaluation
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..models import BlockSite, ModelDescriptor
from ..plan import Request

DROP, REUSE = KINDS = ("drop", "reuse")
MOST_PROBES = 8
_SHARE = 0.5
_AT_STEP = 1e-6


def probed_steps(steps: int, probes: int) -> tuple[int, ...]:
    """Return the steps at which blocks are probed: evenly spread, without the first, which has nothing to reuse."""
    return tuple(sorted({max(1, min(steps - 1, round((index + 0.5) * steps / probes))) for index in range(probes)}))


@dataclass(frozen=True)
class BlockProbeTechnique:
    """Probe a plain run's blocks (:class:`BlockProbeSession`). Settings: ``token``, ``probes``, ``cfg``."""

    name: str = "block_probe"
    exclusive_with: frozenset[str] = frozenset(
        {"cache", "table", "profile", "module_profile", "block_probe", "guidance", "resolution"}
    )

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Block Probe"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` unless the request carries a token, a number of probes and a scale."""
        token, probes = request.settings.get("token"), request.settings.get("probes")
        fine = isinstance(probes, int) and not isinstance(probes, bool) and 1 <= probes <= MOST_PROBES
        fine = fine and isinstance(request.settings.get("cfg"), int | float)
        if not isinstance(token, str) or not token or not fine or set(request.settings) != {"token", "probes", "cfg"}:
            raise StrettoError(
                f"{self.label(request)}: probes is {probes!r}; it must be a whole number in [1, {MOST_PROBES}]"
            )

    def inside_blocks(self, request: Request) -> bool:
        """Return False: whole blocks are probed."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether blocks can be probed under ``facts``."""
        blocked = facts.obstacle() or facts.descriptor.no_blocks
        if not blocked and facts.schedule.steps < 2:
            blocked = "a run of one step has no step before it to reuse"
        if blocked:
            return Outcome(self.name, OFF, blocked)
        sites = facts.descriptor.sites(facts.network)
        budget = budget_for(facts, "blocks", 2 * len(sites), "as computed", _SHARE)
        if not budget.fits:
            return Outcome(self.name, OFF, budget.refusal())
        steps = probed_steps(facts.schedule.steps, request.settings["probes"])
        token, cfg = request.settings["token"], float(request.settings["cfg"])
        session = BlockProbeSession(token, steps, len(sites), facts.descriptor, cfg)
        reason = f"{len(sites)} blocks are probed at steps {', '.join(map(str, steps))}; the picture is the plain one"
        return Outcome(
            self.name, ACTIVE, reason, session=session, needs_blocks=True, reserve_bytes=budget.reserve // facts.branches
        )


@dataclass
class BlockProbeSession:
    """Probe of one run (:class:`~..run.Session`, :class:`~..run.Recorder`). What the sampler gets is computed.

    Args:
        token: what the record is found by.
        steps: steps at which blocks are probed.
        blocks: number of blocks.
        descriptor: the network's family.
        cfg: guidance scale.
    """

    token: str
    steps: tuple[int, ...]
    blocks: int
    descriptor: ModelDescriptor
    cfg: float = 1.0
    name: str = "block_probe"
    peak_bytes: int = 0
    _asked: tuple[str, int] | None = None
    _kept: dict[Any, dict[tuple[int, str], torch.Tensor]] = field(default_factory=dict)
    _making: dict[tuple[int, str], torch.Tensor] | None = None
    _damage: dict[str, list[list[torch.Tensor]]] = field(default_factory=dict)
    _probed: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._damage = {kind: [[] for _ in range(self.blocks)] for kind in KINDS}

    @property
    def bytes(self) -> int:
        """Bytes of the residuals kept now."""
        return sum(tensor.nbytes for kept in self._kept.values() for tensor in kept.values())

    def begin(self, evaluation: Evaluation) -> None:
        """Compute."""
        evaluation.reason = "probed: everything is computed"

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute; at a probed step also once per block and question."""
        at, batch = call.evaluation, (tuple(branch.key for branch in call.branches), call.layout, call.network_input.shape)
        own = abs(at.position - at.step) < _AT_STEP and call.skippable
        keeps = own and at.step + 1 in self.steps
        self._making = {} if keeps else None
        denoised = compute()
        made, self._making = self._making, None
        computed = call.blocks_computed
        if own and at.step in self.steps and (at.step, batch) not in self._probed:
            self._probed.add((at.step, batch))
            self._probe(call, batch, denoised, compute)
            call.blocks_computed = computed
        if made is not None:
            self._kept[batch] = made
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        call.decisions = (COMPUTED,) * len(call.branches)
        return denoised

    def _probe(self, call: Call, batch: Any, denoised: torch.Tensor, compute: Callable[[], torch.Tensor]) -> None:
        right = self._guided(call, call.to_prediction(denoised).float())
        size = torch.linalg.vector_norm(right)
        kept = self._kept.get(batch)
        for kind in KINDS if kept else (DROP,):
            for depth in range(self.blocks):
                self._asked = kind, depth
                try:
                    other = self._guided(call, call.to_prediction(compute()).float())
                finally:
                    self._asked = None
                self._damage[kind][depth].append(torch.linalg.vector_norm(other - right) / size)

    def _guided(self, call: Call, prediction: torch.Tensor) -> torch.Tensor:
        """What guidance makes of both branches: errors that they share weigh little, those that differ weigh ``cfg`` times."""
        names = [branch.name for branch in call.branches]
        if sorted(names) != ["cond", "uncond"]:
            return prediction
        cond, uncond = (call.part(prediction, names.index(name)) for name in ("cond", "uncond"))
        return uncond + self.cfg * (cond - uncond)

    def depths(self, call: Call) -> frozenset[int] | None:
        """The block in question; all where residuals are kept."""
        if self._asked is not None:
            return frozenset({self._asked[1]})
        return None if self._making is not None else frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run a block, leave it out, or put in what it added before."""
        apart = site.kind in self.descriptor.txt_out
        if self._asked is not None and self._asked[1] == site.depth:
            return self._instead(call, site, args, apart)
        if self._making is None:
            return original(args)
        streams = [name for name in (("img", "txt") if apart else ("img",)) if args.get(name) is not None]
        before = {name: args[name].clone() for name in streams}  # some blocks write into their input
        out = original(args)
        for name in streams:
            if out.get(name) is not None:
                self._making[site.depth, name] = out[name] - before[name]
        return out

    def _instead(self, call: Call, site: BlockSite, args: dict, apart: bool) -> dict:
        batch = (tuple(branch.key for branch in call.branches), call.layout, call.network_input.shape)
        kept = self._kept.get(batch, {}) if self._asked[0] == REUSE else {}
        out = {}
        for name in ("img", "txt") if apart else ("img",):
            residual = kept.get((site.depth, name))
            out[name] = args.get(name) if residual is None else args[name] + residual
        return out

    def reset(self) -> None:
        """Forget residuals."""
        self._kept.clear()

    def close(self) -> None:
        """Free everything."""
        self.reset()
        self._damage = {kind: [[] for _ in range(self.blocks)] for kind in KINDS}

    def record(self) -> dict[str, Any]:
        """Return JSON values: ``token``, ``damage`` (kind -> mean over probes, per block) and ``error``, one of them None."""
        seen = {kind: [[float(value) for value in values] for values in blocks] for kind, blocks in self._damage.items()}
        if not all(values for blocks in seen.values() for values in blocks):
            return {"token": self.token, "damage": None, "error": "no network call could be probed on the sampler's own steps"}
        damage = {kind: [sum(values) / len(values) for values in blocks] for kind, blocks in seen.items()}
        return {"token": self.token, "damage": damage, "error": None}


@dataclass(frozen=True)
class Ranking:
    """Blocks in the order of what leaving them out, or reusing them, does to the network's output.

    Attributes:
        sites: blocks in execution order.
        damage: kind -> relative L2 error of the network's output, per block.
    """

    sites: tuple[BlockSite, ...]
    damage: dict[str, tuple[float, ...]]

    def order(self, kind: str) -> list[int]:
        """Return depths, cheapest first."""
        return sorted(range(len(self.sites)), key=lambda depth: self.damage[kind][depth])

    def drop_text(self, count: int, lists: Sequence[tuple[str, str]]) -> str:
        """Return the ``count`` cheapest blocks to drop, as ``prune-depth --drop`` takes them; ``lists``: (kind, attribute)."""
        names, chosen = dict(lists), sorted(self.order(DROP)[:count])
        parts = []
        for kind, name in names.items():
            numbers = [str(self.sites[depth].index) for depth in chosen if self.sites[depth].kind == kind]
            if numbers:
                parts.append((f"{name}:" if len(names) > 1 else "") + ",".join(numbers))
        return ",".join(parts)

    def table_text(self, count: int, steps: int, first: int, last: int) -> str:
        """Return a table of blocks for Stretto Cache Schedule: the ``count`` cheapest to reuse, at every second step in a range.

        Args:
            count: blocks.
            steps: of the run.
            first: first step at which they are reused.
            last: last one.
        """
        reused, rows = set(self.order(REUSE)[:count]), []
        for step in range(steps):
            skip = step > 0 and first <= step <= last and (step - first) % 2 == 0
            rows.append("".join("." if skip and depth in reused else "#" for depth in range(len(self.sites))))
        return json.dumps(rows)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two rows of numbers without ties, in [-1, 1]."""
    ranks = [torch.tensor(row, dtype=torch.float64).argsort().argsort().double() for row in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    return float((a * b).sum() / (a.norm() * b.norm()))
