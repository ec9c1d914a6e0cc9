"""What numbers depend on: processor, cores, versions, and the state of this checkout."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from . import ROOT

LIBRARIES = ("torch", "diffusers", "cache-dit", "comfy-kitchen", "torchao")


def machine(comfyui: Path = ROOT / ".comfyui") -> dict:
    """Return the machine and the versions as JSON values; nothing in it names a person or a host."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "comfyui": _quoted(comfyui / "comfyui_version.py", "__version__"),
        **{name: _version(name) for name in LIBRARIES},
        "stretto": _quoted(ROOT / "pyproject.toml", "version"),
        "commit": _commit(),
    }


def now() -> str:
    """Return the time as ISO 8601 text, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def load() -> float | None:
    """Return how many processes wanted a core in the last minute, None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpu() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _quoted(file: Path, name: str) -> str | None:
    """Return the text that a file assigns to a name."""
    found = re.search(rf'^{name} = "(.+?)"', file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else None
    return found[1] if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, with "+" where files differ from it; None outside of git."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "acceleration", "kernels", "nodes", "benchmarks/*.py"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")
