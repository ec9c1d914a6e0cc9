"""Stages of a run: which steps at which size and at which noise levels, and how a latent gets from one to the next."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ..sampling import Schedule
from .noise_level import band_power, gain, switch_level, to_full, to_small
from .settings import CORRECTED, COUPLED, FRESH, SPEED, ResolutionSettings
from .spectral import Size, expand, ratio, shrink


@dataclass(frozen=True)
class Stage:
    """A part of the run at one size.

    Attributes:
        size: (height, width) of the latent.
        r: :func:`~.spectral.ratio` of the full size to it; 1 at full size.
        first: first step of the full run that belongs to it.
        last: step after its last one.
        sigmas: noise levels that the sampler is given, ``last - first + 1`` of them.
        mapped: whether these are the full run's levels, seen from this size.
    """

    size: Size
    r: float
    first: int
    last: int
    sigmas: tuple[float, ...]
    mapped: bool = True

    def at_full_size(self, sigma: float) -> float:
        """Return the noise level of the full run that ``sigma`` at this size stands for."""
        return to_full(sigma, self.r) if self.mapped and self.r != 1.0 else sigma


@dataclass(frozen=True)
class StagePlan:
    """All stages of a run.

    Attributes:
        method: how they follow on each other.
        full: size of the whole latent.
        stages: in running order; the last one is at full size.
        sigmas: noise levels of the full run.
        refresh: the first of so many steps of a small stage is also predicted at full size; 0 where none is.
    """

    method: str
    full: Size
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    refresh: int = 0

    @property
    def cost(self) -> float:
        """Network rows x tokens of the run over those of the full one: what it takes where time is per token."""
        work = 0.0
        for step, place in enumerate(self._smalls):
            work += 1.0 if place is None else self._area(place)
            if place is None and self.refresh:
                work += sum(self._area(following) for following in self.small_after(step))
        return work / max(len(self._smalls), 1)

    def place_of(self, sigma: float) -> tuple[float, int]:
        """Return the position in the run, and the step, of an evaluation at a noise level of the full run."""
        position = self._schedule.position(sigma)
        return position, self._schedule.step(position)

    def small_stage(self, step: int) -> int | None:
        """Return the number of the stage whose size ``step`` is predicted at, None for the full size."""
        return self._smalls[step]

    def small_after(self, step: int) -> tuple[int, ...]:
        """Return the stages at whose sizes predictions follow on ``step``, until the next full one."""
        found = []
        for place in self._smalls[step + 1 :]:
            if place is None:
                break
            found += [place] if place not in found else []
        return tuple(found)

    def words(self) -> str:
        """Say the stages as a user reads them."""
        parts = [f"steps {s.first + 1} to {s.last} at {s.size[1]}x{s.size[0]}" for s in self.stages]
        full = sum(place is None for place in self._smalls[: self.stages[-1].first])
        more = f", {full} of the small ones also at full size" if self.refresh else ""
        return f"{self.method}: {', '.join(parts)} (latent pixels){more}"

    def to_json(self) -> dict:
        """Return the stages as JSON values."""
        return {
            "method": self.method,
            "stages": [
                {"size": list(s.size), "steps": [s.first, s.last], "sigmas": list(s.sigmas)} for s in self.stages
            ],
            "cost": self.cost,
        }

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.sigmas)

    @cached_property
    def _smalls(self) -> tuple[int | None, ...]:
        """Stage of every step that is predicted at a smaller size, None for the others."""
        return tuple(
            None if stage.r == 1.0 or (self.refresh and (step - stage.first) % self.refresh == 0) else place
            for place, stage in enumerate(self.stages)
            for step in range(stage.first, stage.last)
        )

    def _area(self, place: int) -> float:
        """Return the pixels of a stage over those of the full size."""
        size = self.stages[place].size
        return size[0] * size[1] / (self.full[0] * self.full[1])


def stage_size(full: Size, scale: float, multiple: int) -> Size:
    """Return the size of a stage: ``scale`` of each side, to the nearest multiple of ``multiple``; full size at 1."""
    if scale == 1.0:
        return full
    return tuple(min(max(round(side * scale / multiple) * multiple, multiple), side) for side in full)


def switch_noise_level(settings: ResolutionSettings, scale: float, side: int) -> float:
    """Return the noise level at which a stage of ``scale`` of the side ends, ``side`` being the shorter one in latent pixels."""
    law = settings.power_law
    return switch_level(band_power(law.amplitude, law.exponent, scale * side / 2), settings.delta)


def switch_step(settings: ResolutionSettings, full: Size, size: Size, sigmas: tuple[float, ...]) -> int:
    """Return the step at which a stage of ``size`` ends: the first whose noise level lies below its switch level."""
    level = switch_noise_level(settings, min(size[0] / full[0], size[1] / full[1]), min(full))
    return next((step for step, sigma in enumerate(sigmas) if sigma <= level), len(sigmas) - 1)


def plan_stages(settings: ResolutionSettings, sigmas: tuple[float, ...], full: Size) -> StagePlan | str:
    """Return the stages of a run, or why there is nothing to gain.

    Args:
        settings: what the user asked for.
        sigmas: falling noise levels of the full run, N + 1 of them.
        full: (height, width) of the latent.
    """
    steps = len(sigmas) - 1
    sizes = [stage_size(full, scale, settings.multiple) for scale in settings.stages]
    for size in sizes[:-1]:
        if size != full and min(size) < settings.min_side:
            return (
                f"a stage of {size[1]}x{size[0]} latent pixels is below min_side = {settings.min_side}: "
                "pictures this small come out with another composition"
            )
    if settings.switches:
        ends = [round(share * steps) for share in settings.switches]
    else:
        ends = [switch_step(settings, full, size, sigmas) if size != full else 0 for size in sizes[:-1]]
    bounds = [0]
    for end in (*ends, steps):
        bounds.append(min(max(end, bounds[-1]), steps))
    if not settings.switches and bounds[-2] >= steps:
        bounds[-2] = steps - 1  # the picture is always finished at full size
    parts = [part for part in zip(sizes, bounds, bounds[1:]) if part[2] > part[1]]
    if all(size == full for size, _, _ in parts):
        return _why_nothing(settings, sizes, full, sigmas)
    refresh = settings.refresh if settings.method == CORRECTED else 0
    return StagePlan(settings.method, full, _stages(settings.method, parts, full, sigmas), sigmas, refresh)


def whole_run(sigmas: tuple[float, ...], full: Size, method: str = COUPLED) -> StagePlan:
    """Return the plan of one stage at full size."""
    return StagePlan(method, full, (Stage(full, 1.0, 0, len(sigmas) - 1, sigmas),), sigmas)


def _stages(
    method: str, parts: list[tuple[Size, int, int]], full: Size, sigmas: tuple[float, ...]
) -> tuple[Stage, ...]:
    stages, entry = [], None
    for place, (size, first, last) in enumerate(parts):
        r = ratio(full, size)
        if method in (COUPLED, CORRECTED):
            levels = tuple(sigma if r == 1.0 else to_small(sigma, r) for sigma in sigmas[first : last + 1])
            stages.append(Stage(size, r, first, last, levels))
            continue
        # Published forms give the small network the full run's levels; SPEED enters the next stage above its first one.
        levels = sigmas[first : last + 1] if entry is None else (entry, *sigmas[first + 1 : last + 1])
        stages.append(Stage(size, r, first, last, levels, mapped=False))
        if method == SPEED and place + 1 < len(parts):
            entry = to_full(levels[-1], r / ratio(full, parts[place + 1][0]))
    return tuple(stages)


def _why_nothing(settings: ResolutionSettings, sizes: list[Size], full: Size, sigmas: tuple[float, ...]) -> str:
    if all(size == full for size in sizes):
        return f"every stage has the full size of {full[1]}x{full[0]} latent pixels: nothing to gain"
    return (
        f"the run starts at noise level {sigmas[0]:.3f}, below which the smaller stages would already have ended "
        f"(delta = {settings.delta:g}): nothing to gain"
    )


@dataclass
class Path:
    """What is kept of a run between its stages: the full run's noise and what is known of fine detail.

    Attributes:
        plan: the stages.
        noise: of the full run [B, C, (T,) H, W].
        clean: fine detail without noise: of the latent that sampling starts from, later what a full stage has found.
        seed: of fresh noise, for the published forms.
    """

    plan: StagePlan
    noise: torch.Tensor
    clean: torch.Tensor
    seed: int = 0

    def start(self) -> torch.Tensor:
        """Return the noisy latent that the first stage begins with."""
        stage, sigma = self.plan.stages[0], self.plan.stages[0].sigmas[0]
        noise, clean = self.noise_at(0), self.clean_at(0)
        return (
            sigma * noise + (1.0 - sigma) * clean if stage.r != 1.0 else sigma * self.noise + (1.0 - sigma) * self.clean
        )

    def noise_at(self, place: int) -> torch.Tensor:
        """Return the noise of stage ``place``: the low frequencies of the full run's."""
        return shrink(self.noise, self.plan.stages[place].size)

    def clean_at(self, place: int) -> torch.Tensor:
        """Return the clean latent at the size of stage ``place``."""
        stage = self.plan.stages[place]
        return self.clean if stage.r == 1.0 else shrink(self.clean, stage.size) / stage.r

    def switch(self, place: int, latent: torch.Tensor, denoised: torch.Tensor | None = None) -> torch.Tensor:
        """Return the latent that stage ``place + 1`` begins with, from what stage ``place`` ended with.

        Args:
            place: number of the stage that has ended.
            latent: its noisy latent, at its last noise level.
            denoised: its last prediction of the picture (:data:`~.settings.FRESH` only).
        """
        stage, following = self.plan.stages[place], self.plan.stages[place + 1]
        if stage.size == following.size:
            return latent
        if self.plan.method == FRESH:
            fresh = self._fresh(place, following.size, latent)
            r = stage.r / following.r
            sigma = following.sigmas[0]
            return (1.0 - sigma) * expand(denoised * r, torch.zeros_like(fresh)) + sigma * fresh
        if self.plan.method == SPEED:
            q, r = stage.sigmas[-1], stage.r / following.r
            return expand(latent * gain(q, r), self._fresh(place, following.size, latent) * to_full(q, r))
        return self._along_the_path(stage, following, latent)

    def _along_the_path(self, stage: Stage, following: Stage, latent: torch.Tensor) -> torch.Tensor:
        """Lift to the full size, where what the stage could not hold is noise of the full run and known detail; then cut."""
        sigma = self.plan.sigmas[stage.last]
        if stage.r != 1.0:
            high = sigma * self.noise + (1.0 - sigma) * self.clean
            latent = expand(latent * gain(stage.sigmas[-1], stage.r), high)
        if following.r == 1.0:
            return latent
        if following.size[0] < stage.size[0] or following.size[1] < stage.size[1]:
            # Detail found so far: on a straight path x = (1 - sigma) x0 + sigma noise.
            self.clean = (latent - sigma * self.noise) / (1.0 - sigma) if sigma < 1.0 else self.clean
        return shrink(latent, following.size) / gain(following.sigmas[0], following.r)

    def _fresh(self, place: int, size: Size, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed + 7919 * (place + 1)) % (1 << 63))
        shape = (*like.shape[:-2], *size)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
