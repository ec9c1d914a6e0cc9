"""The one comparison a page runs at a time: started, watched (also after a reload), stopped, resumed after a crash."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from . import downloads
from .measure import arms as edit
from .measure.arms import MEASURE, Api, Arm
from .measure.client import ComfyClient
from .measure.compare import REFERENCE_STEPS, Progress, compare
from .measure.errors import MeasureError, Stopped, WorkflowError
from .measure.history import History
from .measure.report import Report, server_facts
from .measure.variants import StrettoNode, Variant, arms_from, offered, stretto_nodes, ui_of
from .measure.workflow import is_ui_workflow, ui_to_api
from .shelf import Shelf, Source

TICK = 0.25  # seconds between two looks at a running comparison
SCHEMAS_KEPT = 60.0  # seconds; nodes change only when ComfyUI starts again


@dataclass(frozen=True)
class Request:
    """What the person asked for, complete in itself, so that it can be resumed when nothing else is left.

    `document` is the workflow in UI or API form. Without prompts or seeds, and with `steps` None, the workflow's own are
    kept. A variant of kind "fewer-steps" without a number of steps is the competitor that the measuring code works out.
    """

    name: str
    document: dict[str, Any]
    variants: tuple[Variant, ...]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    repeats: int = 6
    reference: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; the history lists it by `workflow`."""
        return {"workflow": self.name, **asdict(self)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Request:
        """Read what `to_json` wrote; raises `WorkflowError` for anything else."""
        try:
            return cls(
                stored["name"],
                stored["document"],
                tuple(Variant(**variant) for variant in stored["variants"]),
                tuple(stored["prompts"]),
                tuple(stored["seeds"]),
                stored["steps"],
                stored["repeats"],
                stored["reference"],
            )
        except (KeyError, TypeError) as error:
            raise WorkflowError("This comparison was not started from the page, so the page cannot resume it.") from error

    def to_arms(self, object_info: dict[str, Any]) -> tuple[Api, list[Arm], bool]:
        """The plain workflow, the arms to measure, and whether the competitor runs too; raises `WorkflowError`."""
        return arms_from(self.variants, to_api(self.document, object_info), object_info)

    def variant_of(self, row: dict[str, Any]) -> Variant:
        """What an arm of the report was made from, to draw it; raises `WorkflowError` for a reference."""
        label, steps = row["label"], row["steps"]
        if row["role"] == "plain":
            return Variant("plain", label)
        found = next((variant for variant in self.variants if variant.label == label), None)
        if found is None and row["role"] == "fewer-steps":
            found = Variant("fewer-steps", label, steps=steps)
        if found is None:
            raise WorkflowError(f"{label} is no variant of the workflow.")
        return found


def to_api(document: dict[str, Any], object_info: dict[str, Any]) -> Api:
    """A workflow in either form as API JSON."""
    return ui_to_api(document, object_info) if is_ui_workflow(document) else document


@dataclass(frozen=True)
class Look:
    """What a workflow holds: its nodes of this pack, the variants to offer, and its own prompt, seed and steps."""

    nodes: list[StrettoNode]
    variants: list[Variant]
    prompt: str
    seed: int | None
    steps: int | None


@dataclass(frozen=True)
class State:
    """A look at the session: progress and the latest picture while it runs, then which entry of the history it became."""

    running: bool
    progress: Progress | None = None
    picture: bytes | None = None
    entry: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Shown:
    """A comparison of the history, opened."""

    entry: int
    report: Report
    folder: Path


class Session:
    """Runs one comparison in a thread of its own, so that a closed or reloaded page loses nothing."""

    def __init__(self, server: str, workflows: Path, out: Path, history: Path | None = None):
        """`server` is ComfyUI's address; every comparison gets a folder of its own under `out`, and a line in `history`."""
        self.server, self.out = server, out
        self.shelf = Shelf(workflows)
        self.history = History(history or out / "history.sqlite")
        self.entry: int | None = None
        self._progress: Progress | None = None
        self._picture: bytes | None = None
        self._error: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._schemas: tuple[float, dict[str, Any]] = (0.0, {})

    # The server

    def check_server(self) -> tuple[dict[str, Any] | None, str | None]:
        """Facts about the server, or None and a sentence about what is wrong with it."""
        try:
            with ComfyClient(self.server, timeout=5.0) as client:
                return server_facts(client.health(), client.base_url, client.has_node(MEASURE), client.loopback), None
        except MeasureError as error:
            return None, str(error)

    def object_info(self) -> dict[str, Any]:
        """The schemas of the server's nodes, asked at most once a minute; raises `MeasureError`."""
        asked, schemas = self._schemas
        if not schemas or time.monotonic() - asked > SCHEMAS_KEPT:
            with ComfyClient(self.server) as client:
                schemas = client.object_info()
            self._schemas = time.monotonic(), schemas
        return schemas

    def look(self, source: Source) -> Look:
        """What a workflow holds; raises `MeasureError`."""
        schemas = self.object_info()
        api = to_api(source.document, schemas)
        return Look(
            stretto_nodes(api, schemas),
            offered(api, schemas),
            edit.get_prompt(api) or "",
            edit.get_seed(api),
            edit.get_steps(api),
        )

    # Running

    @property
    def running(self) -> bool:
        """Whether a comparison is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, request: Request) -> None:
        """Begin a comparison; raises `MeasureError` when one is under way."""
        folder = self.out / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        self._begin(request, folder, resume=False)

    def resume(self, entry: int) -> None:
        """Go on with an interrupted comparison; raises `MeasureError` when it cannot be."""
        request = Request.from_json(self.history.request(entry))
        self._begin(request, self.history.entry(entry).folder, resume=True)

    def stop(self) -> None:
        """Ask a running comparison to end; complete rounds are still reported."""
        self._stop.set()

    def watch(self) -> Iterator[State]:
        """Yield states while a comparison runs, and the final one; without any comparison yields that once."""
        last: tuple[Progress | None, bytes | None] = None, None
        while self.running:
            if (self._progress, self._picture) != last:
                last = self._progress, self._picture
                yield State(True, *last)
            time.sleep(TICK)
        yield State(False, self._progress, None, self.entry, self._error)

    def _begin(self, request: Request, folder: Path, resume: bool) -> None:
        with self._lock:
            if self.running:
                raise MeasureError("A comparison is already running; stop it first or wait for it.")
            self._stop = threading.Event()
            self._progress = self._picture = self._error = self.entry = None
            arguments = (request, folder, resume, self._stop)
            self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
            self._thread.start()

    def _run(self, request: Request, folder: Path, resume: bool, stop: threading.Event) -> None:
        """The thread: whatever happens ends as a line of the history."""
        entry = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entry = self.history.begin(folder, request.to_json())
            report = self._compare(request, folder, resume, stop)
            downloads.forget(folder)  # a stopped comparison that was resumed has older ones
            self.history.finish(entry, report)
            self.entry = entry
        except Stopped as error:
            self._error = str(error)
            if entry is not None:
                self.history.stopped(entry)
        except MeasureError as error:
            self._error = str(error)
            if entry is not None:
                self.history.fail(entry, str(error))
        except OSError as error:
            self._error = f"The report could not be written: {error.strerror or error}."
            if entry is not None:
                self.history.fail(entry, self._error)

    def _compare(self, request: Request, folder: Path, resume: bool, stop: threading.Event) -> Report:
        def remember(progress: Progress) -> None:
            self._progress = progress

        def glance(picture: bytes) -> None:
            self._picture = picture

        with ComfyClient(self.server) as client:
            client.health()
            plain, arms, competitor = request.to_arms(client.object_info())
            return compare(
                client,
                plain,
                arms,
                request.prompts,
                request.seeds,
                request.repeats,
                1,
                folder,
                REFERENCE_STEPS if request.reference else 0,
                remember,
                steps=request.steps,
                competitor=competitor,
                resume=resume,
                stop=stop,
                command=command_of(request, self.server, self.shelf),
                preview=glance,
            )

    # What has been measured

    def shown(self, entry: int) -> Shown:
        """A comparison of the history with its report; raises `MeasureError`."""
        report, folder = self.history.open(entry)
        return Shown(entry, report, folder)

    def drawing(self, shown: Shown, arm: str) -> dict[str, Any]:
        """One arm of a comparison as a workflow for the editor; raises `MeasureError`."""
        row = next((row for row in shown.report["arms"] if row["name"] == arm), None)
        if row is None:
            raise WorkflowError(f"The comparison has no arm {arm!r}.")
        request, schemas = Request.from_json(self.history.request(shown.entry)), self.object_info()
        variant, ui = request.variant_of(row), request.document if is_ui_workflow(request.document) else None
        if variant.kind == "second":
            ui = None  # the drawing is the first workflow's
        return ui_of(variant, ui, to_api(request.document, schemas), schemas)


def command_of(request: Request, server: str, shelf: Shelf) -> str:
    """The command line that does the same; empty for a workflow that has no file."""
    known = request.name in shelf.files()
    if not known and "." not in request.name:
        return ""
    words = ["python", "cli.py", "compare", "--server", server]
    words += ["--workflow", f"workflows/{request.name}" if known else request.name]
    if any(variant.kind == "alone" for variant in request.variants):
        words += ["--each"]
    sweeps: dict[str, list[str]] = {}
    for variant in request.variants:
        if variant.kind == "sweep":
            sweeps.setdefault(f"{variant.node}.{variant.setting}", []).append(str(variant.value))
    for place, values in sweeps.items():
        words += ["--sweep", f"{place}={','.join(values)}"]
    words += ["--prompts", *request.prompts] if request.prompts else []
    words += ["--seed", *map(str, request.seeds)] if request.seeds else []
    words += ["--steps", str(request.steps)] if request.steps is not None else []
    words += ["--repeats", str(request.repeats)]
    words += ["--reference-steps", str(REFERENCE_STEPS if request.reference else 0)]
    words += [] if any(v.kind == "fewer-steps" and v.steps is None for v in request.variants) else ["--no-fewer-steps"]
    return shlex.join(words)
