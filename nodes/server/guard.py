"""Who may ask. ComfyUI has no accounts, and its older versions look at neither origin nor site of a request."""

import ipaddress
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

TOKEN_HEADER = "X-Stretto-Token"
#: Names, separated by commas, under which this server may be reached besides the loopback ones.
HOSTS_VARIABLE = "STRETTO_HOSTS"
#: A workflow is text; 256 nodes come to 200 kB.
MAX_BODY = 16 << 20


def refuse(status: int, words: str) -> web.HTTPException:
    """Return the exception that answers ``{"error": words}``."""
    kinds = {400: web.HTTPBadRequest, 403: web.HTTPForbidden, 415: web.HTTPUnsupportedMediaType}
    return kinds[status](text=json.dumps({"error": words}), content_type="application/json")


def hosts_of(environment: Mapping[str, str]) -> frozenset[str]:
    """Return the host names that the owner of this server allowed besides loopback."""
    names = environment.get(HOSTS_VARIABLE, "").split(",")
    return frozenset(name.strip().lower().strip("[]") for name in names if name.strip())


@dataclass(frozen=True)
class Guard:
    """The rules for everything that starts, stops or opens something.

    Attributes:
        hosts: host names that may stand in ``Host`` and ``Origin`` besides the loopback ones.
        token: secret of this start, which a page of the same origin is given and sends back with every change.
    """

    hosts: frozenset[str] = field(default_factory=lambda: hosts_of(os.environ))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def check_reading(self, request: web.Request, sites: tuple[str, ...] = ("same-origin",)) -> None:
        """Refuse what does not come from this machine, under a name of it, from a page of this server.

        Args:
            request: any request.
            sites: values of ``Sec-Fetch-Site`` that will do, where a browser sends one.

        Raises:
            aiohttp.web.HTTPForbidden: says which rule and, where there is one, the way out.
        """
        self._check_host(request)
        self._check_origin(request)
        site = _only(request, "Sec-Fetch-Site")
        if site is not None and site not in sites:
            raise refuse(403, f"this request comes from another site (Sec-Fetch-Site: {site})")

    async def read_change(self, request: web.Request) -> dict[str, Any]:
        """Return the JSON object of a request that changes something.

        Raises:
            aiohttp.web.HTTPException: 403 as for :meth:`check_reading` or without this start's token; 415 for anything but
                JSON; 400 for a body that is too large or no JSON object.
        """
        self.check_reading(request)
        if request.content_type != "application/json":
            raise refuse(415, f"the body must be application/json, not {request.content_type}")
        token = _only(request, TOKEN_HEADER) or ""
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            raise refuse(403, f"{TOKEN_HEADER} is not this start's token: reload the page (GET /stretto/session gives it)")
        body = bytearray()
        async for part in request.content.iter_any():
            body += part
            if len(body) > MAX_BODY:
                raise refuse(400, f"the body is larger than {MAX_BODY >> 20} MiB")
        try:
            document = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise refuse(400, "the body is not JSON") from None
        if not isinstance(document, dict):
            raise refuse(400, "the body must be a JSON object")
        return document

    def _check_host(self, request: web.Request) -> None:
        """Names other than loopback may have been pointed here by anybody (DNS rebinding)."""
        name = host_name(f"//{_only(request, 'Host') or ''}")
        if name in self.hosts:
            return
        if not is_loopback(name):
            raise refuse(
                403,
                f"this server was asked under the name {name!r}. The panel is for this machine alone; to allow the name, "
                f"start ComfyUI with the environment variable {HOSTS_VARIABLE}={name or 'NAME'}",
            )
        if request.remote is not None and not is_loopback(request.remote):
            raise refuse(
                403,
                f"the panel is for this machine alone, and this request comes from {request.remote}. To allow others, start "
                f"ComfyUI with the environment variable {HOSTS_VARIABLE} naming the host they use",
            )

    def _check_origin(self, request: web.Request) -> None:
        origin = _only(request, "Origin")
        if origin is None:
            return
        try:
            parts = urlsplit(origin)
            same = _address(origin) == _address(f"{parts.scheme}://{request.headers['Host']}")
        except ValueError:
            same, parts = False, None
        if not same and (parts is None or (parts.hostname or "") not in self.hosts):
            raise refuse(403, f"this request comes from a page of another origin ({origin!r})")


def host_name(address: str) -> str:
    """Return the host of an address in lower case, ``""`` where there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Return whether a name means this machine, without asking any resolver."""
    if name == "localhost":
        return True
    try:
        found = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _address(origin: str) -> tuple[str, int]:
    """Return host and port; raises ValueError for what is no web origin."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
        raise ValueError(origin)
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _only(request: web.Request, name: str) -> str | None:
    """Return the one value of a header, None where it is absent; two of them are refused."""
    values = request.headers.getall(name, [])
    if len(values) > 1:
        raise refuse(403, f"the header {name} was sent {len(values)} times")
    return values[0] if values else None
