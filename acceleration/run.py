"""Everything mutable about one sampling run. Made when it starts, dropped when it ends, however it ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from .evaluation import COMPUTED, Attention, Call, Evaluation
from .models import BlockSite, ModulePart
from .sampling import Schedule
from .trace import TraceBuilder


class Session(Protocol):
    """What a technique does during a run. One object per technique and run."""

    bytes: int
    peak_bytes: int

    def begin(self, evaluation: Evaluation) -> None:
        """Decide what the evaluation shall do, before any network call of it."""

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Stand around one network call; ``compute`` runs it. Both return the denoised latent."""

    def depths(self, call: Call) -> frozenset[int] | None:
        """Blocks whose hooks the call needs, by depth, once it is being computed; None for all."""

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Stand around one block; ``original(args)`` runs it."""

    def reset(self) -> None:
        """Forget features: a new trajectory has begun."""

    def close(self) -> None:
        """Free everything."""


@runtime_checkable
class InsideBlocks(Protocol):
    """A session that also acts on modules inside blocks."""

    def module(self, call: Call, part: ModulePart, original: Callable[[], Any]) -> Any:
        """Stand around one part of a module; ``original()`` runs it."""


@runtime_checkable
class InsideAttention(Protocol):
    """A session that also computes attention."""

    def attention(self, call: Call, asked: Attention) -> torch.Tensor | None:
        """Return the attention [B, H, N, d]; None to leave it to the host's own function."""


@runtime_checkable
class Reporter(Protocol):
    """A session that has more to tell about its run than decisions."""

    section: str

    def report(self) -> dict[str, Any]:
        """Return JSON values for a part of the trace of the session's own; called once, after the run."""


@runtime_checkable
class Recorder(Protocol):
    """A session that also hands something over when its run has completed."""

    name: str

    def record(self) -> dict[str, Any]:
        """Return JSON values that belong to nobody else's eyes; whoever asked takes them out of the trace."""


Clock = Callable[[], Callable[[], float]]
"""Start a measurement; the returned function gives the seconds later, after the run."""


def wall_clock() -> Callable[[], float]:
    """Clock for devices that compute synchronously. The first reading is final."""
    start = time.perf_counter()
    reading: list[float] = []

    def read() -> float:
        if not reading:
            reading.append(time.perf_counter() - start)
        return reading[0]

    return read


@dataclass
class RunState:
    """The run in progress: its schedule, its sessions in execution order, and its trace.

    Attributes:
        schedule: noise levels of the run.
        sessions: active techniques, outermost first.
        sites: blocks of the network, by hook key.
        trace: what was decided and measured.
        clock: stopwatch factory of the device.
        level: noise level of the full run that one of the stage in progress stands for; None where they are the same.
    """

    schedule: Schedule
    sessions: tuple[Session, ...]
    sites: dict[tuple[str, int], BlockSite]
    trace: TraceBuilder
    clock: Clock = wall_clock
    evaluation: Evaluation | None = None
    overhead: float = 0.0
    level: Callable[[float], float] | None = None
    _count: int = 0
    _lowest: float = field(default=float("inf"))
    _inside: tuple[InsideBlocks, ...] = ()
    _attending: tuple[InsideAttention, ...] = ()

    def __post_init__(self) -> None:
        self._inside = tuple(session for session in self.sessions if isinstance(session, InsideBlocks))
        self._attending = tuple(session for session in self.sessions if isinstance(session, InsideAttention))

    def begin(self, sigma: float, network_input: torch.Tensor) -> Evaluation:
        """Open the next evaluation and let the sessions decide about it."""
        if sigma > self._lowest * (1 + 1e-4):
            for session in self.sessions:  # noise was added back: features of the old trajectory are foreign
                session.reset()
            self._lowest = sigma
        self._lowest = min(self._lowest, sigma)
        position = self.schedule.position(self.level(sigma) if self.level is not None else sigma)
        evaluation = Evaluation(self._count, sigma, position, self.schedule.step(position), network_input)
        self._count += 1
        for session in self.sessions:
            session.begin(evaluation)
        self.trace.open(evaluation)
        self.evaluation = evaluation
        return evaluation

    def enter_stage(self, level: Callable[[float], float]) -> None:
        """A stage of another size or path begins: features are foreign, and ``level`` places its noise levels in the run."""
        for session in self.sessions:
            session.reset()
        self.level, self._lowest = level, float("inf")

    def end(self, seconds: Callable[[], float]) -> None:
        """Close the open evaluation; ``seconds`` gives its duration once the run is over."""
        self.trace.close(self.evaluation, seconds)
        self.evaluation = None

    def network(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run one batched network call through the sessions and record what became of it."""
        for session in reversed(self.sessions):
            compute = _bind_network(session, call, compute)
        denoised = compute()
        if not call.decisions:
            call.decisions = (COMPUTED,) * len(call.branches)
        self.trace.add(call, len(self.sites))
        return denoised

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run one block through the sessions."""

        def run(arguments: dict) -> dict:
            call.blocks_computed += 1
            return original(arguments)

        for session in reversed(self.sessions):
            run = _bind_block(session, call, site, run)
        return run(args)

    @property
    def inside_blocks(self) -> bool:
        """Whether a session acts on modules inside blocks."""
        return bool(self._inside)

    def module(self, call: Call, part: ModulePart, original: Callable[[], Any]) -> Any:
        """Run one part of a module through the sessions that act inside blocks."""
        for session in reversed(self._inside):
            original = _bind_module(session, call, part, original)
        return original()

    @property
    def inside_attention(self) -> bool:
        """Whether a session computes attention."""
        return bool(self._attending)

    def attention(self, call: Call, asked: Attention) -> torch.Tensor | None:
        """Return the attention [B, H, N, d] of the first session that computes it, None where none does."""
        return next((out for session in self._attending if (out := session.attention(call, asked)) is not None), None)

    def depths(self, call: Call) -> frozenset[int] | None:
        """Blocks whose hooks ``call`` needs, by depth; None for all."""
        wanted = [session.depths(call) for session in self.sessions]
        return None if any(depths is None for depths in wanted) else frozenset().union(*wanted)

    @property
    def peak_bytes(self) -> int:
        """Most bytes that stored features have taken so far."""
        return sum(session.peak_bytes for session in self.sessions)

    def records(self) -> dict[str, Any]:
        """Return what recording sessions have written down, by their name, as JSON values; read before :meth:`close`."""
        return {session.name: session.record() for session in self.sessions if isinstance(session, Recorder)}

    def sections(self) -> dict[str, Any]:
        """Return what sessions report beside their decisions, by section, as JSON values; read before :meth:`close`."""
        return {session.section: session.report() for session in self.sessions if isinstance(session, Reporter)}

    def close(self) -> None:
        """Drop every stored tensor."""
        for session in self.sessions:
            session.close()
        self.evaluation = None


def _bind_network(session: Session, call: Call, compute: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: session.network_call(call, compute)


def _bind_block(session: Session, call: Call, site: BlockSite, run: Callable[[dict], dict]) -> Callable[[dict], dict]:
    return lambda args: session.block(call, site, args, run)


def _bind_module(session: InsideBlocks, call: Call, part: ModulePart, run: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: session.module(call, part, run)
