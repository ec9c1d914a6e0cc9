"""A profile of the user's own model, prompt and sampler."""

import math
from dataclasses import dataclass

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..acceleration.caching.calibration import pair_errors
from ..acceleration.caching.presets import magnitude_preset
from ..acceleration.caching.profile import Profile
from ..acceleration.errors import StrettoError
from ..acceleration.hosts.comfy_profile import TIMING_MASK, profile
from ..acceleration.hosts.comfy_sampling import SamplingJob
from .cache import PRESET_TYPE
from .charts import BLUE, GREEN, ORANGE, PINK, Chart, Series, as_image, draw_charts
from .inputs import sampling_inputs

ProfileType = io.Custom("STRETTO_PROFILE")

#: Signals as a reader knows them, with their colours.
SIGNALS = {
    "rate": ("expected change of the output (EasyCache)", ORANGE),
    "input": ("modulated input (TeaCache)", GREEN),
    "residual": ("first block (FBCache)", PINK),
    "output": ("output", BLUE),
}


@dataclass(frozen=True, eq=False)
class ProfiledRun:
    """What travels along a STRETTO_PROFILE link: the profile, and what it takes to sample again."""

    profile: Profile
    job: SamplingJob
    latent: torch.Tensor


class StrettoProfile(io.ComfyNode):
    """Record one plain run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoProfile",
            display_name="Stretto Profile",
            category="Stretto",
            description="Samples once with nothing skipped and records how much each step changes. "
            "Stretto Calibrate turns the record into settings for a quality or a speed of your choice.",
            inputs=sampling_inputs(),
            outputs=[
                ProfileType.Output(display_name="profile"),
                io.Image.Output(display_name="curves"),
                io.String.Output(display_name="summary"),
                PRESET_TYPE.Output(display_name="MagCache"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image: dict,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
    ) -> io.NodeOutput:
        job = SamplingJob(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        found, latent = profile(model, job, lambda other: job(other, steps=len(TIMING_MASK)))
        picture, text = as_image(curves(found)), summary(found)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(ProfiledRun(found, job, latent), picture, text, magnitude_preset(found), ui=shown)


def curves(found: Profile) -> Image.Image:
    """Return the picture of a profile: what changes from step to step, and how large what the stack adds is."""
    x = found.positions
    signals = [
        Series(SIGNALS[name][0], [None if v is None else (at, v) for at, v in zip(x, values)], SIGNALS[name][1])
        for name, values in found.signals.items()
        if name in SIGNALS
    ]
    base = found.log_norms[0]
    norms = Series(
        "size, first step = 1 (MagCache)", [(at, math.exp(v - base)) for at, v in zip(x, found.log_norms)], BLUE
    )
    return draw_charts(
        _title(found),
        [
            Chart("Relative change since the step before", "step", signals, zero=True),
            Chart("What the stack of blocks adds", "step", [norms], zero=True),
        ],
    )


def summary(found: Profile) -> str:
    """Return a profile in a few plain sentences."""
    about = found.about
    lines = [
        _title(found),
        f"Recorded: {about['feature']}, conditional branch; {found.sketches.shape[1]} numbers a step.",
    ]
    if found.seconds_skipped is None:
        lines.append(f"A computed evaluation takes {found.seconds_computed:.4g} s; a skipped one was not timed.")
    else:
        lines.append(
            f"A computed evaluation takes {found.seconds_computed:.4g} s, a skipped one {found.seconds_skipped:.4g} s "
            f"({found.skipped_cost:.0%})."
        )
    if found.steps > 1:
        errors = pair_errors(found)
        changes = [float(errors[step - 1, step]) for step in range(1, found.steps)]
        most, least = changes.index(max(changes)) + 1, changes.index(min(changes)) + 1
        lines.append(f"The stored feature changes most at step {most} and least at step {least} (counted from 0).")
    return "\n".join(lines)


def profiled(run: object) -> ProfiledRun:
    """Return ``run`` if it is a profiled run.

    Raises:
        StrettoError: something else was connected.
    """
    if not isinstance(run, ProfiledRun):
        raise StrettoError(f"profile is a {type(run).__name__}; connect the output of Stretto Profile")
    return run


def _title(found: Profile) -> str:
    about = found.about
    return f"{about['family']} · {about['sampler']}, {found.steps} steps · CFG {about['cfg']} · seed {about['seed']}"
