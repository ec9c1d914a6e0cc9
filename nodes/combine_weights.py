"""Signed combinations of checkpoints or LoRAs."""

import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ..acceleration.errors import StrettoError
from ..acceleration.weights.combining import open_combination
from .load_quantized import path_of

EXAMPLE = "-0.4 epoch-08.safetensors\n0.5 epoch-10.safetensors\n0.9 epoch-12.safetensors"


class StrettoCombineWeights(io.ComfyNode):
    """Load a signed linear combination of checkpoints, or put one of LoRAs on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoCombineWeights",
            display_name="Stretto Combine Weights",
            category="Stretto/loaders",
            description="Adds up checkpoints of one training with signed weights (LCSC), or LoRA epochs on the model that is "
            "connected. Sums are made in fp32. To keep the result as a file, use the command line: cli.py combine.",
            inputs=[
                io.String.Input(
                    "combination",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="A weight and a file per line. Files lie in diffusion_models, or in loras when a model is connected. "
                    "Weights of checkpoints add up to 1.",
                ),
                io.Model.Input("model", optional=True, tooltip="Connect a model to combine LoRAs on it."),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, combination: str, model=None) -> io.NodeOutput:
        entries = parse(combination)
        if model is not None:
            return io.NodeOutput(with_loras(model, entries))
        paths = [path_of("diffusion_models", name) for _, name in entries]
        with open_combination(paths, [value for value, _ in entries]) as group:
            if group.lora:
                raise StrettoError("these files are LoRAs: connect the model that they belong to")
            tensors = {}
            for spec in group.specs():
                whole = tensors[spec.name] = group.checkpoints[0].tensors[spec.name].read()
                for row, rows in group.parts(spec.name):
                    (whole[row : row + len(rows)] if rows.dim() else whole).copy_(rows)
            metadata = dict(group.checkpoints[0].metadata)
        made = comfy.sd.load_diffusion_model_state_dict(tensors, metadata=metadata)
        if made is None:
            raise StrettoError(f"{paths[0]}: ComfyUI does not know the architecture of these files")
        return io.NodeOutput(made)


def parse(text: str) -> list[tuple[float, str]]:
    """Return (weight, file) of every line.

    Raises:
        StrettoError: a line that is something else.
    """
    entries = []
    for line in filter(None, map(str.strip, text.splitlines())):
        value, _, name = line.partition(" ")
        try:
            entries.append((float(value), name.strip()))
        except ValueError:
            entries.append((0.0, ""))
        if not entries[-1][1]:
            raise StrettoError(
                f"Stretto Combine Weights: {line!r:.80} is no weight and file; write for example 0.5 epoch-10.safetensors"
            )
    if not entries:
        raise StrettoError("Stretto Combine Weights: no files are named; write a weight and a file per line")
    return entries


def with_loras(model, entries: list[tuple[float, str]]):
    """Return a clone of a model with every LoRA at its weight: what they add to the model is summed, not their factors."""
    paths = [path_of("loras", name) for _, name in entries]
    with open_combination(paths, [value for value, _ in entries]):
        pass  # they must belong together, and be LoRAs of two factors
    for (value, _), path in zip(entries, paths):
        if value:
            model, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path, safe_load=True), value, 0.0)
    return model
