"""Which Python, which ComfyUI, and what an existing one gets: a link and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from stretto.scripts.launch import installation, pins
from stretto.scripts.launch.console import SetupError
from stretto.scripts.launch.environments import interpreter
from stretto.scripts.launch.installation import Wishes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def existing(tmp_path) -> Path:
    """A folder that looks like somebody's ComfyUI."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    for name in ("main.py", "nodes.py"):
        (folder / name).touch()
    return folder


@pytest.fixture
def no_panel(monkeypatch):
    """Leave the panel's environment out of it."""
    monkeypatch.setattr(installation, "ensure", lambda *_: None)
    monkeypatch.setattr(installation, "_require_torch", lambda _: None)


@pytest.mark.parametrize("version", [(3, 9), (3, 15), (4, 0)])
def test_other_pythons_are_refused_in_one_sentence(version):
    with pytest.raises(SetupError, match=r"needs Python 3\.10 to 3\.14, and this is"):
        installation.check_python(version)


@pytest.mark.parametrize("version", [(3, 10), (3, 12), (3, 14)])
def test_supported_pythons_pass(version):
    installation.check_python(version)


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_debians_missing_module_is_named(monkeypatch, module):
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(SetupError, match="install python3-venv"):
        installation.check_python((3, 12))


def test_the_torch_packages_are_pinned_as_a_trio():
    assert [pin.split("==")[0] for pin in pins.TORCH] == ["torch", "torchvision", "torchaudio"]


def test_our_requirements_hold_nothing_heavy():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line for line in lines if line.strip() and not line.startswith("#")]
    assert not [line for line in names if line.startswith(("torch", "numpy", "transformers", "gradio"))]


def test_an_existing_comfyui_gets_the_link_and_nothing_else(existing, no_panel):
    before = set(existing.rglob("*"))
    result = installation.prepare(Wishes(comfyui=existing, python=Path(sys.executable)))
    assert set(existing.rglob("*")) - before == {existing / "custom_nodes" / "stretto"}
    assert result.comfyui == existing
    assert not result.own


@pytest.mark.parametrize("name", ["venv", ".venv"])
def test_its_own_environment_is_found(existing, name):
    python = interpreter(existing / name)
    python.parent.mkdir(parents=True)
    python.touch()
    assert installation.find_python(existing, None) == python


def test_without_an_environment_the_person_is_asked(existing, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert installation.find_python(existing, None) == Path(sys.executable)
    monkeypatch.setattr("builtins.input", lambda _: "")
    with pytest.raises(SetupError, match="Pass it with --python"):
        installation.find_python(existing, None)


def test_without_an_environment_and_nobody_to_ask_it_is_one_sentence(existing, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SetupError, match="Which Python runs the ComfyUI"):
        installation.find_python(existing, None)


def test_an_interpreter_without_torch_is_refused(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SetupError, match="has no torch"):
        installation._require_torch(fake)


def test_a_file_that_cannot_run_is_refused(tmp_path):
    (tmp_path / "python").touch()
    with pytest.raises(SetupError, match="cannot be run"):
        installation._require_torch(tmp_path / "python")


def test_two_bootstraps_at_once_are_refused():
    with installation._only_one(), pytest.raises(SetupError, match="Another bootstrap"), installation._only_one():
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--comfyui", "/no/such/folder"], "is no ComfyUI folder"),
        (["--python", "/usr/bin/python3"], "--python says who runs the ComfyUI of --comfyui"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(options, sentence):
    command = [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_bootstrap_needs_nothing_but_the_standard_library():
    """Run it without site-packages: an import of anything else would fail."""
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "bootstrap.py"), "--help"]
    probe = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); sys.argv = ['bootstrap.py', '--help']; "
    command = [sys.executable, "-I", "-S", "-c", probe + "runpy.run_path('scripts/bootstrap.py', run_name='__main__')"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
