"""The A/B panel as a child of ComfyUI: started with fixed arguments, ended with it."""

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

HOST = "127.0.0.1"
#: The interpreter of an environment with requirements-panel.txt, where that is not `.venv-panel` beside the pack.
PYTHON_VARIABLE = "STRETTO_PANEL_PYTHON"
#: Path under which ComfyUI hands the panel's page on; a secret of each start follows.
PAGE_PATH = "/stretto/page/"
LOWEST_PORT, HIGHEST_PORT = 1024, 65535
#: Seconds that the panel may take to end before it is killed, and to answer before it counts as silent.
PATIENCE, ANSWER = 10.0, 3.0
LOG_LINES = 20
STOPPED, STARTING, RUNNING, FAILED = "stopped", "starting", "running", "failed"


class PanelError(Exception):
    """The panel cannot be started or asked; the message says why and what to do."""


@dataclass(frozen=True)
class Child:
    """A panel that was started.

    Attributes:
        process: it.
        port: where it listens on loopback.
        key: the secret part of its page's path.
        started: ``time.monotonic()`` then.
    """

    process: subprocess.Popen
    port: int
    key: str
    started: float

    @property
    def url(self) -> str:
        """Where it answers, seen from this machine."""
        return f"http://{HOST}:{self.port}"

    @property
    def page(self) -> str:
        """The path of its page on ComfyUI's server."""
        return f"{PAGE_PATH}{self.key}/"


class Panel:
    """At most one panel of this ComfyUI."""

    def __init__(self, root: Path, log: Path, environment: Mapping[str, str]) -> None:
        """``root`` is the pack's folder, ``log`` the file that gets what the panel prints."""
        self.root, self.log, self.environment = root, log, environment
        self.child: Child | None = None
        self._answered = False

    @property
    def python(self) -> Path | None:
        """The panel's interpreter, None where there is none. Never taken from a request."""
        named = self.environment.get(PYTHON_VARIABLE)
        folder = self.root / ".venv-panel"
        path = Path(named) if named else folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return path if path.is_file() else None

    def missing(self) -> str:
        """Say why the panel cannot be started from here, ``""`` where it can."""
        if self.python is not None:
            return ""
        named = self.environment.get(PYTHON_VARIABLE)
        if named:
            return f"{PYTHON_VARIABLE} is {named!r}, which is no file: it must be the Python of the panel's environment."
        return "The panel has an environment of its own, which is not there yet. These commands make it; then start again."

    def setup_command(self) -> str:
        """Return what to copy into a terminal to make the panel's environment."""
        folder = self.root / ".venv-panel"
        requirements = self.root / "requirements-panel.txt"
        if os.name == "nt":
            return (
                f'py -m venv "{folder}"\n"{folder / "Scripts" / "python.exe"}" -m pip install -r "{requirements}"'
            )
        python = shlex.quote(str(folder / "bin" / "python"))
        return f"python3 -m venv {shlex.quote(str(folder))}\n{python} -m pip install -r {shlex.quote(str(requirements))}"

    def command(self, server: str, port: int) -> list[str]:
        """Return the argument vector. ``server`` is ComfyUI's own address, ``port`` the panel's."""
        return [
            str(self.python or "python"), "-u", str(self.root / "cli.py"), "panel",
            "--server", server, "--port", str(port), "--until-stdin-closes",
        ]  # fmt: skip

    def start(self, server: str, port: int = 0) -> Child:
        """Start the panel and return at once; a panel that runs is kept as it is.

        Args:
            server: ComfyUI's own address.
            port: where the panel listens; 0 picks a free one.

        Raises:
            PanelError: no environment for it, a port that is taken or out of range, or the system refuses.
        """
        if self.alive():
            return self.child
        problem = self.missing() or _port_problem(port)
        if problem:
            raise PanelError(problem)
        key, port = secrets.token_urlsafe(24), port or _free_port()
        environment = {name: value for name, value in self.environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        environment["GRADIO_ROOT_PATH"] = f"{PAGE_PATH}{key}"  # where the page's own requests have to go
        options: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as file:
                process = subprocess.Popen(
                    self.command(server, port),
                    cwd=self.root,
                    env=environment,
                    stdin=subprocess.PIPE,  # closes with us, however we end
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    **options,
                )
        except OSError as error:
            raise PanelError(f"The panel could not be started: {error}.") from error
        self.child, self._answered = Child(process, port, key, time.monotonic()), False
        return self.child

    def alive(self) -> bool:
        """Whether a panel of ours runs."""
        return self.child is not None and self.child.process.poll() is None

    async def status(self) -> dict[str, Any]:
        """Return the panel's state, and what a person needs in that state."""
        child = self.child
        found: dict[str, Any] = {"schema": "panel-status@1", "can_start": self.python is not None}
        if child is None:
            state = STOPPED
        elif not self.alive():
            state = FAILED
            found |= {"exit_status": child.process.returncode, "log": self.last_lines(), "log_file": str(self.log)}
        else:
            self._answered = self._answered or await _answers(child.url)
            state = RUNNING if self._answered else STARTING
            found |= {"port": child.port, "seconds": round(time.monotonic() - child.started, 1)}
            if state == RUNNING:
                found["page"] = child.page
        if not found["can_start"]:
            found |= {"why_not": self.missing(), "command": self.setup_command()}
        return found | {"state": state}

    async def hand_over(self, workflow: dict[str, Any], name: str) -> str:
        """Give the running panel a workflow and return the path of a page that begins with it.

        Raises:
            PanelError: no panel runs, or it does not take the workflow.
        """
        child = self.child
        if child is None or not self.alive():
            raise PanelError("The panel does not run: start it first.")
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client,
                client.post(f"{child.url}/stretto/workflow", json={"workflow": workflow, "name": name}) as answer,
            ):
                if answer.status in (404, 405):
                    raise PanelError("This panel takes no workflows from the canvas: choose the workflow on its page.")
                document = await answer.json(content_type=None)
                status = answer.status
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise PanelError(f"The panel did not answer ({type(error).__name__}); its log is {self.log}.") from error
        token = document.get("token") if isinstance(document, dict) else None
        if status != 200 or not isinstance(token, str) or not token.replace("-", "").replace("_", "").isalnum():
            told = document.get("error") or document.get("detail") if isinstance(document, dict) else None
            raise PanelError(f"The panel refused the workflow: {told or f'status {status}'}")
        return f"{child.page}?workflow={token}&embed=1"

    def stop(self) -> None:
        """End the panel and everything it started; safe to call at any time."""
        child, self.child = self.child, None
        if child is None:
            return
        process = child.process
        with contextlib.suppress(OSError):
            process.stdin.close()
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        if os.name != "nt":
            _signal(process, signal.SIGKILL)  # whatever of its group is left
        elif process.poll() is None:
            process.kill()
        process.wait()

    def last_lines(self) -> str:
        """Return the end of the panel's log, ``""`` where there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 16384))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-LOG_LINES:])


def _port_problem(port: Any) -> str:
    """Say why the panel cannot listen on ``port``, ``""`` where it can."""
    if isinstance(port, bool) or not isinstance(port, int) or not (port == 0 or LOWEST_PORT <= port <= HIGHEST_PORT):
        return f"The panel's port is {port!r}: it must be a number from {LOWEST_PORT} to {HIGHEST_PORT}, or 0 for a free one."
    if port:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given up is free
            try:
                probe.bind((HOST, port))
            except OSError:
                return f"Port {port} is taken: set another one for the panel in the settings, or 0 for a free one."
    return ""


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to the child's whole group."""
    if os.name == "nt":
        process.terminate()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _answers(url: str) -> bool:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER)) as client,
            client.get(url) as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, asyncio.TimeoutError):
        return False
