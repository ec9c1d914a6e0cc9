"""Making quantized checkpoints from within ComfyUI."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..acceleration.caching.preset_files import checked_name
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy_quantization as host
from ..acceleration.hosts.comfy_quantization_statistics import record_statistics, runs
from ..acceleration.quantization.checkpoints import open_checkpoint
from ..acceleration.quantization.planning import MIXED, Wishes, plan_wishes
from ..acceleration.quantization.quantizing import PROVENANCE_KEY, RECIPE_KEY, Plan, Result, write_file
from ..acceleration.quantization.statistics import Statistics
from .inputs import ADVANCED
from .load_quantized import files, path_of, stem_of
from .profile import ProfiledRun, ProfileType, profiled

StatisticsType = io.Custom("STRETTO_QUANTIZATION_STATISTICS")
FORMATS = ["int8", "w6a8", "w4a8", MIXED, "fp8", "fp8_rows", "w4a16"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """What travels along a link of statistics."""

    statistics: Statistics
    path: Path


class StrettoQuantizationStatistics(io.ComfyNode):
    """Record what balancing and mixed precision need to know."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoQuantizationStatistics",
            display_name="Stretto Quantization Statistics",
            category="Stretto/loaders",
            description="Runs the 16-bit model once more and records how large the inputs of its layers get, and, if asked for, "
            "how much rounding each layer changes the result. Stretto Quantize uses both.",
            inputs=[
                ProfileType.Input("profile", tooltip="From Stretto Profile: the model, prompt and sampler to record."),
                io.Boolean.Input(
                    "losses",
                    default=True,
                    tooltip="Round one layer at a time, in each of three formats, and compare short runs: what mixed precision "
                    "decides by. Takes three short runs per layer.",
                ),
                io.Int.Input("steps", default=4, min=1, max=50, tooltip="Steps of the short runs.", **ADVANCED),
                io.String.Input("name", default="", tooltip="Name of the saved file; empty names it after the model."),
            ],
            outputs=[StatisticsType.Output(display_name="statistics"), io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, profile: ProfiledRun, losses: bool, steps: int, name: str) -> io.NodeOutput:
        run = profiled(profile)
        name = checked_name(name) if name.strip() else f"{run.profile.about['family']}-statistics"
        bar = comfy.utils.ProgressBar(runs(run.job, losses))

        def tick() -> None:
            bar.update(1)
            comfy.model_management.throw_exception_if_processing_interrupted()

        statistics = record_statistics(run.job, losses, steps, tick=tick)
        folder = Path(folder_paths.get_user_directory()) / "stretto" / "quantization"
        folder.mkdir(parents=True, exist_ok=True)
        path = next(path for path in _names(folder, name) if not path.exists())  # files of earlier runs stay
        statistics.save(path)
        lines = [f"{len(statistics.maxima)} layers recorded: {statistics.words}.", f"Saved as {path}."]
        if statistics.cells:
            worst = sorted((c for c in statistics.cells if c.format == "w4a8"), key=lambda cell: -cell.loss)[:5]
            lines += ["Layers that mind 4 bits most (share of the result's energy that changes):"]
            lines += [f"  {cell.loss:.2e}  {cell.layer}" for cell in worst]
        text = "\n".join(lines)
        return io.NodeOutput(Recorded(statistics, path), text, ui={"text": (text,)})


class StrettoQuantize(io.ComfyNode):
    """Write a quantized copy of a diffusion model, and load it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoQuantize",
            display_name="Stretto Quantize",
            category="Stretto/loaders",
            description="Writes a quantized copy of a diffusion model block by block, in less than 1 GB of memory whatever its "
            "size, and loads it. A copy made earlier with the same settings is loaded at once.",
            inputs=[
                io.Combo.Input(
                    "model_name", options=files("diffusion_models"), tooltip="A 16- or 32-bit file, or GGUF; only read."
                ),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    default="int8",
                    tooltip="int8 is hard to tell from 16 bit. w6a8 and w4a8 are smaller. mixed gives every layer the best "
                    "of the three that the budget allows.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=1.0,
                    round=0.001,
                    tooltip="For mixed: size of the file in MB (millions of bytes).",
                ),
                io.Boolean.Input(
                    "balance",
                    default=False,
                    tooltip="Fold factors per channel into the weights where that is exact (ViDiT-Q). Needs statistics, helps "
                    "w4a8 most; the file then needs this pack's loader.",
                ),
                io.Boolean.Input(
                    "keep_ends", default=False, tooltip="Leave the first and last blocks in 16 bit.", **ADVANCED
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    tooltip="Layers to leave alone: patterns of their names, one a line.",
                    **ADVANCED,
                ),
                io.String.Input("name", default="", tooltip="Name of the new file; empty names it after source and format."),
                StatisticsType.Input(
                    "statistics", optional=True, tooltip="From Stretto Quantization Statistics; else losses are estimated."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(display_name="file"),
                io.String.Output(display_name="report"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        format: str,
        budget: float,
        balance: bool,
        keep_ends: bool,
        keep: str,
        name: str,
        statistics: Any = None,
    ) -> io.NodeOutput:
        if format == MIXED and budget <= 0:
            raise StrettoError("Stretto Quantize: mixed needs a budget above 0, the size of the file in MB")
        if statistics is not None and not isinstance(statistics, Recorded):
            raise StrettoError("Stretto Quantize: statistics come from Stretto Quantization Statistics")
        source = path_of("diffusion_models", model_name)
        suffix = f"{format}{f'-{budget:g}MB' if format == MIXED else ''}{'-balanced' if balance else ''}"
        base = checked_name(name) if name.strip() else f"{stem_of(model_name)}-{suffix}"
        lines: list[str] = []
        wishes = Wishes(
            source,
            format=format,
            keep=[line.strip() for line in keep.splitlines() if line.strip()],
            safe=keep_ends,
            transcode=source.lower().endswith(".gguf"),
            budget=int(budget * 1e6) or None,
            statistics=statistics.statistics if statistics else None,
            balance=balance,
        )
        plan = plan_wishes(wishes, lines.append)
        with plan.checkpoint:
            target = _target(_folder(), base, plan, bool(name.strip()))
            if target.exists():
                lines.append(f"{target}: made earlier with the same settings")
            else:
                lines += _words(plan, _write(plan, target))
        model, report = host.load_diffusion_model(str(target), loader=host.STRETTO)
        text = "\n".join([*lines, report.text()])
        return io.NodeOutput(model, str(target), text, ui={"text": (text,)})


def _folder() -> Path:
    """Where ComfyUI's own nodes put models that they save; it lists files from there too."""
    folder = Path(folder_paths.get_output_directory()) / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(plan: Plan, target: Path) -> Result:
    bar = comfy.utils.ProgressBar(1000)

    def progress(done: int, total: int, words: str) -> None:
        bar.update_absolute(1000 * done // max(total, 1), 1000)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return write_file(plan, target, progress=progress)


def _words(plan: Plan, result: Result) -> list[str]:
    counts: dict[str, int] = {}
    for report in result.layers:
        counts[report.format] = counts.get(report.format, 0) + 1
    layers = ", ".join(f"{count} {form}" for form, count in counts.items())
    return [
        f"{result.path}: {result.nbytes / 1e6:,.1f} MB written of {plan.checkpoint.nbytes / 1e6:,.1f} MB; layers: {layers}",
        f"relative weight error {result.error:.4f}",
    ]


def _target(folder: Path, base: str, plan: Plan, asked: bool) -> Path:
    """The file that was made with this plan earlier, or a free name; nothing of the user's is ever written over.

    Raises:
        StrettoError: the name was asked for, and another file has it.
    """
    for path in _names(folder, base):
        if not path.exists() or _same(path, plan):
            return path
        if asked:
            raise StrettoError(f"{path}: exists already and was made otherwise; choose another name, or move it away")
    raise AssertionError("numbers do not end")


def _same(path: Path, plan: Plan) -> bool:
    with open_checkpoint(path) as there:
        try:
            recipe = json.loads(there.metadata.get(RECIPE_KEY, "null"))
            source = json.loads(there.metadata.get(PROVENANCE_KEY, "{}"))
        except ValueError:
            return False
    paths = plan.checkpoint.paths
    same = source.get("source") == [each.name for each in paths]
    same = same and source.get("source_bytes") == sum(each.stat().st_size for each in paths)
    return same and recipe == plan.recipe.document()


def _names(folder: Path, base: str) -> Iterator[Path]:
    """``base``, then ``base-2`` and on."""
    yield folder / f"{base}.safetensors"
    for number in count(2):
        yield folder / f"{base}-{number}.safetensors"
