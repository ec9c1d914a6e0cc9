"""Tests of the diffusers host; without ComfyUI, and skipped where diffusers is not installed."""

import importlib.util

if importlib.util.find_spec("diffusers") is None:
    collect_ignore_glob = ["test_*.py"]
