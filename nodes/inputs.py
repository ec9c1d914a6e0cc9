"""What the inputs of several nodes share."""

import inspect

import comfy.samplers
from comfy_api.latest import io

#: Newer editors fold such inputs away.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}


def sampling_inputs(least_steps: int = 1, denoise: bool = True) -> list[io.Input]:
    """What KSampler asks for, of nodes that sample; the share of the noise levels last, where ``denoise`` asks for it."""
    inputs = [
        io.Model.Input("model", tooltip="The model, with its LoRAs and without anything that skips steps."),
        io.Conditioning.Input("positive", tooltip="A prompt like those you mean to use."),
        io.Conditioning.Input("negative", tooltip="As for KSampler."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise; its size is part of the result."),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Seed of the noise."),
        io.Int.Input("steps", default=28, min=least_steps, max=256, tooltip="Steps of the runs you mean to accelerate."),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale."),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            default="euler",
            tooltip="As for KSampler.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="simple",
            tooltip="As for KSampler.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Share of the noise levels that is run.",
        ),
    ]
    return inputs if denoise else inputs[:-1]
