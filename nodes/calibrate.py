"""From a wish for quality or speed to measured settings."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..acceleration.caching.masks import strip
from ..acceleration.caching.preset_files import checked_name, save_new
from ..acceleration.caching.presets import ANY, MEASURED, Preset, Provenance
from ..acceleration.caching.search import FITTED, ORDERS, PSNR, SPEED, SSIM, Choice, Run, Search, predicted_quality
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.hosts.comfy_fitting import EulerFitter
from ..acceleration.hosts.comfy_profile import evaluation_seconds, traced
from ..acceleration.hosts.comfy_sampling import Callback
from ..acceleration.plan import Request
from .cache import PRESET_TYPE
from .charts import BLUE, GREEN, ORANGE, Chart, Series, as_image, draw_charts
from .profile import ProfiledRun, ProfileType, profiled

TARGETS = {"PSNR at least (dB)": PSNR, "SSIM at least": SSIM, "speed at least (x)": SPEED}
TARGETS_BY_KIND = {kind: words.split(" (")[0] for words, kind in TARGETS.items()}
#: What a target of each kind may be: the limits, and a word about them.
RANGES = {
    PSNR: (5.0, 100.0, "decibels, such as 30"),
    SSIM: (0.0, 1.0, "a similarity below 1, such as 0.95"),
    SPEED: (1.0, 20.0, "a factor, such as 1.8"),
}
#: Identical results have no finite PSNR; files and pictures say this instead.
MOST_DECIBELS = 120.0


class StrettoCalibrate(io.ComfyNode):
    """Find the schedule of a cache that meets a target."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoCalibrate",
            display_name="Stretto Calibrate",
            category="Stretto",
            description="Finds which steps to compute for the quality or the speed you ask for, by real runs of your own "
            "model and prompt, and saves the answer as a preset for Stretto Cache.",
            inputs=[
                ProfileType.Input("profile", tooltip="From Stretto Profile."),
                io.Combo.Input(
                    "target",
                    options=list(TARGETS),
                    default="PSNR at least (dB)",
                    tooltip="What must hold: closeness to the plain run (PSNR, SSIM), or how much faster the steps are.",
                ),
                io.Float.Input(
                    "value",
                    default=30.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="PSNR: 30 is close, 40 hard to tell apart. SSIM: 0.95 is close. Speed: 1.8 means 1.8 times.",
                ),
                io.Combo.Input(
                    "forecaster",
                    options=list(ORDERS),
                    default=FITTED,
                    tooltip="What stands in for a skipped step: a mixture of computed ones that is fitted to your model, "
                    "the line through the last two, or the last one itself. Fitting needs euler; others get the line, and "
                    "samplers that add noise always reuse.",
                ),
                io.Int.Input(
                    "extra_seeds",
                    default=3,
                    min=0,
                    max=8,
                    tooltip="Other seeds that a schedule must keep the target with; the worst decides, and a schedule that "
                    "fails one is tried no further.",
                ),
                io.Int.Input(
                    "probes",
                    default=5,
                    min=0,
                    max=12,
                    tooltip="Runs that measure how much an error at one step changes the result. 0 trusts the built-in "
                    "curve. Runs of more than 60 steps are not probed.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the saved preset; empty names it after model, sampler and steps.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="With it quality is measured on decoded pictures, otherwise on latents. SSIM needs it.",
                ),
            ],
            outputs=[
                PRESET_TYPE.Output(display_name="preset"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="summary"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        profile: ProfiledRun,
        target: str,
        value: float,
        forecaster: str,
        extra_seeds: int,
        probes: int,
        name: str,
        vae: Any = None,
    ) -> io.NodeOutput:
        run, kind = profiled(profile), _kind(target, value)
        if name.strip():
            checked_name(name)  # before minutes of sampling, not after
        about = run.profile.about
        forecaster = _possible(forecaster, run)
        seeds = [(run.job.seed + extra) % (1 << 64) for extra in range(extra_seeds + 1)]
        search = Search(run.profile, lambda *wanted: go(*wanted), forecaster, len(seeds), vae is not None, probes)
        bar = _Progress(search.expected_runs(), run.profile.steps)
        go, search.fitter = _runner(run, seeds, vae, bar), EulerFitter(run.job, bar.callback)
        choice = search.choose(kind, value)
        preset = make_preset(run, choice, seeds, vae is not None, f"{target} {value:g}")
        folder = Path(folder_paths.get_user_directory()) / "stretto" / "presets"
        path = save_new(folder, name if name.strip() else _default_name(about), preset)
        picture = as_image(curve(choice, kind, value))
        text = summary(choice, kind, value, path, vae is not None)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(preset, picture, text, ui={**shown, "text": (text,)})


def make_preset(run: ProfiledRun, choice: Choice, seeds: list[int], pictures: bool, target: str) -> Preset:
    """Return the chosen mask as a preset whose provenance holds what was measured."""
    about, measured = run.profile.about, choice.measured
    figures = {
        "target": target,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": about["family"],
        "network": about["network"],
        "device": about["device"],
        "dtype": about["dtype"],
        "latent_shape": list(about["latent_shape"]),
        "sampler": about["sampler"],
        "scheduler": run.job.scheduler,
        "steps": run.profile.steps,
        "cfg": run.job.cfg,
        "denoise": run.job.denoise,
        "computed": sum(measured.mask),
        "seeds": list(seeds),
        "measured_on": "pictures" if pictures else "latents",
        "psnr": [round(min(value, MOST_DECIBELS), 3) for value in measured.psnr],
        "speed": round(measured.judged(SPEED), 3),
    }
    if measured.ssim is not None:
        figures["ssim"] = [round(value, 5) for value in measured.ssim]
    settings = dict(choice.settings)
    return Preset(
        family=about["family"],
        variant=about.get("variant") or ANY,
        method=settings.pop("method"),
        settings=settings,
        steps=(run.profile.steps, run.profile.steps),
        provenance=Provenance("Stretto Calibrate, on the user's own model and prompt", MEASURED, figures),
    )


def curve(choice: Choice, kind: str, target: float) -> Image.Image:
    """Return the picture of speed against quality: predicted, measured, chosen, and the target."""
    quality = PSNR if kind == SPEED else kind

    def point(measured) -> tuple[float, float]:
        return measured.judged(SPEED), min(measured.judged(quality), MOST_DECIBELS)

    series = [
        Series("predicted", sorted(predicted_quality(choice, quality)), BLUE),
        Series("measured, worst seed", [point(measured) for measured in choice.tried], ORANGE, "dot"),
        Series("chosen", [point(choice.measured)], GREEN, "ring"),
    ]
    chart = Chart(
        f"{'PSNR to the plain run, dB' if quality == PSNR else 'SSIM to the plain run'}; the red line is the target",
        "speed of the evaluations, x",
        series,
        x_line=target if kind == SPEED else None,
        y_line=None if kind == SPEED else target,
    )
    return draw_charts(f"{sum(choice.measured.mask)} of {len(choice.measured.mask)} steps computed", [chart])


def summary(choice: Choice, kind: str, target: float, path: Path, pictures: bool) -> str:
    """Return what was chosen and measured, in plain sentences."""
    measured = choice.measured
    quality = ", ".join(f"{min(value, MOST_DECIBELS):.2f}" for value in measured.psnr)
    lines = [
        f"{strip(measured.mask)}   {sum(measured.mask)} of {len(measured.mask)} steps computed",
        f"Target: {TARGETS_BY_KIND[kind]} {target:g}. Measured: {measured.judged(SPEED):.2f}x, PSNR {quality} dB"
        + (f", SSIM {', '.join(f'{value:.4f}' for value in measured.ssim)}" if measured.ssim is not None else "")
        + f" ({'pictures' if pictures else 'latents'}, {len(measured.psnr)} seed(s)).",
        f"{choice.runs} runs were made. Saved as {path.name} in {path.parent}.",
    ]
    return "\n".join(lines)


def _kind(target: str, value: float) -> str:
    if target not in TARGETS:
        raise StrettoError(f"Stretto Calibrate: target is {target!r}; known targets: {', '.join(TARGETS)}")
    kind = TARGETS[target]
    low, high, words = RANGES[kind]
    fine = low < value < high if kind == SSIM else low <= value <= high
    if not fine or (kind == SPEED and value == low):
        raise StrettoError(
            f"Stretto Calibrate: the value for {target!r} is {value:g}; expected {words}, between {low:g} and {high:g}"
        )
    return kind


class _Progress:
    """One progress bar over all runs of a search."""

    def __init__(self, runs: int, steps: int) -> None:
        self.bar, self.runs, self.steps, self.begun = comfy.utils.ProgressBar(runs * steps), runs, steps, 0

    def callback(self) -> Callback:
        """Return the step callback of the next run; a search that takes longer than expected lengthens the bar."""
        before, self.begun = self.begun * self.steps, self.begun + 1
        total = max(self.runs, self.begun) * self.steps
        return lambda step, *_: self.bar.update_absolute(min(before + step + 1, total), total)


def _possible(forecaster: str, run: ProfiledRun) -> str:
    """Return the forecaster that this run's sampler allows."""
    if run.profile.about.get("stochastic"):
        return "reuse"
    return "line" if forecaster == FITTED and not EulerFitter.suits(run.job) else forecaster


def _runner(
    run: ProfiledRun, seeds: list[int], vae: Any, bar: _Progress
) -> Callable[[Mapping[str, Any] | None, int], Run]:
    """Return what makes the search's real runs."""
    job = run.job
    plain = host.request(job.model, Request("measure"))

    def go(settings: Mapping[str, Any] | None, seed: int) -> Run:
        model = plain if settings is None else host.request(job.model, Request("cache", settings, required=True))
        latent, trace = traced(model, lambda m: job(m, seed=seeds[seed], callback=bar.callback()))
        return Run(latent if vae is None else _decode(vae, latent), evaluation_seconds(trace))

    return go


def _decode(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """Return decoded pictures [B, H, W, C] in 0..1; the frames of clips count as pictures."""
    pictures = vae.decode(latent).detach()
    return pictures.reshape(-1, *pictures.shape[-3:]).float().clamp(0.0, 1.0).cpu()


def _default_name(about: dict[str, Any]) -> str:
    model = about.get("variant") or about["family"]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{about['family']}-{model}-{about['sampler']}-{about['steps']}")
