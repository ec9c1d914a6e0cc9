"""Plans of attention, looked for: a probe of an ordinary run, and a search on what it has seen."""

import math
import re
from pathlib import Path
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from PIL import Image

from ..acceleration.attention.probing.technique import BLOCKS, ORDERS
from ..acceleration.attention.reuse import NAMES
from ..acceleration.attention.search import BUDGETS, SEARCHES
from ..acceleration.caching.preset_files import checked_name
from ..acceleration.errors import StrettoError
from ..acceleration.hosts.comfy_attention_search import GREEDY, QUALITY, TIME, Found, Probed, ProbedRun, probe, search
from ..acceleration.hosts.comfy_sampling import SamplingJob
from ..acceleration.models import describe
from .attention_plan import PLAN_TYPE, save_new_plan, user_folder
from .charts import BLUE, GREEN, ORANGE, PINK, Chart, Series, as_image, draw_charts
from .inputs import ADVANCED, sampling_inputs

PROBE_TYPE = io.Custom("STRETTO_ATTENTION_PROBE")
#: Pictures of fewer tokens have too few blocks of 64.
SHORT = 1024


class StrettoAttentionProbe(io.ComfyNode):
    """Sample, and see what every head of attention could do without."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoAttentionProbe",
            display_name="Stretto Attention Probe",
            category="Stretto",
            description="Samples as KSampler does, to the bit, and looks at a few rows of every attention on the way: what each "
            "head would lose at each budget. Stretto Attention Search makes a plan of it.",
            inputs=[*sampling_inputs(), *_probing()],
            outputs=[
                PROBE_TYPE.Output(display_name="probe"),
                io.Latent.Output(display_name="latent"),
                io.Image.Output(display_name="curves"),
                io.String.Output(display_name="summary"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image: dict, seed: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, denoise: float, order: str, block: str = "auto",
    ) -> io.NodeOutput:  # fmt: skip
        job = SamplingJob(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        size = _block(block, job)
        probed, latent = probe(model, job, order, size)
        picture, text = as_image(error_curves(probed)), probe_summary(probed)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        out = {**latent_image, "samples": latent}
        return io.NodeOutput(ProbedRun(probed, job, latent), out, picture, text, ui=shown)


class StrettoAttentionSearch(io.ComfyNode):
    """Make a plan of what a probe has seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoAttentionSearch",
            display_name="Stretto Attention Search",
            category="Stretto",
            description="Finds what every head of every layer shall do at every part of the run, for the quality or the time you "
            "name, tries it by real runs of your own model and prompt, and saves the plan as a small file.",
            inputs=[
                PROBE_TYPE.Input("probe", tooltip="From Stretto Attention Probe."),
                io.Combo.Input(
                    "method",
                    options=[*SEARCHES, GREEDY],
                    default=BUDGETS,
                    tooltip="Budgets chooses among everything, head by head. The others choose as their papers do, and need a "
                    "probe with order = rows. greedy is DiTFastAttn's own search, which runs the network hundreds of times.",
                ),
                io.Combo.Input(
                    "target",
                    options=[QUALITY, TIME],
                    default=QUALITY,
                    tooltip="What must hold: closeness to the plain run, or attention's time in percent of full attention's.",
                ),
                io.Float.Input(
                    "value", default=30.0, min=1.0, max=100.0, step=0.1, round=0.01, tooltip="In dB, or in percent."
                ),
                io.Int.Input(
                    "tries", default=5, min=1, max=12, tooltip="Runs that plans are tried by. A target in percent takes one."
                ),
                io.String.Input(
                    "name", default="", tooltip="Name of the saved plan; empty names it after model, method and target."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="With it quality is measured on decoded pictures, otherwise on latents.",
                ),
                io.Boolean.Input(
                    "weigh",
                    default=True,
                    optional=True,
                    tooltip="Four runs first, which show how much errors in each quarter of the run count in the picture.",
                ),
                io.Int.Input(
                    "extra_seeds",
                    default=1,
                    min=0,
                    max=8,
                    optional=True,
                    tooltip="Other seeds that a plan must keep the quality with; the worst decides, and a plan that fails one is "
                    "tried no further.",
                ),
            ],
            outputs=[
                PLAN_TYPE.Output(display_name="plan"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="summary"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, probe: ProbedRun, method: str, target: str, value: float, tries: int, name: str, vae: Any = None,
        weigh: bool = True, extra_seeds: int = 1,
    ) -> io.NodeOutput:  # fmt: skip
        if not isinstance(probe, ProbedRun):
            raise StrettoError(f"probe is a {type(probe).__name__}; connect the output of Stretto Attention Probe")
        if target not in (QUALITY, TIME):
            raise StrettoError(f"Stretto Attention Search: target is {target!r}; expected one of {QUALITY}, {TIME}")
        name = checked_name(name) if name.strip() else _default_name(probe.probed, method, target, value)
        decode = None if vae is None else lambda latent: _pictures(vae, latent)
        found = search(probe, method, target, value, tries, decode, _progress, weigh, extra_seeds)
        path = save_new_plan(user_folder(), name, found.plan)
        picture, text = as_image(search_curve(found, target, value)), search_summary(found, method, target, value, path)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(str(path), picture, text, ui=shown)


def error_curves(probed: Probed) -> Image.Image:
    """Return the picture of a probe: error against budget, the best, the middle and the worst head."""
    curves = probed.curves
    places = [index for index, option in enumerate(curves.options) if option.mode == 1 and not option.pattern]
    density, error = (table[..., places].reshape(-1, len(places)) for table in (curves.density, curves.error))
    order = error.mean(-1).argsort()
    rows = {"easiest head": (order[0], GREEN), "middle": (order[len(order) // 2], BLUE), "hardest head": (order[-1], PINK)}
    series = [
        Series(name, [(100 * density[at, i], 100 * math.sqrt(max(error[at, i], 0.0))) for i in range(len(places))], colour)
        for name, (at, colour) in rows.items()
    ]
    return draw_charts(_probe_title(probed), [Chart("Off from full attention (%)", "key blocks kept (%)", series, zero=True)])


def _probe_title(probed: Probed) -> str:
    shape = probed.shape
    return (
        f"{probed.about['family']} · {shape['layers']} layers of {shape['heads']} heads · {shape['tokens']:,} tokens, "
        f"{probed.about['order']}, blocks of {probed.about['block']}"
    )


def probe_summary(probed: Probed) -> str:
    """Return a probe in a few plain sentences."""
    looked, sampler = probed.seconds
    places = [i for i, option in enumerate(probed.curves.options) if option.mode == 1 and not option.pattern]
    at = min(places, key=lambda i: abs(probed.curves.options[i].budget - 0.2))
    lost = probed.curves.error[..., at].ravel()
    easy = float((lost < 0.01).mean())
    return (
        f"{_probe_title(probed)}\n"
        f"With a fifth of the key blocks {easy:.0%} of the heads are less than 10 % off from full attention.\n"
        f"Looking took {looked:.3g} s of {sampler:.3g} s in the sampler ({looked / max(sampler, 1e-9):.1%})."
    )


def search_curve(found: Found, target: str, value: float) -> Image.Image:
    """Return the picture of a search: predicted error against time, and what real runs gave."""
    plan, charts = found.plan.achieved, []
    if found.choose is not None:
        predicted = [found.choose(knob / 20) for knob in range(21)]
        line = sorted({(100 * choice.cost, 100 * math.sqrt(max(choice.error, 0.0))) for choice in predicted})
        marks = [
            Series("predicted", line, BLUE),
            Series("chosen", [(100 * plan["predicted_cost"], 100 * plan["predicted_error"])], GREEN, "ring"),
        ]
        charts.append(Chart("Predicted error of attention (%)", "attention time (% of full)", marks, zero=True))
    charts.append(
        Chart(
            "PSNR to the plain run (dB)",
            "attention time (% of full)",
            [
                Series("tried", [(100 * item.cost, item.quality) for item in found.tried], ORANGE, "dot"),
                Series("chosen", [(100 * plan["predicted_cost"], found.quality)], GREEN, "ring"),
            ],
            x_line=value if target == TIME else None,
            y_line=value if target == QUALITY else None,
        )
    )
    return draw_charts(f"{found.plan.provenance['method']} · {found.plan.model.family} · {found.plan.tokens:,} tokens", charts)


def search_summary(found: Found, method: str, target: str, value: float, path: Path) -> str:
    """Return what was found, in plain sentences."""
    plan, what = found.plan, "pictures" if found.pictures else "latents"
    shares = {name: float((plan.mode == int(mode)).mean()) for name, mode in NAMES.items()}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
    return (
        f"{method}, {target} {value:g}: attention takes {plan.achieved['predicted_cost']:.0%} of its time as predicted; "
        f"measured: all evaluations {found.speed:.2f}x as fast, {found.quality:.1f} dB to the plain run ({what}, worst seed).\n"
        f"Heads: {parts}.\n"
        f"{len(found.tried)} plans were tried. Saved as {path.name} in {path.parent}."
    )


def _default_name(probed: Probed, method: str, target: str, value: float) -> str:
    about = probed.about
    unit = "dB" if target == QUALITY else "percent"
    words = f"{about['family']}-{about['variant'] or 'model'}-{method}-{probed.shape['tokens']}-tokens-{value:g}-{unit}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words)[:64].rstrip(".-")

def _progress(total: int) -> Any:
    bar = comfy.utils.ProgressBar(total)
    return lambda done: bar.update_absolute(min(done, total), total)


def _pictures(vae: Any, latent: Any) -> Any:
    """Return decoded pictures [B, H, W, C] in 0..1; the frames of clips count as pictures."""
    pictures = vae.decode(latent).detach()
    return pictures.reshape(-1, *pictures.shape[-3:]).float().clamp(0.0, 1.0)


def _probing() -> list[io.Input]:
    return [
        io.Combo.Input(
            "order",
            options=list(ORDERS),
            default="tiles",
            tooltip="How tokens are put into blocks. tiles: squares of the picture, best for budgets. rows: as they come, which "
            "windows (DiTFastAttn, Sparse-vDiT, Re-ttention) need.",
        ),
        io.Combo.Input(
            "block",
            options=["auto", *map(str, BLOCKS)],
            default="auto",
            optional=True,
            tooltip="Tokens in a block. auto: 64, and 16 for very small pictures.",
            **ADVANCED,
        ),
    ]


def _block(block: str, job: SamplingJob) -> int:
    if block != "auto":
        return int(block)
    network = job.model.model.diffusion_model
    family = describe(network)
    tokens = family.tokens(network, tuple(job.latent["samples"].shape)) if family else SHORT
    return 64 if tokens >= SHORT else 16
