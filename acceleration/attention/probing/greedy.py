"""DiTFastAttn's own search inside a run (arXiv 2406.08552, algorithm 1): step by step, layer by layer, the cheapest that will do.

Every step is computed again and again, each time with one more layer decided, so a run takes as long as dozens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import StrettoError
from ...evaluation import Call
from ...facts import ACTIVE, OFF, Facts, Outcome
from ...plan import Request
from ..inside import unreachable
from ..planned.schedules import SCHEDULES
from ..planned.session import PlannedSession
from ..planned.settings import FREE_SHARE
from ..planned.technique import BLOCK, FEW_BLOCKS, SMALL_BLOCK, hash_of
from ..reuse import AS_COMPUTED, AttentionMemory, Mode, ModeTable
from ..reuse.schedule import Table
from ..search import ModelTag, PlanFile
from ..search.greedy import CANDIDATES, FULL, Method, decide_step


class OpenTable(Table):
    """A table of modes whose rows are decided one after the other; what a later step may need is always kept.

    Attributes:
        modes: uint8 [steps, layers, heads].
        cfg: bool, likewise.
        now: the step that is being decided.
    """

    def __init__(self, steps: int, layers: int, heads: int) -> None:
        self.modes, self.cfg = np.zeros((steps, layers, heads), np.uint8), np.zeros((steps, layers, heads), bool)
        self.alpha = np.ones((steps, layers, heads), np.float32)
        self.now = 0

    def decide(self, step: int, methods: tuple[Method, ...]) -> None:
        """Let every layer follow its method at a step."""
        self.now = step
        self.modes[step] = np.array([int(method.mode) for method in methods], np.uint8)[:, None]
        self.cfg[step] = np.array([method.cfg for method in methods])[:, None]

    def shares(self, step: int) -> np.ndarray:
        """Return bool [layers, heads]: what is decided, and everything for later steps."""
        if step > self.now:
            return np.full(self.modes.shape[1:], step < self.steps)
        return self.modes[step] == int(Mode.SHARE)

    def correction(self, step: int) -> np.ndarray:
        """Return uint8 [layers, heads]: residuals that are or may be needed from ``step`` on."""
        needed = (self.modes[step] != int(Mode.FULL)) if step <= self.now else np.full(self.modes.shape[1:], True)
        return np.where(needed & (step < self.steps), int(Mode.RESIDUAL), 0).astype(np.uint8)

    def lent(self, step: int) -> np.ndarray:
        """Return bool [layers, heads]: where the second guidance branch takes what the first one computed."""
        return self.cfg[step]


@dataclass
class GreedySession(PlannedSession):
    """A run that decides, step by step, what the layers do, and goes on with what it has decided.

    Attributes:
        token: that whoever asked finds the record by.
        theta: how far the network's output may be off, at its last layer.
        candidates: from the cheapest to the dearest.
        about: what else the record is to say.
        runs: of the network.
    """

    token: str = ""
    theta: float = 0.05
    candidates: tuple[Method, ...] = CANDIDATES
    about: dict[str, Any] = field(default_factory=dict)
    runs: int = 0
    _table: OpenTable | None = None
    _methods: tuple[Method, ...] = ()
    _decided: int = -1

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Decide the step at its first network call; run the network as decided."""
        self.runs += 1
        if self._memory is None:  # the first step is full, and tells how many heads there are
            self._decided = self._now[1]
            return compute()
        step, layers = self._now[1], self._table.layers
        if step != self._decided:
            self._decided, self._methods = step, self._search(call, compute, step, layers)
        self._table.decide(step, self._methods or (FULL,) * layers)
        return compute()

    def record(self) -> dict[str, Any]:
        """Return the methods of every step, or why there are none."""
        document = {"token": self.token, "about": self.about, "runs": self.runs, "error": None}
        if self._table is None:
            return {**document, "error": "; ".join(self.dense) or "no attention came by"}
        modes, cfg = (table[:, :, 0].tolist() for table in (self._table.modes, self._table.cfg))
        return {**document, "modes": modes, "cfg": cfg, "heads": self._table.heads, "sigmas": list(self.sigmas)}

    def _search(self, call: Call, compute: Callable[[], torch.Tensor], step: int, layers: int) -> tuple[Method, ...]:
        before = self._memory.snapshot()

        def tried(methods: tuple[Method, ...]) -> torch.Tensor:
            self._memory.restore(before)
            self._table.decide(step, methods)
            self.runs += 1
            return call.to_prediction(compute())

        methods = decide_step(tried, layers, self.theta, self.candidates)
        self._memory.restore(before)
        return methods

    def _ready(self, heads: int) -> AttentionMemory:
        if self._memory is None:
            self._plan = self.make(heads)
            self._table = OpenTable(len(self.sigmas), self._plan.layers, heads)
            self._memory = AttentionMemory(
                self._table, 0.0, self.policy, self.budget_bytes, self.branches, static=True,
                watch=lambda layer, share: self._kept.append(share),
            )  # fmt: skip
            self._memory.begin(*self._now)
        return self._memory


@dataclass(frozen=True)
class GreedyTechnique:
    """DiTFastAttn's search as the resolver sees it; settings: ``token``, ``theta``, ``guided``."""

    name: str = "attention_greedy"
    exclusive_with: frozenset[str] = frozenset(
        {"attention", "attention_plan", "attention_probe", "attention_greedy", "cache", "table", "guidance", "region"}
    )

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Attention Search (DiTFastAttn, greedy)"

    def validate(self, request: Request) -> None:
        """Raise :class:`~...errors.StrettoError` for settings that cannot work."""
        theta = request.settings.get("theta")
        if set(request.settings) != {"token", "theta", "guided"} or not isinstance(theta, float) or not 0 < theta <= 10:
            raise StrettoError(
                f"{self.label(request)}: settings are {dict(request.settings)}; expected token, theta above 0, and guided"
            )

    def inside_blocks(self, request: Request) -> bool:
        """Return True: modules inside blocks tell which layer's attention comes next."""
        return True

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether the search can run under ``facts``."""
        reason = facts.obstacle() or unreachable(facts)
        if not reason and not facts.sampler.single_call:
            reason = f"the sampler {facts.sampler.name} asks for several predictions a step: search with euler"
        if reason:
            return Outcome(self.name, OFF, reason)
        descriptor, sigmas, row = facts.descriptor, facts.schedule.sigmas[:-1], SCHEDULES["DiTFastAttn"]
        layers, grid = descriptor.module_blocks(facts.network), descriptor.grid(facts.network, facts.latent_shape)
        block = BLOCK if grid[0] * grid[1] * grid[2] >= FEW_BLOCKS * BLOCK else SMALL_BLOCK

        def make(heads: int) -> PlanFile:
            table = ModeTable(np.zeros((len(sigmas), layers, heads), np.uint8))
            return row.laid(table, descriptor.family, sigmas, grid, block, row.keep)

        guided = request.settings["guided"] and facts.branches > 1
        session = GreedySession(
            descriptor, facts.network, self.name, make, sigmas, AS_COMPUTED, int(facts.free_bytes * FREE_SHARE),
            facts.branches, compare=False, token=request.settings["token"], theta=request.settings["theta"],
            candidates=tuple(method for method in CANDIDATES if guided or not method.cfg),
            about={"family": descriptor.family, "variant": facts.variant, "hash": hash_of(facts.network), "grid": list(grid),
                   "block": block, "layers": layers},
        )  # fmt: skip
        words = "every step is computed again and again, to decide what each layer does"
        return Outcome(self.name, ACTIVE, words, session=session)


def plan_of(record: Mapping[str, Any], **fields: Any) -> PlanFile:
    """Return what a search has decided as a plan.

    Args:
        record: of a :class:`GreedySession`.
        fields: further ones of the plan.
    """
    about, row = record["about"], SCHEDULES["DiTFastAttn"]
    modes, cfg = (np.repeat(np.array(record[name])[..., None], record["heads"], -1) for name in ("modes", "cfg"))
    return row.laid(
        ModeTable(modes.astype(np.uint8), cfg.astype(bool)), about["family"], record["sigmas"], tuple(about["grid"]),
        about["block"], row.keep, model=ModelTag(about["family"], about["variant"], about["hash"]), **fields,
    )  # fmt: skip
