"""Reports of real runs: what decided, what was stored, and what the run is compared with."""

import json
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch

from stretto.acceleration.caching.methods import METHODS
from stretto.acceleration.caching.store import STORES
from stretto.acceleration.figures import comparisons
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import NO_PLAIN, summary

from .test_nodes import nodes  # noqa: F401  (a fixture)
from .tiny_models import sample

THRESHOLDS = {"EasyCache": 0.6, "Adaptive": 0.6, "TeaCache": 0.95, "FBCache": 1.0, "CG-Taylor": 1.0}
SKIPPED = ("forecast", "reused")


def run(tiny, family="wan", steps=12, **settings):
    """Sample with a cache; returns latent and trace."""
    request = Request("cache", {"warmup": 2, "tail": 1, "max_skips": 3, **settings})
    return sample(host.request(tiny(family), request), family, steps=steps), host.TRACES.of_prompt(None)[-1]


@pytest.mark.parametrize("method", THRESHOLDS)
def test_what_was_compared_decided(tiny, method):
    _, trace = run(tiny, method=method, threshold=THRESHOLDS[method], order=0)
    jsonschema.validate(trace, schema("trace"))
    seen = comparisons(trace)
    assert any(item.skipped for item in seen) and len(seen) >= 10
    for item in seen:
        assert item.skipped == (item.free and item.value < item.threshold)
    rails = [entry["on_rails"] for entry in trace["evaluations"]]
    assert rails[:2] == [True, True] and rails[-1], "warm-up and tail"
    assert f"threshold {THRESHOLDS[method]:.3g}." in summary(trace)


def test_schedules_known_beforehand_compare_nothing(tiny):
    _, trace = run(tiny, method="Taylor", interval=2)
    assert comparisons(trace) == []
    assert all(entry["threshold"] is None and entry["compared"] is None for entry in trace["evaluations"])


def test_the_picture_shows_the_threshold_where_there_is_one(nodes, tiny):  # noqa: F811
    from stretto.nodes.timeline import LIMIT, SIGNAL, timeline

    wanted = [int(LIMIT[i : i + 2], 16) for i in (1, 3, 5)]

    def drawn(**settings):
        picture = np.asarray(timeline(json.loads(json.dumps(run(tiny, **settings)[1]))))
        return picture.shape[0], int((picture == wanted).all(-1).sum())

    without, with_threshold = drawn(method="Taylor", interval=2), drawn(method="FBCache", threshold=1.0)
    assert without[1] == 0 and with_threshold[1] > 1000
    assert with_threshold[0] == without[0] + SIGNAL


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", ["Taylor", "EasyCache", "FBCache"])
def test_every_store_runs_and_takes_what_it_announced(tiny, store, method):
    settings = {"method": method, "interval": 2, "threshold": THRESHOLDS.get(method, 0.05)}
    exact, plain_trace = run(tiny, **settings)
    result, trace = run(tiny, store=store, **settings)
    held = trace["memory"]["store_peak_bytes"]
    (item,) = trace["techniques"]
    share = {"half": 2, "eighth": 4}.get(store, 1)
    depth = 2 if METHODS[method].forecaster == "newton" else 1
    assert held == plain_trace["memory"]["store_peak_bytes"] // share + (4 * 2 * depth if share > 1 else 0)
    assert held <= item["store_bytes"] + 4 * 2 * depth and item["store_bytes"] <= item["budget_bytes"]
    assert "Stored features: " in summary(trace)
    if store in ("as computed", "system memory"):
        assert torch.equal(result, exact)
    else:
        assert 0 < (result - exact).norm() < {"half": 0.01, "eighth": 0.5}[store] * exact.norm()


def test_a_plain_run_of_the_same_work_is_found(nodes, tiny, monkeypatch):  # noqa: F811
    from stretto.nodes import report

    steps = 13  # no other test's
    _, made = run(tiny, steps=steps, method="Taylor", interval=2)
    host.TRACES.add("prompt-fast", "5", made)
    monkeypatch.setattr(report, "current_prompt_id", lambda: "prompt-fast")
    prompt = {"5": {"inputs": {"model": ["1", 0]}}, "9": {"inputs": {"samples": ["5", 0]}}}
    monkeypatch.setattr(report.StrettoReport, "hidden", SimpleNamespace(prompt=prompt, unique_id="9"), raising=False)
    monkeypatch.setattr(report.ui, "PreviewImage", lambda *_, **__: SimpleNamespace(as_dict=lambda: {"images": []}))

    assert NO_PLAIN in report.StrettoReport.execute({}).result[1]
    sample(host.request(tiny("wan"), Request("measure")), "wan", steps=steps, seed=7)
    plain = host.TRACES.add("prompt-plain", "5", host.TRACES.of_prompt(None)[-1])
    text = report.StrettoReport.execute({}).result[1]
    assert f"was measured against the plain run with seed 7 ({plain['seconds']['sampler']:.3f} s" in text


def test_the_store_is_the_caches_own_whoever_chose_the_rest(nodes, tiny):  # noqa: F811
    from stretto.acceleration.caching.presets import Preset, Provenance

    node = nodes["StrettoCache"]
    assert [item.id for item in node.define_schema().inputs][-2:] == ["store", "text_features"]
    preset = Preset("any", "any", "Taylor", {"interval": 2}, (1, 100), Provenance("a test"))
    numbers = ("Taylor", 3, 1, 0.05, 4, 5, False)
    for chosen in ({}, {"calibrated": preset}):
        (model,) = node.execute(tiny("wan"), *numbers, **chosen).result
        assert host.plan_of(model).of("cache")[0].settings["store"] == "as computed"
        (model,) = node.execute(tiny("wan"), *numbers, store="half", **chosen).result
        assert host.plan_of(model).of("cache")[0].settings["store"] == "half"


def test_the_report_of_a_stacked_run_draws_sizes_and_multiplies_what_each_technique_saves(tiny):
    """Smaller stages, saved guidance and a cache in one run: predicted factors are those of its own work."""
    from stretto.acceleration.figures import run_level, sizes
    from stretto.acceleration.savings import expected, savings
    from stretto.nodes.timeline import timeline

    wanted = (
        Request("resolution", {"stages": [0.5, 1.0], "switches": [0.4], "min_side": 2}),
        Request("guidance", {"interval": 3, "warmup": 2, "tail": 1}),
        Request("cache", {"method": "Taylor", "interval": 2, "warmup": 1, "tail": 1}),
    )
    model = tiny("wan")
    for request in wanted:
        model = host.request(model, request)
    sample(model, "wan", steps=20, shape=(16, 3, 12, 8))
    trace = host.TRACES.of_prompt(None)[-1]
    counted = savings(trace, by_clock=False)
    assert list(counted) == ["resolution", "guidance", "caching"] and counted["guidance"] > 1.0  # caching's goes by the clock
    assert counted["resolution"] == pytest.approx(1 / trace["resolution"]["cost"], rel=1e-6)
    factors = savings(trace)
    assert list(factors) == ["resolution", "guidance", "caching"]
    assert expected(trace) == pytest.approx(factors["resolution"] * factors["guidance"] * factors["caching"])
    parts = [f"{name} {factors[key]:.2f}x" for key, name in (
        ("resolution", "smaller stages"), ("guidance", "guidance saved"), ("caching", "steps skipped"),
    )]  # fmt: skip
    assert f"Predicted: {', '.join(parts)}; together {expected(trace):.2f}x." in summary(trace)
    assert sizes(trace) == [0.25] * 8 + [1.0] * 12
    levels = [run_level(trace, entry) for entry in trace["evaluations"]]
    assert levels == pytest.approx(trace["sigmas"][:-1], abs=1e-4)
    assert timeline(trace).height > timeline({**trace, "resolution": None}).height
