"""Feature caching."""

from comfy_api.latest import io

from ..acceleration.caching.methods import METHODS
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request


class StrettoCache(io.ComfyNode):
    """Skip whole passes through the transformer where its features can be predicted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoCache",
            display_name="Stretto Cache",
            category="Stretto",
            description=(
                "Skips steps of the transformer whose result can be predicted from the steps before. "
                "Taylor is predictable and the better default; EasyCache decides by how much the picture moves."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The diffusion transformer to accelerate (SD3, Wan, FLUX)."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="Taylor",
                    tooltip="Taylor: forecast the last block's output at fixed steps (TaylorSeer-Lite). "
                    "EasyCache: reuse the last change while the input has moved little.",
                ),
                io.Int.Input(
                    "interval",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="Compute every: with 2 every second step is computed, with 3 every third. 1 turns it off. (Taylor)",
                ),
                io.Int.Input(
                    "order",
                    default=1,
                    min=0,
                    max=2,
                    tooltip="Degree of the forecast: 0 repeats the last features, 1 continues their line, "
                    "2 their parabola. Samplers that add noise use 0. (Taylor)",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="How much estimated change may add up before a step is computed: higher is faster, "
                    "lower is closer to the plain picture. 0 turns it off. (EasyCache)",
                ),
                io.Int.Input(
                    "warmup",
                    default=4,
                    min=0,
                    max=100,
                    tooltip="Start after: this many first steps are always computed. They decide the composition.",
                ),
                io.Int.Input(
                    "tail",
                    default=5,
                    min=0,
                    max=100,
                    tooltip="Keep: this many last steps are always computed. They take the largest strides in noise and "
                    "decide the fine texture.",
                ),
                io.Boolean.Input(
                    "required",
                    default=False,
                    tooltip="Stop with an error instead of sampling plainly when the cache cannot run.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls, model, method: str, interval: int, order: int, threshold: float, warmup: int, tail: int, required: bool
    ) -> io.NodeOutput:
        settings = {
            "method": method,
            "interval": interval,
            "order": order,
            "threshold": threshold,
            "warmup": warmup,
            "tail": tail,
        }
        return io.NodeOutput(host.request(model, Request("cache", settings, required=required)))
