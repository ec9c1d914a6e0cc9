"""What the demo benchmarks share: the advantage over fewer steps, and numbers small enough to keep."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """`load(name)` is a benchmark script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module_of(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return module_of


def arm(role, psnr, change=None):
    quality = {"psnr": psnr and {"mean": psnr[0], "worst": psnr[1]}}
    if change is not None:
        quality["change_psnr"] = {"mean": change[0], "worst": change[1]}
    return {"label": role.title(), "role": role, "quality": quality, "traces": [1], "workflow": {"1": {}}}


def test_the_advantage_is_in_decibels_over_fewer_steps(load):
    shared = load("demo_comparison")
    report = {
        "settings": {"frames": 17},
        "arms": [
            arm("plain", None),
            arm("accelerated", (44.0, 40.0), (50.0, 48.0)),
            arm("accelerated", ("inf", "inf"), ("inf", "inf")),
            arm("fewer-steps", (30.0, 29.0), (41.5, 40.0)),
        ],
        "cells": [1],
    }
    assert shared.advantage(report) == [
        "Accelerated: +14.0 dB (worst frame +11.0 dB) over the sampler with fewer steps, "
        "+8.5 dB for the changes from frame to frame."
    ], "what is identical has no finite advantage"
    assert shared.advantage({**report, "arms": report["arms"][:3]}) == []
    kept = shared.numbers(report)
    assert kept["cells"] == [] and all(not entry["traces"] and not entry["workflow"] for entry in kept["arms"])


def test_reports_of_pictures_need_no_changes(load):
    report = {"settings": {}, "arms": [arm("accelerated", (44.0, 40.0)), arm("fewer-steps", (30.0, 29.0))]}
    (line,) = load("demo_comparison").advantage(report)
    assert line.endswith("(worst picture +11.0 dB) over the sampler with fewer steps.")


@pytest.mark.parametrize("name", ["demo_image", "demo_video"])
def test_a_benchmark_names_files_that_exist(load, name):
    load("demo_comparison")
    benchmark = load(name).BENCHMARK
    assert benchmark.name == name and benchmark.prompts.is_file()
    assert all((BENCHMARKS.parent / "workflows" / f"{stem}.json").is_file() for stem in benchmark.workflows)
