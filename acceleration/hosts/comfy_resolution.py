"""Progressive resolution in ComfyUI: a SAMPLER that runs another one in stages of growing size.

The sampler function itself is called once a stage, at the stage's noise levels; conditioning is prepared by ComfyUI's own
code for the stage's size, as it would be for a picture of that size.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.samplers
import torch

from ..compatibility import TECHNIQUES, add_request
from ..errors import StrettoError
from ..facts import Facts
from ..plan import Plan, Request
from ..resolution.corrected import Correction
from ..resolution.noise_level import to_small
from ..resolution.session import ResolutionSession
from ..resolution.settings import ResolutionSettings
from ..resolution.spectral import Size, ratio, shrink
from ..resolution.stages import Path, Stage, StagePlan
from ..resolution.technique import run_stages, sampler_obstacle
from ..run import RunState
from ..sampling import SamplerTraits, schedule_of

#: Pictures in conditioning that ComfyUI brings to the latent's size itself.
RESIZED_BY_COMFYUI = ("concat_latent_image", "concat_mask", "mask")
#: Pictures that stand beside the latent, in sizes of their own.
REFERENCES = ("reference_latents",)
#: Two stages must not draw the same noise again.
SEED_STEP = 1_000_003
log = logging.getLogger("stretto")

Traits = Callable[[Any], SamplerTraits]


class ProgressiveSampler(comfy.samplers.Sampler):
    """A SAMPLER that asks for progressive resolution.

    On a model with a Stretto node the request joins its plan; elsewhere the sampler plans by itself, without a trace.

    Args:
        inner: the sampler to run.
        request: of the technique ``"resolution"``.
        traits: tells what is known of a sampler.
    """

    def __init__(self, inner: Any, request: Request, traits: Traits):
        if isinstance(inner, ProgressiveSampler):
            raise StrettoError(
                "Stretto Progressive Sampler: this sampler already grows in stages; remove one of the two nodes"
            )
        TECHNIQUES[request.technique].validate(request)
        self.inner, self.request, self._traits = inner, request, traits
        self.sampler_function = getattr(inner, "sampler_function", None)
        self.extra_options = getattr(inner, "extra_options", {})
        self.inpaint_options = getattr(inner, "inpaint_options", {})

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Any,
        noise: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ):
        """Sample in stages, or plainly where that is not possible; arguments are those of ComfyUI's samplers."""
        plan = self._plan(guider, sigmas, noise, extra_args, args, kwargs)
        if isinstance(plan, str):
            if self.request.required:
                raise StrettoError(f"Stretto Progressive Sampler is marked as required but cannot run: {plan}.")
            log.info("resolution: off. %s", plan)
            return self.inner.sample(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        log.info("resolution: active. %s", plan.words())
        return StagedSampler(self.inner, plan).sample(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def _plan(
        self, guider: Any, sigmas: torch.Tensor, noise: torch.Tensor, extra_args: dict, args: tuple, kwargs: dict
    ) -> StagePlan | str:
        traits, schedule = self._traits(self.inner), schedule_of(sigmas.tolist())
        if noise.is_nested or noise.ndim == 3:
            return "audio and video latents sampled together are not supported"
        mask = kwargs.get("denoise_mask", args[1] if len(args) > 1 else None)
        reason = sampler_obstacle(traits) or stage_obstacle(guider, self.inner, extra_args["model_options"], mask)
        if reason is None and not schedule.falling:
            reason = "the noise levels of this run do not fall steadily: plain sampling"
        settings = ResolutionSettings.from_mapping(self.request.settings)
        return reason or run_stages(settings, traits, schedule.sigmas, tuple(noise.shape))


def carried_request(sampler: Any, plan: Plan) -> tuple[Any, Plan]:
    """Return the sampler to run, and ``plan`` with the request that ``sampler`` may carry.

    Raises:
        ConflictError: the model's own plan cannot share a run with that request.
    """
    if not isinstance(sampler, ProgressiveSampler):
        return sampler, plan
    return sampler.inner, add_request(plan, sampler.request)


def with_stage_obstacle(
    facts: Facts, plan: Plan, guider: Any, sampler: Any, args: tuple, kwargs: dict[str, Any]
) -> Facts:
    """Return ``facts`` that also tell why the latent's size cannot change, where ``plan`` wants it to."""
    if not plan.of("resolution"):
        return facts
    mask = kwargs.get("denoise_mask", args[4] if len(args) > 4 else None)
    return replace(facts, stage_obstacle=stage_obstacle(guider, sampler, guider.model_options, mask))


def in_stages(args: tuple, run: RunState) -> tuple:
    """Return the arguments of a sampling run with its sampler put into stages, where the run has a plan of stages."""
    session = next((session for session in run.sessions if isinstance(session, ResolutionSession)), None)
    if session is None:
        return args
    staged = StagedSampler(args[2], session.plan, lambda stage: run.enter_stage(stage.at_full_size))
    return (*args[:2], staged, *args[3:])


def stage_obstacle(guider: Any, sampler: Any, options: dict[str, Any], denoise_mask: torch.Tensor | None) -> str | None:
    """Return why a run cannot be cut into stages of different sizes, or None."""
    if type(sampler) is not comfy.samplers.KSAMPLER:
        return f"the sampler is a {type(sampler).__name__} of another pack, which cannot be run in parts"
    if not is_flow(guider.model_patcher.get_model_object("model_sampling")):
        return "the model is not a flow: its noise levels at different sizes are not related as a flow's are"
    if "denoise_mask_function" in options:
        return "differential diffusion changes its mask with the noise level of the full size"
    if denoise_mask is not None and getattr(sampler, "inpaint_options", {}).get("random"):
        return "this sampler draws new noise for inpainting: use euler"
    if any(_remembers_guidance(function) for function in options.get("sampler_pre_cfg_function", ())):
        return "a guidance node with momentum (APG) remembers latents of one size: set its momentum to 0"
    return next(
        (why for conds in guider.original_conds.values() for entry in conds if (why := _entry_obstacle(entry))), None
    )


def _remembers_guidance(function: Callable) -> bool:
    """Whether a function in front of guidance averages over steps, as ComfyUI's APG does where its momentum is not 0."""
    return bool(inspect.getclosurevars(function).nonlocals.get("momentum")) if inspect.isfunction(function) else False


def is_flow(model_sampling: Any) -> bool:
    """Whether x = (1 - sigma) x0 + sigma noise and denoised = x - sigma * output, asked of the model itself."""
    sigma, zero, one = torch.tensor([0.25]), torch.zeros(1, 1), torch.ones(1, 1)
    expected = (
        (model_sampling.noise_scaling(sigma, one, zero), 0.25),
        (model_sampling.noise_scaling(sigma, zero, one), 0.75),
        (model_sampling.calculate_denoised(sigma, one, zero), -0.25),
        (model_sampling.calculate_denoised(sigma, zero, one), 1.0),
        (model_sampling.calculate_input(sigma, one), 1.0),
    )
    return all(abs(float(found) - wanted) < 1e-4 for found, wanted in expected)


def _entry_obstacle(entry: dict[str, Any]) -> str | None:
    """Return why one entry of conditioning cannot be brought to another size, or None."""
    if entry.get("gligen") is not None:
        return "conditioning holds GLIGEN boxes, which are tied to the latent's size"
    control = entry.get("control")
    if entry.get("hooks") is not None or (control is not None and control.get_extra_hooks()):
        return "conditioning holds LoRA or model hooks, which ComfyUI prepares once for the whole run"
    for name, value in entry.items():
        if name in RESIZED_BY_COMFYUI or name in REFERENCES or name in ("control", "model_conds"):
            continue
        tensors = value if isinstance(value, list | tuple) else (value,)
        if any(
            isinstance(tensor, torch.Tensor) and tensor.ndim >= 4 and min(tensor.shape[-2:]) > 1 for tensor in tensors
        ):
            return f"conditioning holds pictures ({name}) that cannot be brought to the size of a stage"
    return None


class StagedSampler(comfy.samplers.Sampler):
    """Runs a sampler function stage by stage.

    Args:
        inner: a KSAMPLER.
        plan: the stages.
        enter: told of every stage before it begins.
    """

    def __init__(self, inner: Any, plan: StagePlan, enter: Callable[[Stage], None] | None = None):
        self.inner, self.plan, self._enter = inner, plan, enter

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Return the latent [B, C, (T,) H, W] at full size; arguments are those of ComfyUI's samplers."""
        if self.plan.refresh:
            corrected = CorrectedGuider(guider, self.plan, noise, latent_image, denoise_mask, extra_args, self._enter)
            return self.inner.sample(
                corrected, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
        model_sampling = guider.inner_model.model_sampling
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        seed = extra_args.get("seed") or 0
        path, conds = Path(self.plan, noise, latent_image, seed), guider.conds
        full = self.plan.stages[0].r == 1.0
        start = self.max_denoise(guider, sigmas)
        x = model_sampling.noise_scaling(sigmas[0], noise, latent_image, start) if full else path.start()
        seen: dict[str, torch.Tensor] = {}
        try:
            for place, stage in enumerate(self.plan.stages):
                if self._enter is not None:
                    self._enter(stage)
                levels = self._levels(stage, sigmas)
                mask = _shrunk_mask(denoise_mask, stage.size)
                clean = latent_image if stage.r == 1.0 else shrink(latent_image, stage.size) / stage.r
                small = path.noise_at(place)
                if stage.r != 1.0:
                    guider.conds = _stage_conds(
                        guider, stage, self.plan.full, small, clean, mask, extra_args.get("seed")
                    )
                else:
                    guider.conds = conds
                network = comfy.samplers.KSamplerX0Inpaint(guider, levels)
                network.latent_image, network.noise = clean, small
                x = self.inner.sampler_function(
                    network,
                    x,
                    levels,
                    extra_args=_stage_args(extra_args, levels, mask, place),
                    callback=_stage_callback(callback, stage, len(sigmas) - 1, seen),
                    disable=disable_pbar,
                    **self.inner.extra_options,
                )
                if place + 1 < len(self.plan.stages):
                    x = path.switch(place, x, seen.get("denoised"))
        finally:
            guider.conds = conds
        return model_sampling.inverse_noise_scaling(sigmas[-1], x)

    def _levels(self, stage: Stage, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the stage's noise levels as the sampler is given them: at full size the run's own, to the bit."""
        own = sigmas[stage.first : stage.last + 1]
        levels = sigmas.new_tensor(stage.sigmas)
        return own if torch.equal(levels, own) else levels


class CorrectedGuider:
    """A guider whose predictions are small, corrected ones where the plan has a small stage; all else is the guider's own.

    Args:
        guider: predicts at any size.
        plan: the stages, with anchors.
        noise: of the run; with the next two what conditioning of a stage is prepared from.
        latent_image: what the run begins with.
        mask: of inpainting, or None.
        extra_args: what the sampler hands to the model.
        enter: told whenever the size of predictions changes.
    """

    def __init__(
        self,
        guider: Any,
        plan: StagePlan,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        mask: torch.Tensor | None,
        extra_args: dict[str, Any],
        enter: Callable[[Stage], None] | None,
    ):
        self._guider, self._plan, self._enter = guider, plan, enter
        self._start, self._mask, self._seed = (noise, latent_image), mask, extra_args.get("seed")
        self._correction, self._conds = Correction(plan), {}
        self._size = plan.full

    def __getattr__(self, name: str) -> Any:
        """Return what the guider has by that name."""
        return getattr(self._guider, name)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> torch.Tensor:
        """Return the prediction of the clean latent [B, C, (T,) H, W] for ``x`` at noise levels ``sigma`` [B]."""

        def full() -> torch.Tensor:
            self._enter_stage(self._plan.stages[-1])
            return self._guider(x, sigma, model_options=model_options, seed=seed)

        def small(latent: torch.Tensor, q: float, place: int) -> torch.Tensor:
            stage, kept = self._plan.stages[place], self._guider.conds
            self._enter_stage(stage)
            levels = sigma.new_tensor([to_small(level, stage.r) for level in self._plan.sigmas])
            transformer_options = {**model_options.get("transformer_options", {}), "sample_sigmas": levels}
            options = {**model_options, "transformer_options": transformer_options}
            self._guider.conds = self._stage_conds(place)
            try:
                return self._guider(latent, torch.full_like(sigma, q), model_options=options, seed=seed)
            finally:
                self._guider.conds = kept

        return self._correction.predict(x, float(sigma.max()), full, small)

    def _enter_stage(self, stage: Stage) -> None:
        if self._enter is not None and stage.size != self._size:
            self._enter(stage)
        self._size = stage.size

    def _stage_conds(self, place: int) -> dict[str, list[dict[str, Any]]]:
        """Return the run's conditioning at the size of a stage, prepared once."""
        if place not in self._conds:
            stage, (noise, latent_image) = self._plan.stages[place], self._start
            small, clean = shrink(noise, stage.size), shrink(latent_image, stage.size) / stage.r
            mask = _shrunk_mask(self._mask, stage.size)
            self._conds[place] = _stage_conds(self._guider, stage, self._plan.full, small, clean, mask, self._seed)
        return self._conds[place]


def _stage_args(
    extra_args: dict[str, Any], levels: torch.Tensor, mask: torch.Tensor | None, place: int
) -> dict[str, Any]:
    """Return what a sampler hands to the model, for one stage."""
    options = extra_args["model_options"]
    transformer_options = {**options.get("transformer_options", {}), "sample_sigmas": levels}
    staged = {
        **extra_args,
        "denoise_mask": mask,
        "model_options": {**options, "transformer_options": transformer_options},
    }
    if staged.get("seed") is not None:
        staged["seed"] = staged["seed"] + place * SEED_STEP
    return staged


def _stage_callback(callback: Callable | None, stage: Stage, steps: int, seen: dict[str, torch.Tensor]) -> Callable:
    """Count steps over the whole run, and remember the prediction of the picture."""

    def step(state: dict[str, Any]) -> None:
        seen["denoised"] = state["denoised"]
        if callback is not None:
            callback(stage.first + state["i"], state["denoised"], state["x"], steps)

    return step


def _stage_conds(
    guider: Any,
    stage: Stage,
    full: Size,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    mask: torch.Tensor | None,
    seed: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the run's conditioning, prepared by ComfyUI for a latent of the stage's size."""
    conds = {
        name: [_stage_entry(entry, stage, full) for entry in entries] for name, entries in guider.original_conds.items()
    }
    extra = (
        {"latent_shapes": [noise.shape]}
        if "latent_shapes" in inspect.signature(comfy.samplers.process_conds).parameters
        else {}
    )
    device = guider.model_patcher.load_device
    return comfy.samplers.process_conds(guider.inner_model, noise, conds, device, latent_image, mask, seed, **extra)


def _stage_entry(entry: dict[str, Any], stage: Stage, full: Size) -> dict[str, Any]:
    """Return one entry of conditioning with its areas and reference latents brought to the size of a stage."""
    entry = entry.copy()
    area = entry.get("area")
    if area is not None and area[0] != "percentage":
        entry["area"] = _stage_area(area, stage.size, full)
    for name in REFERENCES:
        if entry.get(name) is not None:
            entry[name] = [_reference(latent, stage, full) for latent in entry[name]]
    return entry


def _stage_area(area: tuple[int, ...], size: Size, full: Size) -> tuple[int, ...]:
    """Return an area of conditioning, (sizes..., offsets...) in latent pixels, at the size of a stage."""
    sides = len(area) // 2
    scales = [1.0] * (sides - 2) + [size[0] / full[0], size[1] / full[1]]
    starts = [round(start * scale) for start, scale in zip(area[sides:], scales, strict=True)]
    ends = [
        round((start + side) * scale) for side, start, scale in zip(area[:sides], area[sides:], scales, strict=True)
    ]
    return tuple(max(end - start, 1) for start, end in zip(starts, ends, strict=True)) + tuple(starts)


def _reference(latent: torch.Tensor, stage: Stage, full: Size) -> torch.Tensor:
    """Return a reference picture's latent [..., H, W] as much smaller as the stage is, its sides even."""
    sides = tuple(latent.shape[-2:])
    size = tuple(
        min(max(round(side * small / whole / 2) * 2, 2), side)
        for side, small, whole in zip(sides, stage.size, full, strict=True)
    )
    return (shrink(latent, size) / ratio(sides, size)).to(latent.dtype)


def _shrunk_mask(mask: torch.Tensor | None, size: Size) -> torch.Tensor | None:
    """Return an inpainting mask [B, C, (T,) H, W] averaged over the larger pixels of a stage."""
    if mask is None or tuple(mask.shape[-2:]) == size:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return (
        torch.nn.functional.interpolate(flat.float(), size=size, mode="area")
        .to(mask.dtype)
        .reshape(*mask.shape[:-2], *size)
    )
