"""The panel's page through ComfyUI's own server.

A frame of another origin would be refused where ComfyUI is told to load nothing from elsewhere, and would not be reachable
where a browser reaches ComfyUI through a tunnel. So the page has ComfyUI's origin: requests below a path with a secret of
this start are handed on to the panel on loopback, and nowhere else.
"""

import asyncio

import aiohttp
from aiohttp import web
from yarl import URL

#: Headers of one connection only (RFC 9110, 7.6.1), and those that aiohttp sets itself.
CONNECTION = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect",
}  # fmt: skip
#: What a page of ComfyUI's may have, and the panel has no use for.
PRIVATE = {"cookie", "authorization", "origin", "referer", "forwarded", "x-forwarded-for", "x-stretto-token"}
#: What the panel says to browsers that ask it directly.
DIRECT = {"set-cookie", "content-length"}
CHUNK = 1 << 16


async def hand_on(request: web.Request, panel_url: str, root: str) -> web.StreamResponse:
    """Answer ``request`` with the panel's answer, piece by piece as it comes.

    Args:
        request: a request whose path begins with ``root``.
        panel_url: where the panel answers, ``http://127.0.0.1:<port>``.
        root: the path of the page on this server, ending in ``/``.
    """
    _, _, rest = request.rel_url.raw_path.partition(root)
    query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
    target = URL(f"{panel_url}/{rest.lstrip('/')}{query}", encoded=True)
    headers = {name: value for name, value in request.headers.items() if name.lower() not in CONNECTION | PRIVATE}
    headers |= {"X-Forwarded-Host": request.host, "X-Forwarded-Proto": request.scheme}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as client,
            client.request(
                request.method,
                target,
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as answer,
        ):
            return await _pass(request, answer)
    except (aiohttp.ClientConnectorError, asyncio.TimeoutError):
        return web.json_response({"error": "the panel does not answer: it may have been stopped"}, status=502)


async def _pass(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in CONNECTION | DIRECT and not name.lower().startswith("access-control-"):
            response.headers.add(name, value)
    try:
        await response.prepare(request)
        async for part in answer.content.iter_chunked(CHUNK):
            await response.write(part)
        await response.write_eof()
    except (ConnectionError, aiohttp.ClientPayloadError):
        pass  # the browser, or the panel, went away in the middle
    return response
