"""Routes under /stretto: what they tell, whom they refuse, and the panel as a child."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from yarl import URL

import stretto
from stretto.acceleration.compatibility import TECHNIQUES, compatible
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request
from stretto.nodes import routes
from stretto.nodes.server import guard as guards
from stretto.nodes.server import plan_facts
from stretto.nodes.server.digest import digest
from stretto.nodes.server.guard import MAX_BODY, TOKEN_HEADER, Guard
from stretto.nodes.server.panel import PYTHON_VARIABLE, Panel

from .tiny_models import sample

# Answers like the panel: its page, an upload, a stream, a workflow. Its arguments and surroundings end in a file.
FAKE_PANEL = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def answer(self, document, status=200):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Set-Cookie", "panel=1")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"path": self.path, "headers": dict(self.headers)})
    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/stretto/workflow":
            document = json.loads(body)
            if document["name"] == "bad":
                return self.answer({"error": "that is no workflow"}, 422)
            return self.answer({"token": "abc_D-1"})
        self.answer({"path": self.path, "body": body.decode()})
    def log_message(self, *_): pass

def wait():
    sys.stdin.buffer.read()
    os._exit(0)

if os.environ.get("FAKE_PANEL_DIES"):
    print("cannot find gradio")
    sys.exit(3)
with open("seen.json", "w") as file:
    json.dump({"argv": sys.argv, "root": os.environ.get("GRADIO_ROOT_PATH"), "path": os.environ.get("PYTHONPATH")}, file)
threading.Thread(target=wait, daemon=True).start()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def panel(tmp_path):
    """A panel whose program is ours, in a pack of its own."""
    (tmp_path / "cli.py").write_text(FAKE_PANEL)
    found = Panel(tmp_path, tmp_path / "log" / "panel.log", {**os.environ, PYTHON_VARIABLE: sys.executable, "PYTHONPATH": "/x"})
    yield found
    found.stop()


def asked(panel, talk, allowed=frozenset()):
    """Run ``talk(client, guard)`` against a server with the routes."""

    async def run():
        table, guard = web.RouteTableDef(), Guard(hosts=frozenset(allowed))
        routes.add_reading(table)
        routes.add_panel(table, guard, panel)
        app = web.Application()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            return await talk(client, guard)

    return asyncio.run(run())


async def started(client, guard):
    """Start the panel and wait until it answers; returns its status."""
    answer = await client.post("/stretto/panel/start", json={}, headers={TOKEN_HEADER: guard.token})
    assert answer.status == 200, await answer.text()
    for _ in range(200):
        found = await (await client.get("/stretto/panel")).json()
        if found["state"] != "starting":
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("it did not start")


# -- what can be read


def test_every_node_that_passes_a_model_on_says_what_it_asks_of_a_run():
    """A new node belongs in TECHNIQUES_OF, or in WITHOUT when it asks nothing: the sidebar tells conflicts from there."""
    nodes = asyncio.run(asyncio.run(stretto.comfy_entrypoint()).get_node_list())
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}
    passing = {
        name
        for name, schema in schemas.items()
        for kind in ("MODEL", "SAMPLER")
        if any(item.get_io_type() == kind for item in schema.inputs) and any(o.get_io_type() == kind for o in schema.outputs)
    }
    assert passing - plan_facts.WITHOUT <= set(plan_facts.TECHNIQUES_OF)
    assert set(plan_facts.TECHNIQUES_OF) | plan_facts.WITHOUT <= set(schemas)
    assert {name for names in plan_facts.TECHNIQUES_OF.values() for name in names} <= set(TECHNIQUES)


def test_what_the_nodes_request_is_what_the_facts_say():
    """Names of techniques in the source of the nodes, against the table."""
    known = {name for names in plan_facts.TECHNIQUES_OF.values() for name in names}
    for path in Path(routes.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            requests = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Request"
            if requests and isinstance(call.args[0], ast.Constant):
                assert call.args[0].value in known, path.name


def test_the_plan_route_serves_the_engines_own_table(panel):
    async def talk(client, _):
        return await (await client.get("/stretto/plan")).json()

    found = asked(panel, talk)
    pairs = {frozenset(pair) for pair in found["conflicts"]}
    for first in TECHNIQUES:
        for second in TECHNIQUES:
            wanted = not compatible(first, second) and {first, second} != {"measure"}
            assert (frozenset((first, second)) in pairs) == wanted, (first, second)
    assert frozenset(("core_cache", "cache")) in pairs
    assert found["nodes"]["StrettoCache"] == {"techniques": ["cache"], "accelerates": True}
    assert found["nodes"]["StrettoMeasure"]["accelerates"] is False


def test_runs_are_told_with_predicted_and_measured_gain(panel, tiny):
    host.TRACES.add("plain-prompt", "3", _trace(tiny, "measure", {}))
    host.TRACES.add("fast-prompt", "3", _trace(tiny, "cache", {"interval": 2, "warmup": 2, "tail": 1}))

    async def talk(client, _):
        newest = await (await client.get("/stretto/runs")).json()
        named = await (await client.get("/stretto/runs", params={"prompt_id": "plain-prompt"})).json()
        none = await (await client.get("/stretto/runs", params={"prompt_id": "../../etc/passwd"})).json()
        return newest["runs"], named["runs"], none["runs"]

    (newest,), (named,), none = asked(panel, talk)
    assert none == []
    assert newest["prompt_id"] == "fast-prompt" and newest["sampler_node"] == "3"
    assert newest["predicted"] > 1 and newest["measured"] > 0
    assert newest["rows"]["all"].count("forecast") == newest["counts"]["forecast"] > 0
    (cache,) = (item for item in newest["techniques"] if item["technique"] == "cache")
    assert cache["status"] == "active" and cache["factor"] == pytest.approx(newest["predicted"])
    assert named["predicted"] is None and named["counts"]["forecast"] == 0
    lengths = {len(newest[name]) for name in ("step_seconds", "levels", "reasons")}
    assert lengths == {len(newest["rows"]["all"])}


def test_a_digest_invents_nothing(tiny):
    trace = _trace(tiny, "cache", {"interval": 2, "warmup": 2, "tail": 1})
    found = digest(json.loads(json.dumps(trace)))
    assert found["measured"] is None and found["plain_seconds"] is None
    assert found["seconds"] == trace["seconds"]["sampler"]


def _trace(tiny, technique, settings):
    sample(host.request(tiny("sd3"), Request(technique, settings)), "sd3")
    return {key: value for key, value in host.TRACES.of_prompt(None)[-1].items() if key not in ("prompt_id", "sampler_node")}


# -- who is refused

SAME = "http://127.0.0.1"
FOREIGN = [
    ({"Origin": "https://evil.example"}, 403, "another origin"),
    ({"Origin": "null"}, 403, "another origin"),
    ({"Origin": "http://127.0.0.1:1"}, 403, "another origin"),
    ({"Origin": "http://localhost:80@evil.example"}, 403, "another origin"),
    ({"Origin": "file://"}, 403, "another origin"),
    ({"Origin": "http://[broken"}, 403, "another origin"),
    ({"Sec-Fetch-Site": "cross-site"}, 403, "another site"),
    ({"Sec-Fetch-Site": "same-site"}, 403, "another site"),
    ({"Host": "evil.example"}, 403, "under the name 'evil.example'"),
    ({"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}, 403, "under the name"),
    ({"Host": "127.0.0.1.evil.example"}, 403, "under the name"),
    ({"Host": "127.0.0.1@evil.example"}, 403, "under the name"),
    ({"Host": "localhost.evil.example"}, 403, "under the name"),
    ({"Host": "192.168.1.5:8188"}, 403, "under the name"),
    ({"Host": "0.0.0.0:8188"}, 403, "under the name"),
    ({"Host": "[broken"}, 403, "under the name"),
]
CHANGES = ("/stretto/panel/start", "/stretto/panel/stop", "/stretto/panel/workflow")


@pytest.mark.parametrize("headers, status, words", FOREIGN)
def test_requests_of_others_are_refused_everywhere(panel, headers, status, words):
    async def talk(client, guard):
        await started(client, guard)
        page = panel.child.page
        found = [await client.get(path, headers=headers) for path in ("/stretto/session", "/stretto/panel", page)]
        right = {TOKEN_HEADER: guard.token, **headers}
        found += [await client.post(path, json={}, headers=right) for path in CHANGES]
        found += [await client.post(page + "run", json={}, headers=headers)]
        return [(answer.status, await answer.text()) for answer in found]

    for got, text in asked(panel, talk):
        assert got == status and words in text
        assert "token" not in text.replace("this start's token", "")
    assert panel.alive(), "a refused request stopped the panel"


def test_a_page_of_this_server_gets_the_token_and_may_start(panel):
    async def talk(client, guard):
        origin = str(client.make_url("")).rstrip("/")
        headers = {"Sec-Fetch-Site": "same-origin", "Origin": origin}
        session = await client.get("/stretto/session", headers=headers)
        token = (await session.json())["token"]
        assert token == guard.token and session.headers["Cache-Control"] == "no-store"
        answer = await client.post("/stretto/panel/start", json={}, headers={**headers, TOKEN_HEADER: token})
        return answer.status

    assert asked(panel, talk) == 200


@pytest.mark.parametrize("path", CHANGES)
def test_a_change_needs_json_the_token_and_an_object(panel, path):
    async def talk(client, guard):
        right = {TOKEN_HEADER: guard.token}
        text = json.dumps({})
        tries = [
            ({"json": {}, "headers": {}}, 403, "not this start's token"),
            ({"json": {}, "headers": {TOKEN_HEADER: "x" * 43}}, 403, "not this start's token"),
            ({"json": {}, "headers": {TOKEN_HEADER: "é"}}, 403, "not this start's token"),
            ({"json": {"token": guard.token}}, 403, "not this start's token"),
            ({"data": text, "headers": {**right, "Content-Type": "text/plain"}}, 415, "application/json"),
            ({"data": {"a": "b"}, "headers": right}, 415, "application/json"),
            ({"data": text, "headers": {**right, "Content-Type": "application/jsonp"}}, 415, "application/json"),
            ({"data": b"{", "headers": {**right, "Content-Type": "application/json"}}, 400, "not JSON"),
            ({"data": b"[" * 200_000, "headers": {**right, "Content-Type": "application/json"}}, 400, "not JSON"),
            ({"data": b"\xff\xfe", "headers": {**right, "Content-Type": "application/json"}}, 400, "not JSON"),
            ({"json": [], "headers": right}, 400, "object"),
            ({"data": b" " * (MAX_BODY + 1), "headers": {**right, "Content-Type": "application/json"}}, 400, "larger than"),
        ]
        for arguments, status, words in tries:
            answer = await client.post(path, **arguments)
            assert (answer.status, words in await answer.text()) == (status, True), (arguments, await answer.text())
        assert (await client.get(path, headers=right)).status == 405

    asked(panel, talk)
    assert panel.child is None


def test_only_this_machine_unless_the_owner_allows_a_name():
    def try_from(remote, name, allowed=()):
        transport = Mock(get_extra_info=lambda key, default=None: (remote, 5) if key == "peername" else None)
        request = make_mocked_request("GET", "/stretto/session", headers={"Host": name}, transport=transport)
        try:
            Guard(hosts=frozenset(allowed)).check_reading(request)
        except web.HTTPForbidden as refused:
            return refused.text
        return ""

    assert try_from("127.0.0.1", "localhost:8188") == ""
    assert try_from("::1", "[::1]:8188") == ""
    assert try_from("::ffff:127.0.0.1", "127.0.0.1:8188") == ""
    assert "comes from 192.168.1.9" in try_from("192.168.1.9", "localhost:8188")
    assert "STRETTO_HOSTS=studio.lan" in try_from("192.168.1.9", "studio.lan:8188")
    assert try_from("192.168.1.9", "studio.lan:8188", {"studio.lan"}) == ""
    assert guards.hosts_of({"STRETTO_HOSTS": " Studio.lan, [fd00::1] ,,"}) == {"studio.lan", "fd00::1"}


# -- the panel as a child


def test_the_panel_starts_with_fixed_arguments_and_ends(panel, tmp_path):
    async def talk(client, guard):
        evil = {"port": 0, "python": "/bin/sh", "command": ["rm"], "server": "http://evil.example", "out": "../../x", "cwd": "/"}
        await client.post("/stretto/panel/start", json=evil, headers={TOKEN_HEADER: guard.token})
        found = await started(client, guard)
        first = panel.child
        again = await started(client, guard)  # a second start keeps the one that runs
        assert panel.child is first and again["page"] == found["page"]
        seen = json.loads((tmp_path / "seen.json").read_text())
        assert seen["argv"] == [
            str(tmp_path / "cli.py"), "panel", "--server", f"http://127.0.0.1:{client.port}",
            "--port", str(found["port"]), "--until-stdin-closes",
        ]  # fmt: skip
        assert seen["root"] == found["page"].rstrip("/") and seen["path"] is None
        assert len(first.key) >= 32 and first.key in found["page"]
        stopped = await client.post("/stretto/panel/stop", json={}, headers={TOKEN_HEADER: guard.token})
        assert (await stopped.json())["state"] == "stopped" and first.process.poll() is not None
        gone = await client.get(found["page"])
        assert gone.status == 404 and "start it again" in await gone.text()

    asked(panel, talk)


def test_a_panel_that_dies_leaves_its_last_lines(panel):
    panel.environment = {**panel.environment, "FAKE_PANEL_DIES": "1"}
    found = asked(panel, started)
    assert found["state"] == "failed" and found["exit_status"] == 3
    assert "cannot find gradio" in found["log"] and found["log_file"] == str(panel.log)


def test_without_an_environment_the_answer_is_what_to_copy(panel, tmp_path):
    del panel.environment[PYTHON_VARIABLE]

    async def talk(client, guard):
        answer = await client.post("/stretto/panel/start", json={"python": sys.executable}, headers={TOKEN_HEADER: guard.token})
        return answer.status, await answer.json()

    status, found = asked(panel, talk)
    assert status == 409 and found["state"] == "stopped" and not found["can_start"]
    assert str(tmp_path / ".venv-panel") in found["command"] and "requirements-panel.txt" in found["command"]
    panel.environment[PYTHON_VARIABLE] = "/nowhere/python"
    status, found = asked(panel, talk)
    assert status == 409 and "/nowhere/python" in found["error"]


@pytest.mark.parametrize("port", [-1, 80, 65536, 1.5, True, "7860; rm -rf /", "7860", None, [7860]])
def test_a_port_is_a_number_or_nothing_starts(panel, port):
    async def talk(client, guard):
        answer = await client.post("/stretto/panel/start", json={"port": port}, headers={TOKEN_HEADER: guard.token})
        return answer.status, (await answer.json())["error"]

    status, words = asked(panel, talk)
    assert status == 409 and "1024 to 65535" in words and panel.child is None


def test_a_taken_port_is_named(panel):
    async def talk(client, guard):
        answer = await client.post("/stretto/panel/start", json={"port": client.port}, headers={TOKEN_HEADER: guard.token})
        return answer.status, (await answer.json())["error"]

    status, words = asked(panel, talk)
    assert status == 409 and "is taken" in words


def test_a_workflow_is_handed_over(panel):
    async def talk(client, guard):
        right = {TOKEN_HEADER: guard.token}
        early = await client.post("/stretto/panel/workflow", json={"workflow": {}}, headers=right)
        assert early.status == 409 and "start it first" in (await early.json())["error"]
        page = (await started(client, guard))["page"]
        good = await client.post("/stretto/panel/workflow", json={"workflow": {"nodes": []}, "name": "a"}, headers=right)
        assert (await good.json()) == {"page": f"{page}?workflow=abc_D-1&embed=1"}
        bad = await client.post("/stretto/panel/workflow", json={"workflow": {}, "name": "bad"}, headers=right)
        assert bad.status == 409 and "that is no workflow" in (await bad.json())["error"]
        for body in ({}, {"workflow": "/etc/passwd"}, {"workflow": {}, "name": 3}):
            assert (await client.post("/stretto/panel/workflow", json=body, headers=right)).status == 400

    asked(panel, talk)


def test_the_page_is_handed_on_to_the_panel_and_nowhere_else(panel):
    async def talk(client, guard):
        page = (await started(client, guard))["page"]
        secrets = {"Cookie": "a=b", "Authorization": "Basic x", TOKEN_HEADER: guard.token, "Range": "bytes=0-1"}
        answer = await client.get(f"{page}gradio_api/file=a%2Fb?x=1&y=%20", headers=secrets)
        seen = await answer.json()
        assert seen["path"] == "/gradio_api/file=a%2Fb?x=1&y=%20"
        assert seen["headers"]["X-Forwarded-Host"] == f"127.0.0.1:{client.port}" and seen["headers"]["Range"] == "bytes=0-1"
        assert not {"Cookie", "Authorization", TOKEN_HEADER, "Origin"} & set(seen["headers"])
        assert "Set-Cookie" not in answer.headers and "Access-Control-Allow-Origin" not in answer.headers
        sent = await client.post(f"{page}upload", data=b"x" * 300_000)
        assert (await sent.json()) == {"path": "/upload", "body": "x" * 300_000}
        for rest in ("/evil.example/x", "//evil.example/x", "@evil.example/", "http://evil.example/", "%2e%2e/%2e%2e/x", ":1/"):
            handed = await client.session.get(as_it_is(client, page + rest))
            assert handed.status in (200, 404), rest
            if handed.status == 200:
                assert (await handed.json())["headers"]["Host"] == f"127.0.0.1:{panel.child.port}", rest
        for wrong in ("/stretto/page/", "/stretto/page/x/", f"/stretto/page/{panel.child.key[:-1]}/", "/stretto/page/é/"):
            assert (await client.get(wrong)).status == 404

    asked(panel, talk)


def as_it_is(client, path):
    """An address that the client does not tidy."""
    return URL(f"http://127.0.0.1:{client.port}{path}", encoded=True)


def test_a_panel_never_outlives_a_comfyui_that_is_killed(panel, tmp_path):
    """Killed with no chance to tidy up: the panel sees its standard input close."""
    source = routes.ROOT / "nodes" / "server" / "panel.py"
    program = textwrap.dedent(f"""
        import importlib.util, os, sys, time
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("panel", {str(source)!r})
        sys.modules["panel"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = Path({str(tmp_path)!r})
        panel = module.Panel(folder, folder / "log.txt", dict(os.environ, {PYTHON_VARIABLE}=sys.executable))
        print(panel.start("http://127.0.0.1:1").process.pid, flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while not (tmp_path / "seen.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(pid)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_no_route_reads_a_path_of_a_request():
    """The only files these modules open are the panel's log and program, named when ComfyUI starts."""
    folder = Path(routes.__file__).parent
    for path in (folder / "routes.py", *(folder / "server").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"shell\s*=\s*True|os\.system|\beval\(|\bexec\(", text), path.name
        assert "FileResponse" not in text and "static(" not in text, path.name
