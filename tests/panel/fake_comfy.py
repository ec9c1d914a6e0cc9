"""A ComfyUI server in miniature: the HTTP routes and WebSocket events that the measuring code relies on.

Nothing sleeps: the seconds in its traces are computed from what the workflow asks for, times a drift.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

CORE = (
    "UNETLoader",
    "VAELoader",
    "EmptySD3LatentImage",
    "EmptyHunyuanLatentVideo",
    "ModelSamplingSD3",
    "KSampler",
    "VAEDecode",
    "SaveImage",
    "PreviewImage",
)
CACHE = {
    "input": {
        "required": {
            "model": ["MODEL", {}],
            "method": ["COMBO", {"options": ["Taylor", "EasyCache"]}],
            "interval": ["INT", {"default": 2, "min": 1, "max": 8}],
            "order": ["INT", {"default": 1, "min": 0, "max": 3}],
        }
    },
    "output": ["MODEL"],
    "display_name": "Stretto Cache",
}
PACK = ("StrettoCache", "StrettoMeasure", "StrettoReport")
TEXT = "StrettoDemoText"
SKIPPED_COST = 0.05


def _schema(required: dict[str, Any], output: tuple[str, ...] = ("MODEL",), **more: Any) -> dict[str, Any]:
    return {"input": {"required": required}, "output": list(output), "output_node": not output, **more}


_INT = ["INT", {"default": 1, "min": 0, "max": 2**53}]
# Schemas for `FakeComfy(schemas=SCHEMAS)`: enough to read, change and draw the workflow of the tests.
SCHEMAS = {
    "UNETLoader": _schema({"unet_name": [["m.safetensors"]], "weight_dtype": [["default"]]}),
    "VAELoader": _schema({"vae_name": [["v.safetensors"]]}, ("VAE",)),
    TEXT: _schema({"text": ["STRING", {"multiline": True}]}, ("CONDITIONING",)),
    "EmptySD3LatentImage": _schema({"width": _INT, "height": _INT, "batch_size": _INT}, ("LATENT",)),
    "KSampler": _schema(
        {
            "model": ["MODEL"], "seed": _INT, "steps": ["INT", {"default": 20, "min": 1, "max": 10000}],
            "cfg": ["FLOAT", {"default": 8.0}], "sampler_name": [["euler", "heun"]], "scheduler": [["simple", "normal"]],
            "positive": ["CONDITIONING"], "negative": ["CONDITIONING"], "latent_image": ["LATENT"],
            "denoise": ["FLOAT", {"default": 1.0}],
        },
        ("LATENT",),
    ),
    "VAEDecode": _schema({"samples": ["LATENT"], "vae": ["VAE"]}, ("IMAGE",)),
    "SaveImage": _schema({"images": ["IMAGE"], "filename_prefix": ["STRING", {}]}, ()),
    "PreviewImage": _schema({"images": ["IMAGE"]}, ()),
    "StrettoMeasure": _schema({"model": ["MODEL"], "nonce": _INT}),
    "StrettoReport": _schema({"samples": ["LATENT"]}, ("IMAGE",)),
    "StrettoCache": _schema(
        {
            "model": ["MODEL"], "method": [["Taylor", "EasyCache"]], "interval": ["INT", {"default": 2, "min": 1, "max": 8}],
            "order": ["INT", {"default": 1, "min": 0, "max": 3}],
            "threshold": ["FLOAT", {"default": 0.05, "min": 0.0, "max": 1.0}], "warmup": _INT,
            "tail": _INT, "required": ["BOOLEAN", {"default": False}],
        },
        display_name="Stretto Cache",
    ),
}  # fmt: skip


class FakeComfy:
    """`drift(n)` multiplies the seconds of the n-th run; `fail` is "", "execution", "interrupt", "hang" or "die"."""

    def __init__(
        self,
        with_pack: bool = True,
        drift: Callable[[int], float] = lambda n: 1.0,
        side: int = 64,
        schemas: dict[str, Any] | None = None,
    ):
        self.classes = {*CORE, TEXT, *(PACK if with_pack else ())}
        self.with_pack, self.drift, self.side = with_pack, drift, side
        self.schemas = schemas or {}
        self.previews: list[str | None] = []  # what each run asked for
        self.fail, self.fail_at = "", 0
        self.delay = 0.0  # seconds before the history answers
        self.models: dict[str, list[str]] = {}  # by name of an input, where only some are there
        self.runs: list[dict[str, Any]] = []
        self.history: dict[str, Any] = {}
        self.traces: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.interrupted: set[str] = set()
        self.seen: set[str] = set()
        self.sockets: dict[str, WebSocket] = {}
        self.tasks: set[asyncio.Task] = set()
        routes = [
            Route("/system_stats", self._stats),
            Route("/object_info", self._info),
            Route("/prompt", self._prompt, methods=["POST"]),
            Route("/history/{id}", self._history),
            Route("/view", self._view),
            Route("/queue", self._accept, methods=["POST"]),
            Route("/interrupt", self._interrupt, methods=["POST"]),
            WebSocketRoute("/ws", self._ws),
        ]
        if with_pack:
            routes.append(Route("/stretto/traces", self._traces))
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=0,
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> str:
        """Start serving and return the address."""
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("the fake server did not start")
            time.sleep(0.005)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        """Stop serving at once."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=5)

    # Routes

    async def _stats(self, request: Request) -> Response:
        system = {
            "os": "posix",
            "ram_total": 2**34,
            "comfyui_version": "0.0-fake",
            "python_version": "3.11.0 (main)",
            "pytorch_version": "2.0",
            "argv": ["main.py", "--cpu", "--base-directory", "/x/y"],
        }
        return JSONResponse({"system": system, "devices": [{"name": "cpu", "type": "cpu", "vram_total": 2**34}]})

    async def _info(self, request: Request) -> Response:
        known = {name: {"input": {"required": {}}, "output": []} for name in self.classes}
        if self.with_pack:
            known["StrettoCache"] = CACHE
        return JSONResponse({name: self.schemas.get(name, schema) for name, schema in known.items()})

    async def _history(self, request: Request) -> Response:
        await asyncio.sleep(self.delay)
        key = request.path_params["id"]
        return JSONResponse({key: self.history[key]} if key in self.history else {})

    async def _view(self, request: Request) -> Response:
        return Response(self.files[request.query_params["filename"]], media_type="image/png")

    async def _accept(self, request: Request) -> Response:
        return Response()

    async def _interrupt(self, request: Request) -> Response:
        self.interrupted.add((await request.json()).get("prompt_id", ""))
        return Response()

    async def _traces(self, request: Request) -> Response:
        key = request.query_params["prompt_id"]
        return JSONResponse({"schema": "traces@1", "prompt_id": key, "traces": self.traces.get(key, [])})

    async def _ws(self, socket: WebSocket) -> None:
        await socket.accept()
        client = socket.query_params["clientId"]
        self.sockets[client] = socket
        await socket.send_json({"type": "status", "data": {"status": {}}})
        try:
            while True:
                await socket.receive()
        except (WebSocketDisconnect, RuntimeError):
            if self.sockets.get(client) is socket:
                del self.sockets[client]

    async def _prompt(self, request: Request) -> Response:
        body = await request.json()
        api = body["prompt"]
        for key, node in api.items():
            if node["class_type"] not in self.classes:
                return JSONResponse(
                    {
                        "error": {
                            "type": "invalid_prompt",
                            "message": f"Cannot execute because node {node['class_type']} does not exist.",
                        },
                        "node_errors": {},
                    },
                    status_code=400,
                )
            for name in set(self.models) & set(node["inputs"]):
                value, there = node["inputs"][name], self.models[name]
                if value not in there:
                    error = {
                        "type": "value_not_in_list",
                        "message": "Value not in list",
                        "details": f"{name}: '{value}' not in {there}",
                        "extra_info": {"input_name": name, "input_config": [there], "received_value": value},
                    }
                    return JSONResponse(
                        {
                            "error": {"type": "prompt_outputs_failed_validation", "message": "failed"},
                            "node_errors": {key: {"errors": [error], "class_type": node["class_type"]}},
                        },
                        status_code=400,
                    )
            if node["class_type"] == "KSampler" and node["inputs"]["steps"] > 10000:
                error = {
                    "type": "value_bigger_than_max",
                    "message": "Value 20000 bigger than max of 10000",
                    "details": "steps",
                    "extra_info": {"input_name": "steps"},
                }
                return JSONResponse(
                    {
                        "error": {"type": "prompt_outputs_failed_validation", "message": "failed"},
                        "node_errors": {key: {"errors": [error], "class_type": "KSampler"}},
                    },
                    status_code=400,
                )
        key = f"run-{len(self.runs)}"
        self.runs.append(api)
        self.previews.append((body.get("extra_data") or {}).get("preview_method"))
        task = asyncio.create_task(self._run(key, api, body["client_id"]))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return JSONResponse({"prompt_id": key, "number": 1, "node_errors": {}})

    # One run

    async def _run(self, key: str, api: dict[str, Any], client: str) -> None:
        async def send(kind: str, **data: Any) -> None:
            if client in self.sockets:
                await self.sockets[client].send_text(json.dumps({"type": kind, "data": {**data, "prompt_id": key}}))

        number = len(self.runs) - 1
        fail = self.fail if number >= self.fail_at else ""
        signature = json.dumps(api, sort_keys=True)
        cached = list(api) if signature in self.seen else []
        self.seen.add(signature)
        sampler = next(k for k, node in api.items() if node["class_type"] == "KSampler")
        await send("execution_start")
        await send("execution_cached", nodes=cached)
        await send("executing", node=sampler)
        await self.sockets[client].send_bytes(b"\0\0\0\1preview")
        await send("progress", value=1, max=api[sampler]["inputs"]["steps"], node=sampler)
        if fail == "die":
            self.server.should_exit = self.server.force_exit = True
            await self.sockets[client].close(1011)
            return
        if fail == "hang":
            while key not in self.interrupted:
                await asyncio.sleep(0.01)
            await send("execution_interrupted", node_id=sampler, node_type="KSampler")
            return
        if fail == "interrupt":
            await send("execution_interrupted", node_id=sampler, node_type="KSampler")
            return
        if fail == "execution":
            await send(
                "execution_error",
                node_id=sampler,
                node_type="KSampler",
                exception_type="RuntimeError",
                exception_message="mat1 and mat2 shapes cannot be multiplied\nmore",
                traceback=["secret"],
            )
            return
        self._finish(key, api, sampler, number)
        await send("execution_success")
        await send("executing", node=None)

    def _finish(self, key: str, api: dict[str, Any], sampler: str, number: int) -> None:
        """Record history, pictures and trace of a run."""
        cache = next((node["inputs"] for node in api.values() if node["class_type"] == "StrettoCache"), None)
        text = next(node["inputs"]["text"] for node in api.values() if "text" in node["inputs"])
        steps, seed = api[sampler]["inputs"]["steps"], api[sampler]["inputs"]["seed"]
        batch = next(node["inputs"]["batch_size"] for node in api.values() if "batch_size" in node["inputs"])
        length = next((node["inputs"]["length"] for node in api.values() if "length" in node["inputs"]), 1)
        references = []
        # Like VAEDecode on a batch of clips: all frames of the first, then all of the second.
        for index in range(batch):
            for frame in range(length):
                name = f"{key}-{index}-{frame}.png"
                self.files[name] = picture(text, seed + index, steps, cache is not None, self.side, frame)
                references.append({"filename": name, "subfolder": "", "type": "temp"})
        output = next(k for k, node in api.items() if node["class_type"] in ("SaveImage", "PreviewImage"))
        self.history[key] = {"outputs": {output: {"images": references}}, "status": {"completed": True, "messages": []}}
        if "StrettoMeasure" in [node["class_type"] for node in api.values()]:
            self.traces[key] = [trace(key, steps, cache, 0.01 * self.drift(number))]


def picture(text: str, seed: int, steps: int, accelerated: bool, side: int, frame: int = 0) -> bytes:
    """PNG: a smooth pattern of the prompt and seed, disturbed the more the fewer steps were computed.

    From frame to frame the pattern wanders and the disturbance is another one.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{text}{seed}".encode()).digest()[:4], "big"))
    y, x = np.mgrid[0:side, 0:side] / side
    waves = rng.uniform(1, 6, (3, 3))
    clean = np.stack([np.sin(2 * np.pi * (a * x + b * y + c + frame / 20)) for a, b, c in waves], axis=-1) * 90 + 128
    noise = rng.normal(size=(frame + 1, *clean.shape))[-1] * (60.0 / steps + (0.8 if accelerated else 0.0))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(clean + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def trace(prompt_id: str, steps: int, cache: dict[str, Any] | None, unit: float) -> dict[str, Any]:
    """A trace@1 of a run in which every computed evaluation takes `unit` seconds."""
    evaluations = []
    for index in range(steps):
        skip = cache is not None and 3 <= index < steps - 1 and (index - 3) % cache["interval"] != 0
        decision = "forecast" if skip else "computed"
        branches = [
            {"branch": name, "decision": decision, "blocks_computed": 0 if skip else 4, "blocks_total": 4, "tokens": 16}
            for name in ("cond", "uncond")
        ]
        evaluations.append(
            {
                "index": index,
                "position": index / steps,
                "sigma": 1 - index / steps,
                "decision": decision,
                "reason": "interval" if skip else "warm-up" if index < 3 else "",
                "seconds": unit * (SKIPPED_COST if skip else 1),
                "branches": branches,
            }
        )
    skipped = sum(e["decision"] == "forecast" for e in evaluations)
    seconds = sum(e["seconds"] for e in evaluations)
    techniques = [{"technique": "cache", "status": "active", "reason": "last block, every 2"}] if cache else []
    return {
        "schema": "trace@1",
        "prompt_id": prompt_id,
        "sampler_node": "5",
        "ordinal": 0,
        "outcome": "completed",
        "model": {"family": "sd3"},
        "sampler": {"name": "euler"},
        "latent_shape": [1, 16, 8, 8],
        "sigmas": [1 - i / steps for i in range(steps + 1)],
        "techniques": techniques,
        "notes": [],
        "evaluations": evaluations,
        "totals": {"evaluations": steps, "computed": steps - skipped, "forecast": skipped, "reused": 0, "mixed": 0},
        "seconds": {"sampler": seconds, "evaluations": seconds, "overhead": 0.0},
        "memory": {"kind": "rss", "peak_bytes": 500_000_000, "store_peak_bytes": 65536 if cache else 0},
    }
