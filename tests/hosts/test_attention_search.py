"""Probing and searching in ComfyUI: the probing run is plain, plans hold what they promise, mistakes are told in words."""

import json

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.reuse import Mode
from stretto.acceleration.attention.search import SEARCHES, curves_from_json, curves_json, load_plan
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_attention_search import GREEDY, QUALITY, TIME, ProbedRun, greedy, probe, search
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.plan import Request
from stretto.acceleration.quality import psnr

from .test_attention import FAMILIES, options_of, spatial
from .test_nodes import nodes  # noqa: F401  (a fixture)
from .tiny_models import conditioning, sample

STEPS = 8


def job_of(tiny, family="wan", shape=(16, 3, 16, 16), steps=STEPS, **changes):
    latent = {"samples": torch.zeros(1, *shape)}
    pair = conditioning(3, family), conditioning(4, family)
    return SamplingJob(tiny(family), *pair, latent, 1, steps, 4.0, "euler", "simple", **changes)


def quiet(job):
    return lambda model: job(model, callback=lambda *_: None)


def probed_run(job, order="tiles", block=16):
    found, latent = probe(job.model, quiet(job), order, block)
    return ProbedRun(found, job, latent)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probed_run_is_plain_to_the_bit(tiny, family):
    options = {"steps": 3, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    settings = {"token": "t", "order": "rows", "block": 16}
    model = host.request(tiny(family), Request("attention_probe", settings, required=True))
    assert torch.equal(sample(model, family, **options), plain)
    record, trace = host.TRACES.take_record("attention_probe", "t")
    assert record["error"] is None and record["layers"] == len(record["curves"]["norm"]) // record["heads"] // 3
    assert all("records" not in other for other in host.TRACES.all())
    assert trace["techniques"][0]["status"] == "active"


def test_curves_survive_as_json(tiny):
    curves = probed_run(job_of(tiny), "rows").probed.curves
    again = curves_from_json(json.loads(json.dumps(curves_json(curves))))
    assert again.options == curves.options and again.patterns == curves.patterns and again.edges == curves.edges
    for name in ("error", "density", "rho", "alpha", "norm"):
        assert np.allclose(getattr(again, name), getattr(curves, name), rtol=1e-5, equal_nan=True)
    assert len(curves.edges) == 3


@pytest.mark.parametrize("method", sorted(SEARCHES))
def test_every_search_meets_its_target_by_a_real_run(tiny, method, monkeypatch):
    # Where attention is so short no list is faster: let the kernel be as fast as its work is small.
    from stretto.acceleration.attention.search import ideal
    from stretto.acceleration.hosts.comfy_attention_search import Probed

    monkeypatch.setattr(Probed, "latency", lambda self: ideal())
    run = probed_run(job_of(tiny), "tiles" if method == "Budgets" else "rows")
    told = []
    found = search(run, method, QUALITY, 45.0, tries=6, progress=lambda total: lambda done: told.append((done, total)))
    assert found.quality >= 45.0 and found.plan.achieved["psnr"] == pytest.approx(found.quality, abs=0.01)
    assert found.plan.achieved["predicted_cost"] < 1
    assert told[-1][0] <= told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    assert found.plan.provenance["method"] == method
    cheap = search(run, method, TIME, 60.0)
    assert len(cheap.tried) == 1 and cheap.plan.achieved["predicted_cost"] <= 0.6


def test_a_plan_is_saved_followed_and_gives_what_the_search_measured(tiny, nodes, tmp_path, monkeypatch):  # noqa: F811
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    job = job_of(tiny)
    run = probed_run(job)
    out = nodes["StrettoAttentionSearch"].execute(run, "Budgets", TIME, 70.0, 1, "my plan").result
    plan = load_plan(out[0])
    assert out[0].endswith("my plan.safetensors") and out[1].shape[2] == 960 and "Saved as my plan" in out[2]
    again = nodes["StrettoAttentionSearch"].execute(run, "Budgets", TIME, 70.0, 1, "my plan").result
    assert again[0].endswith("my plan-2.safetensors")
    fixed = {"keep": 0.0, "full_until": -1.0, "period": 0, "min_tokens": 0, "required": True}
    for name, found in (("my plan", None), (out[0], None), ("DiTFastAttn", out[0])):
        (model,) = nodes["StrettoAttentionPlan"].execute(job.model, name, found=found, **fixed).result
        latent = quiet(job)(model)
        trace = host.TRACES.of_prompt(None)[-1]
        assert trace["attention"]["method"] == "my plan"
        if plan.achieved["predicted_error"]:
            assert min(psnr(latent, run.latent), 120.0) == pytest.approx(plan.achieved["psnr"], abs=0.1)
    with pytest.raises(StrettoError, match="there is no plan 'nobody'; there are DiTFastAttn"):
        nodes["StrettoAttentionPlan"].execute(job.model, "nobody", **fixed)
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StrettoError, match="broken.safetensors"):
        nodes["StrettoAttentionPlan"].execute(job.model, str(tmp_path / "broken.safetensors"), **fixed)
    options = nodes["StrettoAttentionPlan"].define_schema().inputs[1].options
    assert "my plan" in options and "DiTFastAttn" in options


def test_the_probe_node_hands_on_the_latent_of_the_run(tiny, nodes):  # noqa: F811
    job = job_of(tiny)
    out = nodes["StrettoAttentionProbe"].execute(
        job.model, job.positive, job.negative, job.latent, 1, STEPS, 4.0, "euler", "simple", 1.0, "tiles"
    ).result
    assert torch.equal(out[1]["samples"], quiet(job)(job.model))
    assert out[2].shape[2] == 960 and "of the heads" in out[3]


def test_mistakes_are_told_in_words(tiny, nodes):  # noqa: F811
    job = job_of(tiny)
    run = probed_run(job)
    with pytest.raises(StrettoError, match="Re-ttention has nothing to choose from; probe with order = rows"):
        search(run, "Re-ttention", QUALITY, 30.0)
    with pytest.raises(StrettoError, match="no plan of Budgets reached 119 dB"):
        search(run, "Budgets", QUALITY, 119.0, tries=1, weigh=False)
    with pytest.raises(StrettoError, match="method is 'Magic'"):
        search(run, "Magic", QUALITY, 30.0)
    with pytest.raises(StrettoError, match="connect the output of Stretto Attention Probe"):
        nodes["StrettoAttentionSearch"].execute("a", "Budgets", QUALITY, 30.0, 1, "")
    with pytest.raises(StrettoError, match="too few tokens for blocks of 64"):
        probe(job.model, quiet(job_of(tiny, shape=(16, 1, 8, 8))), "tiles", 64)
    cached = host.request(job.model, Request("cache", {"interval": 2, "warmup": 2, "tail": 1}))
    with pytest.raises(ConflictError, match="Stretto Attention Probe"):
        probe(cached, quiet(job), "tiles", 16)


def test_shared_outputs_are_found_where_nothing_else_is_faster(tiny):
    """At a few tokens full attention is fastest: what remains is to take over what was computed before."""
    run = probed_run(job_of(tiny))
    found = search(run, "Budgets", TIME, 80.0)
    assert set(np.unique(found.plan.mode)) & {int(Mode.SHARE), int(Mode.ZERO)}


def test_the_greedy_search_decides_every_layer_at_every_step_and_its_plan_runs(tiny, nodes, tmp_path, monkeypatch):  # noqa: F811
    job = job_of(tiny, steps=5, shape=(16, 2, 16, 16))
    plan, runs = greedy(job.model, quiet(job), 0.05, guided=True)
    layers = plan.mode.shape[1]
    assert plan.mode.shape[0] == 5 and (plan.mode[-1] == int(Mode.FULL)).all()  # the first step, of most noise
    assert set(np.unique(plan.mode)) <= {int(Mode.FULL), int(Mode.SHARE), int(Mode.RESIDUAL)}
    assert 5 + 4 * (1 + layers) <= runs <= 5 + 4 * (1 + 4 * layers)
    full, few = greedy(job.model, quiet(job), 1e-9)
    exact = full.mode[:-1] != int(Mode.FULL)
    assert few == 5 + 4 * (1 + 2 * layers) or exact.any()  # every candidate was tried and found wanting, or changed nothing
    run = probed_run(job)
    found = search(run, GREEDY, QUALITY, 25.0, tries=2)
    assert found.quality >= 25.0 and found.plan.provenance["theta"] > 0 and found.plan.achieved["network_runs"] > 5
    from stretto.nodes.attention_search import search_curve, search_summary

    assert search_curve(found, QUALITY, 25.0).width == 960
    assert "Heads: " in search_summary(found, GREEDY, QUALITY, 25.0, tmp_path / "a.safetensors")
    with pytest.raises(StrettoError, match="asks for a quality"):
        search(run, GREEDY, TIME, 50.0)


def test_a_run_of_the_greedy_search_ends_where_its_own_plan_does(tiny):
    """What was decided was also followed, so the plan, run again, gives the same picture."""
    from stretto.acceleration.hosts.comfy_attention_search import try_plan

    job = job_of(tiny, steps=5, shape=(16, 2, 16, 16))
    ended = []
    plan, _ = greedy(job.model, lambda model: ended.append(quiet(job)(model)) or ended[0], 0.3)
    again, _ = try_plan(job.model, quiet(job), plan)
    assert (plan.mode != int(Mode.FULL)).any()
    assert torch.allclose(again, ended[0], rtol=1e-4, atol=1e-4)
