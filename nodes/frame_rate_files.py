"""Latents with their frame schedule, in files that ComfyUI's own Load Latent can read too."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import safetensors
import torch
from comfy_api.latest import io

from ..acceleration.errors import StrettoError
from ..acceleration.frame_rate.schedule import LATENT_KEY, FrameRateSchedule, schedule_of_latent, with_schedule
from ..acceleration.quantization.writer import Spec, StreamWriter
from ..acceleration.safetensors_header import SPELLINGS, Header, read_header

SAVE, LOAD = "Stretto Save Latent", "Stretto Load Latent"
TENSOR, VERSION, MASK = "latent_tensor", "latent_format_version_0", "noise_mask"
#: What ComfyUI multiplies the latents of its oldest files by, which lack VERSION.
OLD_SCALE = 1 / 0.18215


class StrettoSaveScheduledLatent(io.ComfyNode):
    """Save a latent with its frame schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoSaveScheduledLatent",
            display_name=SAVE,
            category="Stretto",
            description="Saves a latent and the frame schedule that it carries, which Save Latent would lose.",
            inputs=[
                io.Latent.Input("samples", tooltip="A latent, with or without a schedule."),
                io.String.Input(
                    "filename_prefix", default="latents/Stretto", tooltip="Folder and beginning of the name."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{counter:05}_.latent"
        write_latent(path, samples)
        return io.NodeOutput(ui={"latents": [{"filename": path.name, "subfolder": subfolder, "type": "output"}]})


class StrettoLoadScheduledLatent(io.ComfyNode):
    """Load a latent with its frame schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = Path(folder_paths.get_input_directory())
        names = sorted(path.name for path in folder.glob("*.latent")) if folder.is_dir() else []
        return io.Schema(
            node_id="StrettoLoadScheduledLatent",
            display_name=LOAD,
            category="Stretto",
            description="Loads a latent from ComfyUI's input folder, with the frame schedule that was saved in it.",
            inputs=[io.Combo.Input("latent", options=names, tooltip="A .latent file in ComfyUI's input folder.")],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, latent: str) -> io.NodeOutput:
        return io.NodeOutput(read_latent(Path(folder_paths.get_annotated_filepath(latent))))

    @classmethod
    def fingerprint_inputs(cls, latent: str) -> str:
        digest = hashlib.sha256()
        with Path(folder_paths.get_annotated_filepath(latent)).open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()

    @classmethod
    def validate_inputs(cls, latent: str) -> bool | str:
        return True if folder_paths.exists_annotated_filepath(latent) else f"there is no latent file {latent}"


def write_latent(path: Path, latent: Mapping[str, Any]) -> None:
    """Write a LATENT to ``path``: whole or not at all, and never over a file that is there.

    Args:
        path: the file.
        latent: ``samples`` [B, C, (T,) H, W] of any floating dtype, kept to the bit; its ``noise_mask`` and schedule too.

    Raises:
        StrettoError: the schedule is stale, the latent is no single tensor, the file exists, or the disk is too full.
    """
    samples = latent["samples"]
    if not isinstance(samples, torch.Tensor) or samples.is_nested:
        raise StrettoError(f"{SAVE}: the latent is {type(samples).__name__}; only one of a single tensor can be saved")
    schedule_of_latent(latent)  # a stale schedule must not get into a file
    tensors = {TENSOR: samples, VERSION: torch.tensor([])}
    if isinstance(latent.get("noise_mask"), torch.Tensor):
        tensors[MASK] = latent["noise_mask"]
    metadata = {LATENT_KEY: json.dumps(latent[LATENT_KEY])} if LATENT_KEY in latent else {}
    if path.exists():
        raise StrettoError(f"{SAVE}: {path.name} exists already; choose another filename_prefix")
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with StreamWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            if tensor.numel():
                writer.write(name, tensor)


def read_latent(path: Path) -> dict[str, Any]:
    """Read a LATENT with its schedule, where the file holds one: float32, as ComfyUI's own Load Latent returns it.

    Raises:
        StrettoError: no such file, or no latent in it, or a schedule of another latent; said before a tensor is read.
    """
    header = read_header(path)
    entry = header.entries.get(TENSOR)
    if entry is None:
        raise StrettoError(f"{LOAD}: {path.name} holds no {TENSOR}; it is no latent file")
    if not entry.dtype.is_floating_point or not 3 <= len(entry.shape) <= 5 or not math.prod(entry.shape):
        kind = f"{SPELLINGS[entry.dtype]} {list(entry.shape)}"
        raise StrettoError(
            f"{LOAD}: {TENSOR} in {path.name} is {kind}; expected floating point with 3 to 5 axes, none empty"
        )
    schedule = _schedule_in(header)
    schedule_of_latent(with_schedule({"samples": torch.empty(entry.shape, device="meta")}, schedule))
    with safetensors.safe_open(path, "pt") as file:
        # A copy: what is read is a view of the file, which may be moved or written while the latent is in use.
        samples = file.get_tensor(TENSOR).to(torch.float32, copy=True)
        latent = {"samples": samples if VERSION in header.entries else samples * OLD_SCALE}
        if MASK in header.entries:
            latent[MASK] = file.get_tensor(MASK).clone()
    return with_schedule(latent, schedule)


def _schedule_in(header: Header) -> FrameRateSchedule | None:
    if LATENT_KEY not in header.metadata:
        return None
    try:
        document = json.loads(header.metadata[LATENT_KEY])
    except (ValueError, RecursionError) as error:
        raise StrettoError(f"{LOAD}: the schedule in {header.path.name} is no JSON: {str(error)[:120]}") from None
    return FrameRateSchedule.from_json(document)
