"""What the engine must know about samplers, and where in a run a noise level lies."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation import Evaluation


@dataclass(frozen=True)
class SamplerTraits:
    """How a sampler calls the model.

    Attributes:
        name: the sampler function's name without its ``sample_`` prefix.
        known: False means nothing else here can be trusted; acceleration stays off.
        single_call: one model evaluation a step, at the step's own noise level.
        multistep: combines predictions of earlier steps.
        stochastic: adds fresh noise between steps, so consecutive inputs are less alike.
        adaptive: picks its own noise levels, which the sigma list does not hold.
    """

    name: str
    known: bool = True
    single_call: bool = True
    multistep: bool = False
    stochastic: bool = False
    adaptive: bool = False


_SINGLE = "euler euler_cfg_pp"
_SINGLE_STOCHASTIC = "euler_ancestral euler_ancestral_cfg_pp ddpm lcm"
_MULTISTEP = (
    "lms dpmpp_2m dpmpp_2m_cfg_pp ipndm ipndm_v deis res_multistep res_multistep_cfg_pp "
    "gradient_estimation gradient_estimation_cfg_pp unipc unipc_bh2"
)
_MULTISTEP_STOCHASTIC = (
    "dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
    "dpmpp_3m_sde_gpu res_multistep_ancestral res_multistep_ancestral_cfg_pp er_sde sa_solver"
)
_MULTI_CALL = "heun heunpp2 dpm_2 exp_heun_2_x0"
_MULTI_CALL_STOCHASTIC = (
    "dpm_2_ancestral dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu "
    "seeds_2 seeds_3 sa_solver_pece exp_heun_2_x0_sde"
)
_ADAPTIVE = "dpm_fast dpm_adaptive"


def _table() -> dict[str, SamplerTraits]:
    rows = (
        (_SINGLE, {}),
        (_SINGLE_STOCHASTIC, {"stochastic": True}),
        (_MULTISTEP, {"multistep": True}),
        (_MULTISTEP_STOCHASTIC, {"multistep": True, "stochastic": True}),
        (_MULTI_CALL, {"single_call": False}),
        (_MULTI_CALL_STOCHASTIC, {"single_call": False, "stochastic": True}),
        (_ADAPTIVE, {"single_call": False, "adaptive": True}),
    )
    return {name: SamplerTraits(name, **traits) for names, traits in rows for name in names.split()}


SAMPLERS = _table()


def traits_of(name: str) -> SamplerTraits:
    """Return the traits of sampler ``name``; an unknown one comes back with ``known=False``."""
    return SAMPLERS.get(name, SamplerTraits(name, known=False))


@dataclass(frozen=True)
class Schedule:
    """The falling noise levels of one run, from the first step's to the end's.

    Positions are continuous: an evaluation at ``sigmas[i]`` has position ``i``, one
    between two levels a fraction. They come from the noise level alone, so samplers
    that evaluate twice a step, sliced schedules and repeated guidance passes need no
    call counting.
    """

    sigmas: tuple[float, ...]
    _ascending: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ascending", tuple(-sigma for sigma in self.sigmas))

    @property
    def steps(self) -> int:
        """Number of steps (one less than the number of levels)."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def falling(self) -> bool:
        """Whether every level lies strictly below the one before."""
        return all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))

    def position(self, sigma: float) -> float:
        """Return the continuous step position of ``sigma``, clamped to [0, steps].

        Levels within a relative 1e-4 of a scheduled one count as that one (half-precision
        models hand back rounded sigmas).
        """
        levels = self.sigmas
        right = bisect.bisect_left(self._ascending, -sigma)
        for index in (right - 1, right):
            if 0 <= index < len(levels) and abs(levels[index] - sigma) <= 1e-4 * max(levels[index], 1e-6):
                return float(index)
        if right == 0:
            return 0.0
        if right == len(levels):
            return float(self.steps)
        above, below = levels[right - 1], levels[right]
        return right - 1 + (above - sigma) / (above - below)

    def step(self, position: float) -> int:
        """Return the step that ``position`` belongs to, in [0, steps - 1]."""
        return min(max(int(position + 1e-9), 0), max(self.steps - 1, 0))


def schedule_of(sigmas: Sequence[float]) -> Schedule:
    """Return the :class:`Schedule` of a run's sigma list."""
    return Schedule(tuple(float(sigma) for sigma in sigmas))


Coordinate = Callable[["Evaluation"], float]


def coordinate_of(name: str) -> Coordinate:
    """Return the coordinate that forecasts are made in.

    Args:
        name: ``"step"`` (continuous step position), ``"sigma"`` (noise level) or ``"logsnr"`` (log of signal over noise of
            a flow, ln((1 - sigma) / sigma), clamped near sigma = 1; -ln sigma above).
    """
    return {"step": lambda e: e.position, "sigma": lambda e: -e.sigma, "logsnr": lambda e: log_snr(e.sigma)}[name]


def log_snr(sigma: float) -> float:
    """Log signal-to-noise ratio of a flow at ``sigma``; beyond 1 (other parametrisations) minus its logarithm."""
    if sigma > 1.0:
        return -math.log(sigma) + math.log(1e-3)
    return math.log(max(1.0 - sigma, 1e-3) / max(sigma, 1e-6))
