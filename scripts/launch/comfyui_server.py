"""One ComfyUI server as a child process: start it, wait until it answers, stop it with everything it started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from .console import SetupError

HOST = "127.0.0.1"
START_LIMIT = 300.0
"""Seconds after which a server that does not answer is given up."""

# A proxy of the environment never leads to a server on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def require_free_port(port: int, what: str, option: str) -> None:
    """Refuse a port that something else listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given up is free
        try:
            probe.bind((HOST, port))
        except OSError:
            raise SetupError(f"Port {port} for {what} is taken: choose another one with {option}.") from None


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def get_json(url: str, timeout: float = 10.0) -> object:
    """Fetch and parse a JSON answer. Raises OSError or ValueError."""
    with _OPENER.open(url, timeout=timeout) as response:
        return json.load(response)


def device_arguments(python: Path) -> list[str]:
    """Return ['--cpu'] when torch sees no accelerator, otherwise nothing."""
    probe = (
        "import sys, torch; x = getattr(torch, 'xpu', None); "
        "sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available() or (x and x.is_available())))"
    )
    result = subprocess.run([str(python), "-c", probe], capture_output=True, check=False)
    return [] if result.returncode == 0 else ["--cpu"]


class Child:
    """A program that runs beside this one and never outlives it."""

    def __init__(self, command: Sequence[str], log: Path, cwd: Path, name: str) -> None:
        """Start `command`; everything it prints goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, log
        options: dict[str, object] = {"start_new_session": True}
        if os.name == "nt":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with log.open("wb") as file:
            # In a group of its own: Ctrl-C reaches only us, and stop() reaches its children too.
            self.process = subprocess.Popen(
                list(command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **options
            )

    def alive(self) -> bool:
        """True while it runs."""
        return self.process.poll() is None

    def last_lines(self, count: int = 15) -> str:
        """Return the end of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def wait_for(self, url: str, tick: Callable[[float], None], limit: float = START_LIMIT) -> None:
        """Return when `url` answers; raise SetupError when the program dies or stays silent."""
        started = time.monotonic()
        while True:
            if not self.alive():
                raise SetupError(
                    f"{self.last_lines()}\n{self.name} stopped while starting "
                    f"(exit status {self.process.returncode}): the whole log is {self.log}."
                )
            if _answers(url):
                return
            seconds = time.monotonic() - started
            if seconds > limit:
                raise SetupError(
                    f"{self.last_lines()}\n{self.name} did not answer within {limit:.0f} s: the whole log is {self.log}."
                )
            tick(seconds)
            time.sleep(0.5)

    def stop(self, patience: float = 10.0) -> None:
        """End the program and its children; safe to call twice."""
        if self.alive():
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        if os.name != "nt":
            self._signal(signal.SIGKILL)  # whatever of its group is left
        elif self.alive():
            self.process.kill()
        self.process.wait()

    def _signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        if os.name == "nt":
            self.process.terminate()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _answers(url: str) -> bool:
    """True when an HTTP server answers without an error."""
    try:
        with _OPENER.open(url, timeout=5.0) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def start_comfyui(
    comfyui: Path, python: Path, port: int, log: Path, extra: Sequence[str] = (), own: bool = True
) -> Child:
    """Start ComfyUI on 127.0.0.1. `own` adds what suits a ComfyUI that nobody uses for anything else."""
    command = [str(python), "-u", str(comfyui / "main.py"), "--listen", HOST, "--port", str(port)]
    command += ["--disable-auto-launch", "--use-pytorch-cross-attention", *device_arguments(python)]
    if own:
        command.append("--disable-api-nodes")  # no paid services, and the page loads nothing from elsewhere
    return Child([*command, *extra], log, comfyui, "ComfyUI")


def require_pack(url: str, log: Path) -> None:
    """Refuse to go on when ComfyUI runs but could not import the pack."""
    nodes = get_json(f"{url}/object_info", timeout=60.0)
    if "StrettoCache" not in nodes:
        raise SetupError(f"ComfyUI runs, but it could not load Stretto's nodes: the reason is in {log}.")
