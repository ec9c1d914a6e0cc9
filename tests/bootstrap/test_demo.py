"""demo.sh when things go wrong: a ComfyUI that dies, one that never answers, a person who stops it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.scripts.launch.comfyui_server import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="demo.sh is for systems with bash"),
    pytest.mark.skipif(not (ROOT / ".venv-panel").exists(), reason="needs ./test.sh's environments"),
]

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({} if 'object_info' in self.path else {'system': {}, 'devices': []}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
port = int(sys.argv[sys.argv.index('--port') + 1])
http.server.HTTPServer(('127.0.0.1', port), Handler).serve_forever()
"""


@pytest.fixture
def comfyui(tmp_path):
    """Return a function that makes a false ComfyUI out of the text of its main.py; it notes its process id."""

    def make(code: str) -> Path:
        folder = tmp_path / "ComfyUI"
        (folder / "comfy").mkdir(parents=True)
        (folder / "nodes.py").touch()
        note = f"import os, pathlib\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        (folder / "main.py").write_text(note + code)
        return folder

    return make


def start(folder: Path, *options: str) -> subprocess.Popen:
    """Start demo.sh from another folder with the false ComfyUI."""
    command = [str(ROOT / "demo.sh"), "--comfyui", str(folder), "--python", sys.executable, "--port", str(free_port())]
    return subprocess.Popen(
        [*command, *options], cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_pid(tmp_path: Path) -> int:
    """The process id of the false ComfyUI, once it runs."""
    note = tmp_path / "pid"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if note.exists() and note.read_text():
            return int(note.read_text())
        time.sleep(0.1)
    raise TimeoutError("the false ComfyUI was never started")


def is_gone(pid: int) -> bool:
    """True when the process has ended (it is its parent's child, so it is reaped soon)."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_comfyui_that_dies_shows_its_last_words(comfyui, tmp_path):
    demo = start(comfyui("import sys; print('CUDA is on fire'); sys.exit(3)"), "--once")
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "CUDA is on fire" in errors
    assert "ComfyUI stopped while starting (exit status 3)" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_comfyui_without_our_nodes_is_one_sentence_and_is_stopped(comfyui, tmp_path):
    demo = start(comfyui(SERVER), "--once")
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "could not load Stretto's nodes" in errors
    assert "Traceback" not in errors
    assert is_gone(wait_for_pid(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_the_demo_stops_comfyui(comfyui, tmp_path, number):
    demo = start(comfyui("import time; time.sleep(300)"))
    pid = wait_for_pid(tmp_path)
    time.sleep(1.0)
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert "Traceback" not in errors
    assert is_gone(pid)
