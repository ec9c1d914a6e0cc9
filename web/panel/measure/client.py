"""Talk to a ComfyUI server: queue a workflow, follow it over the WebSocket, fetch pictures and traces."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import httpx
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from .errors import (
    ExecutionFailed,
    Interrupted,
    InvalidWorkflow,
    RunTimeout,
    ServerDied,
    ServerRefused,
    ServerUnreachable,
    Stopped,
)

Api = dict[str, dict[str, Any]]
StepCallback = Callable[[int, int], None]
PreviewCallback = Callable[[bytes], None]

LONGEST = 200  # characters of a server's details in a message
POLL_SECONDS = 0.25  # how long a read waits before the stop event and the deadline are looked at
PREVIEW, PREVIEW_WITH_METADATA = 1, 4  # the first four bytes of a binary message; the next four are a kind or a length
SILENCE_SECONDS = 5.0  # after so long without a message the history is asked, in case the final event was lost


@dataclass(frozen=True)
class RunResult:
    """One finished run: `seconds` from execution start to finish, by the server's clock where it tells, and what it made.

    `cached` are the node ids that ComfyUI took from its node cache; `outputs` is the history's output per node.
    """

    prompt_id: str
    seconds: float
    cached: frozenset[str]
    outputs: dict[str, Any]


@dataclass
class _Progress:
    """What the events of one run have told so far (seconds are readings of the monotonic clock)."""

    started: float
    finished: float | None = None
    done: bool = False
    cached: set[str] = field(default_factory=set)


class ComfyClient:
    """A synchronous client of one ComfyUI server. Usable as a context manager.

    Raises `ServerUnreachable` when nothing answers, `ServerDied` when the connection breaks during a run,
    `InvalidWorkflow`, `ExecutionFailed`, `Interrupted`, `Stopped` and `RunTimeout` from `run`.
    """

    def __init__(self, base_url: str, timeout: float = 15.0):
        """`base_url` like http://127.0.0.1:8188; `timeout` in seconds for one HTTP request."""
        parts = _address(base_url.strip())
        self.base_url = base_url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.client_id = uuid.uuid4().hex
        self.loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._ws_url = f"{'wss' if parts.scheme == 'https' else 'ws'}{base_url[len(parts.scheme) :]}/ws"
        # Proxies of the environment never lead to a machine of one's own.
        self._http = httpx.Client(base_url=base_url, timeout=timeout, trust_env=False)
        self._object_info: dict[str, Any] | None = None

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the HTTP connections."""
        self._http.close()

    # Plain requests

    def health(self) -> dict[str, Any]:
        """The server's /system_stats: versions, devices and memory in bytes."""
        return self._json("/system_stats")

    def object_info(self) -> dict[str, Any]:
        """Schema of every node the server knows; asked once and kept."""
        if self._object_info is None:
            self._object_info = self._json("/object_info")
        return self._object_info

    def has_node(self, class_type: str) -> bool:
        """Whether the server knows the node class."""
        return class_type in self.object_info()

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a run, or None while it has not finished."""
        return self._json(f"/history/{quote(prompt_id, safe='')}").get(prompt_id)

    def fetch_image(self, reference: dict[str, str]) -> bytes:
        """The file behind an image reference {filename, subfolder, type} of an output."""
        query = {key: reference.get(key, "") for key in ("filename", "subfolder", "type")}
        return self._get("/view", query).content

    def traces(self, prompt_id: str) -> list[dict[str, Any]] | None:
        """The trace@1 objects of a run; None on a server without the pack, so only total time is known."""
        response = self._get("/stretto/traces", {"prompt_id": prompt_id}, allow_missing=True)
        if response.status_code in (404, 405):
            return None
        return [trace for trace in response.json().get("traces", []) if _known_trace(trace)]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the run `prompt_id`, whether it waits or executes; without an id whatever executes now."""
        if prompt_id is not None:
            self._post("/queue", {"delete": [prompt_id]})
        self._post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def queue(self, workflow: Api, previews: bool = False) -> str:
        """Queue an API workflow and return its prompt id; raises `InvalidWorkflow`.

        `previews` asks servers that can switch per run (those with `extra_data.preview_method`) to send some.
        """
        body = {"prompt": workflow, "client_id": self.client_id}
        response = self._post("/prompt", {**body, "extra_data": {"preview_method": "auto"}} if previews else body)
        try:
            reply = response.json()
        except json.JSONDecodeError:
            reply = {}
        if response.status_code == 400:
            raise _invalid(reply, workflow)
        if response.status_code != 200 or "prompt_id" not in reply:
            raise ServerRefused(f"The server answered HTTP {response.status_code} when the workflow was queued.")
        if reply.get("node_errors"):
            # ComfyUI runs the outputs that passed; half a workflow is no measurement.
            self.interrupt(reply["prompt_id"])
            raise _invalid(reply, workflow)
        return reply["prompt_id"]

    # One run, followed to its end

    def run(
        self,
        workflow: Api,
        *,
        on_step: StepCallback | None = None,
        on_preview: PreviewCallback | None = None,
        stop: threading.Event | None = None,
        timeout: float = 1800.0,
    ) -> RunResult:
        """Run an API workflow to its end; `timeout` in seconds, `on_step(step, steps)` follows the sampler.

        `on_preview(file)` gets previews, PNG or JPEG, and asks for them: making them costs time, so not while measuring.
        """
        with self._connect() as socket:
            prompt_id = self.queue(workflow, on_preview is not None)
            state = _Progress(started=time.monotonic())
            try:
                self._follow(socket, prompt_id, state, (on_step, on_preview), stop, state.started + timeout)
            except (Stopped, RunTimeout, KeyboardInterrupt):
                self.interrupt(prompt_id)
                raise
        entry = self._finished_entry(prompt_id)
        seconds = _server_seconds(entry)
        if seconds is None:
            seconds = (state.finished or time.monotonic()) - state.started
        return RunResult(prompt_id, seconds, frozenset(state.cached), entry.get("outputs", {}))

    def _connect(self) -> ClientConnection:
        try:
            return connect(f"{self._ws_url}?clientId={self.client_id}", max_size=None, proxy=None, open_timeout=15)
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise self._unreachable() from error

    def _follow(
        self,
        socket: ClientConnection,
        prompt_id: str,
        state: _Progress,
        callbacks: tuple[StepCallback | None, PreviewCallback | None],
        stop: threading.Event | None,
        deadline: float,
    ) -> None:
        """Read events until the run is over."""
        on_step, on_preview = callbacks
        heard = time.monotonic()
        while not state.done:
            if stop is not None and stop.is_set():
                raise Stopped("Stopped; the finished measurements are kept.")
            if time.monotonic() > deadline:
                raise RunTimeout("The run took longer than allowed and was cancelled.")
            try:
                message = socket.recv(timeout=POLL_SECONDS)
            except TimeoutError:
                if time.monotonic() - heard > SILENCE_SECONDS:
                    heard = time.monotonic()
                    state.done = self._settled(prompt_id)
                continue
            except ConnectionClosed as error:
                if state.finished is not None:
                    return
                raise self._died() from error
            heard = time.monotonic()
            if isinstance(message, str):
                _apply_event(json.loads(message), prompt_id, state, on_step)
            elif on_preview is not None and (picture := _preview(message)):
                on_preview(picture)

    def _settled(self, prompt_id: str) -> bool:
        """Whether the history knows the end of a run that has become silent; raises if it failed or the server died."""
        try:
            entry = self.history(prompt_id)
        except ServerUnreachable as error:
            raise self._died() from error
        except RunTimeout:
            return False  # busy, with loading a model for instance; how long a run may take decides
        if entry is None:
            return False
        for name, data in entry.get("status", {}).get("messages", []):
            _apply_event({"type": name, "data": data}, prompt_id, _Progress(0.0), None)
        return True

    def _finished_entry(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a finished run; the server writes it a moment after its success event."""
        deadline = time.monotonic() + SILENCE_SECONDS
        try:
            while (entry := self.history(prompt_id)) is None:
                if time.monotonic() > deadline:
                    raise ServerDied("The run finished, but the server has no record of it.")
                time.sleep(0.02)
        except ServerUnreachable as error:
            raise self._died() from error
        return entry

    # HTTP

    def _get(self, path: str, params: dict[str, str] | None = None, allow_missing: bool = False) -> httpx.Response:
        try:
            response = self._http.get(path, params=params)
        except httpx.TimeoutException as error:
            raise RunTimeout(f"The server at {self.base_url} did not answer {path} in time.") from error
        except httpx.TransportError as error:
            raise self._unreachable() from error
        if response.status_code >= 400 and not (allow_missing and response.status_code in (404, 405)):
            raise ServerRefused(f"The server answered HTTP {response.status_code} for {path}.")
        return response

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return self._http.post(path, json=body)
        except httpx.TimeoutException as error:
            raise RunTimeout(f"The server at {self.base_url} did not answer {path} in time.") from error
        except httpx.TransportError as error:
            raise self._unreachable() from error

    def _json(self, path: str) -> dict[str, Any]:
        try:
            reply = self._get(path).json()
        except json.JSONDecodeError as error:
            raise ServerRefused(f"{self.base_url} answers, but it is not a ComfyUI server.") from error
        if not isinstance(reply, dict):
            raise ServerRefused(f"{self.base_url} answers, but it is not a ComfyUI server.")
        return reply

    def _unreachable(self) -> ServerUnreachable:
        return ServerUnreachable(f"No ComfyUI server answers at {self.base_url}; is it running?")

    def _died(self) -> ServerDied:
        return ServerDied(f"The server at {self.base_url} went away in the middle of a run; it may have crashed.")


def _preview(message: bytes) -> bytes:
    """The picture in a binary message; empty when it holds none."""
    kind, length = (int.from_bytes(message[start : start + 4], "big") for start in (0, 4))
    if kind == PREVIEW:
        return message[8:]
    return message[8 + length :] if kind == PREVIEW_WITH_METADATA else b""


def _address(url: str) -> SplitResult:
    """The parts of a server's address; raises `ServerUnreachable` for anything else."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0):
            httpx.URL(parts.geturl())
            return parts
    except (ValueError, httpx.InvalidURL):
        pass  # the same sentence as for every other wrong address
    raise ServerUnreachable(f"{url!r} is not a server address; it should look like http://127.0.0.1:8188.")


def _server_seconds(entry: dict[str, Any]) -> float | None:
    """Seconds between the start and success messages of a history entry, or None on servers without timestamps."""
    stamps = {
        name: data.get("timestamp")
        for name, data in entry.get("status", {}).get("messages", [])
        if isinstance(data, dict)
    }
    start, end = stamps.get("execution_start"), stamps.get("execution_success")
    return None if start is None or end is None else (end - start) / 1000


def _known_trace(trace: dict[str, Any]) -> bool:
    """Whether a trace has the major version this code reads."""
    return str(trace.get("schema", "")).split("@")[-1].split(".")[0] == "1"


def _apply_event(event: dict[str, Any], prompt_id: str, state: _Progress, on_step: StepCallback | None) -> None:
    """Update `state` from one WebSocket event; raises `ExecutionFailed` or `Interrupted`."""
    kind, data = event.get("type"), event.get("data") or {}
    if data.get("prompt_id") not in (None, prompt_id):
        return
    match kind:
        case "execution_start":
            # A run may have waited behind others; its time starts now.
            state.started = time.monotonic()
        case "execution_cached":
            state.cached.update(data.get("nodes", []))
        case "progress" if on_step is not None:
            on_step(int(data.get("value", 0)), int(data.get("max", 0)))
        case "execution_success":
            state.finished = time.monotonic()
        case "executing" if data.get("node") is None and "prompt_id" in data:
            state.finished = state.finished or time.monotonic()
            state.done = True
        case "execution_error":
            raise _failed(data)
        case "execution_interrupted":
            raise Interrupted("The run was cancelled in ComfyUI.")


def _failed(data: dict[str, Any]) -> ExecutionFailed:
    """The error of a node, shortened to its first line."""
    lines = str(data.get("exception_message") or data.get("exception_type") or "unknown error").strip().splitlines()
    message = lines[0].strip() if lines else "unknown error"
    class_type = str(data.get("node_type", "a node"))
    return ExecutionFailed(
        f"{class_type} (node {data.get('node_id', '?')}) failed: {message}", str(data.get("node_id", "")), class_type
    )


def _invalid(reply: dict[str, Any], workflow: Api) -> InvalidWorkflow:
    """The first validation error as a sentence that names node and input."""
    for node_id, entry in (reply.get("node_errors") or {}).items():
        class_type = entry.get("class_type") or workflow.get(node_id, {}).get("class_type", "")
        for error in entry.get("errors", []):
            field_name = (error.get("extra_info") or {}).get("input_name", "")
            details = error.get("details") or ""
            place = f"{class_type} (node {node_id})" + (f", input {field_name!r}" if field_name else "")
            if error.get("type") == "value_not_in_list":
                wanted = (error.get("extra_info") or {}).get("received_value", "")
                return InvalidWorkflow(
                    f"This server has no {str(wanted)[:LONGEST]!r} for {place}: put the file into its folder of models, or "
                    "choose another one in the workflow.",
                    node_id,
                    class_type,
                    field_name,
                )
            details = details if len(details) <= LONGEST else f"{details[:LONGEST]}…"  # some list every file there is
            tail = f" ({details})" if details and details != field_name else ""
            return InvalidWorkflow(
                f"The server refused the workflow at {place}: {error.get('message', 'invalid')}{tail}.",
                node_id,
                class_type,
                field_name,
            )
    error = reply.get("error") or {}
    message = error.get("message") if isinstance(error, dict) else str(error)
    return InvalidWorkflow(f"The server refused the workflow: {message or 'no reason given'}")
