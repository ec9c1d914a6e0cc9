"""Probing a MODEL's attention during a run of it, and trying plans by further ones."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ..attention.geometry import Geometry
from ..attention.planned.schedules import SCHEDULES
from ..attention.probing.greedy import plan_of
from ..attention.probing.technique import ORDERS
from ..attention.reuse import Mode
from ..attention.search import (
    SEARCHES,
    Allocation,
    Curves,
    LatencyTable,
    Limits,
    ModelTag,
    PlanFile,
    Problem,
    Tried,
    as_plan,
    cheapest_that_passes,
    curves_from_json,
    of_attention,
    pose,
    save_plan,
)
from ..errors import StrettoError
from ..plan import Request
from ..quality import psnr
from .comfy import TRACES, request
from .comfy_profile import evaluation_seconds, traced
from .comfy_sampling import SamplingJob

Sample = Callable[[Any], torch.Tensor]


Decode = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[int], None]

#: DiTFastAttn's own search, beside those on a probe's curves.
GREEDY = "DiTFastAttn, greedy"
#: theta of the greedy search by knob, from fast to full; the paper's lie between.
THETAS = (0.5, 0.002)
QUALITY, TIME = "PSNR at least (dB)", "attention time at most (%)"
#: How bold the choice is that shows what errors of each part of the run count.
WEIGHING_KNOB = 0.4
#: Identical results have no finite PSNR; figures say this instead.
MOST_DECIBELS = 120.0


@dataclass(frozen=True, eq=False)
class Probed:
    """What a probe found.

    Attributes:
        curves: of every head.
        about: family, variant, hash, order, block and period.
        shape: layers, heads, kv_heads, size, tokens, grid and rows.
        sigmas: noise level of every step.
        seconds: (of the probing, of the sampler with it).
        device: that the run was on.
        dtype: of the network.
    """

    curves: Curves
    about: Mapping[str, Any]
    shape: Mapping[str, Any]
    sigmas: tuple[float, ...]
    seconds: tuple[float, float]
    device: str
    dtype: str

    def latency(self) -> LatencyTable:
        """Time attention at the probed shape, on the probed device."""
        geometry = Geometry(tuple(self.shape["grid"]), 0, self.shape["tokens"])
        return of_attention(
            geometry, ORDERS[self.about["order"]], self.about["block"], *(self.shape[x] for x in ("heads", "kv_heads", "size")),
            dtype=getattr(torch, self.dtype), device=self.device,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ProbedRun:
    """What was seen, and what it takes to sample again.

    Attributes:
        probed: curves and shapes.
        job: the run.
        latent: of the run, which is that of plain sampling to the bit.
    """

    probed: Probed
    job: SamplingJob
    latent: torch.Tensor


def probe(model: Any, sample: Sample, order: str, block: int) -> tuple[Probed, torch.Tensor]:
    """Sample with MODEL ``model`` while looking at its attention.

    Args:
        model: MODEL without anything that skips steps or attention.
        sample: samples with the MODEL it is given and returns the latent.
        order: key of :data:`~..attention.probing.technique.ORDERS`.
        block: tokens in a block.

    Returns:
        What was found, and the latent, which is that of plain sampling to the bit.

    Raises:
        StrettoError: attention cannot be looked at; the message says why.
        ConflictError: the model already carries a technique that a probe cannot share a run with.
    """
    token = uuid4().hex
    settings = {"token": token, "order": order, "block": block}
    latent = sample(request(model, Request("attention_probe", settings, required=True)))
    taken = TRACES.take_record("attention_probe", token)
    if taken is None:
        raise StrettoError("Stretto Attention Probe: the sampler did not run the model it was given, so nothing was seen")
    record, trace = taken
    if record["error"] is not None:
        raise StrettoError(f"Stretto Attention Probe: {record['error']}")
    names = ("layers", "heads", "kv_heads", "size", "tokens", "grid", "rows")
    return Probed(
        curves_from_json(record["curves"]),
        record["about"],
        {name: record[name] for name in names},
        tuple(record["sigmas"]),
        (record["seconds"], trace["seconds"]["sampler"]),
        trace["model"]["device"],
        trace["model"]["dtype"],
    ), latent


def try_plan(model: Any, sample: Sample, plan: PlanFile) -> tuple[torch.Tensor, float]:
    """Sample with MODEL ``model`` following ``plan``; return the latent and the seconds of all evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.safetensors"
        save_plan(file, plan)
        settings = {"file": str(file), "min_tokens": 0, "compare": False}
        latent, trace = traced(request(model, Request("attention_plan", settings, force=True)), sample)
        return latent, evaluation_seconds(trace)


def plain_seconds(model: Any, sample: Sample) -> tuple[torch.Tensor, float]:
    """Sample plainly; return the latent and the seconds of all evaluations."""
    latent, trace = traced(request(model, Request("measure")), sample)
    return latent, evaluation_seconds(trace)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to.

    Attributes:
        plan: the plan.
        problem: what was chosen from; None for the greedy search.
        choose: knob -> choice; likewise.
        tried: plans that were run.
        speed: measured, plain evaluations over those with the plan.
        quality: PSNR of the plan's run, dB.
        pictures: whether quality was measured on pictures.
    """

    plan: PlanFile
    problem: Problem | None
    choose: Callable[[float], Allocation] | None
    tried: list[Tried]
    speed: float
    quality: float
    pictures: bool


def greedy(model: Any, sample: Sample, theta: float, guided: bool = False, **fields: Any) -> tuple[PlanFile, int]:
    """Search as DiTFastAttn does, in one run that computes every step dozens of times.

    Args:
        model: MODEL without anything that skips steps or attention.
        sample: samples with the MODEL it is given.
        theta: how far the network's output may be off; the paper's are .05 to .0725.
        guided: whether guidance branches may share.
        fields: further ones of the plan.

    Returns:
        The plan, and how often the network was run.

    Raises:
        StrettoError: the search cannot run; the message says why.
    """
    token = uuid4().hex
    settings = {"token": token, "theta": theta, "guided": guided}
    sample(request(model, Request("attention_greedy", settings, required=True)))
    taken = TRACES.take_record("attention_greedy", token)
    if taken is None or taken[0]["error"] is not None:
        why = "the sampler did not run the model it was given" if taken is None else taken[0]["error"]
        raise StrettoError(f"Stretto Attention Search: {why}")
    return plan_of(taken[0], **fields), taken[0]["runs"]


def search(
    run: ProbedRun, method: str, target: str, value: float, tries: int = 5, decode: Decode | None = None,
    progress: Callable[[int], Progress] | None = None, weigh: bool = True, extra_seeds: int = 0,
) -> Found:  # fmt: skip
    """Return the plan of a probe that meets a target.

    Args:
        run: what was probed, and what it takes to sample again.
        method: key of :data:`~..attention.search.SEARCHES`, or :data:`GREEDY`.
        target: :data:`QUALITY` or :data:`TIME`.
        value: decibels, or percent of full attention's time.
        tries: runs that plans are tried by, at a target in decibels.
        decode: latent -> pictures in 0..1, on which quality is measured; None: on latents.
        progress: number of steps of all runs -> what is told how many are done.
        weigh: whether a run for each part of the noise levels tells first how much errors there count.
        extra_seeds: further seeds that a plan must reach the target with; the worst counts, and a plan that fails one is tried
            no further.

    Raises:
        StrettoError: no such method, the probe has not tried what it needs, or no plan meets the target.
    """
    if method == GREEDY:
        return _search_greedy(run, target, value, tries, decode, progress, extra_seeds)
    probed, row = run.probed, _search_row(method)
    buckets = len(probed.curves.edges) + 1
    runs = (tries * (1 + extra_seeds) if target == QUALITY else 1) + extra_seeds + (buckets if weigh else 0)
    trial = _Trials(run, decode, runs, progress, extra_seeds if target == QUALITY else 0, value)
    latency, limits = probed.latency(), Limits(period=probed.about["period"])
    problem = pose(probed.curves, latency, limits)

    def make(chosen: Allocation) -> PlanFile:
        return _as_plan(run, problem, chosen, method)

    try:
        choose = row.search(problem)
    except ValueError as error:
        raise StrettoError(f"Stretto Attention Search: {error}; probe with order = rows") from None
    if weigh:
        weights = _weights(choose, problem, lambda chosen: trial.once(make(chosen), 0)[1])
        problem = pose(probed.curves, latency, limits, weights=weights)
        choose = row.search(problem)
    if target == TIME:
        knob = _knob_for(choose, value / 100.0)
        plan = make(choose(knob))
        tried = [Tried(knob, plan.achieved["predicted_cost"], trial(plan))]
    else:
        plan, tried = cheapest_that_passes(choose, make, trial, value, tries)
    return _found(plan, tried, trial, method, value, problem, choose, decode is not None)


def _found(
    plan: PlanFile | None, tried: list[Tried], trial: "_Trials", method: str, value: float, problem: Problem | None,
    choose: Callable[[float], Allocation] | None, pictures: bool,
) -> Found:  # fmt: skip
    if plan is None:
        best = max(item.quality for item in tried)
        raise StrettoError(
            f"Stretto Attention Search: no plan of {method} reached {value:g} dB; the best of {len(tried)} tries gave "
            f"{best:.1f} dB. Ask for less, or give more tries"
        )
    speed, quality = trial.figures[id(plan)]
    achieved = {**plan.achieved, "psnr": round(quality, 2), "speed": round(speed, 3)}
    return Found(replace(plan, achieved=achieved), problem, choose, tried, speed, quality, pictures)


def _search_greedy(
    run: ProbedRun, target: str, value: float, tries: int, decode: Decode | None,
    progress: Callable[[int], Progress] | None, extra_seeds: int,
) -> Found:  # fmt: skip
    """Like :func:`search`, with a run of the greedy search for every theta that is tried."""
    if target == TIME:
        raise StrettoError(f"Stretto Attention Search: {GREEDY} asks for a quality; choose the target {QUALITY!r}")
    trial = _Trials(run, decode, tries * (2 + extra_seeds) + extra_seeds, progress, extra_seeds, value)

    def choose(knob: float) -> Allocation:
        theta = THETAS[0] * (THETAS[1] / THETAS[0]) ** knob
        plan, runs = greedy(run.job.model, trial.sample, theta, provenance=_provenance(run, GREEDY, theta=theta))
        cost = np.select([plan.mode == int(Mode.FULL), plan.mode == int(Mode.SHARE)], [1.0, 0.0], SCHEDULES["DiTFastAttn"].keep)
        achieved = {"predicted_cost": round(float(cost.mean()), 6), "network_runs": runs}
        return _Made(np.zeros(0, np.int64), float(cost.mean()), 0.0, replace(plan, achieved=achieved))

    plan, tried = cheapest_that_passes(choose, lambda made: made.plan, trial, value, tries)
    return _found(plan, tried, trial, GREEDY, value, None, None, decode is not None)


@dataclass(frozen=True, eq=False)
class _Made(Allocation):
    """A choice that is a plan already."""

    plan: PlanFile


class _Trials:
    """Runs plans and compares what comes out with the plain run, of one seed or more."""

    def __init__(
        self, run: ProbedRun, decode: Decode | None, runs: int, progress: Callable[[int], Progress] | None,
        extra_seeds: int = 0, target: float = 0.0,
    ) -> None:  # fmt: skip
        self.run, self.decode, self.steps, self.target = run, decode or (lambda latent: latent), 0, target
        self.tell = (progress or (lambda total: lambda done: None))((runs + 1) * run.job.steps)
        self.seeds = [(run.job.seed + extra) % (1 << 64) for extra in range(extra_seeds + 1)]
        self.seed = self.seeds[0]
        self.plain_seconds = plain_seconds(run.job.model, self.sample)[1]
        self.references = {0: self._decoded(run.latent)}
        self.peak = None if decode is None else 1.0
        self.figures: dict[int, tuple[float, float]] = {}
        self.plans: list[PlanFile] = []  # kept, so that ids stay taken

    def __call__(self, plan: PlanFile) -> float:
        """Return the quality of a plan, dB: the worst seed's, or the first that misses the target."""
        speed, quality = self.once(plan, 0)
        for index in range(1, len(self.seeds)):
            if quality < self.target:
                break
            quality = min(quality, self.once(plan, index)[1])
        self.plans.append(plan)
        self.figures[id(plan)] = speed, quality
        return quality

    def once(self, plan: PlanFile, index: int) -> tuple[float, float]:
        """Return how much faster than the plain run a plan is with one of the seeds, and its quality, dB."""
        self.seed = self.seeds[index]
        if index not in self.references:
            self.references[index] = self._decoded(plain_seconds(self.run.job.model, self.sample)[0])
        latent, seconds = try_plan(self.run.job.model, self.sample, plan)
        quality = min(psnr(self._decoded(latent), self.references[index], self.peak), MOST_DECIBELS)
        self.seed = self.seeds[0]
        return self.plain_seconds / seconds, quality

    def _decoded(self, latent: torch.Tensor) -> torch.Tensor:
        return self.decode(latent).float().cpu()

    def sample(self, model: Any) -> torch.Tensor:
        def step(*_: Any) -> None:
            self.steps += 1
            self.tell(self.steps)

        return self.run.job(model, seed=self.seed, callback=step)


def _weights(
    choose: Callable[[float], Allocation], problem: Problem, quality: Callable[[Allocation], float]
) -> np.ndarray:
    """Return what errors of each part of the noise levels count, [S, 1, 1]: measured by a run with errors there alone.

    A choice is followed in one part, all else being full. How much the picture is off, by how much attention was predicted
    to be, is the part's weight. A part in which the choice is full counts as the mean of the others.

    Args:
        choose: knob -> choice.
        problem: what it chooses from.
        quality: choice -> PSNR of a run with it, dB.
    """
    bold, shape = choose(WEIGHING_KNOB).chosen, problem.curves.error.shape[:3]
    parts = np.broadcast_to(np.arange(shape[0])[:, None, None], shape).ravel()
    rows, found = np.arange(len(bold)), np.full(shape[0], np.nan)
    for part in range(shape[0]):
        chosen = np.where(parts == part, bold, 0)
        error = float(problem.error[rows, chosen].sum())
        if error > 0:
            cost = float(problem.cost[rows, chosen].sum())
            found[part] = 10 ** (-quality(Allocation(chosen, cost, error)) / 10) / error
    if not np.isfinite(found).any():
        return np.ones((shape[0], 1, 1))
    return np.where(np.isfinite(found), found, np.nanmean(found))[:, None, None]


def _search_row(method: str) -> Any:
    if method not in SEARCHES:
        raise StrettoError(f"Stretto Attention Search: method is {method!r}; known methods: {', '.join(SEARCHES)}")
    return SEARCHES[method]


def _as_plan(run: ProbedRun, problem: Problem, chosen: Allocation, method: str) -> PlanFile:
    probed, about = run.probed, run.probed.about
    tag = ModelTag(about["family"], about["variant"], about["hash"])
    return as_plan(
        problem, chosen, tag, steps=len(probed.sigmas), grid=tuple(probed.shape["grid"]), tokens=probed.shape["tokens"],
        block=(about["block"],) * 2, order=ORDERS[about["order"]],
        rho_step=0.0, provenance=_provenance(run, method),
    )  # fmt: skip


def _provenance(run: ProbedRun, method: str, **more: Any) -> dict[str, Any]:
    job, probed = run.job, run.probed
    return {
        "source": "Stretto Attention Search, tried by real runs",
        "method": method,
        "paper": "arXiv 2406.08552" if method == GREEDY else SEARCHES[method].source,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "sampler": job.sampler_name,
        "scheduler": job.scheduler,
        "cfg": job.cfg,
        "seed": job.seed,
        "device": probed.device,
        "dtype": probed.dtype,
        **more,
    }


def _knob_for(choose: Callable[[float], Allocation], cost: float) -> float:
    """Return the largest knob whose choice costs at most ``cost``; 0 where none does."""
    low, high = 0.0, 1.0
    if choose(1.0).cost <= cost:
        return 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if choose(middle).cost <= cost else (low, middle)
    return low
