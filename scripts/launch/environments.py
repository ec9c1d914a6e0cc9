"""Virtual environments: made once, updated in place when the requirements change, believed only with a stamp."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import stamps
from .console import Progress, SetupError, clock, run_logged, say
from .pins import GIGABYTE, ROOT

LOGS = ROOT / ".cache" / "logs"

_NETWORK = re.compile(
    r"NewConnectionError|name resolution|Name or service not known|nodename nor servname|Network is unreachable"
    r"|ConnectTimeout|Connection (refused|reset|timed out|aborted)|ProxyError|SSLError|Read timed out"
    r"|ReadTimeoutError|Could not connect|Max retries exceeded|getaddrinfo failed",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"No space left on device|Errno 28|Disk quota exceeded", re.IGNORECASE)
_NOT_FOUND = re.compile(r"No matching distribution found for (?P<what>.+)")
_SUMMARY = re.compile(r"^(Collecting|Downloading|Using cached|Installing collected packages|Building|Preparing)\b")


@dataclass(frozen=True)
class Layer:
    """One set of requirements of an environment: pip arguments and what they stand for."""

    name: str
    pip_arguments: tuple[str, ...]
    made_from: str


@dataclass(frozen=True)
class Environment:
    """A virtual environment of ours."""

    folder: Path
    title: str
    layers: tuple[Layer, ...]
    space: int

    @property
    def python(self) -> Path:
        """The interpreter inside."""
        return interpreter(self.folder)


def interpreter(folder: Path) -> Path:
    """Return where a virtual environment keeps its interpreter on this system."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def version_of(python: Path) -> str | None:
    """Return '3.12' for an interpreter that starts and finds its packages, None for one that does not."""
    # An upgrade of the system's Python leaves environments whose interpreter no longer looks into their own folder.
    probe = "import importlib.util as u, sys; print('%d.%d' % sys.version_info[:2] if u.find_spec('pip') else '')"
    try:
        result = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _is_stamped(environment: Environment) -> bool:
    """True when at least one layer of the environment was finished by this script."""
    return any(stamps.read(environment.folder, layer.name) for layer in environment.layers)


def ensure(environment: Environment, adopt: bool) -> None:
    """Bring the environment to the state its layers describe; do nothing when it is there already."""
    folder = environment.folder
    if stamps.is_half_made(folder) or (_is_stamped(environment) and version_of(environment.python) is None):
        say(f"{folder.name}: unfinished or without a working interpreter, making it anew")
        shutil.rmtree(folder)
    if folder.exists() and not _is_stamped(environment) and not adopt:
        raise SetupError(
            f"{folder} was not made by this script: move it away, or pass --adopt to install into it."
        )
    fresh = not folder.exists()
    try:
        for layer in environment.layers:
            wanted = stamps.digest(layer.made_from)
            if stamps.read(folder, layer.name) == wanted:
                continue
            if not folder.exists():
                require_space(environment.space, environment.title)
                _create(environment)
            _install(environment, layer)
            stamps.write(folder, layer.name, wanted)
            fresh = False
    except BaseException:
        # Also on Ctrl-C: a folder that never became complete must not stay. (Removing it is all this does.)
        if fresh and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def require_space(needed: int, title: str, folder: Path = ROOT) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"Not enough disk space for {title}: {needed / GIGABYTE:.1f} GB needed, "
            f"{free / GIGABYTE:.1f} GB free at {folder}."
        )


def pip_install(python: Path, arguments: Sequence[str], title: str, log_name: str) -> None:
    """Run `pip install` in the interpreter's environment, with progress; failures become one sentence."""
    run_pip(python, ["install", *arguments], title, log_name)


def run_pip(python: Path, arguments: Sequence[str], title: str, log_name: str) -> None:
    """Run pip with progress and a log; raise SetupError with the reason when it fails."""
    log = LOGS / f"{log_name}.log"
    # pip unpacks into TMPDIR, which is often a small RAM disk; the wheels of torch need gigabytes.
    scratch_root = ROOT / ".cache"
    scratch_root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pip-", dir=scratch_root) as scratch:
        env = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch, "PIP_NO_INPUT": "1"}
        command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
        command += ["--progress-bar", "off", "--retries", "3"]
        status = run_logged(command, log, Progress(title), _summarize, env)
    if status != 0:
        raise SetupError(explain_pip_failure(log.read_text(encoding="utf-8", errors="replace"), title, log))


def explain_pip_failure(output: str, title: str, log: Path) -> str:
    """Turn what pip printed into one sentence."""
    if _NO_SPACE.search(output):
        return f"The disk became full while installing {title}: free some space and run this again."
    if _NETWORK.search(output):
        return f"The package index cannot be reached, so {title} cannot be installed: check the network connection."
    missing = _NOT_FOUND.search(output)
    if missing:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"The package index offers no {missing['what'].strip()} for Python {version} on this system."
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".") if errors else "pip failed"
    return f"Installing {title} failed ({reason}): see {log}."


def _summarize(line: str) -> str | None:
    """Shorten a line of pip's output; None for the uninteresting ones."""
    if not _SUMMARY.match(line):
        return None
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return re.sub(r"\s*\(from .*|https?://\S*/", "", line)


def _create(environment: Environment) -> None:
    """Make the empty environment."""
    stamps.mark_making(environment.folder)
    result = subprocess.run(
        [sys.executable, "-m", "venv", str(environment.folder)], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        detail = (result.stderr or result.stdout).strip().splitlines()
        raise SetupError(f"Python could not make {environment.folder}: {detail[-1] if detail else 'no reason given'}.")


def _install(environment: Environment, layer: Layer) -> None:
    """Install one layer and say so."""
    progress = Progress(environment.title)
    say(f"{environment.folder.name}: installing {layer.name}")
    log_name = f"{environment.folder.name.lstrip('.')}-{layer.name}"
    pip_install(environment.python, layer.pip_arguments, f"{environment.title} ({layer.name})", log_name)
    say(f"{environment.folder.name}: {layer.name} ready after {clock(progress.seconds)}")
