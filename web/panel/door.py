"""Who may talk to the page: a check of Host, Origin and framing in front of everything, and a way in for workflows.

Other pages in the same browser can send requests to loopback, and a name that was rebound can even read the answers. Both
carry headers that tell: `Host` names the address the browser believes to talk to, `Origin` the page that asks.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .measure.carried import parse
from .measure.errors import MeasureError
from .shelf import Shelf

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

LARGEST_WORKFLOW = 8 * 2**20  # bytes of a posted workflow; the largest that people share have a few hundred kilobytes
LONGEST_NAME = 120
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ROUTE = "/stretto/workflow"


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name in a Host header, without port and brackets, in small letters; empty when it is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class Door:
    """ASGI middleware: refuses foreign hosts and foreign origins, and says which pages may put this one in a frame.

    `listen` is the address that the page listens on, `server` ComfyUI's address: its editor may ask and may frame.
    """

    def __init__(self, app: Any, listen: str, server: str):
        self.app, self.listen = app, listen
        self.friends = origins_of(server)
        ancestors = " ".join(origin for origin in self.friends if "[" not in origin)  # CSP knows no IPv6 addresses
        self.framing = f"frame-ancestors 'self' {ancestors}".strip()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        problem = self.problem(headers, scope.get("method", "POST"))
        if problem is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await PlainTextResponse(problem, status_code=403)(scope, receive, send)
            return

        async def framed(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", self.framing.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, framed)

    def problem(self, headers: dict[str, str], method: str) -> str | None:
        """Why a request is refused, or None."""
        host = headers.get("host", "")
        if not self._is_ours(host_name(host)):
            return "This page does not answer to that host name."
        origin = headers.get("origin")
        if origin is None or method in SAFE_METHODS:
            return None
        if origin in self.friends or (urlsplit(origin).scheme in ("http", "https") and _authority(origin) == host):
            return None
        return "Another page may not do that."

    def _is_ours(self, name: str) -> bool:
        """Whether a browser that believes to talk to `name` cannot have been misled by a rebound name."""
        if is_loopback(name) or name == self.listen.lower():
            return True
        if is_loopback(self.listen):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return True  # an address cannot be rebound


def origins_of(server: str) -> list[str]:
    """The origins that ComfyUI's editor may have: its address, with every name of loopback when it is on this machine."""
    try:
        parts = urlsplit(server if "://" in server else f"http://{server}")
        name, port = parts.hostname or "", parts.port
    except ValueError:
        return []
    if parts.scheme not in ("http", "https") or not name:
        return []
    names = LOOPBACK_NAMES if is_loopback(name) else (name,)
    usual = {"http": 80, "https": 443}[parts.scheme]
    suffix = "" if port is None or port == usual else f":{port}"
    return [f"{parts.scheme}://{f'[{one}]' if ':' in one else one}{suffix}" for one in names]


def _authority(origin: str) -> str:
    return urlsplit(origin).netloc


# The way in for workflows


def workflow_route(shelf: Shelf) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint `POST /stretto/workflow`: {"workflow": UI or API JSON, "name": text} -> {"token": text}.

    The page opened with `/?workflow=<token>` begins with that workflow.
    """

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refusal(415, "Send the workflow as application/json.")
        try:
            body = await _bounded(request)
        except ClientDisconnect:
            return _refusal(400, "The connection ended early.")
        if body is None:
            return _refusal(413, f"A workflow may have at most {LARGEST_WORKFLOW // 2**20} MiB.")
        try:
            message = parse(body, "The request")
        except MeasureError as error:
            return _refusal(400, str(error))
        workflow, name = (message.get("workflow"), message.get("name", "")) if isinstance(message, dict) else (None, "")
        if not isinstance(workflow, dict) or not isinstance(name, str):
            return _refusal(400, 'Send {"workflow": a workflow in UI or API form, "name": text}.')
        try:
            token = shelf.put(workflow, name.strip()[:LONGEST_NAME] or "From the editor")
        except MeasureError as error:
            return _refusal(422, str(error))
        return JSONResponse({"token": token})

    return endpoint


async def _bounded(request: Request) -> bytes | None:
    """The body, or None as soon as it is too long."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_WORKFLOW:
            return None
    return bytes(body)


def _refusal(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)
