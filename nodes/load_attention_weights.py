"""Files of trained attention: SLA, SALAD, CLEAR."""

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..acceleration.attention.weights import ANY, KINDS, AttentionWeights, convert, load_weights
from ..acceleration.caching.preset_files import checked_name
from ..acceleration.errors import StrettoError
from ..acceleration.hosts.comfy_attention_weights import apply_clear
from ..acceleration.models import describe
from .inputs import ADVANCED

#: Trained attention on its way to Stretto Sparse Attention.
WEIGHTS_TYPE = io.Custom("STRETTO_ATTENTION_WEIGHTS")
#: Folder under ComfyUI's models that file names are looked up in first.
FOLDER = "attention"
#: Kinds of model folders a full checkpoint or a file of weights may also lie in.
OTHER_FOLDERS = ("diffusion_models", "loras")
#: What a user calls the variants of SLA that files do not tell apart.
VARIANTS = {"as the file says": "", "all keys": "all", "complement": "complement"}


class StrettoLoadAttentionWeights(io.ComfyNode):
    """Load what a sparse attention method was trained with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoLoadAttentionWeights",
            display_name="Stretto Load Attention Weights",
            category="Stretto",
            description="Loads trained parts of SLA or SALAD for Stretto Sparse Attention, or puts CLEAR's fine-tuned "
            "attention weights into a FLUX model. Reads published checkpoints too, and can save them in Stretto's format.",
            inputs=[*_main(), *_published()],  # saved values are positional: append only
            outputs=[WEIGHTS_TYPE.Output(display_name="weights"), io.Model.Output(display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others) -> str:
        """Run again when the file has changed, or is there only now."""
        try:
            status = os.stat(_find(file))
        except (OSError, StrettoError):
            return "missing"
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(
        cls,
        file: str,
        kind: str,
        model=None,
        variant: str = "as the file says",
        keep: float = 0.0,
        layers: int = 0,
        radius: int = 0,
        save_as: str = "",
    ) -> io.NodeOutput:
        if kind not in ("auto", *KINDS):
            raise StrettoError(f"Stretto Load Attention Weights: kind is {kind!r}; known: auto, {', '.join(KINDS)}")
        if variant not in VARIANTS:
            raise StrettoError(f"Stretto Load Attention Weights: variant is {variant!r}; known: {', '.join(VARIANTS)}")
        path, trained = (
            _find(file),
            {"variant": VARIANTS[variant], "topk": keep / 100 or None, "layers": layers or None},
        )
        trained["base_model"] = _base_model(model)
        if save_as.strip():
            path = _saved(path, save_as, {**trained, "base_model": trained["base_model"] or ANY})
            trained = {}
        weights = load_weights(path, kind=kind, radius=radius, **_said(path, trained))
        return io.NodeOutput(weights, _patched(model, weights))


def _main() -> list[io.Input]:
    return [
        io.String.Input(
            "file",
            default="",
            tooltip="A file in models/attention (or models/diffusion_models, models/loras), or a full path. Ours: .safetensors "
            "with SLA or SALAD weights. Published: TurboDiffusion's .pth, SimpleTuner's sla_attention.pt, "
            "clear_local_16.safetensors.",
        ),
        io.Combo.Input(
            "kind",
            options=["auto", *KINDS],
            default="auto",
            tooltip="What the file must hold; auto takes what it finds. Anything else than you ask for is an error.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="CLEAR: the FLUX model that gets the weights, before or after LoRAs. For others it passes through.",
        ),
    ]


def _published() -> list[io.Input]:
    """What published checkpoints do not say themselves."""
    return [
        io.Combo.Input(
            "variant",
            options=list(VARIANTS),
            default="as the file says",
            optional=True,
            tooltip="Published SLA checkpoints do not say over which keys their linear branch runs. all keys: TurboDiffusion, "
            "SageSLA, SLA's main branch. complement: SLA-1. The wrong one gives wrong pictures.",
            **ADVANCED,
        ),
        io.Float.Input(
            "keep",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.5,
            round=0.01,
            optional=True,
            tooltip="Keep: percent of key blocks a published SLA checkpoint was trained with, such as 10 for TurboDiffusion. "
            "0: as the file says. (topk)",
            **ADVANCED,
        ),
        io.Int.Input(
            "layers",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Layers of the model, for SimpleTuner's files: they hold one projection for all. 0: as the file says.",
            **ADVANCED,
        ),
        io.Int.Input(
            "radius",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="CLEAR's radius in tokens, for a file that was renamed. 0: from its name, clear_local_16 for example.",
            **ADVANCED,
        ),
        io.String.Input(
            "save_as",
            default="",
            optional=True,
            tooltip="Saves a published SLA checkpoint's attention weights under this name in models/attention, small and in "
            "Stretto's format, and loads that. An existing file is never overwritten: clear this after the first run.",
            **ADVANCED,
        ),
    ]


def _find(file: str) -> Path:
    """Return the file a user means.

    Raises:
        StrettoError: it is nowhere; says where it was looked for.
    """
    name = file.strip().strip('"')
    if not name:
        raise StrettoError(
            "Stretto Load Attention Weights: file is empty; name a file in models/attention, or a full path"
        )
    places = [Path(name)] if Path(name).is_absolute() else [_folder() / name]
    if not Path(name).is_absolute():
        known = folder_paths.folder_names_and_paths
        for kind in (FOLDER, *OTHER_FOLDERS):
            places += [Path(folder) / name for folder in (folder_paths.get_folder_paths(kind) if kind in known else ())]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(dict.fromkeys(str(place.parent) for place in places))
    raise StrettoError(f"Stretto Load Attention Weights: no file {name!r} in {looked}")


def _folder() -> Path:
    return Path(folder_paths.models_dir) / FOLDER


def _base_model(model) -> str:
    """Return the family of a given model, which published checkpoints do not name; "" without one."""
    descriptor = describe(model.model.diffusion_model) if model is not None else None
    return descriptor.family if descriptor else ""


def _said(path: Path, trained: dict) -> dict:
    """Return what the user says of the file; the family only beside something that a published checkpoint needs."""
    told = {name: value for name, value in trained.items() if value}
    return told if told.keys() - {"base_model"} else {}


def _saved(source: Path, name: str, trained: dict) -> Path:
    """Convert a published checkpoint into models/attention and return the new file."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StrettoError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        name = checked_name(name.strip().removesuffix(".safetensors"))
    except StrettoError:
        raise StrettoError(
            f"Stretto Load Attention Weights: save_as is {name!r:.80}; use 1 to 64 letters, digits, spaces, dots, dashes and "
            "underscores, starting with a letter or digit"
        ) from None
    return convert(source, folder / f"{name}.safetensors", **trained)


def _patched(model, weights: AttentionWeights):
    """Return the model with CLEAR's weights in it; with others', as it is."""
    if weights.kind != "CLEAR":
        return model
    if model is None:
        raise StrettoError(f"{weights.file}: CLEAR's weights go into the model; connect a FLUX model to this node's input")
    return apply_clear(model, weights)
