"""Child programs: found dead at once, stopped with everything they started; ports checked before anything starts."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.scripts.launch.comfyui_server import Child, free_port, require_free_port
from stretto.scripts.launch.console import Progress, SetupError, clock, run_logged

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    """A command that runs a few lines of Python."""
    return [sys.executable, "-c", code]


def test_a_taken_port_is_named_with_the_way_out():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=f"Port {port} for ComfyUI is taken: choose another one with --port"):
            require_free_port(port, "ComfyUI", "--port")
    require_free_port(free_port(), "ComfyUI", "--port")


def test_the_demo_refuses_a_taken_port_before_it_installs_anything():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--once", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"Port {port} for ComfyUI is taken: choose another one with --port.\n"


def test_a_child_that_dies_at_start_shows_the_end_of_its_log(tmp_path):
    child = Child(python("print('the reason'); raise SystemExit(3)"), tmp_path / "log", tmp_path, "ComfyUI")
    with pytest.raises(SetupError, match=r"(?s)the reason.*ComfyUI stopped while starting \(exit status 3\)"):
        child.wait_for(f"http://127.0.0.1:{free_port()}/", lambda _: None)
    child.stop()


def test_a_silent_child_is_given_up(tmp_path):
    child = Child(python("import time; time.sleep(60)"), tmp_path / "log", tmp_path, "ComfyUI")
    try:
        with pytest.raises(SetupError, match="did not answer within 1 s"):
            child.wait_for(f"http://127.0.0.1:{free_port()}/", lambda _: None, limit=1.0)
    finally:
        child.stop()


def test_waiting_ends_when_the_child_answers(tmp_path):
    port = free_port()
    child = Child([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], tmp_path / "log", tmp_path, "x")
    try:
        child.wait_for(f"http://127.0.0.1:{port}/", lambda _: None, limit=30.0)
    finally:
        child.stop()
    assert not child.alive()


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_stopping_reaches_grandchildren_and_those_who_ignore_sigterm(tmp_path):
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', inner])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    child = Child(python(code), tmp_path / "log", tmp_path, "x")
    deadline = time.monotonic() + 20
    while not (pid := child.last_lines(1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.stop(patience=0.5)
    assert not child.alive()
    for _ in range(100):
        if not _running(int(pid)):
            return
        time.sleep(0.05)
    pytest.fail("the grandchild is still running")


def _running(pid: int) -> bool:
    """True while a process exists and is not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_logged_command_shows_progress_and_returns_its_status(tmp_path, capsys):
    log = tmp_path / "logs" / "x.log"
    status = run_logged(python("print('Collecting x'); raise SystemExit(4)"), log, Progress("piece"), lambda line: line)
    assert status == 4
    assert log.read_text() == "Collecting x\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (65, "1 min 05 s")])
def test_times_read_well(seconds, text):
    assert clock(seconds) == text
