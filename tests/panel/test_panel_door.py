"""Who gets in: foreign hosts, foreign pages, and what the way in for workflows takes."""

import json

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from stretto.web.panel import door
from stretto.web.panel.shelf import MOST_KEPT, Shelf

HOST = "127.0.0.1:7860"
COMFY = "http://127.0.0.1:8188"


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def client_of(shelf, listen="127.0.0.1", host=HOST):
    async def page(request):
        return PlainTextResponse("page")

    routes = [Route(door.ROUTE, door.workflow_route(shelf), methods=["POST"]), Route("/", page, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(door.Door, listen=listen, server=COMFY)])
    return TestClient(app, base_url=f"http://{host}")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "127.0.0.2"])
def test_names_of_loopback_are_let_in(shelf, host):
    answer = client_of(shelf).get("/", headers={"host": host})
    assert answer.status_code == 200
    framing = answer.headers["content-security-policy"]
    assert "'self'" in framing and COMFY in framing and "http://localhost:8188" in framing
    assert "x-frame-options" not in answer.headers, "ComfyUI's sidebar shows the page in a frame"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.2", "", "[", "a@b"])
def test_a_rebound_name_reads_nothing(shelf, host):
    answer = client_of(shelf).get("/", headers={"host": host})
    assert answer.status_code == 403 and answer.text != "page"


def test_a_page_for_others_answers_to_addresses_but_not_to_names(shelf):
    client = client_of(shelf, listen="0.0.0.0")
    assert client.get("/", headers={"host": "192.168.1.2:7860"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example:7860"}).status_code == 403


@pytest.mark.parametrize(
    "origin,status",
    [
        (None, 200),
        (f"http://{HOST}", 200),
        ("http://localhost:8188", 200),
        (COMFY, 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1:9999", 403),
        ("null", 403),
        (f"file://{HOST}", 403),
        (f"http://{HOST}.evil.example", 403),
    ],
)
def test_only_the_page_itself_and_the_editor_may_change_anything(shelf, workflow, origin, status):
    client = client_of(shelf)
    headers = {} if origin is None else {"origin": origin}
    assert client.post(door.ROUTE, json={"workflow": workflow, "name": "x"}, headers=headers).status_code == status
    assert client.post("/", headers=headers).status_code == status, "and so for everything behind the door"
    assert bool(shelf.choices()) == (status == 200)


def test_a_workflow_gets_a_token(shelf, workflow):
    answer = client_of(shelf).post(door.ROUTE, json={"workflow": workflow, "name": "My canvas"})
    token = answer.json()["token"]
    assert len(token) >= 20 and shelf.get(token).document == workflow and shelf.get(token).name == "My canvas"
    assert shelf.choices()[0] == ("My canvas", token)
    again = client_of(shelf).post(door.ROUTE, json={"workflow": workflow}).json()["token"]
    assert again != token


@pytest.mark.parametrize(
    "body,kind,status",
    [
        (b'{"workflow": {}}', "text/plain", 415),
        (b'{"workflow": {}}', "", 415),
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"workflow": "../../etc/passwd"}', "application/json", 400),
        (b'{"workflow": {}, "name": 3}', "application/json", 400),
        (b'{"workflow": {"a": 1}}', "application/json", 422),
        (b'{"workflow": {}}', "application/json", 422),
        (b'{"name": "' + b"a" * (9 * 2**20) + b'"}', "application/json", 413),
    ],
)
def test_anything_else_is_refused_in_words(shelf, body, kind, status):
    answer = client_of(shelf).post(door.ROUTE, content=body, headers={"content-type": kind})
    assert answer.status_code == status and json.loads(answer.text)["error"].endswith(".") and not shelf.choices()


def test_few_are_kept(shelf, workflow):
    tokens = [shelf.put(workflow, str(number)) for number in range(MOST_KEPT + 3)]
    assert not shelf.has(tokens[2]) and shelf.has(tokens[3]) and len(shelf.choices()) == MOST_KEPT


@pytest.mark.parametrize(
    "server,origins",
    [
        ("http://127.0.0.1:8188", ["http://localhost:8188", "http://127.0.0.1:8188", "http://[::1]:8188"]),
        ("https://box.example:443", ["https://box.example"]),
        ("ftp://x", []),
        ("http://[", []),
    ],
)
def test_origins_of_the_editor(server, origins):
    assert door.origins_of(server) == origins
