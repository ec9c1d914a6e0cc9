"""Progressive resolution."""

from comfy_api.latest import io

from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from ..acceleration.resolution.settings import CORRECTED, CUSTOM, METHODS, ResolutionSettings, parse_numbers
from ..acceleration.resolution.spectrum import SPECTRA, fit_spectrum
from ..acceleration.resolution.stages import switch_noise_level
from .inputs import ADVANCED

#: Corrected stages stay closest to the full run for as much work, and so may last longer (guidance_resolution.py).
DEFAULTS = ResolutionSettings(method=CORRECTED, delta=0.05)
STAGES = "0.5, 1"


class StrettoProgressiveResolution(io.ComfyNode):
    """Sample the first, noisy steps at a smaller size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoProgressiveResolution",
            display_name="Stretto Progressive Resolution",
            category="Stretto",
            description=(
                "The first steps decide coarse structure only: they run on a smaller latent, on the same path as the full run. "
                "For flow models (FLUX, SD3, Wan, Qwen-Image, ...) and any sampler node."
            ),
            inputs=[io.Model.Input("model", tooltip="The diffusion transformer to accelerate."), *_inputs()],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, **inputs) -> io.NodeOutput:
        return io.NodeOutput(host.request(model, _request(**inputs)))


class StrettoProgressiveSampler(io.ComfyNode):
    """The same as a sampler, for custom sampling graphs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoProgressiveSampler",
            display_name="Stretto Progressive Sampler",
            category="Stretto",
            description=(
                "Wraps a sampler so that its first steps run on a smaller latent, on the same path as the full run. For "
                "SamplerCustom and SamplerCustomAdvanced; with KSampler use Stretto Progressive Resolution."
            ),
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to run in stages, from KSamplerSelect for example."),
                *_inputs(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, sampler, **inputs) -> io.NodeOutput:
        return io.NodeOutput(host.progressive_sampler(sampler, _request(**inputs)))


class StrettoSpectrum(io.ComfyNode):
    """Measure how fast a model's latents lose power towards fine detail."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoSpectrum",
            display_name="Stretto Spectrum",
            category="Stretto",
            description=(
                "Fits the power spectrum of some clean latents (VAE Encode of a few of your pictures, or finished samples), "
                "and puts progressive resolution with stages chosen by it on the model: connect the model output and run."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model the latents are for: it tells their scale."),
                io.Latent.Input("latent", tooltip="Clean latents, the more the better; twenty pictures are plenty."),
                *[entry for entry in _inputs(optional=True) if entry.id in ("stages", "delta", "min_side")],
            ],
            outputs=[
                io.Float.Output(display_name="amplitude"),
                io.Float.Output(display_name="exponent"),
                io.String.Output(display_name="report"),
                io.Model.Output(display_name="model", tooltip="The model with progressive resolution by this spectrum."),
            ],
        )

    @classmethod
    def execute(
        cls, model, latent, stages: str = STAGES, delta: float = DEFAULTS.delta, min_side: int = DEFAULTS.min_side
    ) -> io.NodeOutput:
        samples = model.model.process_latent_in(latent["samples"])
        found = fit_spectrum(samples)
        numbers = {"amplitude": found.amplitude, "exponent": found.exponent, "min_side": min_side}
        wanted = _request(stages, "", delta, CUSTOM, False, DEFAULTS.method, **numbers)
        settings = ResolutionSettings.from_mapping(wanted.settings)
        side = min(samples.shape[-2:])
        ends = [
            f"{scale:g} of the side until noise level {switch_noise_level(settings, scale, side):.3f}"
            for scale in settings.stages
            if scale < 1.0
        ]
        law = f"power = {found.amplitude:.4g} x cycles^-{found.exponent:.4g}, {found.source}"
        words = f"{law}; at this size with delta {delta:g}: {', '.join(ends) or 'no smaller stage'}"
        return io.NodeOutput(found.amplitude, found.exponent, words, host.request(model, wanted))


def _request(
    stages: str, switches: str, delta: float, spectrum: str, required: bool, method: str = DEFAULTS.method, **more
) -> Request:
    settings = {
        "method": method,
        "stages": parse_numbers("stages", stages),
        "switches": [share / 100.0 for share in parse_numbers("switches", switches)],
        "delta": delta,
        "spectrum": spectrum,
        **more,
    }
    return Request("resolution", settings, required=required)


def _inputs(optional: bool = False) -> list[io.Input]:
    """What the nodes ask for; saved values are positional: append only. ``optional`` makes the first ones so."""
    methods = "; ".join(f"{name}: {words}" for name, words in METHODS.items())
    return [
        io.String.Input(
            "stages",
            default=STAGES,
            optional=optional,
            tooltip="Sizes in running order, as shares of the side; the last is 1. 0.5, 1 is a good start; "
            "0.5, 0.75, 1 is gentler; 1, 0.5, 1 begins at full size, too.",
        ),
        io.String.Input(
            "switches",
            default="",
            tooltip="Percent of the steps at which stages end, such as 30, or 20, 40 for three stages. Empty: chosen from the "
            "spectrum and delta.",
        ),
        io.Float.Input(
            "delta",
            default=DEFAULTS.delta,
            optional=optional,
            min=0.001,
            max=0.5,
            step=0.005,
            round=0.001,
            tooltip="Speed: how much of the fine detail's power a small stage may miss. 0.01 is safe, 0.05 is fast.",
        ),
        io.Combo.Input(
            "spectrum",
            options=[*SPECTRA, CUSTOM],
            default=DEFAULTS.spectrum,
            tooltip="How fast this model's latents lose power towards fine detail. custom: the two numbers below, from "
            "Stretto Spectrum.",
        ),
        io.Boolean.Input(
            "required",
            default=False,
            tooltip="Stop with an error instead of sampling plainly when the run cannot be cut into stages.",
        ),
        io.Float.Input(
            "amplitude", default=DEFAULTS.amplitude, min=1e-6, max=1e9, step=0.001, round=1e-6, optional=True,
            tooltip="Power at one cycle over the shorter side, noise having 1. (custom)", **ADVANCED,
        ),
        io.Float.Input(
            "exponent", default=DEFAULTS.exponent, min=0.001, max=20.0, step=0.001, round=1e-6, optional=True,
            tooltip="How fast power falls with frequency. (custom)", **ADVANCED,
        ),
        io.Int.Input(
            "min_side", default=DEFAULTS.min_side, min=2, max=4096, optional=True,
            tooltip="Shortest side of a stage, in latent pixels (usually 8 pixels each). Much below the sizes a model was "
            "trained on, compositions change.", **ADVANCED,
        ),
        io.Combo.Input(
            "method", options=list(METHODS), default=DEFAULTS.method, optional=True,
            tooltip=f"How stages follow on each other. {methods}.", **ADVANCED,
        ),
        io.Int.Input(
            "refresh", default=DEFAULTS.refresh, min=2, max=100, optional=True,
            tooltip="While steps are small, predict at full size at the first of so many. 4 is a good start, 3 is closer to the "
            "full run. (Corrected)", **ADVANCED,
        ),
    ]  # fmt: skip
