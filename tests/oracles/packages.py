"""The packages that the oracles live in: skipped where they are absent, but never on CI."""

import importlib
import os

import pytest


def required(name):
    """Import ``name``; where it is missing, skip the calling module, or fail it on CI."""
    if os.environ.get("CI"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: ./test.sh installs requirements-dev.txt")
