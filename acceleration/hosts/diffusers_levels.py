"""Noise levels of diffusers' schedulers: where in a run a call of the transformer stands, and what its output means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..sampling import SamplerTraits, traits_of

FLOW, EPSILON, VELOCITY, SAMPLE = "flow", "epsilon", "v_prediction", "sample"
#: Scheduler class -> sampler that calls the model in the same way.
_SAMPLERS = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DDPMScheduler": "ddpm",
    "LCMScheduler": "lcm",
    "FlowMatchLCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "CogVideoXDPMScheduler": "dpmpp_2m_sde",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
}
#: Single-call samplers that have no twin among ComfyUI's; deterministic as pipelines call them.
_OTHERS = ("DDIMScheduler", "CogVideoXDDIMScheduler")
#: Relative accuracy of a timestep beyond its type's own: pipelines divide and multiply by the training timesteps.
ACCURACY = 1e-4
#: Noise level of schedules that begin with no signal at all.
PURE_NOISE = 1e5


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels of one run.

    Attributes:
        timesteps: the scheduler's timesteps, one for every call that it expects.
        sigmas: noise level of each, and of the end.
        source: what they were read from; another object means another run.
        kind: what the network predicts: ``"flow"``, ``"epsilon"``, ``"v_prediction"`` or ``"sample"``; "" where the
            scheduler's noise levels or prediction are not understood.
        train: number of training timesteps.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    source: Any
    kind: str = FLOW
    train: float = 1000.0

    @property
    def falling(self) -> tuple[float, ...]:
        """Noise levels without the repetitions of schedulers that evaluate twice."""
        return tuple(sigma for index, sigma in enumerate(self.sigmas) if index == 0 or sigma != self.sigmas[index - 1])

    def affine(self, index: int) -> tuple[float, float]:
        """Return (a, b): the denoised latent is ``a * network input + b * prediction`` at call ``index``.

        A flow's input is the latent itself; that of the others is divided by sqrt(sigma**2 + 1), as schedulers scale it.
        """
        sigma = self.sigmas[index]
        root = (sigma**2 + 1.0) ** 0.5
        known = {FLOW: (1.0, -sigma), EPSILON: (root, -sigma), VELOCITY: (1.0 / root, -sigma / root)}
        return known.get(self.kind, (0.0, 1.0))


def given_levels(sigmas: Sequence[float]) -> Levels:
    """Return the :class:`Levels` of a flow without a scheduler: ``sigmas`` fall from 1 or less to the end's."""
    values = tuple(float(sigma) for sigma in sigmas)
    return Levels(tuple(1000.0 * sigma for sigma in values[:-1]), values, sigmas)


def levels_of(scheduler: Any) -> Levels | None:
    """Return the :class:`Levels` that ``scheduler`` was last set to; None where it has no timesteps."""
    source = getattr(scheduler, "timesteps", None)
    if not isinstance(source, torch.Tensor) or source.ndim != 1 or not len(source):
        return None
    timesteps = tuple(float(value) for value in source.tolist())
    sigmas, kind = _sigmas(scheduler, timesteps), _kind(scheduler)
    train = float(getattr(scheduler.config, "num_train_timesteps", 1000))
    if sigmas is None or not kind:
        return Levels(timesteps, (*timesteps, 0.0), source, "", train)
    return Levels(timesteps, sigmas, source, kind, train)


def _sigmas(scheduler: Any, timesteps: tuple[float, ...]) -> tuple[float, ...] | None:
    told = getattr(scheduler, "sigmas", None)
    if isinstance(told, torch.Tensor) and len(told) == len(timesteps) + 1:
        return tuple(float(value) for value in told.tolist())
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None or any(value != int(value) for value in timesteps):
        return None
    kept = [float(products[int(value)]) for value in timesteps]
    return (*(((1.0 - value) / value) ** 0.5 if value > 0 else PURE_NOISE for value in kept), 0.0)


def _kind(scheduler: Any) -> str:
    if type(scheduler).__name__.startswith("FlowMatch"):
        return FLOW
    told = getattr(scheduler.config, "prediction_type", None)
    if told == "flow_prediction" and getattr(scheduler.config, "use_flow_sigmas", False):
        return FLOW
    return told if told in (EPSILON, VELOCITY, SAMPLE) else ""


def scheduler_traits(scheduler: Any, levels: Levels) -> SamplerTraits:
    """Return how ``scheduler`` makes its pipeline call the transformer; an unknown one comes back as not known."""
    name, config = type(scheduler).__name__, scheduler.config
    if not levels.kind:
        return SamplerTraits(name, known=False)
    if name in _OTHERS:
        return SamplerTraits("ddim")
    traits = traits_of(_SAMPLERS.get(name, name))
    if name == "DPMSolverMultistepScheduler" and str(getattr(config, "algorithm_type", "")).startswith("sde"):
        return traits_of("dpmpp_2m_sde")
    return replace(traits, stochastic=True) if getattr(config, "stochastic_sampling", False) else traits


def place(scheduler: Any, levels: Levels, given: float, dtype: torch.dtype, last: int) -> int | None:
    """Return which of the run's calls a call of the transformer is, None for one that does not belong to the run.

    Schedulers that count their steps are believed, and the timestep must agree: another pipeline may share the network.

    Args:
        scheduler: the pipeline's; None where levels were given by hand.
        levels: its levels.
        given: timestep of the call, as the scheduler counts.
        dtype: type that the network was given it in.
        last: the call of the run before this one, -1 for none.
    """
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index
        if index is None:
            # Not told where it begins (image to image): the first call shows that; until a step nothing else follows.
            index = _nearest(levels, given) if last < 0 else last
        return index if 0 <= index < len(levels.timesteps) and _agrees(levels.timesteps[index], given, dtype) else None
    index = _nearest(levels, given)
    return index if _agrees(levels.timesteps[index], given, dtype) else None


def _nearest(levels: Levels, given: float) -> int:
    return min(range(len(levels.timesteps)), key=lambda index: abs(levels.timesteps[index] - given))


def _agrees(timestep: float, given: float, dtype: torch.dtype) -> bool:
    accuracy = max(torch.finfo(dtype).eps, ACCURACY) if dtype.is_floating_point else ACCURACY
    return abs(timestep - given) <= accuracy * max(abs(timestep), 1.0)
