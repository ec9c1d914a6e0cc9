"""A schedule of the user's own: which steps, which blocks, or which modules of blocks at which step, are computed."""

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..acceleration.caching.masks import COMPUTED, SKIPPED, Table, parse_mask, strip
from ..acceleration.caching.table import table_settings
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request

FORECASTERS = {"reuse": 0, "line": 1, "parabola": 2}
#: Larger files are refused unread: 256 steps of 100 blocks come to 30 kB.
MAX_BYTES = 1 << 20


class StrettoCacheSchedule(io.ComfyNode):
    """Skip exactly the steps, blocks or modules that the user names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoCacheSchedule",
            display_name="Stretto Cache Schedule",
            category="Stretto",
            description="Skips exactly the steps you draw (# computed, . skipped), or blocks, or modules of blocks, by a table.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion transformer to accelerate."),
                io.String.Input(
                    "schedule",
                    default="####.##.#.#.#.##",
                    multiline=True,
                    tooltip="One character a step: # is computed, . is skipped; another number of steps stretches it. Or a "
                    'table of blocks as JSON (one mask a step, such as ["####", "##.."]), or of modules inside blocks (see the '
                    "help page), or the path of such a file.",
                ),
                io.Combo.Input(
                    "forecaster",
                    options=list(FORECASTERS),
                    default="line",
                    tooltip="What stands in for a skipped step: the last computed features, the line through the last two, "
                    "or the parabola through three. For tables of modules it stands in for a module; tables of blocks reuse.",
                ),
                io.Boolean.Input(
                    "required",
                    default=False,
                    tooltip="Stop with an error instead of sampling plainly when the schedule cannot run.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, schedule: str, forecaster: str, required: bool) -> io.NodeOutput:
        return io.NodeOutput(host.request(model, schedule_request(schedule, forecaster, required)))


def schedule_request(schedule: str, forecaster: str, required: bool = False) -> Request:
    """Return the request that a schedule text asks for.

    Args:
        schedule: a mask (``"###.#..#"``), a table as JSON text, or the path of a JSON file with a table.
        forecaster: key of :data:`FORECASTERS`.
        required: raise instead of sampling plainly when it cannot run.

    Raises:
        StrettoError: neither mask nor table nor file, or a table of unknown modules; says what was expected.
    """
    if forecaster not in FORECASTERS:
        known = ", ".join(FORECASTERS)
        raise StrettoError(f"Stretto Cache Schedule: forecaster is {forecaster!r}; known forecasters: {known}")
    text = schedule.strip()
    if not text:
        raise StrettoError("Stretto Cache Schedule: the schedule is empty; write one '#' or '.' per step")
    if all(character.isspace() or character in COMPUTED + SKIPPED for character in text):
        mask, order = strip(parse_mask(text)), FORECASTERS[forecaster]
        settings = {"method": "Schedule", "mask": mask, "order": order, "warmup": 0, "tail": 0}
        return Request("cache", settings, required=required)
    source = "Stretto Cache Schedule"
    if text[0] in "[{":
        document = _json(text, source)
    else:
        source = text.strip('"')
        document = _json(_read(Path(source)), source)
    table, order = Table.from_json(document, source), FORECASTERS[forecaster]
    settings = table_settings(table, source)
    if table.modules and order:
        settings |= {"forecaster": "newton", "order": order}
    return Request("table", settings, required=required)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise StrettoError(f"{path}: larger than {MAX_BYTES} bytes; a table is never that large")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise StrettoError(
            f"Stretto Cache Schedule: {str(path)!r:.200} is neither a mask of '#' and '.' nor JSON nor a readable file ({reason})"
        ) from None


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StrettoError(f"{source}: not JSON ({error})") from None
