"""Loaders of quantized checkpoints."""

from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy_quantization as host
from ..acceleration.hosts.diffusers_folder import find_folders
from .inputs import ADVANCED

NONE = "none"
#: Begins the name of a network inside a folder of ComfyUI's diffusers folders.
PIPELINE = "diffusers: "
FORMATS = [host.AS_IS, "int8", "w6a8", "w4a8", "fp8"]
LOADERS = [host.AUTOMATIC, host.STRETTO, host.CORE]
TYPES = [kind.name.lower() for kind in comfy.sd.CLIPType]
_FORMAT_TIP = (
    "What to do with a 16-bit or GGUF file while loading it: int8 has nearly the quality of 16 bit at half the size, w6a8 and "
    "w4a8 are smaller. Files that are quantized already are loaded as they are."
)
_LOADER_TIP = "Automatic leaves to ComfyUI what it loads best by itself, and says so."


def transformer_folders(kind: str) -> dict[str, Path]:
    """Return folders of diffusers transformers by name: those in ComfyUI's folders of that kind, and those of pipelines."""
    if kind != "diffusion_models":
        return {}
    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(kind)):
        for config in sorted(base.rglob("config.json")) if base.is_dir() else ():
            if config.parent != base and any(config.parent.glob("*.safetensors")):
                found.setdefault(config.parent.relative_to(base).as_posix() + "/", config.parent)
    for base in map(Path, folder_paths.get_folder_paths("diffusers")):
        for name in find_folders(base):
            for folder in sorted((base / name).glob("transformer*")):
                found.setdefault(f"{PIPELINE}{name}/{folder.name}", folder)
    return found


def files(kind: str) -> list[str]:
    """Return the names to choose from: what ComfyUI lists, GGUF files in the same folders, and folders of diffusers."""
    names = list(folder_paths.get_filename_list(kind))
    for folder in map(Path, folder_paths.get_folder_paths(kind)):
        if folder.is_dir():
            names += [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))]
    return list(dict.fromkeys([*names, *transformer_folders(kind)]))


def stem_of(name: str) -> str:
    """Return what files made of a name of :func:`files` are called after."""
    if name.startswith(PIPELINE):
        return name.removeprefix(PIPELINE).replace("/", "-")
    return Path(name).stem


def path_of(kind: str, name: str) -> str:
    """Return the path of a name that :func:`files` lists.

    Raises:
        StrettoError: there is no such file in ComfyUI's folders.
    """
    found = folder_paths.get_full_path(kind, name)
    if found is None and name in (folders := transformer_folders(kind)):
        found = str(folders[name])
    if found is None:
        raise StrettoError(
            f"{name!r:.200} is in none of ComfyUI's {kind} folders; reload the page to see what is there"
        )
    return found


class StrettoLoadDiffusionModel(io.ComfyNode):
    """Load a diffusion model in any quantized format, or quantize it while loading."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoLoadDiffusionModel",
            display_name="Stretto Load Diffusion Model",
            category="Stretto/loaders",
            description="Loads 8-, 6- and 4-bit models in ComfyUI's quantized format, scaled fp8 and GGUF, or quantizes a 16-bit "
            "model while loading it. Says which format it found, which products it uses and how much memory it saves.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files("diffusion_models"),
                    tooltip="A file in ComfyUI's diffusion_models folders, or the folder of a diffusers transformer.",
                ),
                io.Combo.Input("format", options=FORMATS, default=host.AS_IS, tooltip=_FORMAT_TIP),
                io.Combo.Input(
                    "lora",
                    options=[host.BRANCH, host.REQUANTIZE],
                    default=host.BRANCH,
                    tooltip="Where LoRAs go: beside the weights they are exact and cost a little time per step; in the weights "
                    "they cost none and are rounded with them.",
                ),
                io.Combo.Input("loader", options=LOADERS, default=host.AUTOMATIC, tooltip=_LOADER_TIP),
                io.Int.Input(
                    "keep_decoded",
                    default=host.KEEP >> 20,
                    min=0,
                    max=1 << 20,
                    optional=True,
                    tooltip="MB of decoded weights kept from step to step where the model runs on the processor. 6- and 4-bit "
                    "layers and fp8 are decoded anew in every step beyond it. A GPU keeps none.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "feature_weights",
                    options=list(host.FEATURE_WEIGHTS),
                    default=host.LOADED,
                    optional=True,
                    tooltip="Weights that see the timestep alone (a quarter to a third of FLUX, Qwen-Image and SD3.5) or the "
                    "prompt alone (a seventh of Wan). Read from the file: they are never loaded, and Stretto Temporal Feature "
                    "Cache keeps what they make.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        format: str,
        lora: str,
        loader: str,
        keep_decoded: int = host.KEEP >> 20,
        feature_weights: str = host.LOADED,
    ) -> io.NodeOutput:
        path = path_of("diffusion_models", model_name)
        model, report = host.load_diffusion_model(path, format, loader, lora, keep_decoded << 20, feature_weights)
        return io.NodeOutput(model, report.text())


class StrettoLoadTextEncoder(io.ComfyNode):
    """Load a text encoder in any quantized format, or quantize it while loading."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoLoadTextEncoder",
            display_name="Stretto Load Text Encoder",
            category="Stretto/loaders",
            description="Loads a text encoder in ComfyUI's quantized format, scaled fp8 or GGUF, or quantizes a 16-bit one while "
            "loading it. Only weights are rounded: a text encoder runs once per prompt.",
            inputs=[
                io.Combo.Input(
                    "clip_name", options=files("text_encoders"), tooltip="A file in ComfyUI's text_encoders folders."
                ),
                io.Combo.Input("type", options=TYPES, tooltip="The model family the encoder is for."),
                io.Combo.Input(
                    "format", options=[host.AS_IS, "int8", "fp8", "w4a16"], default=host.AS_IS, tooltip=_FORMAT_TIP
                ),
                io.Combo.Input("loader", options=LOADERS, default=host.AUTOMATIC, tooltip=_LOADER_TIP),
                *[
                    io.Combo.Input(
                        f"clip_name{number}",
                        options=[NONE, *files("text_encoders")],
                        default=NONE,
                        optional=True,
                        tooltip="A further encoder, for models with more than one (FLUX: CLIP L beside T5; SD3: CLIP G too).",
                    )
                    for number in (2, 3, 4)
                ],
                io.Combo.Input(
                    "vocabulary",
                    options=list(host.VOCABULARIES),
                    default=host.LOADED,
                    optional=True,
                    tooltip="The vocabulary table of T5, UMT5, Llama, Qwen and Gemma encoders takes 0.2 to 2 GB, and a prompt "
                    "touches some hundred rows of it. Rows from the file: only those are read, when the prompt is encoded; the "
                    "result is the same to the bit. From system memory: the table is loaded there and never moved to the GPU.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls,
        clip_name: str,
        type: str,
        format: str,
        loader: str,
        clip_name2: str = NONE,
        clip_name3: str = NONE,
        clip_name4: str = NONE,
        vocabulary: str = host.LOADED,
    ) -> io.NodeOutput:
        names = [name for name in (clip_name, clip_name2, clip_name3, clip_name4) if name != NONE]
        paths = [path_of("text_encoders", name) for name in names]
        folders = folder_paths.get_folder_paths("embeddings")
        clip, reports = host.load_text_encoder(paths, type, format, loader, folders, vocabulary)
        return io.NodeOutput(clip, "\n".join(report.text() for report in reports))
