"""Latents with their frame schedule, in files that ComfyUI's own Load Latent can read too."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import folder_paths
import safetensors.torch
import torch
from comfy_api.latest import io

from ..acceleration.errors import StrettoError
from ..acceleration.frame_rate.schedule import LATENT_KEY, FrameRateSchedule, schedule_of_latent, with_schedule
from ..acceleration.safetensors_header import read_header

TENSOR, VERSION, MASK = "latent_tensor", "latent_format_version_0", "noise_mask"


class StrettoSaveScheduledLatent(io.ComfyNode):
    """Save a latent with its frame schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoSaveScheduledLatent",
            display_name="Stretto Save Latent",
            category="Stretto",
            description="Saves a latent and the frame schedule that it carries, which Save Latent would lose.",
            inputs=[
                io.Latent.Input("samples", tooltip="A latent, with or without a schedule."),
                io.String.Input("filename_prefix", default="latents/Stretto", tooltip="Folder and beginning of the name."),
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
            display_name="Stretto Load Latent",
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
        return hashlib.sha256(Path(folder_paths.get_annotated_filepath(latent)).read_bytes()).hexdigest()

    @classmethod
    def validate_inputs(cls, latent: str) -> bool | str:
        return True if folder_paths.exists_annotated_filepath(latent) else f"there is no latent file {latent}"


def write_latent(path: Path, latent: dict) -> None:
    """Write a LATENT to ``path``: whole or not at all, and never over a file that is there.

    Raises:
        StrettoError: the schedule is stale, the file exists, or the disk is too full.
    """
    schedule_of_latent(latent)  # a stale schedule must not get into a file
    tensors = {TENSOR: latent["samples"].contiguous(), VERSION: torch.tensor([])}
    if isinstance(latent.get("noise_mask"), torch.Tensor):
        tensors[MASK] = latent["noise_mask"].contiguous()
    metadata = {LATENT_KEY: json.dumps(latent[LATENT_KEY])} if LATENT_KEY in latent else {}
    if path.exists():
        raise StrettoError(f"Stretto Save Latent: {path.name} exists already; choose another filename_prefix")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + (1 << 16)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise StrettoError(f"Stretto Save Latent: {path.name} takes {size:,} bytes and {free:,} are free")
    temporary = path.with_suffix(".tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_latent(path: Path) -> dict:
    """Read a LATENT with its schedule, where the file holds one.

    Raises:
        StrettoError: no such file, or no latent in it, or a schedule of another latent.
    """
    header = read_header(path)
    if TENSOR not in header.entries:
        raise StrettoError(f"Stretto Load Latent: {path.name} holds no {TENSOR}; it is no latent file")
    tensors = safetensors.torch.load_file(path)
    scale = 1.0 if VERSION in tensors else 1 / 0.18215  # what ComfyUI does for its oldest files
    latent = {"samples": tensors[TENSOR].float() * scale}
    if MASK in tensors:
        latent["noise_mask"] = tensors[MASK]
    if LATENT_KEY not in header.metadata:
        return latent
    try:
        schedule = FrameRateSchedule.from_json(json.loads(header.metadata[LATENT_KEY]))
    except json.JSONDecodeError as error:
        raise StrettoError(f"Stretto Load Latent: the schedule in {path.name} is no JSON: {error}") from None
    found = with_schedule(latent, schedule)
    schedule_of_latent(found)
    return found
