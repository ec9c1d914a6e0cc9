"""One run of a diffusers transformer: evaluations, their calls and branches, and the trace."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import COMPUTED, Branch, Call
from ..facts import Facts
from ..guidance.session import GuidanceSession
from ..models.diffusers import Transformer
from ..plan import Plan
from ..resolve import Execution
from ..run import RunState
from ..trace import TraceBuilder
from .device import clock_for, peak_memory, synchronize
from .diffusers_guidance import Saver
from .diffusers_levels import Levels

#: Arguments of transformers that tell one guidance branch from another.
CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "pooled_projections",
    "class_labels",
    "guidance",
)
#: Conditionings that a run remembers; more are told apart all the same, but never recognised.
MOST_CONDITIONS = 16
#: Branches of a pipeline that guides with calls of their own, in the order in which it makes them.
BRANCH_NAMES = ("cond", "uncond")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a transformer is called with.

    Attributes:
        hidden_states: latent as the network is given it, perhaps with the channels of a condition behind its own.
        latent: the part of it that the prediction stands for.
        timestep: the largest of its timesteps (frames that are given have 0), as the network counts.
        timestep_dtype: their type.
        branches: guidance branches in this batch.
        arguments: all of them, by name.
    """

    hidden_states: torch.Tensor
    latent: torch.Tensor
    timestep: float
    timestep_dtype: torch.dtype
    branches: int
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], known: Transformer | None, network: Any) -> "Asked | None":
        """Return the call, None for one that is not understood (no latent, or a batch at several timesteps)."""
        hidden_states, timestep = arguments.get("hidden_states"), arguments.get("timestep")
        if not isinstance(hidden_states, torch.Tensor) or timestep is None:
            return None
        timestep = timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)
        low, high = torch.stack(torch.aminmax(timestep)).tolist()
        if timestep.ndim < 2 and low != high:
            return None
        latent = known.latent(network, hidden_states) if known else hidden_states
        # Pipelines that guide with one call give it the latent twice.
        twice = known is not None and known.batched and len(latent) % 2 == 0 and torch.equal(*latent.chunk(2))
        return cls(hidden_states, latent, high, timestep.dtype, 2 if twice else 1, arguments)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent of one guidance branch."""
        return (len(self.latent) // self.branches, *self.latent.shape[1:])


Compute = Callable[[Call, Mapping[str, Any]], Any]
"""Calls the network with the given arguments, inside a call of the engine's."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one call of the network.

    Attributes:
        run: it belongs to.
        asked: what was asked.
        call: as the engine saw it.
        denoised: what the sessions made of it.
        raw: what the network returned, None where it did not run.
    """

    run: "Run"
    asked: Asked
    call: Call
    denoised: torch.Tensor
    raw: Any

    def out(self) -> Any:
        """Return what the network returned, or would have."""
        if self.raw is not None:
            return self.raw
        return self.run.whole(self.call.to_prediction(self.denoised), self.asked)


class Conditionings:
    """Names conditionings by what they are: the tensor itself, unchanged, or one that equals it to the bit."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, int, int]] = []
        self._count = 0

    def name(self, tensor: torch.Tensor) -> int:
        """Return a number that only equal tensors share."""
        version = _version(tensor)
        for kept, at, number in self._kept:
            if kept is tensor and at == version:
                return number
        for kept, at, number in self._kept:
            alike = kept.shape == tensor.shape and kept.dtype == tensor.dtype and kept.device == tensor.device
            if alike and kept is not tensor and at == _version(kept) and torch.equal(kept, tensor):
                return number
        self._count += 1
        if len(self._kept) < MOST_CONDITIONS:
            self._kept.append((tensor, version, self._count))
        return self._count

    def clear(self) -> None:
        """Let go of every tensor."""
        self._kept.clear()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Run:
    """A trajectory on one transformer, from its first noise level to its last."""

    def __init__(
        self,
        network: torch.nn.Module,
        known: Transformer | None,
        levels: Levels,
        facts: Facts,
        execution: Execution,
        plan: Plan,
        keep: Callable[[dict[str, Any]], None],
        scale: float | None,
        device: torch.device,
    ) -> None:
        self.network, self.known, self.levels, self.keep = network, known, levels, keep
        self.index, self.done = -1, False
        sites = {site.key: site for site in known.descriptor.sites(network)} if known else {}
        self.device = device
        header = _header(plan, facts, execution, network, self.device, scale)
        self.state = RunState(facts.schedule, execution.sessions, sites, TraceBuilder(header), clock_for(self.device))
        self._conditionings = Conditionings()
        self._readings: list[Callable[[], float]] = []
        self._seen: list[Hashable] = []
        self._order: list[Hashable] = []
        self._calls_before = 0
        self._rest: torch.Tensor | None = None
        self._inside, self._decision = 0.0, COMPUTED
        saving = next((each for each in execution.sessions if isinstance(each, GuidanceSession)), None)
        self._saver = Saver(saving, self) if saving is not None else None
        self._started = self._ended = time.perf_counter()

    def call(self, index: int, asked: Asked, compute: Compute) -> Any:
        """Run one call of the network through the sessions and return what the network would return."""
        entered = time.perf_counter()
        branches = self._branches(asked)
        keys = [branch.key for branch in branches]
        if index != self.index or any(key in self._seen for key in keys):
            self._turn(index, asked.latent[: asked.latent_shape[0]])
        self._seen += keys
        elapsed = self.state.clock()
        self._inside = 0.0
        try:
            if self._saver is not None:
                out = self._saver.answer(asked, branches, compute)
            else:
                out = self.one(asked, branches, compute).out()
        except BaseException as error:
            self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        elapsed()
        self._ended = time.perf_counter()
        self._readings.append(elapsed)
        if self._inside and self._decision == COMPUTED:
            self.state.overhead += self._ended - entered - self._inside
        last = index == len(self.levels.timesteps) - 1
        if last and self._calls_before and len(self._readings) == self._calls_before:
            self.finish("completed")  # nobody waits for another call: what is stored is freed before decoding
        return out

    def one(self, asked: Asked, branches: tuple[Branch, ...], compute: Compute) -> "Answer":
        """Send one call of the network, as asked, through the sessions."""
        call, raw = self._call(asked, branches), None

        def run() -> torch.Tensor:
            nonlocal raw
            call.scratch["depths"] = self.state.depths(call) if self.state.sessions else frozenset()
            started = time.perf_counter()
            raw = compute(call, asked.arguments)
            self._inside += time.perf_counter() - started
            return call.to_denoised(self._prediction(raw, asked))

        denoised = self.state.network(call, run)
        self._decision = call.decisions[0]
        return Answer(self, asked, call, denoised, raw)

    def affine(self) -> tuple[float, float]:
        """Return (a, b) of the evaluation: a denoised latent is ``a * network input + b * network output``."""
        scale, gain = self.levels.affine(self.index)
        return scale, gain * (self.known.sign if self.known else 1.0)

    def finish(self, outcome: str | None) -> None:
        """End the run: free what it stores and keep its trace. Without an ``outcome``, its last step tells."""
        if self.done:
            return
        self.done = True
        if outcome is None:
            outcome = "completed" if self.index == len(self.levels.timesteps) - 1 else "interrupted"
        synchronize(self.device)
        self._close_evaluation()
        if self._saver is not None:
            self._saver.close()
            self.state.trace.header["notes"].append(self._saver.session.words())
        memory = {**peak_memory(self.device), "store_peak_bytes": self.state.peak_bytes}
        sections = self.state.sections()
        self.state.close()
        self._conditionings.clear()
        self._rest = None
        document = self.state.trace.document(outcome, self._ended - self._started, self.state.overhead, memory)
        self.keep(document | sections)

    def _turn(self, index: int, network_input: torch.Tensor) -> None:
        """End the evaluation in progress and begin the next."""
        self._calls_before = len(self._readings)
        self._close_evaluation()
        self.index, self._seen = index, []
        self.state.begin(self.levels.sigmas[index], network_input)

    def _close_evaluation(self) -> None:
        if self.state.evaluation is not None:
            readings, self._readings = self._readings, []
            self.state.end(lambda: sum(read() for read in readings))

    def _branches(self, asked: Asked) -> tuple[Branch, ...]:
        given = {name: value for name, value in asked.arguments.items() if value is not None}
        conditions = tuple(
            (name, self._conditionings.name(given[name]))
            for name in CONDITIONS
            if isinstance(given.get(name), torch.Tensor)
        )
        key = (conditions, tuple(sorted(given)), tuple(asked.hidden_states.shape), asked.hidden_states.device)
        if asked.branches == 2:
            return tuple(Branch(name, (key, name)) for name in self.known.batched)
        if key in self._order:
            place = self._order.index(key)
        else:
            place = len(self._order)
            self._order.append(key)
        return (Branch(BRANCH_NAMES[place] if place < len(BRANCH_NAMES) else "other", key),)

    def _call(self, asked: Asked, branches: tuple[Branch, ...]) -> Call:
        latent = asked.latent if asked.latent.dtype == torch.float64 else asked.latent.float()
        scale, gain = self.affine()
        known: list[tuple[torch.Tensor, torch.Tensor]] = []

        def to_denoised(prediction: torch.Tensor) -> torch.Tensor:
            denoised = scale * latent + gain * prediction.to(latent.dtype)
            known.append((denoised, prediction))
            return denoised

        def to_prediction(denoised: torch.Tensor) -> torch.Tensor:
            # What was made of a prediction goes back to that very one, without rounding.
            same = next((prediction for made, prediction in known if made is denoised), None)
            return (denoised - scale * latent) / gain if same is None else same

        text = asked.arguments.get("encoder_hidden_states")
        return Call(
            evaluation=self.state.evaluation,
            branches=branches,
            rows=len(latent) // len(branches),
            tokens=self.known.descriptor.tokens(self.network, latent.shape) if self.known else 0,
            network_input=asked.latent,
            to_prediction=to_prediction,
            to_denoised=to_denoised,
            skippable=not asked.arguments.get("skip_layers"),
            context_tokens=text.shape[1] if isinstance(text, torch.Tensor) and text.ndim > 2 else 0,
        )

    def _prediction(self, raw: Any, asked: Asked) -> torch.Tensor:
        """Return the prediction in what the network returned; learned variances stand behind it."""
        sample = raw[0]
        if self.known is None:
            return sample
        dim, channels = self.known.channel_dim, asked.latent.shape[self.known.channel_dim]
        more = sample.shape[dim] - channels
        self._rest = sample.narrow(dim, channels, more).clone() if more > 0 else None
        return sample.narrow(dim, 0, channels) if more > 0 else sample

    def whole(self, prediction: torch.Tensor, asked: Asked) -> Any:
        """Return what the network would have returned around ``prediction``."""
        sample = prediction.to(asked.hidden_states.dtype)
        if self._rest is not None:
            # Of a saved branch there is none: its pipeline reads the conditional one's.
            rest = self._rest if len(self._rest) >= len(sample) else torch.cat((self._rest, self._rest))
            sample = torch.cat((sample, rest[: len(sample)]), dim=self.known.channel_dim)
        if asked.arguments.get("return_dict", True) is False:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)


def _header(
    plan: Plan, facts: Facts, execution: Execution, network: torch.nn.Module, device: torch.device, scale: float | None
) -> dict[str, Any]:
    sampler = facts.sampler
    return {
        "model": {
            "family": facts.descriptor.family if facts.descriptor else None,
            "network": type(network).__name__,
            "blocks": len(facts.descriptor.sites(network)) if facts.descriptor else 0,
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "device": str(device),
        },
        "sampler": {
            "name": sampler.name,
            "single_call": sampler.single_call,
            "multistep": sampler.multistep,
            "stochastic": sampler.stochastic,
            "known": sampler.known,
        },
        "latent_shape": list(facts.latent_shape),
        "sigmas": list(facts.schedule.sigmas),
        "cfg": scale,
        "seed": None,
        "plan": plan.to_json(),
        "techniques": [outcome.to_json() for outcome in execution.outcomes],
        "notes": list(execution.notes),
    }
