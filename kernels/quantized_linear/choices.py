"""Which of several equal ways to make a product is fastest, measured once for every device and shape and kept on disk."""

import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

VERSION = 1
_RUNS = 3
_MAX_FILE = 1 << 22
log = logging.getLogger("stretto")


class Choices:
    """A table from shapes to the name of the fastest way, for one device; entries of another driver or kernel are not read."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Prepare.

        Args:
            folder: where the tables lie, a file per device; None keeps them in memory alone.
        """
        self._folder = None if folder is None else Path(folder)
        self._tables: dict[torch.device, tuple[dict[str, str], dict[str, str]]] = {}

    def fastest(self, key: str, ways: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> str:
        """Return the name of the fastest of ``ways``, measured where the table does not know.

        Args:
            key: shape, dtype and whatever else the time depends on.
            ways: what to measure; all compute the same. One that fails is left out.
            device: whose table it is.

        Raises:
            RuntimeError: none of them runs.
        """
        if len(ways) == 1:
            return next(iter(ways))
        if device not in self._tables:  # once: this is asked in every layer of every step
            about = _about(device)
            self._tables[device] = about, self._read(about)
        about, table = self._tables[device]
        known = table.get(key)
        if known in ways:
            return known
        table[key] = _measured(ways, device)
        self._write(about, table)
        return table[key]

    def _path(self, about: Mapping[str, str]) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"products-{hashlib.sha256(about['device'].encode()).hexdigest()[:12]}.json"

    def _read(self, about: Mapping[str, str]) -> dict[str, str]:
        path = self._path(about)
        try:
            if path is None or path.stat().st_size > _MAX_FILE:
                return {}
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("choices_version") != VERSION or document.get("about") != about:
                return {}
            choices = document["choices"]
            return {k: v for k, v in choices.items() if isinstance(k, str) and isinstance(v, str)}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return {}  # a damaged table is measured again

    def _write(self, about: Mapping[str, str], table: Mapping[str, str]) -> None:
        path = self._path(about)
        if path is None:
            return
        document = {"choices_version": VERSION, "about": dict(about), "choices": dict(table)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            os.replace(name, path)
        except OSError as error:
            log.warning("the table of products cannot be kept in %s (%s)", path.parent, error.strerror)
            self._folder = None


def _about(device: torch.device) -> dict[str, str]:
    """What measured times belong to (guard G14): device, versions, and the kernel's own text."""
    kernel = Path(__file__).with_name("triton_kernel.py").read_bytes()
    name, driver = str(device.type), ""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, driver = f"{found.name} {found.major}.{found.minor}", str(torch.version.cuda or torch.version.hip)
    return {
        "device": name, "driver": driver, "torch": torch.__version__, "triton": _version("triton"),
        "comfy-kitchen": _version("comfy-kitchen"), "kernel": hashlib.sha256(kernel).hexdigest()[:16],
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _measured(ways: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> str:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: dict[str, list[float]] = {}
    reasons = []
    for name, way in ways.items():
        try:
            way()  # compiles
            wait()
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            reasons.append(f"{name}: {str(error).strip().splitlines()[:1]}")
            continue
        seconds[name] = []
    for _ in range(_RUNS):
        for name in seconds:
            start = time.perf_counter()
            ways[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    if not seconds:
        raise RuntimeError(f"no product runs here: {'; '.join(reasons)}")
    return min(seconds, key=lambda name: statistics.median(seconds[name]))
