"""Feature caching."""

from comfy_api.latest import io

from ..acceleration.caching.methods import COORDINATES, LEVELS, METHODS, PRESETS
from ..acceleration.caching.presets import Preset, load_preset
from ..acceleration.caching.store import STORES
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from .inputs import ADVANCED

#: A preset on its way from Stretto Calibrate or Stretto Profile.
PRESET_TYPE = io.Custom("STRETTO_PRESET")


class StrettoCache(io.ComfyNode):
    """Skip whole passes through the transformer where its features can be predicted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoCache",
            display_name="Stretto Cache",
            category="Stretto",
            description=(
                "Skips steps of the transformer whose result can be predicted from the steps before. "
                "The defaults are a good start; Stretto Calibrate finds the settings for a quality or speed you name."
            ),
            inputs=[*_main(), *_fine(), *_calibrated(), *_storing(), *_text()],  # saved values are positional: append only
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        method: str,
        interval: int,
        order: int,
        threshold: float,
        warmup: int,
        tail: int,
        required: bool,
        preset_file: str = "",
        calibrated: Preset | None = None,
        store: str = STORES[0],
        text_features: bool = True,
        **more,
    ) -> io.NodeOutput:
        if preset_file.strip():
            if calibrated is not None:
                raise StrettoError(
                    "Stretto Cache: both preset_file and calibrated are given; clear the file name or unplug the preset"
                )
            calibrated = load_preset(preset_file.strip().strip('"'))
        if calibrated is not None:
            settings = calibrated.request(preset_file.strip())
        else:
            settings = {
                "method": method,
                "interval": interval,
                "order": order,
                "threshold": threshold,
                "warmup": warmup,
                "tail": tail,
                **more,
            }
        settings["store"] = store
        settings["text_features"] = text_features
        return io.NodeOutput(host.request(model, Request("cache", settings, required=required)))


def _main() -> list[io.Input]:
    """Model, method and the numbers that most people set."""
    return [
        io.Model.Input("model", tooltip="The diffusion transformer to accelerate."),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default="Taylor",
            tooltip="Taylor: forecast the last block's output at fixed steps (TaylorSeer-Lite). "
            "EasyCache: reuse the last change while the input has moved little. Adaptive: decide as EasyCache, "
            "forecast as Taylor. The others are for comparison with their publications; see the help page.",
        ),
        io.Int.Input(
            "interval",
            default=3,
            min=1,
            max=16,
            tooltip="Compute every: with 2 every second step is computed, with 3 every third. 1 turns it off. (Taylor)",
        ),
        io.Int.Input(
            "order",
            default=1,
            min=0,
            max=3,
            tooltip="Degree of the forecast: 0 repeats the last features, 1 continues their line, "
            "2 their parabola. Samplers that add noise use 0. (Taylor)",
        ),
        io.Float.Input(
            "threshold",
            default=0.05,
            min=0.0,
            max=10.0,
            step=0.005,
            round=0.001,
            tooltip="How much estimated change a skipped step may have, or may add up to: higher is faster, "
            "lower is closer to the plain picture. 0 turns it off. (All methods that look at the run; each has a scale of "
            "its own.)",
        ),
        io.Int.Input(
            "warmup",
            default=4,
            min=0,
            max=100,
            tooltip="Start after: this many first steps are always computed. They decide the composition.",
        ),
        io.Int.Input(
            "tail",
            default=5,
            min=0,
            max=100,
            tooltip="Keep: this many last steps are always computed. They take the largest strides in noise and "
            "decide the fine texture.",
        ),
        io.Boolean.Input(
            "required",
            default=False,
            tooltip="Stop with an error instead of sampling plainly when the cache cannot run.",
        ),
    ]


def _fine() -> list[io.Input]:
    """Presets, and the numbers of single methods."""
    return [
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=PRESETS[0],
            optional=True,
            tooltip="Where the numbers come from. as set: from this node. published: from the method's authors, for "
            "this model. quality, balanced, fast: measured with Stretto. The report says what was used.",
        ),
        io.Int.Input(
            "max_skips",
            default=0,
            min=0,
            max=100,
            optional=True,
            tooltip="Most steps skipped in a row; 0 is no limit. Skips in a cluster cost more than the same "
            "number spread out.",
            **ADVANCED,
        ),
        io.Int.Input(
            "first_blocks",
            default=1,
            min=1,
            max=100,
            optional=True,
            tooltip="Blocks at the front that always run and tell how much has changed. (DBCache)",
            **ADVANCED,
        ),
        io.Int.Input(
            "last_blocks",
            default=0,
            min=0,
            max=100,
            optional=True,
            tooltip="Blocks at the back that always run and correct what was reused. (DBCache)",
            **ADVANCED,
        ),
        io.Float.Input(
            "growth",
            default=0.75,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            tooltip="How much the gap between computed steps grows with each of them. (Spectrum)",
            **ADVANCED,
        ),
        io.Float.Input(
            "damping",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Share of the slope that a forecast of order 1 keeps: 1 is the straight line, 0 reuse.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "coordinate",
            options=list(COORDINATES),
            default=COORDINATES[0],
            optional=True,
            tooltip="What forecasts are made over: step number, noise level or log signal-to-noise ratio.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "level",
            options=list(LEVELS),
            default="medium",
            optional=True,
            tooltip="Which static mask, from most to fewest computed steps. (SCM)",
            **ADVANCED,
        ),
    ]


def _calibrated() -> list[io.Input]:
    """Settings that stand in for all of the above."""
    return [
        io.String.Input(
            "preset_file",
            default="",
            optional=True,
            tooltip="Path of a preset that Stretto Calibrate saved; it replaces everything above. Empty: none.",
            **ADVANCED,
        ),
        PRESET_TYPE.Input(
            "calibrated",
            optional=True,
            tooltip="A preset straight from Stretto Calibrate or Stretto Profile; it replaces everything above.",
        ),
    ]


def _storing() -> list[io.Input]:
    """How features are kept, whoever chose the settings."""
    return [
        io.Combo.Input(
            "store",
            options=list(STORES),
            default=STORES[0],
            optional=True,
            tooltip="How stored features are kept. as computed: exactly, where the model runs. half: at most two bytes a "
            "number. eighth: one byte (8-bit floating point), coarse. system memory: exactly, away from the graphics "
            "card; every skipped step fetches them.",
            **ADVANCED,
        ),
    ]


def _text() -> list[io.Input]:
    """What is exact, whichever method was chosen."""
    return [
        io.Boolean.Input(
            "text_features",
            default=True,
            optional=True,
            tooltip="Keep text keys: compute the keys and values that depend on the prompt alone once, where the model "
            "has such and it saves time. The picture stays the same, to the bit. (Wan, LTX-Video, PixArt, Cosmos Predict2)",
            **ADVANCED,
        ),
    ]
