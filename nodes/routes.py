"""HTTP routes under /stretto: traces and facts to read, and the panel to start, stop and fill."""

import asyncio
import atexit
import os
import sys
from pathlib import Path
from secrets import compare_digest
from typing import Any

from aiohttp import web

from ..acceleration.figures import plain_run
from ..acceleration.hosts.comfy import TRACES
from .server.digest import digest
from .server.guard import Guard
from .server.page import hand_on
from .server.panel import PAGE_PATH, Panel, PanelError
from .server.plan_facts import plan_facts

ROOT = Path(__file__).resolve().parent.parent
#: What a new page, a reload or a link from ComfyUI's own says about where it comes from.
OPENING = ("same-origin", "none")
#: Longest name of a workflow that is handed on.
LONGEST_NAME = 200


def register_routes() -> None:
    """Add the routes to ComfyUI's server; a process without one (tests, tools) has nothing to add to."""
    module = sys.modules.get("server")  # ComfyUI has loaded it long before custom nodes
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is None:
        return
    import folder_paths

    log = Path(folder_paths.get_user_directory()) / "stretto-panel.log"
    panel = Panel(ROOT, log, os.environ)
    atexit.register(panel.stop)
    add_reading(server.routes)
    add_panel(server.routes, Guard(), panel)


def add_reading(routes: web.RouteTableDef) -> None:
    """Add what can only be read: traces of runs, and which techniques go together."""

    @routes.get("/stretto/traces")
    async def traces(request: web.Request) -> web.Response:
        prompt_id = request.query.get("prompt_id")
        if not prompt_id:
            return web.json_response({"error": "prompt_id is missing: /stretto/traces?prompt_id=..."}, status=400)
        return web.json_response({"schema": "traces@1", "prompt_id": prompt_id, "traces": TRACES.of_prompt(prompt_id)})

    @routes.get("/stretto/plan")
    async def plan(_: web.Request) -> web.Response:
        return web.json_response(plan_facts())

    @routes.get("/stretto/runs")
    async def runs(request: web.Request) -> web.Response:
        return web.json_response({"schema": "runs@1", "runs": digests(request.query.get("prompt_id"))})


def digests(prompt_id: str | None) -> list[dict[str, Any]]:
    """Return the digests of the runs of one prompt, of the newest one that left a trace where none is named."""
    every = TRACES.all()
    if prompt_id is None and every:
        prompt_id = every[-1].get("prompt_id")
    return [digest(trace, plain_run(trace, every)) for trace in every if trace.get("prompt_id") == prompt_id]


def add_panel(routes: web.RouteTableDef, guard: Guard, panel: Panel) -> None:
    """Add what starts, stops and fills the panel; every change needs the token that ``session`` gives."""

    @routes.get("/stretto/session")
    async def session(request: web.Request) -> web.Response:
        guard.check_reading(request)
        return web.json_response({"schema": "session@1", "token": guard.token}, headers={"Cache-Control": "no-store"})

    @routes.get("/stretto/panel")
    async def status(request: web.Request) -> web.Response:
        guard.check_reading(request)
        return web.json_response(await panel.status(), headers={"Cache-Control": "no-store"})

    @routes.post("/stretto/panel/start")
    async def start(request: web.Request) -> web.Response:
        body = await guard.read_change(request)
        try:
            panel.start(own_address(request), body.get("port", 0))
        except PanelError as error:
            return web.json_response({**await panel.status(), "error": str(error)}, status=409)
        return web.json_response(await panel.status())

    @routes.post("/stretto/panel/stop")
    async def stop(request: web.Request) -> web.Response:
        await guard.read_change(request)
        await asyncio.to_thread(panel.stop)
        return web.json_response(await panel.status())

    @routes.post("/stretto/panel/workflow")
    async def workflow(request: web.Request) -> web.Response:
        body = await guard.read_change(request)
        document, name = body.get("workflow"), body.get("name", "canvas")
        if not isinstance(document, dict) or not isinstance(name, str):
            return web.json_response({"error": 'expected {"workflow": {...}, "name": "..."}'}, status=400)
        try:
            return web.json_response({"page": await panel.hand_over(document, name[:LONGEST_NAME])})
        except PanelError as error:
            return web.json_response({"error": str(error), "page": panel.child.page if panel.alive() else None}, status=409)

    async def page(request: web.Request) -> web.StreamResponse:
        guard.check_reading(request, OPENING)
        child, key = panel.child, request.match_info["key"]
        if child is None or not compare_digest(key.encode(), child.key.encode()):
            raise web.HTTPNotFound(text="The panel that this page belonged to was stopped: start it again in ComfyUI.")
        return await hand_on(request, child.url, child.page)

    for method in ("GET", "POST"):
        routes.route(method, PAGE_PATH + "{key}/{rest:.*}")(page)


def own_address(request: web.Request) -> str:
    """Return where this server was reached, from the connection itself and not from what the request says."""
    host, port = request.transport.get_extra_info("sockname")[:2]
    scheme = "https" if request.transport.get_extra_info("sslcontext") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
