"""Short names for what accelerates a workflow, out of its nodes' settings."""

from __future__ import annotations

from typing import Any

from .arms import PREFIX, SWITCHED_OFF, Api, accelerators

# What decides for each caching method, as its name in a report; methods that are not listed have no number of their own.
EVERY = ("Taylor", "TaylorSeer", "HiCache", "FORA", "Output")
THRESHOLD = (
    "EasyCache", "Adaptive", "TeaCache", "MagCache", "FBCache", "DBCache", "DBCache-Taylor", "CG-Taylor", "SpeCa", "DiCache",
    "AdaCache", "LazyCache",
)  # fmt: skip


def _cache_label(inputs: dict[str, Any]) -> str:
    """A Stretto Cache by its method and the setting that decides."""
    method = inputs.get("method")
    if isinstance(inputs.get("calibrated"), list) or inputs.get("preset_file"):
        return "Calibrated"
    if inputs.get("preset", "as set") != "as set":
        return f"{method} ({inputs['preset']})"
    if method in THRESHOLD:
        return f"{method} (threshold {inputs.get('threshold')})"
    if method in EVERY:
        return f"{method} (every {inputs.get('interval')}, order {inputs.get('order')})"
    return f"{method} ({inputs.get('level')})" if method == "SCM" else str(method)


def _own_label(node: dict[str, Any]) -> str:
    """Another node by its class, and by what it keeps where that decides."""
    name, keep = node["class_type"].removeprefix(PREFIX), node["inputs"].get("keep")
    return f"{name} (keep {keep:g} %)" if node["class_type"] in SWITCHED_OFF and isinstance(keep, int | float) else name


def label_of(api: Api, fallback: str) -> str:
    """A short name for what accelerates a workflow, out of its nodes' settings."""
    parts = []
    for node in api.values():
        inputs = node.get("inputs", {})
        if node["class_type"] == "StrettoCache":
            parts.append(_cache_label(inputs))
        elif node["class_type"] in accelerators({"": node}):
            parts.append(_own_label(node))
    return " + ".join(parts) or fallback
