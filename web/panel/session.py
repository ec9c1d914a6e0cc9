"""The one comparison a page runs at a time: started, watched (also after a reload), stopped."""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .measure.arms import MEASURE
from .measure.client import ComfyClient
from .measure.compare import REFERENCE_STEPS, Progress, arms_of, compare, read_workflow
from .measure.errors import MeasureError, WorkflowError
from .measure.report import Report, server_facts

TICK = 0.25  # seconds between two looks at a running comparison


@dataclass(frozen=True)
class Request:
    """What the person asked for. `seed` and `steps` None keep the workflow's own."""

    workflow: str
    prompts: tuple[str, ...]
    seed: int | None
    steps: int | None
    repeats: int
    fewer_steps: bool
    reference: bool

    @classmethod
    def from_page(
        cls,
        workflow: str | None,
        prompts: str,
        seed: float | None,
        steps: float | None,
        repeats: float,
        fewer_steps: bool,
        reference: bool,
    ) -> Request:
        """Read the fields of the page; raises `WorkflowError` for what cannot be run."""
        if not workflow:
            raise WorkflowError("Choose a workflow first.")
        if steps is not None and steps < 1:
            raise WorkflowError("The number of steps must be at least 1.")
        lines = tuple(line.strip() for line in (prompts or "").splitlines() if line.strip())
        return cls(
            workflow,
            lines,
            None if seed is None else int(seed),
            None if steps is None else int(steps),
            int(repeats),
            bool(fewer_steps),
            bool(reference),
        )


@dataclass(frozen=True)
class State:
    """A look at the session: progress while it runs, then a report or a sentence about what went wrong."""

    running: bool
    progress: Progress | None = None
    report: Report | None = None
    folder: Path | None = None
    error: str | None = None


def export_path(folder: Path) -> Path:
    """The copy of a report's page that people download."""
    return folder / f"stretto-{folder.name}.html"


class Session:
    """Runs one comparison in a thread of its own, so that a closed or reloaded page loses nothing."""

    def __init__(self, server: str, workflows: Path, out: Path):
        """`server` is ComfyUI's address; every comparison gets a folder of its own under `out`."""
        self.server, self.workflows, self.out = server, workflows, out
        self.report: Report | None = None
        self.folder: Path | None = None
        self._progress: Progress | None = None
        self._error: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether a comparison is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check_server(self) -> tuple[dict[str, Any] | None, str | None]:
        """Facts about the server, or None and a sentence about what is wrong with it."""
        try:
            with ComfyClient(self.server, timeout=5.0) as client:
                return server_facts(client.health(), client.base_url, client.has_node(MEASURE), client.loopback), None
        except MeasureError as error:
            return None, str(error)

    def start(self, request: Request) -> None:
        """Begin a comparison; raises `MeasureError` when one is under way."""
        with self._lock:
            if self.running:
                raise MeasureError("A comparison is already running; stop it first or wait for it.")
            self._stop = threading.Event()
            self._progress = self._error = self.report = None
            self.folder = self.out / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            self._thread = threading.Thread(target=self._run, args=(request, self.folder, self._stop), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask a running comparison to end; complete rounds are still reported."""
        self._stop.set()

    def watch(self) -> Iterator[State]:
        """Yield states while a comparison runs, and the final one; without any comparison yields that once."""
        last: Progress | None = None
        while self.running:
            if self._progress is not last:
                last = self._progress
                yield State(True, last)
            time.sleep(TICK)
        yield State(False, self._progress, self.report, self.folder, self._error)

    def _run(self, request: Request, folder: Path, stop: threading.Event) -> None:
        try:
            self.report = self._compare(request, folder, stop)
            # Downloads keep the name of the file, and "index" says nothing.
            shutil.copyfile(folder / "index.html", export_path(folder))
        except MeasureError as error:
            self._error = str(error)
        except OSError as error:
            self._error = f"The report could not be written: {error.strerror or error}."

    def _compare(self, request: Request, folder: Path, stop: threading.Event) -> Report:
        def remember(progress: Progress) -> None:
            self._progress = progress

        with ComfyClient(self.server) as client:
            client.health()
            # The name comes from a browser: only names of files in the folder are opened.
            if request.workflow not in {path.name for path in self.workflows.glob("*.json")}:
                raise WorkflowError(f"There is no workflow {request.workflow!r} in the workflow folder.")
            path = self.workflows / request.workflow
            plain, arms = arms_of([(path.stem, read_workflow(path, client))])
            return compare(
                client,
                plain,
                arms,
                request.prompts,
                [] if request.seed is None else [request.seed],
                request.repeats,
                1,
                folder,
                REFERENCE_STEPS if request.reference else 0,
                remember,
                steps=request.steps,
                competitor=request.fewer_steps,
                stop=stop,
                command=self._command(request),
            )

    def _command(self, request: Request) -> str:
        """The command line that does the same."""
        words = ["python", "cli.py", "compare", "--server", self.server, "--workflow", f"workflows/{request.workflow}"]
        words += ["--prompts", *request.prompts] if request.prompts else []
        words += ["--seed", str(request.seed)] if request.seed is not None else []
        words += ["--steps", str(request.steps)] if request.steps is not None else []
        words += [
            "--repeats",
            str(request.repeats),
            "--reference-steps",
            str(REFERENCE_STEPS if request.reference else 0),
        ]
        words += [] if request.fewer_steps else ["--no-fewer-steps"]
        return shlex.join(words)
