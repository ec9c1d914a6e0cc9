"""VGDFR in ComfyUI (arXiv 2504.12259): a few steps at full length, then the rest on fewer latent frames.

The two passes are two runs of ComfyUI's own sampler, so models are loaded and conditioning is prepared as ever; in
between the predicted video is decoded, judged, shortened and encoded again.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..errors import StrettoError
from ..frame_rate.fitting import fit_ratio
from ..frame_rate.gather import (
    gather_conditioning,
    gather_latents,
    is_video,
    noise_mask_for,
    obstacle_in,
    pinned_latents,
)
from ..frame_rate.schedule import LATENT_KEY, LINEAR, FrameRateSchedule, with_schedule
from ..frame_rate.similarity import loss_of
from ..frame_rate.technique import AUTO, NODE
from ..plan import Request
from ..resolution.technique import sampler_obstacle
from . import comfy as host
from .comfy_resolution import is_flow
from .comfy_sampling import SamplingJob, preview_callback
from .comfy_video_vae import DynamicRateVAE, stride_of
from .device import synchronize


@dataclass(frozen=True)
class DynamicSettings:
    """How a run is shortened.

    Attributes:
        ratio: kept share of the latent frames, in (0, 1]; 1 is plain sampling.
        after: share of the steps that run at full length, in [0, 1).
        layers: layers that see original positions: ``"auto"`` or their numbers.
        restore: how the decoder shall make up the frames in between.
        fresh: as published, all latents start the second pass from re-encoded ones and the seed's noise. Otherwise
            those at rate 1 go on from where they are.

    Raises:
        StrettoError: a value is out of range.
    """

    ratio: float = 0.6
    after: float = 0.2
    layers: Any = AUTO
    restore: str = LINEAR
    fresh: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise StrettoError(f"{NODE}: ratio is {self.ratio!r}; it must be a number in (0, 1]")
        if not 0 <= self.after < 1:
            raise StrettoError(f"{NODE}: after is {self.after!r}; it must be a number in [0, 1)")


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything the second pass is given. ``seconds`` tells what the middle took (decode, choose, encode)."""

    schedule: FrameRateSchedule
    model: Any
    positive: Any
    negative: Any
    latent: dict[str, Any]
    seconds: dict[str, float]


class GatheredNoise:
    """A NOISE for the short video: that of the full one, generated at full length, at the kept latents."""

    def __init__(self, noise: Any, schedule: FrameRateSchedule):
        self.noise, self.schedule, self.seed = noise, schedule, noise.seed

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        """Return noise [B, C, L', h, w] for a LATENT of the short video."""
        samples = latent["samples"]
        if samples.ndim != 5 or samples.shape[2] != self.schedule.latents:
            raise StrettoError(
                f"{NODE}: this noise is for {self.schedule.latents} latent frames; the latent has the shape "
                f"{tuple(samples.shape)}"
            )
        full = samples.new_zeros(*samples.shape[:2], self.schedule.full_latents, *samples.shape[3:])
        whole = {name: value for name, value in latent.items() if name not in (LATENT_KEY, "noise_mask")}
        return gather_latents(self.noise.generate_noise({**whole, "samples": full}), self.schedule)


def run_obstacle(model: Any, positive: list, negative: list, latent: dict[str, Any]) -> str | None:
    """Return why a run cannot be shortened in its middle, or None."""
    if not is_video(latent):
        return "the latent is not a video; latents of audio and video together are not supported"
    if latent["samples"].shape[0] != 1:
        return f"the batch holds {latent['samples'].shape[0]} videos, which would each need a schedule; sample one at a time"
    if not is_flow(model.get_model_object("model_sampling")):
        return "the model is not a flow"
    if "context_handler" in model.model_options:
        return "context windows cut the video at fixed frames; remove them or this node"
    if "denoise_mask_function" in model.model_options:
        return "differential diffusion ties its mask to the full length"
    return obstacle_in(positive) or obstacle_in(negative)


def prepare_second_pass(
    model: Any,
    vae: Any,
    positive: list,
    negative: list,
    predicted: dict[str, Any],
    settings: DynamicSettings,
    clock: Callable[[], float] = time.perf_counter,
) -> Prepared:
    """Return a run's second pass, from its predicted clean video.

    Args:
        model: MODEL.
        vae: of the model.
        positive: CONDITIONING.
        negative: CONDITIONING.
        predicted: LATENT at full length, ``denoised_output`` of the first pass.
        settings: how much is kept.
        clock: what seconds are read from.

    Raises:
        StrettoError: the run cannot be shortened; the message says why.
    """
    reason = run_obstacle(model, positive, negative, predicted)
    if reason:
        raise StrettoError(f"{NODE}: {reason}.")
    samples, stride = predicted["samples"], stride_of(vae)
    seconds: dict[str, float] = {}
    pixels = _timed(seconds, "decode", vae, lambda: vae.decode(samples), clock)[0]
    if len(pixels) != 1 + stride * (samples.shape[2] - 1):
        raise StrettoError(f"{NODE}: the VAE made {len(pixels)} frames of {samples.shape[2]} latent frames")
    mask = predicted.get("noise_mask")
    pinned = pinned_latents([*positive, *negative], mask, samples.shape[2])

    def choose() -> FrameRateSchedule:
        rates = fit_ratio(loss_of(pixels, stride), settings.ratio, pinned=pinned)
        return FrameRateSchedule(len(pixels), rates, stride, restore=settings.restore)

    schedule = _timed(seconds, "choose", vae, choose, clock)
    positive, negative = gather_conditioning(positive, schedule), gather_conditioning(negative, schedule)
    short = samples
    if not schedule.trivial:
        short = _timed(seconds, "encode", vae, lambda: DynamicRateVAE(vae, schedule).encode(pixels), clock)
        wanted = {"schedule": schedule.to_json(), "layers": settings.layers, "seconds": dict(seconds)}
        model = host.request(model, Request("frame_rate", wanted))
    latent = with_schedule({**predicted, "samples": short}, schedule)
    if mask is not None:
        latent["noise_mask"] = noise_mask_for(mask, schedule)
    return Prepared(schedule, model, positive, negative, latent, seconds)


def sample_dynamic(
    job: SamplingJob, vae: Any, settings: DynamicSettings, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Any], dict[str, float]]:
    """Sample as KSampler does, on fewer latent frames after the first steps.

    Returns:
        The LATENT with its schedule, and seconds: ``first``, ``decode``, ``choose``, ``encode``, ``second``.

    Raises:
        StrettoError: the run cannot be shortened; the message says why.
    """
    stride = stride_of(vae)
    if settings.ratio == 1.0:
        samples = job()
        schedule = FrameRateSchedule.full(1 + stride * (samples.shape[2] - 1), stride, restore=settings.restore)
        return with_schedule({**job.latent, "samples": samples}, schedule), {}
    sampler = comfy.samplers.sampler_object(job.sampler_name)
    latent, noise = job.start(job.model, job.seed)
    reason = run_obstacle(job.model, job.positive, job.negative, {**job.latent, "samples": latent})
    obstacle = sampler_obstacle(host.sampler_traits(sampler))
    if reason is None and obstacle is not None:  # here nothing is sampled plainly instead
        reason = f"{obstacle.removesuffix(': plain sampling')}; use euler"
    if reason is None and (type(sampler) is not comfy.samplers.KSAMPLER or sampler.inpaint_options.get("random")):
        reason = f"the sampler {job.sampler_name} cannot be run in two parts: use euler"
    sigmas = job.sigmas()
    steps = len(sigmas) - 1
    first = min(max(round(settings.after * steps), 1), steps - 1)
    if reason is None and steps < 2:
        reason = "one step cannot be cut in two"
    if reason:
        raise StrettoError(f"{NODE}: {reason}.")
    run = _Passes(job, sampler, noise, preview_callback(job.model, steps), steps)
    seconds: dict[str, float] = {}
    _timed(seconds, "first", job.model, lambda: run.first(latent, sigmas[: first + 1]), clock)
    predicted = {**job.latent, "samples": job.model.model.process_latent_out(run.predicted)}
    prepared = prepare_second_pass(job.model, vae, job.positive, job.negative, predicted, settings, clock)
    seconds |= prepared.seconds
    samples = _timed(
        seconds, "second", job.model, lambda: run.second(prepared, sigmas[first:], first, settings.fresh), clock
    )
    return {**prepared.latent, "samples": samples}, seconds


class _Passes:
    """The two runs of one sampler, and what goes from the first to the second."""

    def __init__(self, job: SamplingJob, sampler: Any, noise: torch.Tensor, callback: Callable, steps: int):
        self.job, self.sampler, self.noise, self.callback, self.steps = job, sampler, noise, callback, steps
        self.predicted: torch.Tensor | None = None
        self.reached: torch.Tensor | None = None

    def first(self, latent: torch.Tensor, sigmas: torch.Tensor) -> None:
        """Sample at full length; keep the noisy latent as it stands and the last prediction of the clean one."""

        def stop_there(function: Callable) -> Callable:
            @functools.wraps(function)
            def run(*args: Any, **kwargs: Any) -> torch.Tensor:
                self.reached = function(*args, **kwargs)
                return self.reached

            return run

        def note(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            self.predicted = denoised
            self.callback(step, denoised, x, self.steps)

        job = self.job
        self._run(job.model, job.positive, job.negative, latent, self.noise, sigmas, stop_there, note, job.latent)

    def second(self, prepared: Prepared, sigmas: torch.Tensor, done: int, fresh: bool) -> torch.Tensor:
        """Sample the short video to its end, its untouched latents from where the first pass left them."""
        schedule = prepared.schedule
        untouched = [] if fresh else [i for i, rate in enumerate((1, *schedule.rates)) if rate == 1]
        places = [schedule.kept[i] for i in untouched]
        reached = self.reached

        def go_on(function: Callable) -> Callable:
            @functools.wraps(function)
            def run(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                start = x.clone()
                start[:, :, untouched] = reached[:, :, places].to(x)
                return function(model, start, *args, **kwargs)

            return run

        def note(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            self.callback(done + step, denoised, x, self.steps)

        noise = gather_latents(self.noise, schedule)
        return self._run(
            prepared.model, prepared.positive, prepared.negative, prepared.latent["samples"], noise, sigmas, go_on, note,
            prepared.latent,
        )  # fmt: skip

    def _run(self, model, positive, negative, latent, noise, sigmas, around, callback, source) -> torch.Tensor:
        inner = self.sampler
        sampler = comfy.samplers.KSAMPLER(around(inner.sampler_function), inner.extra_options, inner.inpaint_options)
        return comfy.sample.sample_custom(
            model, noise, self.job.cfg, sampler, sigmas, positive, negative, latent,
            noise_mask=source.get("noise_mask"), callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.job.seed,
        )  # fmt: skip


def _timed(
    seconds: dict[str, float], name: str, owner: Any, work: Callable[[], Any], clock: Callable[[], float]
) -> Any:
    device = getattr(owner, "load_device", None) or getattr(owner, "device", None) or torch.device("cpu")
    started = clock()
    result = work()
    synchronize(device)
    seconds[name] = clock() - started
    return result
