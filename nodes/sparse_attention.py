"""Sparse attention."""

import re

from comfy_api.latest import io

from ..acceleration.attention.methods import METHODS
from ..acceleration.attention.settings import CHOICES, AttentionSettings
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from .inputs import ADVANCED
from .load_attention_weights import WEIGHTS_TYPE

DEFAULTS = AttentionSettings()


class StrettoSparseAttention(io.ComfyNode):
    """Let every token attend only to those that matter to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoSparseAttention",
            display_name="Stretto Sparse Attention",
            category="Stretto",
            description=(
                "Leaves out the parts of self-attention that carry little. Pays on long sequences: videos and large pictures. "
                "The report shows what each head kept and how far off it was."
            ),
            inputs=[*_main(), *_fine()],  # saved values are positional: append only
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        method: str,
        keep: float,
        dense_until: float,
        dense_layers: str,
        min_tokens: int,
        required: bool,
        weights=None,
        block: str = str(DEFAULTS.block),
        **more,
    ) -> io.NodeOutput:
        settings = {
            "method": method,
            "keep": keep / 100.0,
            "dense_until": dense_until / 100.0,
            "dense_layers": list(parse_layers(dense_layers)),
            "min_tokens": min_tokens,
            "block": int(block),
            **more,
        }
        if weights is not None:
            settings["weights"] = weights.path
        return io.NodeOutput(host.request(model, Request("attention", settings, required=required)))


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as "0, 3-5" names, ascending.

    Raises:
        StrettoError: anything else.
    """
    layers: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise StrettoError(f"Stretto Sparse Attention: dense_layers has {part!r}; expected numbers and ranges such as 0, 3-5")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _main() -> list[io.Input]:
    """Model, method and the numbers that most people set."""
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    return [
        io.Model.Input("model", tooltip="The diffusion transformer to accelerate."),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=DEFAULTS.method,
            tooltip=f"Which key blocks a block of queries attends to. {methods}. The help page says when each serves.",
        ),
        io.Float.Input(
            "keep",
            default=round(DEFAULTS.keep * 100, 2),
            min=0.5,
            max=100.0,
            step=0.5,
            tooltip="Percent of the key blocks that each block of queries keeps: lower is faster, higher is closer to the plain "
            "picture. 100 turns it off. Methods with a fixed pattern say on the help page what it means to them.",
        ),
        io.Float.Input(
            "dense_until",
            default=round(DEFAULTS.dense_until * 100, 2),
            min=0.0,
            max=100.0,
            step=1.0,
            tooltip="Percent of the steps, from the start, whose attention stays complete. They decide the composition: this "
            "matters more for quality than anything else here.",
        ),
        io.String.Input(
            "dense_layers",
            default="",
            tooltip="Layers whose attention stays complete, such as 0, 1 or 0-2. The report lists the layers that were off most. "
            "Usually none need it.",
        ),
        io.Int.Input(
            "min_tokens",
            default=DEFAULTS.min_tokens,
            min=0,
            max=1 << 20,
            tooltip="Pictures and clips of fewer tokens are left alone: attention is a small part of their time.",
        ),
        io.Boolean.Input(
            "required",
            default=False,
            tooltip="Stop with an error instead of sampling plainly when sparse attention cannot run.",
        ),
    ]


def _fine() -> list[io.Input]:
    """Trained parts, and what only some need."""
    return [
        WEIGHTS_TYPE.Input(
            "weights",
            optional=True,
            tooltip="Trained parts of SLA or SALAD from Stretto Load Attention Weights. Without them these methods use what "
            "needs no training.",
        ),
        io.Combo.Input(
            "block",
            options=[str(block) for block in CHOICES["block"]],
            default=str(DEFAULTS.block),
            optional=True,
            tooltip="Tokens in a block. 64 is right for long sequences; smaller ones only for very short ones.",
            **ADVANCED,
        ),
        io.Int.Input(
            "radius",
            default=DEFAULTS.radius,
            min=0,
            max=512,
            optional=True,
            tooltip="How far a token sees, in tokens of the picture; 0: as far as keep allows. (CLEAR)",
            **ADVANCED,
        ),
        io.Combo.Input(
            "tail",
            options=list(CHOICES["tail"]),
            default=DEFAULTS.tail,
            optional=True,
            tooltip="Whether blocks left out still count as one averaged key each. auto: as the method has it.",
            **ADVANCED,
        ),
        io.Boolean.Input(
            "probe",
            default=DEFAULTS.probe,
            optional=True,
            tooltip="Compare a few blocks with full attention at three steps, for the report. Costs less than one percent on "
            "long sequences.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "fit",
            options=list(CHOICES["fit"]),
            default=DEFAULTS.fit,
            optional=True,
            tooltip="What is fitted of a branch without weights during the first, complete steps: one share per head, or a map "
            "of both outputs, which takes more memory. (SALAD)",
            **ADVANCED,
        ),
    ]
