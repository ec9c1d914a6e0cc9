"""One comparison from beginning to end: probe, warm up, measure interleaved, fetch pictures, write the report."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import arms as edit
from .arms import MEASURE, Api, Arm
from .carried import read_carried
from .client import ComfyClient, PreviewCallback, StepCallback
from .errors import MeasureError, RunTimeout, ServerDied, ServerUnreachable, Stopped, WorkflowError
from .files import check_space, write_whole, writing
from .interleave import Cell, Measurement, MeasurementFile, Slot, cells_of, remaining, run_interleaved, schedule
from .labels import label_of
from .lock import folder_lock
from .metrics import read_rgb
from .pictures import png_bytes
from .report import Report, Results, build_report, server_facts, write_report
from .workflow import is_ui_workflow, ui_to_api

REFERENCE_STEPS = 200
RUN_TIMEOUT = 3600.0  # seconds for a single run, generous because large models on a CPU are slow
NONCE_BITS = 52  # JavaScript's integers end at 53
PICTURES = "pictures"
MEASUREMENTS = "measurements.jsonl"


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: `done` of `total` runs, and the sampler step of the run in progress."""

    phase: str
    done: int
    total: int
    arm: str
    prompt: str
    step: int = 0
    steps: int = 0
    finished: Measurement | None = None


ProgressCallback = Callable[[Progress], None]


def compare(
    client: ComfyClient,
    plain_workflow: Api,
    arms: Sequence[Arm],
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    repeats: int = 3,
    warmup: int = 1,
    out_dir: Path = Path("report"),
    reference_steps: int = REFERENCE_STEPS,
    progress: ProgressCallback | None = None,
    *,
    batch: int | None = None,
    steps: int | None = None,
    competitor: bool = True,
    resume: bool = False,
    stop: threading.Event | None = None,
    command: str = "",
    preview: PreviewCallback | None = None,
) -> Report:
    """Measure `arms` against `plain_workflow` (API JSON) and write report.json and index.html into `out_dir`.

    Without prompts or seeds those of the workflow are used. `competitor` adds the same sampler with as many steps as
    the first arm computes. `reference_steps` 0 leaves the reference out. Setting `stop` ends the comparison early with
    a report of the complete rounds. `preview` gets pictures, PNG or JPEG, while they are made: previews in runs that are not
    measured, since making them costs time, and the first picture of every measured run after its end. Raises
    `MeasureError`s; finished measurements stay in `out_dir` for `resume`.
    """
    folder = Path(out_dir)
    with writing(folder), folder_lock(folder):
        check_space(folder)
        comparison = _Comparison(client, folder, progress, stop, preview)
        comparison.plan(plain_workflow, arms, prompts, seeds, batch, steps)
        return comparison.run(repeats, warmup, reference_steps, competitor, resume, command)


class _Comparison:
    """State of one comparison: the arms and cells, what has been measured, and whom to tell."""

    def __init__(
        self,
        client: ComfyClient,
        folder: Path,
        progress: ProgressCallback | None,
        stop: threading.Event | None,
        preview: PreviewCallback | None,
    ):
        self.client, self.folder, self.stop, self.preview = client, folder, stop, preview
        self.tell = progress or (lambda _: None)
        self.stats = client.health()
        self.with_pack = client.has_node(MEASURE)
        self.arms: list[Arm] = []
        self.cells: list[Cell] = []
        self.measurements: list[Measurement] = []
        self.notes: list[str] = []
        self.frame_rate: float | None = None  # of clips; None when the workflow makes pictures
        self.total = self.done = 0

    def plan(
        self,
        plain_workflow: Api,
        arms: Sequence[Arm],
        prompts: Sequence[str],
        seeds: Sequence[int],
        batch: int | None,
        steps: int | None,
    ) -> None:
        """Make every arm's workflow equal in everything that is not compared."""
        if not prompts:
            found = edit.get_prompt(plain_workflow)
            prompts = [found] if found is not None else []
        if not prompts:
            raise WorkflowError("The workflow has no prompt text, so give one with the comparison.")
        self.cells = cells_of(prompts, seeds or [edit.get_seed(plain_workflow) or 0])
        self.frame_rate = edit.get_frame_rate(plain_workflow)
        for arm in [Arm("plain", "Plain", plain_workflow, "plain"), *arms]:
            workflow = edit.prepare(arm.workflow)
            workflow = edit.set_batch(workflow, batch) if batch is not None else workflow
            workflow = edit.set_steps(workflow, steps) if steps is not None else workflow
            self._check_classes(arm.label, workflow)
            self.arms.append(replace(arm, workflow=workflow))
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise WorkflowError(f"Two arms have the same name: {', '.join(names)}.")
        if not self.with_pack:
            self.notes.append("The server lacks the Stretto nodes: total time only.")

    def run(
        self, repeats: int, warmup: int, reference_steps: int, competitor: bool, resume: bool, command: str
    ) -> Report:
        """Carry the plan out and write the report."""
        if repeats < 1 or warmup < 0:
            raise WorkflowError("A comparison needs at least one repeat and no negative number of warm-up rounds.")
        file = MeasurementFile(self.folder / MEASUREMENTS, self._fingerprint(repeats, reference_steps, competitor))
        self.measurements = file.start(resume)
        first = next((arm for arm in self.arms if arm.role == "accelerated"), None)
        probing = competitor and first is not None
        extra = len(self.cells) if reference_steps else 0
        slots = schedule(self.arms, self.cells, repeats, warmup)
        # The competitor is only known after the probe; until then it is counted as if it came.
        self.total = extra + probing + len(slots) + probing * (len(slots) // len(self.arms))
        complete = True
        try:
            if probing:
                self._add_competitor(first)
            slots = schedule(self.arms, self.cells, repeats, warmup)
            left = remaining(slots, self.measurements)
            self.total = extra + probing + len(left)
            self._measure(left, file)
            if reference_steps:
                self._reference(reference_steps, file)
        except Stopped:
            complete = False
            self._drop_torn_rounds(slots)
        except (ServerDied, ServerUnreachable, RunTimeout) as error:
            kept = sum(not m.warmup for m in self.measurements)
            raise ServerDied(
                f"{error} {kept} finished runs are kept in {self.folder}: start ComfyUI again if it is down, then resume."
            ) from error
        report = build_report(
            Results(
                self.folder,
                self.arms,
                self.cells,
                self.measurements,
                server_facts(self.stats, self.client.base_url, self.with_pack, self.client.loopback),
                self._settings(repeats, warmup, reference_steps, complete),
                command,
                self.notes,
            ),
            self._scoring,
        )
        write_report(report, self.folder)
        return report

    def _check_classes(self, label: str, workflow: Api) -> None:
        """Name all nodes that the server lacks before anything runs."""
        missing = sorted({n["class_type"] for n in workflow.values() if not self.client.has_node(n["class_type"])})
        if missing:
            raise WorkflowError(
                f"{label}: this ComfyUI has no node {', '.join(map(repr, missing))}; install the pack "
                f"{'it comes' if len(missing) == 1 else 'they come'} from."
            )

    # Parts of a run

    def _add_competitor(self, first: Arm) -> None:
        """Learn from one run how many evaluations the first accelerated arm computes, and add that many plain steps."""
        probe = self._execute(Slot(-1, 0, first, self.cells[0], 0), "probe")
        self.done += 1
        totals = [trace["totals"] for trace in probe.traces or []]
        evaluations, computed = (sum(t[key] for t in totals) for key in ("evaluations", "computed"))
        plain_steps = edit.get_steps(self.arms[0].workflow)
        if not evaluations or plain_steps is None:
            self.notes.append("No trace tells how many evaluations were computed, so there is no arm with fewer steps.")
            return
        steps = max(1, round(plain_steps * computed / evaluations))
        if steps >= plain_steps:
            self.notes.append(f"{first.label} skipped nothing, so there is no arm with fewer steps.")
            return
        workflow = edit.fewer_steps(self.arms[0].workflow, steps)
        self.arms.append(Arm("fewer-steps", f"Same sampler, {steps} steps", workflow, "fewer-steps"))

    def _measure(self, slots: Sequence[Slot], file: MeasurementFile) -> None:
        """Run what is left of the schedule."""

        def keep(measurement: Measurement) -> None:
            if not measurement.warmup:
                file.append(measurement)

        for measurement in run_interleaved(slots, self._execute, keep, stop=self.stop):
            self.measurements.append(measurement)
            self.done += 1
            self._announce("warm-up" if measurement.warmup else "measuring", measurement)

    def _reference(self, steps: int, file: MeasurementFile) -> None:
        """Make the pictures that many steps would give; untimed, so after everything else."""
        arm = Arm("reference", f"Plain, {steps} steps", edit.set_steps(self.arms[0].workflow, steps), "reference")
        self.arms.append(arm)
        finished = {m.cell for m in self.measurements if m.arm == arm.name}
        for cell in self.cells:
            if cell.index not in finished:
                measurement = self._execute(Slot(cell.index, 0, arm, cell, 0), "reference")
                file.append(measurement)
                self.measurements.append(measurement)
                self.done += 1
                self._announce("reference", measurement)
            else:
                self.done += 1

    def _execute(self, slot: Slot, phase: str = "") -> Measurement:
        """One run on the server, with its traces and, unless it is discarded, its pictures."""
        phase = phase or ("warm-up" if slot.warmup else "measuring")
        result = self.client.run(
            self._workflow(slot),
            on_step=self._stepper(phase, slot),
            on_preview=None if phase == "measuring" else self.preview,
            stop=self.stop,
            timeout=RUN_TIMEOUT,
        )
        cached = set(edit.sampler_ids(slot.arm.workflow)) & result.cached
        if cached:
            raise MeasureError(
                f"The server took sampler node {cached.pop()} from its node cache, so nothing was measured."
            )
        traces = self.client.traces(result.prompt_id) if self.with_pack else None
        pictures, pixels, frames = ([], "", 1) if slot.warmup else self._pictures(slot, result.outputs)
        return Measurement(
            slot.arm.name,
            slot.cell.index,
            slot.cell.prompt,
            slot.cell.seed,
            slot.repeat,
            slot.round,
            slot.position,
            result.prompt_id,
            result.seconds,
            traces,
            pictures,
            pixels,
            frames,
        )

    def _workflow(self, slot: Slot) -> Api:
        """The arm's workflow for this cell, with a nonce that ComfyUI's node cache has never seen."""
        workflow = edit.set_seed(edit.set_prompt(slot.arm.workflow, slot.cell.prompt), slot.cell.seed)
        nonce = secrets.randbits(NONCE_BITS)
        return (
            edit.ensure_measure(workflow, nonce) if self.with_pack else edit.defeat_cache_without_pack(workflow, nonce)
        )

    def _pictures(self, slot: Slot, outputs: dict[str, Any]) -> tuple[list[str], str, int]:
        """Fetch the run's pictures, keep those of the first repeat as files, hash the pixels of all; count a clip's.

        The frames of a batch of clips come as one list, clip after clip.
        """
        digest, names = hashlib.sha256(), []
        references = edit.pictures_of(slot.arm.workflow, outputs)
        frames = self._frames_per_clip(slot, len(references))
        for index, reference in enumerate(references):
            try:
                picture = self.client.fetch_image(reference)
                pixels = read_rgb(picture)
            except ValueError as error:
                raise MeasureError(f"{error} It is {reference['filename'][:80]!r} of the arm {slot.arm.label!r}.") from error
            if index == 0 and self.preview is not None:
                self.preview(picture)
            digest.update(pixels.tobytes())
            if slot.repeat == 0:
                number = f"{index // frames}-{index % frames:03d}" if frames > 1 else str(index)
                names.append(f"{PICTURES}/{slot.arm.name}-{slot.cell.index:03d}-{number}.png")
                write_whole(self.folder / names[-1], png_bytes(pixels))
        return names, digest.hexdigest() if references else "", frames

    def _frames_per_clip(self, slot: Slot, count: int) -> int:
        """How many of `count` pictures of a run make a clip; 1 where the workflow makes pictures."""
        if self.frame_rate is None or count == 0:
            return 1
        batch = edit.get_batch(slot.arm.workflow) or 1
        if count % batch:
            raise MeasureError(f"The run made {count} frames, which cannot be {batch} clips of one length.")
        return count // batch

    # Bookkeeping

    def _scoring(self, label: str, prompt: str) -> bool:
        """Tell whose pictures are scored; whoever stops now does not wait for the slow metrics."""
        self.tell(Progress("scoring", self.done, self.total, label, prompt))
        return self.stop is None or not self.stop.is_set()

    def _stepper(self, phase: str, slot: Slot) -> StepCallback:
        def on_step(step: int, steps: int) -> None:
            self.tell(Progress(phase, self.done, self.total, slot.arm.label, slot.cell.prompt, step, steps))

        on_step(0, 0)
        return on_step

    def _announce(self, phase: str, measurement: Measurement) -> None:
        label = next(arm.label for arm in self.arms if arm.name == measurement.arm)
        self.tell(Progress(phase, self.done, self.total, label, measurement.prompt, finished=measurement))

    def _drop_torn_rounds(self, slots: Sequence[Slot]) -> None:
        """After a stop only complete rounds count; with none there is nothing to report."""
        torn = {slot.round for slot in remaining(slots, self.measurements)}
        self.measurements = [m for m in self.measurements if m.round not in torn]
        rounds = {slot.round for slot in slots if not slot.warmup}
        if not any(m for m in self.measurements if not m.warmup):
            raise Stopped("Stopped before a round was complete; there is nothing to report.")
        self.notes.append(f"Stopped early: {len(rounds - torn)} of {len(rounds)} rounds were measured.")

    def _settings(self, repeats: int, warmup: int, reference_steps: int, complete: bool) -> dict[str, Any]:
        """What was run, for the report."""
        plain = self.arms[0].workflow
        inputs = plain[edit.sampler_ids(plain)[0]]["inputs"]
        sampler = {name: value for name, value in inputs.items() if not edit.is_link(value)}
        frames = max((m.frames for m in self.measurements), default=1)
        return {
            "prompts": list(dict.fromkeys(cell.prompt for cell in self.cells)),
            "seeds": list(dict.fromkeys(cell.seed for cell in self.cells)),
            "repeats": repeats,
            "warmup": warmup,
            "steps": edit.get_steps(plain),
            "reference_steps": reference_steps,
            "batch": edit.get_batch(plain),
            "frames": frames if frames > 1 else None,
            "frame_rate": self.frame_rate if frames > 1 else None,
            "sampler": sampler.get("sampler_name"),
            "scheduler": sampler.get("scheduler"),
            "cfg": sampler.get("cfg"),
            "complete": complete,
        }

    def _fingerprint(self, repeats: int, reference_steps: int, competitor: bool) -> str:
        """Identity of the plan, so that only measurements of the same plan are continued."""
        plan = [
            [(arm.name, edit.fingerprint(arm.workflow)) for arm in self.arms],
            [(cell.prompt, cell.seed) for cell in self.cells],
            repeats,
            reference_steps,
            competitor,
        ]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]


def read_workflow(path: Path, client: ComfyClient) -> Api:
    """Read a file that is or carries a workflow (`read_carried`), in either form, as API JSON; raises `WorkflowError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror}.") from error
    return as_api(read_carried(data, str(path)), client)


def as_api(workflow: dict[str, Any], client: ComfyClient) -> Api:
    """A workflow in either form as API JSON; the server's node schemas tell how."""
    return ui_to_api(workflow, client.object_info()) if is_ui_workflow(workflow) else workflow


def read_prompts(entries: Sequence[str]) -> list[str]:
    """Texts or files (one prompt per line, or a JSON list of texts) -> prompts; raises `WorkflowError`.

    An entry is a file when one of that name exists or when it ends like one.
    """
    prompts: list[str] = []
    for entry in entries:
        path = Path(entry)
        if not _is_file_name(entry):
            prompts.append(entry)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkflowError(f"The prompt file {entry} cannot be read.") from error
        lines = _json_prompts(entry, text) if path.suffix == ".json" else text.splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if entries and not prompts:
        raise WorkflowError("There is no prompt in what was given as prompts.")
    return prompts


def _is_file_name(entry: str) -> bool:
    try:
        return entry.endswith((".json", ".txt")) or Path(entry).is_file()
    except OSError:
        return False  # longer than a file name may be


def _json_prompts(name: str, text: str) -> list[str]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkflowError(f"The prompt file {name} is not JSON.") from error
    if not isinstance(document, list) or not all(isinstance(prompt, str) for prompt in document):
        raise WorkflowError(f"The prompt file {name} must hold a list of texts.")
    return document


def arms_of(workflows: Sequence[tuple[str, Api]]) -> tuple[Api, list[Arm]]:
    """Named workflows -> the plain workflow (the first with this pack's nodes bypassed) and one arm for each other one.

    A workflow that is the plain one already makes no arm; raises `WorkflowError` when none is left.
    """
    baseline = edit.plain(workflows[0][1])
    shape = edit.shape(baseline)
    taken = ["plain", "reference", "fewer-steps"]
    arms: list[Arm] = []
    for name, workflow in workflows:
        if edit.shape(workflow) == shape:
            continue
        label = label_of(workflow, name)
        arms.append(Arm(edit.name_of(label, taken), label, workflow))
        taken.append(arms[-1].name)
    if not arms:
        raise WorkflowError("No workflow has an accelerating Stretto node, so there is nothing to compare.")
    return baseline, arms
