"""Pipelines of diffusers: loaded from folders, run under the plan of the technique nodes."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..acceleration.errors import StrettoError
from ..acceleration.hosts import diffusers_load as loading
from ..acceleration.hosts.comfy import TRACES, execution_ids
from ..acceleration.hosts.diffusers_folder import check_folder, find_folders
from ..acceleration.hosts.diffusers_load import DTYPES
from ..acceleration.hosts.diffusers_pipeline import Pipeline, Sampling, run_pipeline
from ..acceleration.hosts.diffusers_write import write_folder
from .inputs import ADVANCED

KIND = "diffusers"
#: A pipeline also counts as a MODEL on its way through nodes, so that every technique node takes and gives it.
PIPELINE_OR_MODEL = io.Custom("STRETTO_PIPELINE,MODEL")
#: Demo models, which are converted when they are first chosen.
DEMOS = {"stretto-demo-image": "image", "stretto-demo-video": "video"}
NOTHING = "none found"


def folders() -> list[str]:
    """Return the names to choose from: folders with a pipeline in ComfyUI's diffusers folders, and the demo models."""
    found = [
        name for base in map(Path, folder_paths.get_folder_paths(KIND)) if base.is_dir() for name in find_folders(base)
    ]
    demos = [name for name in DEMOS if _demo_files(name)]
    return list(dict.fromkeys([*found, *demos])) or [NOTHING]


def _demo_files(name: str) -> tuple[Path, Path] | None:
    """Return the files of a demo model: transformer and VAE; None where the pack came without them."""
    found = [
        folder_paths.get_full_path(kind, f"{name}{ending}.safetensors")
        for kind, ending in (("diffusion_models", ""), ("vae", "-vae"))
    ]
    return tuple(map(Path, found)) if all(found) else None


def _located(name: str) -> tuple[Path, Path]:
    """Return (folder, folder that its files may not leave) of a name that :func:`folders` lists.

    Raises:
        StrettoError: there is no such folder.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise StrettoError(
            f"Stretto Load Diffusers Pipeline: {name!r:.200} is no folder below ComfyUI's diffusers folders"
        )
    bases = [Path(base) for base in folder_paths.get_folder_paths(KIND)]
    for base in bases:
        if (base / name).is_dir():
            return base / name, base
    files = _demo_files(name) if name in DEMOS else None
    if files is None:
        raise StrettoError(
            f"Stretto Load Diffusers Pipeline: {name!r:.200} is in none of ComfyUI's diffusers folders "
            f"({', '.join(map(str, bases))}); reload the page to see what is there"
        )
    made = Path(folder_paths.get_temp_directory()) / f"{name}-diffusers"
    if not made.is_dir():
        made.parent.mkdir(parents=True, exist_ok=True)
        write_folder(*files, made)
    return made, made


class StrettoLoadDiffusersPipeline(io.ComfyNode):
    """Load a diffusers pipeline from a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoLoadDiffusersPipeline",
            display_name="Stretto Load Diffusers Pipeline",
            category="Stretto/diffusers",
            description="Loads a pipeline of diffusers from a folder in models/diffusers, for models that ComfyUI does not have. "
            "Safetensors only, and no code of the folder's own. Stretto's technique nodes take the pipeline like a model; "
            "Stretto Diffusers Sample runs it.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders(),
                    tooltip="A folder with a model_index.json below models/diffusers (or a diffusers folder of "
                    "extra_model_paths.yaml). The demo models are converted when they are first loaded.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=next(iter(DTYPES)),
                    tooltip="Type of the weights in memory. as stored: what the transformer's file has.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    optional=True,
                    tooltip="Get the pipeline named in hub_id from the Hugging Face hub into models/diffusers first, once. Off: "
                    "nothing is ever downloaded.",
                    **ADVANCED,
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    optional=True,
                    tooltip="owner/name on the Hugging Face hub; read only with download on, and then in the place of folder.",
                    **ADVANCED,
                ),
            ],
            outputs=[PIPELINE_OR_MODEL.Output(display_name="pipeline"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, folder: str, dtype: str, download: bool = False, hub_id: str = "") -> io.NodeOutput:
        if dtype not in DTYPES:
            raise StrettoError(
                f"Stretto Load Diffusers Pipeline: dtype is {dtype!r:.60}; expected one of {', '.join(DTYPES)}"
            )
        path, base = _downloaded(hub_id) if download else _located(folder)
        found = check_folder(path, base)
        pipeline = Pipeline(loading.load_pipeline(found, DTYPES[dtype]))
        networks = (part for part in found.components.values() if part.headers)
        parts = [f"{part.name}: {part.class_name}, {part.nbytes / 2**20:,.0f} MB" for part in networks]
        absent = [f"left out: {', '.join(found.absent)}"] if found.absent else []
        return io.NodeOutput(pipeline, "\n".join([found.class_name, *parts, *absent]))


def _downloaded(hub_id: str) -> tuple[Path, Path]:
    base = Path(folder_paths.get_folder_paths(KIND)[0])
    return loading.download(hub_id, base), base


class StrettoDiffusersSample(io.ComfyNode):
    """Run a diffusers pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoDiffusersSample",
            display_name="Stretto Diffusers Sample",
            category="Stretto/diffusers",
            description="Runs a diffusers pipeline from prompt to pictures, or to the frames of a clip, under the plan of the "
            "Stretto nodes before it. Stretto Report takes its latent.",
            inputs=[*_main(), *_more()],  # saved values are positional: append only
            outputs=[
                io.Image.Output(display_name="images", tooltip="Pictures; of a clip, all frames in order."),
                io.Latent.Output(display_name="latent", tooltip="As the pipeline's VAE was given it."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        frames: int,
        steps: int,
        cfg: float,
        seed: int,
        batch: int = 1,
        positive=None,
        negative=None,
    ) -> io.NodeOutput:
        if not isinstance(model, Pipeline):
            raise StrettoError(
                "Stretto Diffusers Sample: the link carries a model of ComfyUI's; KSampler runs those. Connect Stretto Load "
                "Diffusers Pipeline"
            )
        if positive is None and negative is not None:
            raise StrettoError(
                "Stretto Diffusers Sample: negative is connected and positive is not; connect both or neither"
            )
        embedded = None if positive is None else (positive, negative)
        settings = Sampling(prompt, negative_prompt, width, height, frames, steps, cfg, seed, batch, embedded)
        images, latent = run_pipeline(model, settings, TRACES, execution_ids())
        return io.NodeOutput(images, {"samples": latent})


def _main() -> list[io.Input]:
    """What every run is asked."""
    return [
        PIPELINE_OR_MODEL.Input(
            "model", tooltip="From Stretto Load Diffusers Pipeline, perhaps through Stretto's technique nodes."
        ),
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            tooltip="What to draw. Models of classes take their names, with commas between.",
        ),
        io.String.Input(
            "negative_prompt", default="", multiline=True, tooltip="What to keep away from; may stay empty."
        ),
        io.Int.Input(
            "width", default=1024, min=16, max=8192, step=8, tooltip="Pixels; models ask for multiples of 16 or 32."
        ),
        io.Int.Input("height", default=1024, min=16, max=8192, step=8, tooltip="Pixels."),
        io.Int.Input(
            "frames",
            default=81,
            min=1,
            max=1025,
            tooltip="Frames of a clip; most models ask for multiples of 4, and one more.",
        ),
        io.Int.Input("steps", default=28, min=1, max=1000, tooltip="Steps of the pipeline's own scheduler."),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Guidance scale; 1 is none. Of models whose guidance is distilled (FLUX dev), that scale.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Seed of the noise."
        ),
    ]


def _more() -> list[io.Input]:
    """What only some need."""
    return [
        io.Int.Input(
            "batch", default=1, min=1, max=64, optional=True, tooltip="Pictures or clips in one run.", **ADVANCED
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="Text embeddings in the place of the prompt, for pipelines without a text encoder such as the demo models.",
        ),
        io.Conditioning.Input("negative", optional=True, tooltip="The same for the negative prompt."),
    ]
