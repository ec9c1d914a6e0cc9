"""Which layers of a model need a shortened video's original positions: asked of the model itself.

VGDFR (arXiv 2504.12259) publishes the list for HunyuanVideo alone. Here every latent frame but the kept ones is left out
at one noise level, and each layer in turn gets the original positions: the layers that bring the prediction closest to
that of the full video are the global ones.
"""

from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ..errors import StrettoError
from ..frame_rate.fitting import uniform_rates
from ..frame_rate.gather import gather_conditioning, gather_latents
from ..frame_rate.schedule import FrameRateSchedule
from ..frame_rate.technique import NODE
from ..models import describe
from ..plan import Request
from . import comfy as host
from .comfy_frame_rate import run_obstacle
from .comfy_sampling import SamplingJob

#: Share of the layers that VGDFR's list for HunyuanVideo holds.
SHARE = 8 / 60


def probe_layers(job: SamplingJob, at: Sequence[float] = (0.3, 0.6), stride: int = 4) -> tuple[list[int], list[float]]:
    """Return the global layers of a model, and by how much (share of the error) each layer's original positions help.

    Args:
        job: model, prompt, seed and steps. A latent that holds a clean video is noised; an empty one is sampled first.
        at: shares of the steps whose noise levels are looked at.
        stride: frames of a latent.

    Raises:
        StrettoError: the run could not be shortened, or the model's blocks cannot be reached.
    """
    reason = run_obstacle(job.model, job.positive, job.negative, job.latent)
    descriptor = describe(job.model.model.diffusion_model)
    sites = descriptor.sites(job.model.model.diffusion_model) if descriptor else ()
    if reason is None and not sites:
        reason = "the blocks of this model cannot be reached"
    if reason is None and job.latent["samples"].shape[2] < 5:
        reason = "the video must have at least 5 latent frames"
    if reason:
        raise StrettoError(f"{NODE}, probe: {reason}.")
    full = job.latent["samples"]
    clean = job() if not full.any() else full
    _, noise = job.start(job.model, job.seed)
    count = clean.shape[2] - 1
    schedule = FrameRateSchedule(1 + stride * count, uniform_rates(count, -(-count // 2)), stride)
    positive, negative = gather_conditioning(job.positive, schedule), gather_conditioning(job.negative, schedule)
    sigmas, helps = job.sigmas(), torch.zeros(len(sites))

    def predict(model: Any, latent: torch.Tensor, start: torch.Tensor, conds: tuple, level: torch.Tensor) -> torch.Tensor:
        return comfy.sample.sample_custom(
            model, start, job.cfg, comfy.samplers.sampler_object("euler"), torch.stack([level, level.new_zeros(())]),
            *conds, latent, disable_pbar=True, seed=job.seed,
        )  # fmt: skip

    for share in at:
        level = sigmas[round(share * (len(sigmas) - 1))]
        wanted = gather_latents(predict(job.model, clean, noise, (job.positive, job.negative), level), schedule)

        def miss(layers: list[int], level: torch.Tensor = level, wanted: torch.Tensor = wanted) -> float:
            settings = {"schedule": schedule.to_json(), "layers": layers}
            model = host.request(job.model, Request("frame_rate", settings))
            latent, start = gather_latents(clean, schedule), gather_latents(noise, schedule)
            found = predict(model, latent, start, (positive, negative), level)
            return float((found - wanted).square().mean())

        none = max(miss([]), 1e-20)
        helps += torch.tensor([1 - miss([site.depth]) / none for site in sites]) / len(at)
    many = max(1, round(SHARE * len(sites)))
    best = sorted(range(len(sites)), key=lambda layer: -float(helps[layer]))[:many]
    return sorted(layer for layer in best if helps[layer] > 0), helps.tolist()
