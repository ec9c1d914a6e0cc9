"""On the trained demo model, through the server: off and engaged caches give the plain picture, pixel for pixel."""

import itertools

import numpy as np
import pytest

from .shipped import key_of

STEPS = 8
CASES = [
    *itertools.product(["euler", "dpmpp_2m", "heun", "euler_ancestral"], [(1.0, 1, 1.0), (5.0, 2, 1.0)]),
    *itertools.product(["euler", "heun"], [(5.0, 1, 0.5)]),
]
#: EasyCache at a threshold that no change stays below computes every step, with all hooks in place: engaged, not off.
ENGAGED = {"method": "EasyCache", "threshold": 1e-9, "warmup": 2, "tail": 1}
OFF = [{"method": "Taylor", "interval": 1}, {"method": "EasyCache", "threshold": 0.0}]


def pictures(comfy, prompt, sampler, case, cache):
    """Run a variant of a workflow; return its batch of pictures and its trace."""
    cfg, batch, denoise = case
    prompt[key_of(prompt, "KSampler")]["inputs"].update(
        sampler_name=sampler, cfg=cfg, denoise=denoise, steps=STEPS
    )
    prompt[key_of(prompt, "EmptySD3LatentImage")]["inputs"]["batch_size"] = batch
    if cache:
        prompt[key_of(prompt, "StrettoCache")]["inputs"].update(cache)
    run = comfy.run(prompt)
    save = key_of(prompt, "SaveImage")
    found = [comfy.pixels(run, save, index) for index in range(batch)]
    return np.stack(found), comfy.traces(run)[0]


@pytest.mark.parametrize(("sampler", "case"), CASES, ids=lambda value: str(value))
def test_off_and_engaged_give_the_plain_picture(sampler, case, comfy, api):
    plain, _ = pictures(comfy, api("plain"), sampler, case, None)
    for cache in OFF:
        off, trace = pictures(comfy, api("taylor"), sampler, case, cache)
        assert {item["status"] for item in trace["techniques"] if item["technique"] == "cache"} == {"off"}
        np.testing.assert_array_equal(plain, off)
    engaged, trace = pictures(comfy, api("taylor"), sampler, case, ENGAGED)
    assert trace["memory"]["store_peak_bytes"] > 0, "the cache never engaged, so this proves nothing"
    assert trace["totals"]["computed"] == trace["totals"]["evaluations"]
    np.testing.assert_array_equal(plain, engaged)
