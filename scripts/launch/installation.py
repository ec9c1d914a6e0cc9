"""From a fresh clone to something that runs: which pieces there are and in which order they are made."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import comfyui_source, stamps
from .console import SetupError, say
from .environments import Environment, Layer, ensure, interpreter, pip_install
from .pins import (
    COMFYUI,
    COMFYUI_PINS,
    NEWEST_PYTHON,
    OLDEST_PYTHON,
    ROOT,
    SPACE_MAIN,
    SPACE_PANEL,
    TORCH,
)

MAIN_FOLDER = ROOT / ".venv"
PANEL_FOLDER = ROOT / ".venv-panel"
COMFYUI_FOLDER = ROOT / ".comfyui"


@dataclass(frozen=True)
class Installation:
    """What the other programs need to know: where ComfyUI is and which interpreters run what."""

    comfyui: Path
    python: Path
    panel_python: Path
    own: bool


@dataclass(frozen=True)
class Wishes:
    """The choices of the command line."""

    comfyui: Path | None = None
    python: Path | None = None
    dev: bool = False
    adopt: bool = False


def prepare(wishes: Wishes) -> Installation:
    """Make everything that is missing; return where it is. Raises SetupError with one sentence."""
    check_python()
    with _only_one():
        if wishes.comfyui is None:
            return _prepare_own(wishes)
        return _prepare_existing(wishes)


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Refuse interpreters that the pinned packages do not support, or that cannot make environments."""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST_PYTHON, NEWEST_PYTHON))
        raise SetupError(
            f"Stretto needs Python {oldest} to {newest}, and this is {'.'.join(map(str, version))}: "
            "set PYTHON to another interpreter."
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "This Python cannot make virtual environments: on Debian and Ubuntu install python3-venv "
            "(sudo apt install python3-venv), then run this again."
        )


@contextmanager
def _only_one() -> Iterator[None]:
    """Keep two bootstraps of one checkout from working at the same time."""
    path = ROOT / ".cache" / "bootstrap.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+b") as file:
        try:
            _lock(file.fileno())
        except OSError:
            raise SetupError("Another bootstrap of this folder is running: wait until it has finished.") from None
        yield


def _lock(descriptor: int) -> None:
    """Take an exclusive lock that the system drops when the process ends; OSError when it is taken."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read(name: str) -> str:
    """Return the text of a file of the checkout."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except OSError as error:
        raise SetupError(f"This checkout is incomplete: {name} cannot be read ({error.strerror}).") from error


def _main_environment(dev: bool) -> Environment:
    """The environment that runs ComfyUI with the pack, and the tests."""
    comfyui_requirements = COMFYUI_FOLDER / "requirements.txt"
    base_arguments = (
        *TORCH, *COMFYUI_PINS, "-r", str(comfyui_requirements), "-r", str(ROOT / "requirements.txt"),
    )
    made_from = "\n".join((*TORCH, *COMFYUI_PINS, COMFYUI.sha256, _read("requirements.txt")))
    layers = [Layer("ComfyUI", base_arguments, made_from)]
    if dev:
        # The pins come along so that no test tool can pull torch to another version.
        arguments = (*TORCH, *COMFYUI_PINS, "-r", str(ROOT / "requirements-dev.txt"))
        layers.append(Layer("test-tools", arguments, "\n".join((*TORCH, *COMFYUI_PINS, _read("requirements-dev.txt")))))
    return Environment(MAIN_FOLDER, "ComfyUI's environment", tuple(layers), SPACE_MAIN)


def _panel_environment(dev: bool) -> Environment:
    """The environment of the panel and the measuring code: no torch."""
    text = _read("requirements-panel.txt")
    layers = [Layer("panel", ("-r", str(ROOT / "requirements-panel.txt")), text)]
    if dev:
        lines = _read("requirements-dev.txt").splitlines()
        tools = tuple(line for line in lines if line.startswith(("pytest", "hypothesis", "jsonschema")))
        layers.append(Layer("test-tools", tools, "\n".join(tools)))
    return Environment(PANEL_FOLDER, "the panel's environment", tuple(layers), SPACE_PANEL)


def _prepare_own(wishes: Wishes) -> Installation:
    """Our own ComfyUI beside the checkout's files."""
    # The source comes first: the environment installs what its requirements.txt asks for.
    comfyui_source.ensure_source(COMFYUI_FOLDER, COMFYUI, Path(sys.executable), wishes.adopt)
    main = _main_environment(wishes.dev)
    ensure(main, wishes.adopt)
    panel = _panel_environment(wishes.dev)
    ensure(panel, wishes.adopt)
    comfyui_source.link_pack(COMFYUI_FOLDER)
    return Installation(COMFYUI_FOLDER, main.python, panel.python, own=True)


def _prepare_existing(wishes: Wishes) -> Installation:
    """A ComfyUI that somebody already has: a link and our light requirements, nothing more."""
    comfyui = wishes.comfyui.expanduser().resolve()
    comfyui_source.check_is_comfyui(comfyui)
    python = find_python(comfyui, wishes.python)
    _require_torch(python)
    panel = _panel_environment(wishes.dev)
    ensure(panel, wishes.adopt)
    text = _read("requirements.txt")
    wanted = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stamp = stamps.digest(str(python), text)
    record = ROOT / ".cache" / "existing"
    record.mkdir(parents=True, exist_ok=True)
    layer = stamps.digest(str(comfyui))
    if wanted and stamps.read(record, layer) != stamp:
        pip_install(python, ["-r", str(ROOT / "requirements.txt")], "the pack's requirements", "existing-comfyui")
        stamps.write(record, layer, stamp)
    comfyui_source.link_pack(comfyui)
    return Installation(comfyui, python, panel.python, own=False)


def find_python(comfyui: Path, given: Path | None) -> Path:
    """Return the interpreter that runs the existing ComfyUI; ask rather than guess."""
    if given is not None:
        if not given.expanduser().is_file():
            raise SetupError(f"--python {given} is not a file: give the path of ComfyUI's Python interpreter.")
        return given.expanduser().absolute()
    candidates = [interpreter(comfyui / name) for name in ("venv", ".venv")]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")  # the portable Windows build
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if sys.stdin.isatty():
        answer = input(f"No environment found in {comfyui}. Does {sys.executable} run this ComfyUI? [y/N] ")
        if answer.strip().lower() in ("y", "yes"):
            return Path(sys.executable)
    raise SetupError(f"Which Python runs the ComfyUI in {comfyui}? Pass it with --python.")


def _require_torch(python: Path) -> None:
    """Refuse an interpreter that cannot run ComfyUI, before anything is changed."""
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    try:
        result = subprocess.run([str(python), "-c", probe], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{python} cannot be run ({error}): pass ComfyUI's interpreter with --python.") from error
    if result.returncode != 0:
        raise SetupError(f"{python} has no torch, so it does not run ComfyUI: pass the right one with --python.")


def report(installation: Installation) -> None:
    """Say in one line that everything is there."""
    say(f"Ready: ComfyUI at {installation.comfyui}, Python {installation.python}")
