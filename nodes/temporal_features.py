"""Temporal and prompt features."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from ..acceleration.temporal_features.session import EXACT, MODES
from .inputs import ADVANCED


class StrettoTemporalFeatureCache(io.ComfyNode):
    """Keep what depends on the timestep or the prompt alone in tables, so that its weights need not be loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoTemporalFeatureCache",
            display_name="Stretto Temporal Feature Cache",
            category="Stretto",
            description="Modulations depend on the timestep alone, and in some models keys and values on the prompt alone. This "
            "computes them once and keeps them in small tables: the same picture to the bit. With Stretto Load Diffusion Model "
            "(feature weights read from the file) their weights, up to a third of the model, are never loaded.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion transformer."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=EXACT,
                    tooltip="Exact: each timestep in the shape in which the model computes it, equal to the bit. Batched: all "
                    "timesteps in one product, which is faster and rounds the last bit of some numbers differently.",
                ),
                io.Boolean.Input(
                    "prompt_features",
                    default=True,
                    tooltip="Also keep keys and values of the prompt (Wan, LTX-Video, PixArt, Cosmos): memory per prompt.",
                ),
                io.Boolean.Input(
                    "required",
                    default=False,
                    tooltip="Stop with an error instead of sampling plainly when the model has no such layers.",
                ),
                io.Boolean.Input(
                    "save_tables",
                    default=False,
                    tooltip="Keep modulations in a file in ComfyUI's user folder (stretto/temporal_features), so that after a "
                    "restart their weights are not read again for timesteps, guidance and pooled text that were there before.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, mode: str, prompt_features: bool, required: bool, save_tables: bool = False) -> io.NodeOutput:
        settings = {"mode": mode, "prompt": prompt_features}
        if save_tables:
            settings["folder"] = str(Path(folder_paths.get_user_directory()) / "stretto" / "temporal_features")
        return io.NodeOutput(host.request(model, Request("temporal_features", settings, required=required)))
