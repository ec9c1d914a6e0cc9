"""Guidance reduction."""

from comfy_api.latest import io

from ..acceleration.guidance.settings import AS_METHOD, FORECASTS, METHODS, NUMBERS, STAND_INS, WHOLE, GuidanceSettings
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from .inputs import ADVANCED

#: At least 1.25x at CFG 5 on the demo model also for a single picture, whose rows are cheap, and closer to the plain run than
#: fewer steps (guidance_resolution.py).
DEFAULTS = GuidanceSettings(interval=3, warmup=2, guide_from=0.1)


class StrettoGuidanceSaver(io.ComfyNode):
    """Ask the unconditional branch of CFG only where it has something new to say."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoGuidanceSaver",
            display_name="Stretto Guidance Saver",
            category="Stretto",
            description=(
                "Half of the work above CFG 1 is the branch of the negative prompt. This asks it at some steps only, and puts in "
                "what it would have said at the others. Combines with Stretto Cache."
            ),
            inputs=[*_main(), *_fine()],  # saved values are positional: append only
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        method: str,
        interval: int,
        warmup: int,
        tail: int,
        guide_from: float,
        guide_until: float,
        agreement: float,
        required: bool,
        **more,
    ) -> io.NodeOutput:
        settings = {
            "method": method,
            "interval": interval,
            "warmup": warmup,
            "tail": tail,
            "guide_from": guide_from / 100.0,
            "guide_until": guide_until / 100.0,
            "agreement": agreement,
            **more,
        }
        return io.NodeOutput(host.request(model, Request("guidance", settings, required=required)))


def _main() -> list[io.Input]:
    """Model, method and the numbers that most people set."""
    return [
        io.Model.Input("model", tooltip="The diffusion transformer to accelerate."),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=DEFAULTS.method,
            tooltip="Periodic: ask every few steps, and continue the difference between the branches in between. FasterCache: "
            "repeat it, with low and high frequencies weighted apart. Adaptive: guide until both branches agree. Interval: "
            "guide in a part of the run only.",
        ),
        _whole(
            "interval",
            "Ask every: with 2 the negative branch runs at every second step, with 1 at every one. (Periodic, FasterCache)",
        ),
        _whole(
            "warmup",
            "Start after: this many first steps with guidance always ask both branches. They decide the composition.",
        ),
        _whole("tail", "Keep: this many last steps always ask both branches. They decide the fine texture."),
        _percent(
            "guide_from",
            "No guidance before this percent of the steps: 10 usually changes little, 0 guides from the start.",
        ),
        _percent("guide_until", "No guidance from this percent of the steps on: colours and contrast become milder."),
        _number(
            "agreement",
            0.005,
            "Cosine of both branches' predictions from which on guidance is dropped: lower is faster. (Adaptive)",
        ),
        io.Boolean.Input(
            "required",
            default=False,
            tooltip="Stop with an error instead of sampling plainly when nothing can be saved, as at CFG 1.",
        ),
    ]


def _fine() -> list[io.Input]:
    """What only some need."""
    return [
        io.Combo.Input(
            "stand_in",
            options=list(STAND_INS),
            default=DEFAULTS.stand_in,
            optional=True,
            tooltip="What stands in at saved steps: the branches' difference, the same with its frequencies weighted apart, "
            "or no guidance.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "forecast",
            options=[AS_METHOD, *FORECASTS],
            default=DEFAULTS.forecast,
            optional=True,
            tooltip="How the difference is carried on: the last one again, or the line through the last two. Samplers that add "
            "noise repeat.",
            **ADVANCED,
        ),
        _number(
            "sigma_from",
            0.01,
            "No guidance above this noise level; 0 is no limit. Flow models begin at 1.",
            optional=True,
            **ADVANCED,
        ),
        _number("sigma_until", 0.01, "No guidance below this noise level.", optional=True, **ADVANCED),
        _number(
            "hysteresis",
            0.005,
            "How far agreement must fall before guidance comes back. (Adaptive)",
            optional=True,
            **ADVANCED,
        ),
        _whole("patience", "Steps in a row that must agree. (Adaptive)", optional=True, **ADVANCED),
        _whole(
            "recheck",
            "Once guidance is dropped, look again every so many steps; 0 is never. (Adaptive)",
            optional=True,
            **ADVANCED,
        ),
        _number(
            "low_weight",
            0.05,
            "Weight of coarse structure in the middle of the run (w1 of FasterCache).",
            optional=True,
            **ADVANCED,
        ),
        _number(
            "high_weight", 0.05, "Weight of fine detail late in the run (w2 of FasterCache).", optional=True, **ADVANCED
        ),
    ]


def _whole(name: str, tooltip: str, **extra) -> io.Input:
    low, high = WHOLE[name]
    return io.Int.Input(name, default=getattr(DEFAULTS, name), min=low, max=high, tooltip=tooltip, **extra)


def _number(name: str, step: float, tooltip: str, **extra) -> io.Input:
    low, high = NUMBERS[name]
    return io.Float.Input(
        name, default=getattr(DEFAULTS, name), min=low, max=high, step=step, round=0.001, tooltip=tooltip, **extra
    )


def _percent(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=getattr(DEFAULTS, name) * 100, min=0.0, max=100.0, step=1.0, tooltip=tooltip)
