"""Fitted forecasts through ComfyUI: the cache does what the fit did, and steps aside where the fit does not hold."""

import pytest
import torch

from stretto.acceleration.caching.fitting import FittingSampler
from stretto.acceleration.caching.masks import parse_mask
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_fitting import EulerFitter
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.plan import Request

from .tiny_models import LATENTS, conditioning, sample

MASK = "###.##.#..##"


def job_of(tiny, family, **changes):
    """The job that tiny_models.sample does."""
    given = {
        "model": tiny(family),
        "positive": conditioning(3, family),
        "negative": conditioning(4, family),
        "latent": {"samples": torch.zeros(1, *LATENTS[family])},
        "seed": 1,
        "steps": len(MASK),
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "simple",
    }
    return SamplingJob(**{**given, **changes})


def fitter_of(job):
    return EulerFitter(job, lambda: lambda *_: None)


def settings_of(fitted):
    return {"method": "Fitted", **fitted.to_settings(), "warmup": 0, "tail": 0}


def trace_of(model, family, **options):
    result = sample(model, family, steps=len(MASK), **options)
    return result, host.TRACES.of_prompt(None)[-1]


@pytest.mark.parametrize("family", ["wan", "sd3", "flux", "lumina2"])
def test_the_cache_gives_what_the_fit_gave(tiny, family):
    job = job_of(tiny, family)
    fitter = fitter_of(job)
    fitted = fitter.fit(parse_mask(MASK))
    plain = sample(tiny(family), family, steps=len(MASK))
    assert torch.equal(job(callback=lambda *_: None), plain)
    again = FittingSampler(fitted.mask, fitter.plain.states)  # the same run, to see where it ends
    ends = job.run_with(again, lambda *_: None)
    assert again.weights == fitted.weights
    request = Request("cache", settings_of(fitted), required=True)
    result, trace = trace_of(host.request(tiny(family), request), family)
    assert trace["techniques"][0]["status"] == "active", trace["techniques"]
    assert [e["decision"] == "computed" for e in trace["evaluations"]] == list(parse_mask(MASK))
    assert torch.allclose(result, ends, rtol=0, atol=2e-4 * float(ends.abs().max()))
    assert (result - plain).norm() > 10 * (result - ends).norm()


def test_a_skipped_step_runs_no_part_of_the_network(tiny):
    model, calls = tiny("wan"), []
    fitted = fitter_of(job_of(tiny, "wan")).fit(parse_mask(MASK))
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        trace_of(host.request(model, Request("cache", settings_of(fitted))), "wan")
    finally:
        handle.remove()
    assert len(calls) == MASK.count("#")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "dpmpp_2m"}, "fitted with euler: straight lines stand in"),
        ({"denoise": 0.5}, "fitted on other noise levels: straight lines stand in"),
    ],
)
def test_another_run_gets_lines_and_says_so(tiny, options, words):
    fitted = fitter_of(job_of(tiny, "wan")).fit(parse_mask(MASK))
    model = host.request(tiny("wan"), Request("cache", settings_of(fitted)))
    _, trace = trace_of(model, "wan", **options)
    outcome = trace["techniques"][0]
    assert outcome["status"] == "reduced" and words in outcome["reason"]


def test_noise_between_steps_falls_back_to_reuse(tiny):
    fitted = fitter_of(job_of(tiny, "wan")).fit(parse_mask(MASK))
    model = host.request(tiny("wan"), Request("cache", settings_of(fitted)))
    _, trace = trace_of(model, "wan", sampler="euler_ancestral")
    assert "falls back to reuse" in trace["techniques"][0]["reason"]
    assert {e["decision"] for e in trace["evaluations"]} == {"computed", "reused"}


@pytest.mark.parametrize("force", [False, True])
def test_off_and_engaged_are_plain_to_the_bit(tiny, force):
    fitted = fitter_of(job_of(tiny, "wan")).fit(parse_mask(MASK))
    plain = sample(tiny("wan"), "wan", steps=len(MASK))
    settings = {**settings_of(fitted), "warmup": 100}
    result, trace = trace_of(host.request(tiny("wan"), Request("cache", settings, force=force)), "wan")
    assert torch.equal(result, plain) and (trace["techniques"][0]["status"] != "off") == force


def test_without_weights_the_node_says_where_to_get_them(tiny):
    with pytest.raises(StrettoError, match="connect Stretto Calibrate, or choose a preset"):
        host.request(tiny("wan"), Request("cache", {"method": "Fitted"}))
    model = host.request(tiny("wan"), Request("cache", {"method": "Fitted", "preset": "quality"}))
    _, trace = trace_of(model, "wan")
    assert trace["techniques"][0]["status"] == "off" and "Stretto Calibrate finds them" in trace["techniques"][0]["reason"]


def test_only_eulers_method_on_slopes_is_fitted(tiny):
    assert EulerFitter.suits(job_of(tiny, "wan"))
    assert not EulerFitter.suits(job_of(tiny, "wan", sampler_name="dpmpp_2m"))
    job = job_of(tiny, "wan")

    class Sampling(type(job.model.get_model_object("model_sampling"))):
        def calculate_denoised(self, sigma, model_output, model_input):
            return model_input * (1 - sigma) - model_output * sigma  # as Cosmos does it

    other = job.model.clone()
    sampling = job.model.get_model_object("model_sampling")
    replaced = Sampling.__new__(Sampling)
    replaced.__dict__ = sampling.__dict__
    other.add_object_patch("model_sampling", replaced)
    assert not EulerFitter.suits(job_of(tiny, "wan", model=other))


def test_noise_levels_are_those_of_the_run(tiny):
    _, trace = trace_of(host.request(tiny("sd3"), Request("measure")), "sd3", denoise=0.5)
    levels = job_of(tiny, "sd3", denoise=0.5).sigmas().tolist()
    assert levels == pytest.approx(trace["sigmas"])
