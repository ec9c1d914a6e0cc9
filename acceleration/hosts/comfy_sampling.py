"""Sampling as ComfyUI's KSampler node does it, as a job that can be repeated with another model or seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]


@dataclass(frozen=True, eq=False)
class SamplingJob:
    """Everything KSampler is given.

    Attributes:
        model: MODEL.
        positive: CONDITIONING.
        negative: CONDITIONING.
        latent: LATENT, ``{"samples": [B, C, (T,) H, W], ...}``.
        seed: of the noise.
        steps: number of steps.
        cfg: guidance scale.
        sampler_name: one of ComfyUI's samplers.
        scheduler: one of ComfyUI's schedulers.
        denoise: share of the noise levels that is run, in (0, 1].
    """

    model: Any
    positive: Any
    negative: Any
    latent: Mapping[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0

    def __call__(
        self,
        model: Any = None,
        *,
        seed: int | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Sample and return the latent; what is left out is the job's own. Interrupts pass through.

        Without a ``callback`` progress and previews are shown as KSampler shows them.
        """
        model = self.model if model is None else model
        seed = self.seed if seed is None else seed
        steps = self.steps if steps is None else steps
        latent, noise = self.start(model, seed)
        quiet = callback is not None or not comfy.utils.PROGRESS_BAR_ENABLED
        return comfy.sample.sample(
            model,
            noise,
            steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            latent,
            denoise=self.denoise,
            noise_mask=self.latent.get("noise_mask"),
            callback=preview_callback(model, steps) if callback is None else callback,
            disable_pbar=quiet,
            seed=seed,
        )

    def run_with(self, function: Callable[..., torch.Tensor], callback: Callback) -> torch.Tensor:
        """Sample with a sampler function of ours in the place of the job's sampler, over the same noise levels."""
        latent, noise = self.start(self.model, self.seed)
        return comfy.sample.sample_custom(
            self.model,
            noise,
            self.cfg,
            comfy.samplers.KSAMPLER(function),
            self.sigmas(),
            self.positive,
            self.negative,
            latent,
            noise_mask=self.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=True,
            seed=self.seed,
        )

    def sigmas(self) -> torch.Tensor:
        """Return the N + 1 noise levels of the run."""
        return comfy.samplers.KSampler(
            self.model, self.steps, self.model.load_device, self.sampler_name, self.scheduler, self.denoise
        ).sigmas

    def slope_is_output(self, tolerance: float) -> bool:
        """Whether the network's output is ``(x - denoised) / sigma``, as for flow and noise prediction."""
        model_sampling = self.model.get_model_object("model_sampling")
        sigma = self.sigmas()[:1]
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        from_output = model_sampling.calculate_denoised(sigma, one, zero)
        from_input = model_sampling.calculate_denoised(sigma, zero, one)
        return bool((from_output + sigma).abs() <= tolerance * sigma and (from_input - 1.0).abs() <= tolerance)

    def start(self, model: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latent that sampling starts from, and its noise."""
        # Newer ComfyUI notes in an empty latent how much smaller than the picture it is.
        scale = [self.latent["downscale_ratio_spacial"]] if "downscale_ratio_spacial" in self.latent else []
        latent = comfy.sample.fix_empty_latent_channels(model, self.latent["samples"], *scale)
        return latent, comfy.sample.prepare_noise(latent, seed, self.latent.get("batch_index"))


def preview_callback(model: Any, steps: int) -> Callback:
    """Return ComfyUI's own callback: progress in the interface, and live previews where they are on."""
    import latent_preview  # a module beside ComfyUI's packages; it reads folders of models when it is imported

    return latent_preview.prepare_callback(model, steps)
