"""A client of ComfyUI's HTTP API for tests: small, blocking, standard library and Pillow only."""

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Api = dict[str, Any]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """ComfyUI's validation refused a prompt; `errors` is its list of node errors."""

    def __init__(self, errors: dict[str, Any]) -> None:
        super().__init__(json.dumps(errors))
        self.errors = errors


@dataclass(frozen=True)
class Run:
    """A finished run: its id, the outputs by node and the status messages."""

    prompt_id: str
    outputs: dict[str, Any]
    messages: dict[str, Any]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that ended it, if one did."""
        return self.messages.get("execution_error")


class ComfyApi:
    """One server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._nonce = 0

    def get(self, path: str, **query: str) -> Any:
        """Fetch JSON."""
        return json.loads(self.raw(path, **query))

    def raw(self, path: str, **query: str) -> bytes:
        """Fetch bytes."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with OPENER.open(address, timeout=60) as response:
            return response.read()

    def post(self, path: str, body: Any) -> Any:
        """Send JSON; return the JSON answer or None."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with OPENER.open(request, timeout=60) as response:
            text = response.read()
        return json.loads(text) if text else None

    def queue(self, api: Api) -> str:
        """Queue a prompt and return its id; raises Refused."""
        try:
            return self.post("/prompt", {"prompt": api, "client_id": "tests"})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read()).get("node_errors", {})) from error

    def wait(self, prompt_id: str, limit: float = 180.0) -> Run:
        """Wait for the end of a run."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return Run(prompt_id, entry["outputs"], dict(entry["status"]["messages"]))
            time.sleep(0.05)
        raise TimeoutError(f"run {prompt_id} did not end within {limit:.0f} s")

    def run(self, api: Api) -> Run:
        """Queue and wait, past ComfyUI's cache of node outputs; the run must succeed."""
        run = self.attempt(api)
        assert run.error is None, run.error
        return run

    def attempt(self, api: Api) -> Run:
        """Queue and wait, past ComfyUI's cache of node outputs."""
        self._nonce += 1
        for node in api.values():
            if node["class_type"] == "StrettoMeasure":
                node["inputs"]["nonce"] = self._nonce
        return self.wait(self.queue(api))

    def pixels(self, run: Run, node: str, index: int = 0) -> np.ndarray:
        """One picture of an output node as uint8 [height, width, channel]."""
        reference = run.outputs[node]["images"][index]
        return np.asarray(Image.open(io.BytesIO(self.raw("/view", **reference))))

    def traces(self, run: Run) -> list[dict[str, Any]]:
        """The traces of a run, through the pack's route."""
        answer = self.get("/stretto/traces", prompt_id=run.prompt_id)
        assert answer["schema"] == "traces@1"
        assert answer["prompt_id"] == run.prompt_id
        return answer["traces"]
