"""Which blocks a model can do without."""

from comfy_api.latest import io, ui

from ..acceleration.hosts.comfy_block_probe import probe_blocks
from ..acceleration.hosts.comfy_sampling import SamplingJob
from ..acceleration.models import describe
from ..acceleration.weights.block_probe import DROP, MOST_PROBES, REUSE, Ranking
from .charts import BLUE, ORANGE, Chart, Series, as_image, draw_charts
from .inputs import ADVANCED, sampling_inputs


class StrettoBlockProbe(io.ComfyNode):
    """Rank a model's blocks by what dropping or reusing them costs on a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoBlockProbe",
            display_name="Stretto Block Probe",
            category="Stretto",
            description="Samples once and, at a few steps, leaves out every block once and reuses it once. Ranks blocks by what "
            "that does to the network's output, and writes a schedule that reuses the cheapest and a list to prune.",
            inputs=[
                *sampling_inputs(least_steps=2, denoise=False),
                io.Int.Input(
                    "count",
                    default=4,
                    min=1,
                    max=200,
                    tooltip="Blocks that the schedule reuses, and that the list drops: the cheapest of each ranking.",
                ),
                io.Int.Input(
                    "probes",
                    default=3,
                    min=1,
                    max=MOST_PROBES,
                    tooltip="Steps at which blocks are probed. Each costs two network calls per block.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "reuse_from", default=20, min=0, max=100, tooltip="Percent of the steps before any is reused.", **ADVANCED
                ),
                io.Int.Input(
                    "reuse_until", default=90, min=0, max=100, tooltip="Percent of the steps after which none is.", **ADVANCED
                ),
            ],
            outputs=[
                io.String.Output(display_name="schedule"),
                io.String.Output(display_name="drop"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="summary"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image: dict, seed: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, count: int, probes: int, reuse_from: int, reuse_until: int,
    ) -> io.NodeOutput:  # fmt: skip
        job = SamplingJob(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler)
        ranking, latent = probe_blocks(model, job, probes, cfg)
        count = min(count, len(ranking.sites) - 1)
        first, last = (round(part * (steps - 1) / 100) for part in (reuse_from, reuse_until))
        schedule = ranking.table_text(count, steps, first, last)
        drop = ranking.drop_text(count, describe(model.model.diffusion_model).block_lists)
        picture, text = as_image(chart(ranking)), summary(ranking, count, drop)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(schedule, drop, picture, text, {**latent_image, "samples": latent}, ui=shown)


def chart(ranking: Ranking):
    """Return the picture of a ranking: both damages per block."""
    rows = [
        Series(words, list(enumerate(ranking.damage[kind])), colour)
        for kind, words, colour in ((DROP, "left out", ORANGE), (REUSE, "last residual put in", BLUE))
    ]
    return draw_charts(
        f"{len(ranking.sites)} blocks: damage to the network's output", [Chart("Relative error", "block", rows, zero=True)]
    )


def summary(ranking: Ranking, count: int, drop: str) -> str:
    """Return a ranking in words."""
    lines = []
    for kind, words in ((DROP, "cheapest to leave out"), (REUSE, "cheapest to reuse")):
        named = (f"{ranking.sites[depth].kind} {ranking.sites[depth].index} ({ranking.damage[kind][depth]:.3f})"
                 for depth in ranking.order(kind)[:count])  # fmt: skip
        lines.append(f"{words}: {', '.join(named)}")
    total = sum(ranking.damage[DROP]) / max(sum(ranking.damage[REUSE]), 1e-12)
    lines.append(f"over all blocks, reusing the last residual damages {total:.1f} times less than leaving out")
    lines.append(f"prune-depth --drop {drop} (without training after it, expect visible damage)")
    return "\n".join(lines)
