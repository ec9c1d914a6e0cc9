"""Profiling: nothing changes, and what is recorded is what the network really did."""

import comfy.model_management
import numpy as np
import pytest
import torch

from stretto.acceleration.caching.sketch import CountSketch
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_profile import profile
from stretto.acceleration.plan import Request

from .tiny_models import CONFIGS, ONE_ROW, sample

FAMILIES = ["sd3", "wan", "flux", "lumina2"]


def profiled(model, family, **options):
    steps = options.pop("steps", 8)
    return profile(
        model,
        lambda m: sample(m, family, steps=steps, **options),
        lambda m: sample(m, family, steps=8, **options),
    )


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_profiled_run_is_the_plain_run(tiny, family, sampler):
    plain = sample(tiny(family), family, sampler=sampler, steps=6, batch=2)
    recorded, latent = profiled(tiny(family), family, sampler=sampler, steps=6, batch=2)
    assert torch.equal(plain, latent)
    assert recorded.steps == 6 and recorded.positions == tuple(range(6))
    assert recorded.about["family"] == family and recorded.about["sampler"] == sampler


@pytest.mark.parametrize("options", [{"cfg": 1.0}, {"denoise": 0.5}, {"cfg": 1.0, "batch": 2}])
def test_without_guidance_and_with_half_the_noise(tiny, options):
    plain = sample(tiny("wan"), "wan", **options)
    recorded, latent = profiled(tiny("wan"), "wan", **options)
    assert torch.equal(plain, latent) and recorded.steps == 8


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_the_record_is_what_the_blocks_did(tiny, family):
    """Another pack's patches watch the same run: first input, first output, last output, conditional rows only."""
    model, seen = tiny(family), {}
    first, last = ("double_block", 0), ("double_block", 2) if family == "wan" else ("single_block", 1)

    def watch(key):
        def patch(args, extra):
            before = args["img"].clone()
            out = extra["original_block"](args)
            kinds = args["transformer_options"]["cond_or_uncond"] if "transformer_options" in args else None
            seen.setdefault(key, []).append((before, out["img"].clone(), kinds))
            return out

        return patch

    for key in (first, last):
        model.set_model_patch_replace(watch(key), "dit", *key)
    recorded, _ = profiled(model, family, steps=5)
    text = 5 if family == "flux" else 0
    sketch, previous = CountSketch(), None
    for step in range(5):
        before, after, _ = seen[first][step]
        yielded = seen[last][step][1][:, text:]
        # Which half is the conditional one shows in the sketch itself; both halves must agree on it.
        rows = [slice(0, 1), slice(1, 2)]
        errors = [np.abs(sketch(yielded[r]).numpy() - recorded.sketches[step]).max() for r in rows]
        row = rows[int(np.argmin(errors))]
        assert min(errors) < 1e-4 < max(errors)
        norm = (yielded[row].double() - before[row].double()).norm().log().item()
        assert recorded.log_norms[step] == pytest.approx(norm, rel=1e-5)
        added = after[row] - before[row]
        if previous is not None:
            change = ((added - previous).abs().mean() / previous.abs().mean()).item()
            assert recorded.signals["residual"][step] == pytest.approx(change, rel=1e-4)
        previous = added
    assert recorded.signals["residual"][0] is None
    for name in ("rate", "input", "output"):
        assert recorded.signals[name][0] is None and all(value > 0 for value in recorded.signals[name][2:]), name


def test_a_family_without_block_hooks_records_its_output(tiny):
    recorded, _ = profiled(tiny("lumina2"), "lumina2")
    assert recorded.about["feature"] == "the network's output" and set(recorded.signals) == {"rate", "output"}
    blocks, _ = profiled(tiny("sd3"), "sd3")
    assert blocks.about["feature"] == "the last block's output"
    assert set(blocks.signals) == {"rate", "input", "residual", "output"}


def test_both_kinds_of_evaluation_are_timed(tiny):
    recorded, _ = profiled(tiny("sd3"), "sd3")
    assert recorded.seconds_computed > 0 and recorded.seconds_skipped > 0
    alone, _ = profile(tiny("sd3"), lambda model: sample(model, "sd3"))
    assert alone.seconds_computed > 0 and alone.seconds_skipped is None


def test_the_record_leaves_the_trace_and_the_trace_stays(tiny):
    profiled(tiny("wan"), "wan")
    traces = host.TRACES.of_prompt(None)
    assert not any("records" in trace for trace in traces)
    assert traces[-2]["techniques"][0]["technique"] == "profile" and traces[-2]["totals"]["computed"] == 8


def test_what_skips_is_refused_by_name(tiny):
    cached = host.request(tiny("wan"), Request("cache", {"method": "Taylor"}))
    with pytest.raises(ConflictError, match="Stretto Profile cannot share a model with Stretto Cache"):
        profiled(cached, "wan")
    core = tiny("wan")
    core.model_options.setdefault("transformer_options", {})["easycache"] = object()
    with pytest.raises(ConflictError, match="skips nothing, and ComfyUI's own EasyCache"):
        profiled(core, "wan")


def test_a_sampler_with_levels_of_its_own_says_so(tiny):
    with pytest.raises(StrettoError, match="Stretto Profile is marked as required but cannot run.*its own noise levels"):
        profiled(tiny("wan"), "wan", sampler="dpm_adaptive")


def test_an_interrupt_passes_through_and_leaves_no_record(tiny):
    def stop(step, *args):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        profiled(tiny("wan"), "wan", callback=stop)
    assert "records" not in host.TRACES.of_prompt(None)[-1]


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - ONE_ROW))
def test_every_family_is_recorded_unchanged(tiny, family):
    plain = sample(tiny(family), family, steps=3)
    recorded, latent = profile(tiny(family), lambda model: sample(model, family, steps=3))
    assert torch.equal(plain, latent) and recorded.steps == 3
    assert all(value > 0 for value in recorded.signals["output"][1:])


@pytest.mark.parametrize("family", sorted(ONE_ROW))
def test_families_of_one_row_too(tiny, family):
    plain = sample(tiny(family), family, steps=3, cfg=1.0)
    assert torch.equal(plain, profile(tiny(family), lambda model: sample(model, family, steps=3, cfg=1.0))[1])
