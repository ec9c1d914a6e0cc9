"""HTTP routes under /stretto (read-only)."""

import sys

from ..acceleration.hosts.comfy import TRACES


def register_routes() -> None:
    """Add the routes to ComfyUI's server; a process without one (tests, tools) has nothing to add to."""
    module = sys.modules.get("server")  # ComfyUI has loaded it long before custom nodes
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/stretto/traces")
    async def traces(request: web.Request) -> web.Response:
        prompt_id = request.query.get("prompt_id")
        if not prompt_id:
            return web.json_response({"error": "prompt_id is missing: /stretto/traces?prompt_id=..."}, status=400)
        return web.json_response({"schema": "traces@1", "prompt_id": prompt_id, "traces": TRACES.of_prompt(prompt_id)})
