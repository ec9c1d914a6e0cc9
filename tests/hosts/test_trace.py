"""Traces are valid, complete and honest."""

import comfy.model_management
import jsonschema
import pytest

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.trace_store import TraceStore
from stretto.acceleration.plan import Request
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import summary

from .tiny_models import sample

REQUESTS = {
    "measure": Request("measure", {"nonce": 1}),
    "taylor": Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1}),
    "easycache": Request("cache", {"method": "EasyCache", "threshold": 0.9, "warmup": 2, "tail": 1}),
    "off": Request("cache", {"interval": 1}),
}


def newest():
    return host.TRACES.of_prompt(None)[-1]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m"])
@pytest.mark.parametrize("name", REQUESTS)
def test_valid_and_adds_up(tiny, name, sampler):
    sample(host.request(tiny("wan"), REQUESTS[name]), "wan", sampler=sampler)
    trace = newest()
    jsonschema.validate(trace, schema("trace"))
    totals = trace["totals"]
    assert totals["evaluations"] == sum(totals[kind] for kind in ("computed", "forecast", "reused", "mixed"))
    assert trace["seconds"]["evaluations"] <= trace["seconds"]["sampler"]
    positions = [entry["position"] for entry in trace["evaluations"]]
    assert positions == sorted(positions)
    assert all(entry["seconds"] > 0 for entry in trace["evaluations"])


def test_skipped_steps_run_no_block_and_both_branches_agree(tiny):
    sample(host.request(tiny("flux"), REQUESTS["taylor"]), "flux")
    entries = newest()["evaluations"]
    assert [entry["decision"] for entry in entries] == ["computed"] * 2 + ["forecast", "computed"] * 3
    for entry in entries:
        assert {branch["branch"] for branch in entry["branches"]} == {"cond", "uncond"}
        for branch in entry["branches"]:
            assert branch["decision"] == entry["decision"]
            assert branch["blocks_computed"] == (4 if entry["decision"] == "computed" else 0)
            assert branch["tokens"] == 12


def test_two_calls_a_step_share_a_decision(tiny):
    """Heun evaluates at a step's end and again at the next one's start: one noise level, one decision."""
    sample(host.request(tiny("wan"), REQUESTS["taylor"]), "wan", sampler="heun")
    by_position = {}
    for entry in newest()["evaluations"]:
        by_position.setdefault(entry["position"], set()).add(entry["decision"])
    assert all(len(decisions) == 1 for decisions in by_position.values())
    assert {"computed", "forecast"} == set().union(*by_position.values())


def test_an_interrupted_run_is_recorded_and_valid(tiny):
    def stop(step, *args):
        if step == 3:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(host.request(tiny("sd3"), REQUESTS["taylor"]), "sd3", callback=stop)
    trace = newest()
    jsonschema.validate(trace, schema("trace"))
    assert trace["outcome"] == "interrupted" and len(trace["evaluations"]) == 4
    assert "interrupted" in summary(trace)


def test_summary_names_strip_reason_and_ceiling(tiny):
    sample(host.request(tiny("wan"), REQUESTS["taylor"]), "wan")
    text = summary(newest())
    assert "##~#~#~#" in text and "5 of 8 steps are computed" in text and "is the most this run could gain" in text


def test_store_is_bounded_and_keyed():
    store = TraceStore(limit=3)
    for ordinal in range(2):
        assert store.add("p", "5", {})["ordinal"] == ordinal
    store.add("p", "6", {})
    store.add("q", "5", {"new": True})
    assert len(store.of_prompt("p")) == 2 and len(store.of_prompt("q")) == 1
    assert store.of_node("5")[-1]["new"] and [t["ordinal"] for t in store.of_node("5", "p")] == [1]


def test_an_evicted_ordinal_never_overwrites_a_kept_trace():
    store = TraceStore(limit=2)
    for value in range(4):
        store.add("p", "5", {"value": value})
    assert [trace["value"] for trace in store.of_node("5")] == [2, 3]
    assert [trace["ordinal"] for trace in store.of_node("5")] == [2, 3]
