"""Text conditioning for the demo models."""

import logging
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError

from ..acceleration.errors import StrettoError
from ..demo.text_encoder import load

FILE = "stretto-demo-text.safetensors"
# Width of the text states that each demo model reads; Wan's is fixed by ComfyUI's loader.
WIDTHS = {"image": 0, "video": 4096}
log = logging.getLogger("stretto")


class StrettoDemoText(io.ComfyNode):
    """Turn a few words into CONDITIONING for the demo models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoDemoText",
            display_name="Stretto Demo Text",
            category="Stretto/demo",
            description="The demo models' own small text encoder. It knows the words of emoji names; "
            "an empty text is the unconditional input.",
            inputs=[
                io.String.Input(
                    "text",
                    default="fluent red apple",
                    multiline=True,
                    tooltip="Style and name, for example: fluent red apple; flat blue heart; noto cat face.",
                ),
                io.Combo.Input(
                    "model",
                    options=list(WIDTHS),
                    optional=True,
                    default="image",
                    tooltip="Which demo model the conditioning is for. The video model has the input width of Wan "
                    "(4096): the states are padded with zeros.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, text: str, model: str = "image") -> io.NodeOutput:
        if model not in WIDTHS:
            raise StrettoError(f"Stretto Demo Text: model is {model!r}; known models: {', '.join(WIDTHS)}")
        path = folder_paths.get_full_path("text_encoders", FILE)
        if path is None:
            raise StrettoError(
                f"{FILE} is not in any text_encoders folder. It ships with Stretto's repository in demo/models; "
                "the registry package leaves it out."
            )
        try:
            encoder = load(Path(path))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise StrettoError(f"{path} cannot be read as the demo text encoder: {error}. Restore the file.") from error
        states, pooled, unknown = encoder.encode([text])
        if unknown:
            log.warning("Stretto Demo Text does not know: %s", ", ".join(unknown))
        states = torch.nn.functional.pad(states, (0, max(WIDTHS[model] - states.shape[-1], 0)))
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput([[states.to(device), {"pooled_output": pooled.to(device)}]])
