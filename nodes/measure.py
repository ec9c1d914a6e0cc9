"""Timing without acceleration."""

from comfy_api.latest import io

from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request


class StrettoMeasure(io.ComfyNode):
    """Time a run without changing it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoMeasure",
            display_name="Stretto Measure",
            category="Stretto",
            description="Times the sampler and every step of it; the picture stays identical to the bit. "
            "Comparisons put it into every arm, the plain one included.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose runs are timed."),
                io.Int.Input(
                    "nonce",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    tooltip="Change it to make ComfyUI sample again instead of answering from its cache of node outputs.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, nonce: int) -> io.NodeOutput:
        return io.NodeOutput(host.request(model, Request("measure", {"nonce": nonce})))
