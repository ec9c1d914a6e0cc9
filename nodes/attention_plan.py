"""Attention that follows a plan."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..acceleration.attention.planned.schedules import SCHEDULES
from ..acceleration.attention.planned.settings import STORES, PlannedSettings
from ..acceleration.attention.search import PlanFile, load_plan, save_plan
from ..acceleration.errors import StrettoError
from ..acceleration.hosts import comfy as host
from ..acceleration.plan import Request
from .inputs import ADVANCED

PLAN_TYPE = io.Custom("STRETTO_ATTENTION_PLAN")
SHIPPED = Path(__file__).resolve().parent.parent / "presets" / "attention"
DEFAULTS = PlannedSettings(schedule=next(iter(SCHEDULES)))


class StrettoAttentionPlan(io.ComfyNode):
    """Let attention follow a plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoAttentionPlan",
            display_name="Stretto Attention Plan",
            category="Stretto",
            description="Lets every head of attention do what a plan says: attend to everything, to the blocks that matter, or "
            "take over what an earlier step computed. Plans come from Stretto Attention Search, or are published schedules.",
            inputs=[*_plan_main(), *_plan_fine()],  # saved values are positional: append only
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, plan: str, **others) -> str:
        """Run again when the file has changed, or is there only now."""
        try:
            status = os.stat(_plan_file(plan))
        except (OSError, StrettoError):
            return plan
        return f"{plan} {status.st_mtime_ns} {status.st_size}"

    @classmethod
    def validate_inputs(cls, plan: str) -> bool:
        """Plans come and go as files; :meth:`execute` says what is wrong with a name."""
        return True

    @classmethod
    def execute(
        cls, model, plan: str, keep: float, full_until: float, period: int, min_tokens: int, required: bool,
        found: str | None = None, share_guidance: bool = False, memory: int = 0, store: str = DEFAULTS.store,
        compare: bool = True,
    ) -> io.NodeOutput:  # fmt: skip
        settings: dict[str, Any] = {
            "min_tokens": min_tokens,
            "memory": memory,
            "store": store,
            "compare": compare,
        }
        if found is not None or plan not in SCHEDULES:
            file = found if found is not None else _plan_file(plan)
            load_plan(file)  # a plan that cannot be read is refused here, not in the middle of a workflow
            settings["file"] = str(file)
        else:
            settings |= {
                "schedule": plan,
                "keep": keep / 100.0,
                "full_until": full_until / 100.0 if full_until >= 0 else -1.0,
                "period": period,
                "share_guidance": share_guidance,
            }
        return io.NodeOutput(host.request(model, Request("attention_plan", settings, required=required)))


def save_new_plan(folder: Path, name: str, plan: PlanFile) -> Path:
    """Save a plan as ``<folder>/<name>.safetensors``, or ``<name>-2``, ``-3`` ... where that exists; return the path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StrettoError(f"{folder}: cannot be made ({error.strerror})") from None
    for number in count(1):
        path = folder / (f"{name}.safetensors" if number == 1 else f"{name}-{number}.safetensors")
        if not path.exists():
            save_plan(path, plan)
            return path
    raise AssertionError("unreachable")


def user_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "stretto" / "attention_plans"


def _plans() -> dict[str, Path]:
    """Return the plan files there are, the pack's own and the user's, by name."""
    files = [path for folder in (SHIPPED, user_folder()) if folder.is_dir() for path in sorted(folder.glob("*.safetensors"))]
    return {path.stem: path for path in reversed(files)}


def _plan_file(plan: str) -> Path:
    """Return the path of a plan that is named, or given as a path.

    Raises:
        StrettoError: there is no such plan.
    """
    known = _plans()
    if plan in known:
        return known[plan]
    path = Path(plan.strip().strip('"'))
    if path.suffix == ".safetensors" and path.is_file():
        return path
    names = ", ".join([*SCHEDULES, *sorted(known)])
    raise StrettoError(f"Stretto Attention Plan: there is no plan {plan!r}; there are {names}")


def _plan_main() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model whose attention is to follow the plan."),
        io.Combo.Input(
            "plan",
            options=[*SCHEDULES, *_plans()],
            default=next(iter(SCHEDULES)),
            tooltip="A published schedule, a plan that comes with Stretto, or one that Stretto Attention Search has saved.",
        ),
        io.Float.Input(
            "keep",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Percent of the picture's tokens that a schedule's lists keep; 0: the schedule's own. Files have theirs.",
        ),
        io.Float.Input(
            "full_until",
            default=-1.0,
            min=-1.0,
            max=100.0,
            step=1.0,
            tooltip="Percent of the steps with full attention at the beginning of a schedule; -1: the schedule's own.",
        ),
        io.Int.Input(
            "period",
            default=0,
            min=0,
            max=100,
            tooltip="Steps from one full step to the next in a schedule; 0: the schedule's own.",
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
            tooltip="Stop with an error instead of sampling plainly when the plan cannot be followed.",
        ),
    ]


def _plan_fine() -> list[io.Input]:
    return [
        PLAN_TYPE.Input("found", optional=True, tooltip="From Stretto Attention Search; goes before the plan that is named."),
        io.Boolean.Input(
            "share_guidance",
            default=DEFAULTS.share_guidance,
            optional=True,
            tooltip="Let the negative prompt take the prompt's attention (DiTFastAttn). Fast, and far from plain guidance.",
            **ADVANCED,
        ),
        io.Int.Input(
            "memory",
            default=DEFAULTS.memory,
            min=0,
            max=1 << 20,
            optional=True,
            tooltip="MiB that may be kept from step to step; 0: half of what is free. Heads do with less where it is short.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "store",
            options=list(STORES),
            default=DEFAULTS.store,
            optional=True,
            tooltip="How it is kept. auto: as computed where that fits, else in eight bits, else in system memory.",
            **ADVANCED,
        ),
        io.Boolean.Input(
            "compare",
            default=DEFAULTS.compare,
            optional=True,
            tooltip="Compare a few blocks with full attention at three steps, for the report.",
            **ADVANCED,
        ),
    ]
