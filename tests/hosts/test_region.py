"""Region-adaptive sampling inside ComfyUI: exact where every token is active, honest everywhere else."""

import gc
import weakref

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch

from stretto.acceleration.errors import ConflictError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import LATENTS, conditioning, sample

FAMILIES = [
    "sd3",
    "sd3.5",
    "wan",
    "flux",
    "kontext",
    "chroma",
    "flux2",
    "qwen_image",
    "qwen_image_edit",
    "lumina2",
    "z_image",
]
EVERY = {"ratio": 1.0, "start": 2, "tail": 0, "refresh_every": 0, "min_tokens": 0}
HALF = {"ratio": 0.5, "start": 2, "tail": 0, "refresh_every": 3, "min_tokens": 0}


def region(model, settings, **more):
    return host.request(model, Request("region", settings, **more))


def trace():
    return host.TRACES.of_prompt(None)[-1]


def status():
    return next(item for item in trace()["techniques"] if item["technique"] == "region")


def shares():
    return [entry["active_share"] for entry in trace()["evaluations"]]


def split_guidance(monkeypatch):
    """Make ComfyUI believe that cond and uncond do not fit into one batch."""
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)


#: (cfg, batch, split, sampler)
CASES = [(5.0, 2, False, "euler"), (1.0, 1, False, "euler"), (5.0, 1, False, "dpmpp_2m"), (5.0, 2, True, "euler")]


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in FAMILIES for case in (CASES if family in ("sd3", "wan", "flux") else CASES[:1])],
)
def test_off_and_every_token_active_are_bit_exact(tiny, family, case, monkeypatch):
    """Ratio 1 is off; forced, every step takes tokens, kept keys and stale velocities through the whole machinery."""
    cfg, batch, split, sampler = case
    if split:
        split_guidance(monkeypatch)
    options = {"cfg": cfg, "batch": batch, "sampler": sampler, "steps": 5}
    plain = sample(tiny(family), family, **options)
    assert torch.equal(plain, sample(region(tiny(family), EVERY), family, **options))
    assert status()["status"] == "off"
    for stale, keys in (("repeat", "repeat"), ("line", "line"), ("hidden state", "line")):
        result = sample(region(tiny(family), {**EVERY, "stale": stale, "keys": keys}, force=True), family, **options)
        assert status()["status"] != "off", status()
        assert shares() == [None, None, 1.0, 1.0, 1.0]
        assert trace()["memory"]["store_peak_bytes"] > 0
        assert torch.equal(plain, result), stale


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_tokens(tiny, family, monkeypatch):
    def run(stale, **more):
        options = {"cfg": 5.0, "batch": 2, "steps": 9, **more}
        return sample(region(tiny(family), {**HALF, "stale": stale}), family, **options)

    plain = sample(tiny(family), family, batch=2, steps=9)
    for stale in ("repeat", "line", "hidden state"):
        merged = run(stale)
        found = shares()
        assert [share is None for share in found] == [True, True, False, False, True, False, False, True, False]
        assert not torch.equal(merged, plain) and (merged - plain).norm() < 0.5 * plain.norm(), stale


def test_merged_and_split_guidance_leave_out_the_same_tokens(tiny, monkeypatch):
    def run():
        result = sample(region(tiny("sd3"), HALF), "sd3", batch=2, steps=9)
        return result, [step["rows"] for step in trace()["region"]["steps"]]

    merged, maps = run()
    split_guidance(monkeypatch)
    split, split_maps = run()
    assert maps == split_maps and any(rows != ["9" * 4] * 3 for rows in maps)
    assert (merged - split).norm() < 1e-3 * merged.norm()


@pytest.mark.parametrize("family", ["sd3", "sd3.5", "wan", "flux", "qwen_image", "z_image"])
def test_kept_keys_are_the_ones_that_full_attention_would_see(tiny, family):
    """Where noise levels hardly fall, inactive tokens' keys are hardly older: active ones come out as in a plain run."""

    def run(model):
        sigmas = torch.tensor([0.8, 0.7990, 0.7980, 0.7970, 0.7960])
        latent = torch.zeros(1, *LATENTS[family])
        noise = comfy.sample.prepare_noise(latent, 1)
        positive, negative = conditioning(3, family), conditioning(4, family)
        return comfy.sample.sample_custom(
            model,
            noise,
            5.0,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            latent,
            disable_pbar=True,
        )

    plain = run(tiny(family))
    moved = (plain - comfy.sample.prepare_noise(torch.zeros(1, *LATENTS[family]), 1) * 0.8).norm()
    kept = run(region(tiny(family), {**HALF, "refresh_every": 0}))
    assert shares()[2:] == [0.5, 0.5]
    assert (kept - plain).norm() < 2e-3 * moved


@pytest.mark.parametrize("stale", ["repeat", "line"])
def test_inactive_tokens_follow_their_old_velocity(tiny, stale):
    """x - dsigma * v_old between two steps, in every pixel of a token that rests; on a grid that no patch divides."""
    seen = []

    def note(step, denoised, x, total):
        seen.append(x.clone())

    model = region(tiny("sd3"), {**HALF, "stale": stale, "start": 3, "refresh_every": 0, "most_skips": 9})
    latent = torch.zeros(1, 16, 5, 7)
    noise = comfy.sample.prepare_noise(latent, 1)
    comfy.sample.sample(
        model, noise, 6, 5.0, "euler", "simple", conditioning(3, "sd3"), conditioning(4, "sd3"),
        latent, disable_pbar=True, seed=1, callback=note,
    )  # fmt: skip
    document = trace()
    sigmas, steps = document["sigmas"], document["region"]["steps"]
    resting = [
        torch.tensor([[cell == "0" for cell in row] for row in step["rows"]])
        .repeat_interleave(2, 0)
        .repeat_interleave(2, 1)[:5, :7]
        for step in steps
    ]
    assert steps[3]["share"] < 1 and resting[3].any()
    before, last = ((seen[i + 1] - seen[i]) / (sigmas[i + 1] - sigmas[i]) for i in (1, 2))
    slope = (last - before) / (sigmas[2] - sigmas[1]) if stale == "line" else 0.0
    now = (seen[4] - seen[3]) / (sigmas[4] - sigmas[3])
    expected = last + (sigmas[3] - sigmas[2]) * slope
    where = resting[3].expand_as(now)
    assert torch.allclose(now[where], expected[where], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(now[~where], expected[~where], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "heun", "dpm_2", "dpmpp_2m_sde"])
def test_samplers_that_would_suffer_stay_plain(tiny, sampler):
    options = {"sampler": sampler, "steps": 5}
    plain = sample(tiny("sd3"), "sd3", **options)
    assert torch.equal(plain, sample(region(tiny("sd3"), HALF), "sd3", **options))
    assert status()["status"] == "off" and sampler in status()["reason"]


@pytest.mark.parametrize("family", ["pixart", "hunyuan_video", "ltxv"])
def test_families_out_of_reach_are_off_with_the_reason(tiny, family):
    plain = sample(tiny(family), family, steps=3, cfg=1.0)
    assert torch.equal(plain, sample(region(tiny(family), HALF), family, steps=3, cfg=1.0))
    assert status()["status"] == "off" and family in status()["reason"]


def test_a_mask_is_always_worked_on(tiny):
    rows = ["0000", "0000", "0011"]
    sample(region(tiny("sd3"), {**HALF, "mask": rows}), "sd3", steps=9)
    for step in trace()["region"]["steps"]:
        assert step["rows"][2][2:] == "99"


def test_outside_an_inpainting_mask_nothing_is_worked_on(tiny):
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., :4] = 1.0
    sample(region(tiny("sd3"), HALF), "sd3", steps=9, noise_mask=mask)
    partial = [step for step in trace()["region"]["steps"] if step["share"] < 1.0]
    assert partial and all(row[2:] == "00" for step in partial for row in step["rows"])


def test_memory_is_counted_shown_and_bounded(tiny, monkeypatch):
    """Kept in fewer bits, then in fewer blocks, then off; never more than announced."""
    found = []
    for free in (1 << 30, 60_000, 40_000, 34_000, 32_000, 4_000):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, free=free, **kwargs: free)
        sample(region(tiny("wan"), {**HALF, "memory_share": 1.0}), "wan", steps=6)
        found.append(status())
        if found[-1]["status"] != "off":
            assert 0 < trace()["memory"]["store_peak_bytes"] <= found[-1]["store_bytes"] <= free
    assert [item["status"] for item in found] == ["active", *["reduced"] * 4, "off"]
    kinds = ["of two steps", "bf16, of two steps", "kept as bf16", "kept as fp8", "fp8, in 2 of 3 blocks", "memory_share"]
    assert all(words in item["reason"] for words, item in zip(kinds, found, strict=True)), [i["reason"] for i in found]


def test_a_cache_decides_first_and_regions_act_in_its_computed_steps(tiny):
    model = host.request(
        region(tiny("sd3"), HALF), Request("cache", {"method": "Taylor", "interval": 2, "warmup": 4, "tail": 1})
    )
    result = sample(model, "sd3", steps=16)
    entries = trace()["evaluations"]
    assert any(entry["active_share"] == 0.5 and entry["decision"] == "computed" for entry in entries)
    assert any(entry["decision"] == "forecast" for entry in entries)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("method", ["FBCache", "EasyCache", "DBCache"])
def test_caches_that_look_first_and_regions(tiny, method):
    model = host.request(
        region(tiny("sd3"), HALF), Request("cache", {"method": method, "threshold": 0.0, "warmup": 2}, force=True)
    )
    assert torch.isfinite(sample(model, "sd3", steps=9)).all()


def test_sparse_attention_keeps_to_the_full_steps(tiny):
    sparse = Request(
        "attention", {"method": "Block mass", "keep": 0.5, "dense_until": 0.0, "min_tokens": 0, "block": 16}
    )
    model = host.request(region(tiny("wan"), HALF), sparse)
    assert torch.isfinite(sample(model, "wan", steps=9)).all()
    assert [entry["attention_kept"] is None for entry in trace()["evaluations"]][2:4] == [True, True]


def test_two_of_them_are_refused_by_name(tiny):
    with pytest.raises(ConflictError, match="Stretto Region Adaptive"):
        region(region(tiny("sd3"), HALF), HALF)


def test_nothing_is_left_behind(tiny):
    """Other sizes, other seeds, an interrupt, and the node taken away again: runs are as in a fresh process."""
    patched = region(tiny("sd3"), HALF)
    first = sample(patched, "sd3", steps=6)
    plain = sample(tiny("sd3"), "sd3", steps=6)

    def stop(step, denoised, x, total):
        if step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, "sd3", steps=6, callback=stop)
    assert trace()["outcome"] == "interrupted"
    sample(patched, "sd3", steps=6, shape=(16, 4, 10), seed=9)
    assert torch.equal(first, sample(patched, "sd3", steps=6))
    assert torch.equal(plain, sample(tiny("sd3"), "sd3", steps=6))


def test_kept_tensors_are_freed(tiny, monkeypatch):
    from stretto.acceleration.region import store

    made = []
    fill = store.Kept.fill
    monkeypatch.setattr(store.Kept, "fill", lambda self, *args: (made.append(weakref.ref(self)), fill(self, *args))[1])
    sample(region(tiny("wan"), HALF), "wan", steps=6)
    gc.collect()
    assert made and all(kept() is None for kept in made)
