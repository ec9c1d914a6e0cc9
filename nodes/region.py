"""Region-adaptive sampling: the node that asks for it, and the one that shows it over the picture."""

import json

import torch
from comfy_api.latest import io, ui

from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from ..acceleration.region.settings import (
    GUARDS,
    KEYS,
    MASK_SIDE,
    NODE,
    NUMBERS,
    SCHEDULES,
    STALE,
    WHOLE,
    RegionSettings,
    steps_from_text,
)
from .charts import as_image
from .inputs import ADVANCED
from .region_map import frames_over, region_sheet

DEFAULTS = RegionSettings()


class StrettoRegionAdaptive(io.ComfyNode):
    """Compute only the regions that the model is working on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoRegionAdaptive",
            display_name=NODE,
            category="Stretto",
            description=(
                "At most steps only the part of the picture that changes most runs through the model; the rest goes on as it "
                "was. Euler and multistep samplers. The report shows where the model worked."
            ),
            inputs=[*_main(), *_fine()],  # saved values are positional: append only
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        ratio: float,
        start: int,
        refresh_every: int,
        starvation: float,
        tail: int,
        required: bool,
        mask: torch.Tensor | None = None,
        resets: str = "",
        memory_share: float = DEFAULTS.memory_share * 100,
        **more,
    ) -> io.NodeOutput:
        settings = {
            "ratio": ratio / 100.0,
            "start": start,
            "refresh_every": refresh_every,
            "starvation": starvation,
            "tail": tail,
            "memory_share": memory_share / 100.0,
            **more,
        }
        if resets.strip():
            settings["resets"] = steps_from_text(resets)
        if mask is not None:
            settings["mask"] = mask_rows(mask)
        return io.NodeOutput(host.request(model, Request("region", settings, required=required)))


class StrettoRegionMap(io.ComfyNode):
    """Show over the picture where the model worked, step by step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoRegionMap",
            display_name="Stretto Region Map",
            category="Stretto",
            description="Lays over a picture or clip which regions Stretto Region Adaptive worked on, at each step.",
            inputs=[
                io.String.Input(
                    "trace",
                    force_input=True,
                    tooltip="Connect the trace output of Stretto Report: it tells which regions.",
                ),
                io.Image.Input("images", tooltip="The decoded picture, or the frames of the clip."),
                io.Float.Input(
                    "fps", default=4.0, min=0.5, max=30.0, step=0.5, tooltip="Steps a second in the moving picture."
                ),
            ],
            outputs=[io.Image.Output(display_name="map"), io.Image.Output(display_name="steps")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trace: str, images: torch.Tensor, fps: float) -> io.NodeOutput:
        document = _read(trace)
        frames = frames_over(document, images)
        sheet = as_image(region_sheet(document, images))
        moving = torch.cat([as_image(frame) for frame in frames])
        saved = ui.ImageSaveHelper.save_animated_webp(
            moving,
            filename_prefix="stretto_region",
            folder_type=io.FolderType.temp,
            cls=cls,
            fps=fps,
            lossless=False,
            quality=90,
            method=4,
        )
        return io.NodeOutput(sheet, moving, ui=ui.SavedImages([saved], is_animated=len(moving) > 1))


def mask_rows(mask: torch.Tensor) -> list[str]:
    """Return a MASK [B, H, W] as rows of "0" and "1", at most 64 a side; what it touches anywhere counts."""
    flat = (mask.reshape(-1, *mask.shape[-2:]) > 0).float().amax(dim=0)
    sides = [min(side, MASK_SIDE) for side in flat.shape]
    cells = torch.nn.functional.adaptive_max_pool2d(flat[None, None], sides)[0, 0]
    return ["".join("1" if cell else "0" for cell in row) for row in cells.tolist()]


def _read(text: str) -> dict:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StrettoError(
            f"Stretto Region Map: trace is no JSON ({error}); connect Stretto Report's trace output"
        ) from None
    if not isinstance(document, dict) or not (document.get("region") or {}).get("steps"):
        raise StrettoError(
            "Stretto Region Map: no region was left out in this run, so there is nothing to show. Put Stretto Region Adaptive "
            "before the sampler, and see in Stretto Report whether it was active."
        )
    return document


def _main() -> list[io.Input]:
    """Model, and the numbers that most people set."""
    return [
        io.Model.Input("model", tooltip="The diffusion transformer to accelerate."),
        io.Float.Input(
            "ratio",
            default=DEFAULTS.ratio * 100,
            min=NUMBERS["ratio"][0] * 100,
            max=100.0,
            step=5.0,
            tooltip="Percent of the picture that is computed at a step. Lower is faster, and further from the plain picture; "
            "100 computes everything.",
        ),
        _whole("start", "Start after: this many first steps compute everything. They decide the composition."),
        _whole(
            "refresh_every",
            "Every so many steps everything is computed again: with 2 every second step. 0 is never.",
        ),
        io.Float.Input(
            "starvation",
            default=DEFAULTS.starvation,
            min=NUMBERS["starvation"][0],
            max=NUMBERS["starvation"][1],
            step=0.05,
            round=0.001,
            tooltip="How fast a region that was left out becomes more important: 0 looks at its changes alone.",
        ),
        _whole("tail", "Keep: this many last steps compute everything. They decide the fine texture."),
        io.Boolean.Input(
            "required",
            default=False,
            tooltip="Stop with an error instead of sampling plainly when regions cannot be left out.",
        ),
        io.Mask.Input("mask", optional=True, tooltip="Always work here: regions under the mask are never left out."),
    ]


def _fine() -> list[io.Input]:
    """What only some need."""
    return [
        _whole("most_skips", "A region is never left out more steps in a row than this.", optional=True, **ADVANCED),
        io.String.Input(
            "resets",
            default="",
            optional=True,
            tooltip="Further steps that compute everything, counted from 0: 12, 22.",
            **ADVANCED,
        ),
        _choice(
            "schedule",
            SCHEDULES,
            "How the share runs: the same at every step, falling along a line, or with the noise level; both fall from 100 "
            "percent to ratio.",
        ),
        _choice(
            "stale",
            STALE,
            "What regions that are left out go on with: their last velocity, the line through their last two, or their last "
            "hidden state.",
        ),
        _choice(
            "keys",
            KEYS,
            "What other regions see of those that are left out: as they were last, or continued along a line, which takes twice "
            "the memory.",
        ),
        _choice(
            "guard",
            GUARDS,
            "Which regions are kept: those that change most (corrected), or the choice of the published code, for comparison.",
        ),
        _whole(
            "min_tokens",
            "Below so many tokens everything is computed: such steps cost too little to save.",
            optional=True,
            **ADVANCED,
        ),
        io.Float.Input(
            "memory_share",
            default=DEFAULTS.memory_share * 100,
            min=1.0,
            max=100.0,
            step=1.0,
            optional=True,
            tooltip="Percent of the free memory that keys and values of all regions may take. Where it is too little they are "
            "kept in 16 or 8 bits, then in fewer blocks.",
            **ADVANCED,
        ),
    ]


def _whole(name: str, tooltip: str, **extra) -> io.Input:
    low, high = WHOLE[name]
    return io.Int.Input(name, default=getattr(DEFAULTS, name), min=low, max=high, tooltip=tooltip, **extra)


def _choice(name: str, options: tuple[str, ...], tooltip: str) -> io.Input:
    return io.Combo.Input(
        name, options=list(options), default=getattr(DEFAULTS, name), optional=True, tooltip=tooltip, **ADVANCED
    )
