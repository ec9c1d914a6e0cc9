"""Progressive resolution inside ComfyUI: off and whole runs to the bit, samplers, conditioning, caches, refusals."""

import itertools

import comfy.samplers
import pytest
import torch

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import SAMPLERS

from . import tiny_models
from .test_guidance import PERIODIC
from .tiny_models import conditioning, sample

SHAPE, CLIP = (16, 12, 16), (16, 3, 12, 8)
LARGER = {"sd3": (16, 12, 12), "wan": CLIP, "flux": SHAPE}
HALF = {"stages": [0.5, 1.0], "switches": [0.4], "min_side": 2}
GROWING = Request("resolution", HALF)
WHOLE = Request("resolution", {"stages": [1.0]}, force=True)


def trace():
    return host.TRACES.of_prompt(None)[-1]


def tokens(document=None):
    return [entry["branches"][0]["tokens"] for entry in (document or trace())["evaluations"]]


def custom(model, sampler, family="flux", *, steps=8, cfg=5.0, denoise_mask=None, latent=None):
    """Sample as SamplerCustom does."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros(1, *LARGER[family]) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, 1)
    pair = conditioning(0, family), conditioning(1, family)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, *pair, latent, noise_mask=denoise_mask, disable_pbar=True, seed=1
    )


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
@pytest.mark.parametrize("family", ["sd3", "wan", "flux"])
def test_off_and_one_whole_stage_are_bit_exact(tiny, family, sampler):
    for options in ({"cfg": 1.0}, {"cfg": 5.0, "batch": 2, "denoise": 0.5}):
        options = {"sampler": sampler, "steps": 5, "shape": LARGER[family], **options}
        plain = sample(tiny(family), family, **options)
        for wanted, status in ((WHOLE, "active"), (Request("resolution", {"stages": [1.0]}), "off")):
            assert torch.equal(plain, sample(host.request(tiny(family), wanted), family, **options))
            assert trace()["techniques"][0]["status"] == status


@pytest.mark.parametrize("family", ["sd3", "wan", "flux"])
def test_the_first_steps_run_on_fewer_tokens_and_positions_stay_those_of_the_run(tiny, family):
    shape = LARGER[family]
    sample(tiny(family), family, shape=shape)
    result = sample(host.request(tiny(family), GROWING), family, steps=10, shape=shape)
    document = trace()
    full = tokens(document)[-1]
    assert tokens(document) == [full // 4] * 4 + [full] * 6
    assert [entry["position"] for entry in document["evaluations"]] == pytest.approx(range(10))
    assert result.shape[1:] == shape and torch.isfinite(result).all()
    assert document["resolution"]["cost"] == pytest.approx(0.7)
    assert "steps 1 to 4 at" in document["techniques"][0]["reason"]


def test_small_noise_is_the_low_band_of_the_full_noise(tiny):
    """The first prediction's input at half size, against the full run's."""
    from stretto.acceleration.resolution.spectral import shrink

    seen = []

    def watch(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["input"].clone()) or args["denoised"])
        return model

    sample(watch(tiny("flux")), "flux", shape=SHAPE, steps=4)
    full = seen[0]
    seen.clear()
    sample(watch(host.request(tiny("flux"), GROWING)), "flux", shape=SHAPE, steps=4)
    torch.testing.assert_close(seen[0], shrink(full, (6, 8)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", [name for name, traits in SAMPLERS.items() if "gpu" not in name])
def test_every_sampler_runs_in_stages_or_says_why_not(tiny, sampler):
    name = {"unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}.get(sampler, sampler)
    if name not in comfy.samplers.SAMPLER_NAMES:
        pytest.skip(f"ComfyUI here has no {name}")
    wanted = Request("resolution", {**HALF, "switches": [0.5]})
    plain = sample(tiny("flux"), "flux", shape=SHAPE, sampler=name, steps=8)
    result = sample(host.request(tiny("flux"), wanted), "flux", shape=SHAPE, sampler=name, steps=8)
    assert result.shape == plain.shape and torch.isfinite(result).all()
    if SAMPLERS[sampler].adaptive:
        assert trace()["techniques"][0]["status"] == "off" and torch.equal(plain, result)
    else:
        assert trace()["techniques"][0]["status"] == "active" and not torch.equal(plain, result)
        assert tokens()[0] * 4 == tokens()[-1]
        assert all(entry["position"] <= 8 for entry in trace()["evaluations"])


def test_stages_without_a_step_to_spare_are_refused_for_unipc(tiny):
    wanted = Request("resolution", {**HALF, "switches": [0.2]})
    sample(host.request(tiny("flux"), wanted), "flux", shape=SHAPE, sampler="uni_pc", steps=8)
    assert "needs 3 steps in a stage" in trace()["techniques"][0]["reason"]


def test_sampler_and_model_node_do_the_same(tiny):
    euler = comfy.samplers.ksampler("euler")
    on_model = custom(host.request(tiny("flux"), GROWING), euler)
    alone = custom(tiny("flux"), host.progressive_sampler(euler, GROWING))
    assert torch.equal(on_model, alone)
    beside = custom(
        host.request(tiny("flux"), Request("measure", {"nonce": 1})), host.progressive_sampler(euler, GROWING)
    )
    assert torch.equal(on_model, beside)
    assert [item["technique"] for item in trace()["techniques"]] == ["measure", "resolution"]
    assert len(trace()["plan"]["requests"]) == 2
    with pytest.raises(ConflictError, match="Stretto Progressive Resolution cannot share"):
        custom(host.request(tiny("flux"), GROWING), host.progressive_sampler(euler, GROWING))
    with pytest.raises(StrettoError, match="already grows in stages"):
        host.progressive_sampler(host.progressive_sampler(euler, GROWING), GROWING)


def test_a_sampler_that_cannot_grow_is_plain_or_stops_when_required(tiny):
    euler, small = comfy.samplers.ksampler("euler"), {"min_side": 100}
    plain = custom(tiny("flux"), euler)
    assert torch.equal(plain, custom(tiny("flux"), host.progressive_sampler(euler, Request("resolution", small))))
    with pytest.raises(StrettoError, match="marked as required but cannot run: a stage of 8x6 latent pixels is below"):
        custom(tiny("flux"), host.progressive_sampler(euler, Request("resolution", small, required=True)))


class Foreign(comfy.samplers.KSAMPLER):
    """Another pack's sampler."""


def test_what_cannot_be_cut_is_refused_with_its_reason(tiny):
    model = host.request(tiny("flux"), GROWING)
    custom(model, Foreign(comfy.samplers.ksampler("euler").sampler_function))
    assert "a Foreign of another pack" in trace()["techniques"][0]["reason"]
    late = host.request(tiny("flux"), Request("resolution", {"min_side": 2, "delta": 0.02}))
    plain = sample(tiny("flux"), "flux", shape=SHAPE, steps=5, denoise=0.3)
    assert torch.equal(plain, sample(late, "flux", shape=SHAPE, steps=5, denoise=0.3))
    assert "nothing to gain" in trace()["techniques"][0]["reason"]
    sample(host.request(tiny("pixart"), GROWING), "pixart", steps=3)
    assert "not a flow" in trace()["techniques"][0]["reason"]


def with_entry(monkeypatch, **extra):
    monkeypatch.setattr(
        tiny_models,
        "conditioning",
        lambda *args: [[words, {**options, **extra}] for words, options in conditioning(*args)],
    )


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"gligen": ("position", None, [])}, "GLIGEN"),
        ({"vace_frames": [torch.zeros(1, 32, 1, 12, 16)]}, "pictures (vace_frames)"),
    ],
)
def test_conditioning_tied_to_a_size_is_refused_by_name(tiny, monkeypatch, extra, why):
    from stretto.acceleration.hosts.comfy_resolution import _entry_obstacle

    assert why in _entry_obstacle({"pooled_output": torch.zeros(1, 24), **extra})
    assert _entry_obstacle({"pooled_output": torch.zeros(1, 24), "mask": torch.zeros(1, 1, 9, 9)}) is None


def test_masks_and_areas_of_conditioning_follow_the_stage(tiny, monkeypatch):
    """Left half and right half: in the small stage each part stays on its side."""
    mask = torch.zeros(1, 24, 32)
    mask[:, :, :16] = 1.0
    seen = []
    original = comfy.samplers.process_conds

    def watch(model, noise, conds, *args, **kwargs):
        out = original(model, noise, conds, *args, **kwargs)
        seen.append((tuple(noise.shape[-2:]), [(e.get("area"), e.get("mask")) for e in out["positive"]]))
        return out

    monkeypatch.setattr(comfy.samplers, "process_conds", watch)
    with_entry(monkeypatch, mask=mask, mask_strength=1.0)
    assert torch.isfinite(sample(host.request(tiny("flux"), GROWING), "flux", shape=SHAPE, steps=5)).all()
    (_, full), (size, small) = seen
    assert size == (6, 8) and small[0][1].shape[-2:] == (6, 8) and full[0][1].shape[-2:] == (12, 16)
    assert small[0][1][..., :3].min() == 1.0 and small[0][1][..., 5:].max() == 0.0
    seen.clear()
    with_entry(monkeypatch, area=(12, 8, 0, 8))
    sample(host.request(tiny("flux"), GROWING), "flux", shape=SHAPE, steps=5)
    assert tuple(seen[1][1][0][0]) == (6, 4, 0, 4)
    seen.clear()
    with_entry(monkeypatch, area=("percentage", 1.0, 0.5, 0.0, 0.5))
    sample(host.request(tiny("flux"), GROWING), "flux", shape=SHAPE, steps=5)
    assert tuple(seen[1][1][0][0]) == (6, 4, 0, 4)


def test_reference_latents_shrink_with_the_stage(tiny, monkeypatch):
    from stretto.acceleration.hosts.comfy_resolution import _stage_entry
    from stretto.acceleration.resolution.stages import Stage

    stage = Stage((6, 8), 2.0, 0, 2, (1.0, 0.8, 0.7))
    entry = {"reference_latents": [torch.ones(1, 16, 4, 6), torch.ones(1, 16, 2, 2)]}
    found = _stage_entry(entry, stage, (12, 16))["reference_latents"]
    assert [tuple(latent.shape[-2:]) for latent in found] == [(2, 4), (2, 2)]
    torch.testing.assert_close(found[0], torch.ones(1, 16, 2, 4))
    assert entry["reference_latents"][0].shape[-1] == 6  # the conditioning itself is untouched
    result = sample(host.request(tiny("kontext"), GROWING), "kontext", shape=SHAPE, steps=5)
    assert torch.isfinite(result).all() and trace()["techniques"][0]["status"] == "active"


@pytest.mark.parametrize(
    "family", ["wan_i2v", "flux_fill", "wan2.2_5b", "qwen_image", "hunyuan_video", "ltxv", "chroma"]
)
def test_families_with_pictures_or_frames_beside_the_latent(tiny, family):
    shape = tiny_models.LATENTS[family]
    shape = (*shape[:-2], shape[-2] * 2, shape[-1] * 2)
    result = sample(host.request(tiny(family), GROWING), family, shape=shape, steps=5)
    assert trace()["techniques"][0]["status"] == "active", trace()["techniques"]
    assert tokens()[0] <= tokens()[-1] / 3 and result.shape[1:] == shape and torch.isfinite(result).all()


def test_concat_pictures_are_brought_to_the_stage_by_comfyui(tiny, monkeypatch):
    clip = {"concat_latent_image": torch.randn(1, 16, 3, 12, 8), "concat_mask": torch.ones(1, 1, 3, 12, 8)}
    with_entry(monkeypatch, **clip)
    result = sample(host.request(tiny("wan_i2v"), GROWING), "wan_i2v", shape=CLIP, steps=5)
    assert trace()["techniques"][0]["status"] == "active" and torch.isfinite(result).all()


def test_controlnet_hints_are_asked_for_at_the_size_of_the_stage(tiny, monkeypatch):
    from .test_neighbours import Control

    sizes = []

    class Watched(Control):
        def get_control(self, x, *args):
            sizes.append(tuple(x.shape[-2:]))
            tokens = x.shape[-2] * x.shape[-1] // 4
            return {"output": [torch.full((x.shape[0], tokens, 192), 0.1)] * 3}

    with_entry(monkeypatch, control=Watched(), control_apply_to_uncond=True)
    sample(host.request(tiny("sd3"), GROWING), "sd3", shape=(16, 12, 12), steps=5)
    assert trace()["techniques"][0]["status"] == "active"
    assert sizes == [(6, 6)] * 2 + [(12, 12)] * 3


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_inpainting_keeps_what_is_outside_the_mask(tiny, family):
    shape = LARGER[family]
    latent = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, *shape[-2:])
    mask[..., : shape[-2] // 2, :] = 1.0
    euler = comfy.samplers.ksampler("euler")
    result = custom(host.request(tiny(family), GROWING), euler, family, denoise_mask=mask, latent=latent)
    assert trace()["techniques"][0]["status"] == "active"
    kept = slice(shape[-2] // 2, None)
    assert (result[..., kept, :] - latent[..., kept, :]).abs().max() < 1e-4
    assert not torch.equal(result, latent)


@pytest.mark.parametrize("method", ["Taylor", "EasyCache", "FBCache"])
def test_caches_are_cleared_at_the_switch(tiny, method):
    cache = Request("cache", {"method": method, "interval": 2, "threshold": 0.8, "warmup": 1, "tail": 1})
    models = []
    for order in itertools.permutations([cache, GROWING, PERIODIC]):
        model = tiny("wan")
        for wanted in order:
            model = host.request(model, wanted)
        models.append(model)
    assert len({host.plan_of(model) for model in models}) == 1
    results = [sample(model, "wan", shape=CLIP, steps=12) for model in (models[0], models[-1])]
    assert torch.equal(*results)
    entries = trace()["evaluations"]
    assert [item["status"] for item in trace()["techniques"]] == ["active"] * 3
    switch = next(i for i, count in enumerate(tokens()) if count == tokens()[-1])
    assert 0 < switch < 12 and entries[switch]["decision"] == "computed"
    assert len(entries[switch]["branches"]) == 2  # differences of the branches are foreign, too
    assert any(entry["decision"] != "computed" for entry in entries) or method == "FBCache"


def test_three_stages_and_down_and_up_again(tiny):
    for stages, switches, counts in (
        ([0.5, 0.75, 1.0], [0.25, 0.5], [1 / 4] * 2 + [1 / 2, 1 / 2] + [1] * 4),
        ([1.0, 0.5, 1.0], [0.25, 0.5], [1] * 2 + [1 / 4] * 2 + [1] * 4),
    ):
        wanted = Request("resolution", {"stages": stages, "switches": switches, "min_side": 2})
        result = sample(host.request(tiny("flux"), wanted), "flux", shape=(16, 16, 16), steps=8)
        full = tokens()[-1]
        assert torch.isfinite(result).all()
        assert [count / full for count in tokens()] == pytest.approx([c if c != 1 / 2 else 36 / 64 for c in counts])


def test_odd_sizes(tiny):
    result = sample(host.request(tiny("flux"), GROWING), "flux", shape=(16, 13, 9), steps=5)
    assert result.shape[-2:] == (13, 9) and torch.isfinite(result).all()
    assert [tuple(stage["size"]) for stage in trace()["resolution"]["stages"]] == [(6, 4), (13, 9)]


def test_every_published_form_runs_and_differs(tiny):
    results = [
        sample(
            host.request(tiny("flux"), Request("resolution", {**HALF, "method": method})), "flux", shape=SHAPE, steps=8
        )
        for method in ("Coupled", "SPEED", "Fresh noise")
    ]
    assert all(torch.isfinite(result).all() for result in results)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


def test_progress_counts_the_whole_run(tiny):
    steps = []
    sample(
        host.request(tiny("flux"), GROWING),
        "flux",
        shape=SHAPE,
        steps=5,
        callback=lambda i, d, x, n: steps.append((i, n)),
    )
    assert steps == [(step, 5) for step in range(5)]


def test_runs_leave_nothing_behind(tiny):
    model = host.request(tiny("flux"), GROWING)
    first = sample(model, "flux", shape=SHAPE)

    def stop(step, *args):
        if step == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(model, "flux", shape=SHAPE, callback=stop)
    sample(model, "flux", shape=(16, 8, 8), batch=2)
    assert torch.equal(first, sample(model, "flux", shape=SHAPE))


def test_the_nodes_ask_for_what_their_inputs_say(tiny):
    from stretto.nodes.resolution import StrettoProgressiveResolution, StrettoProgressiveSampler, StrettoSpectrum

    defaults = {entry.id: entry.default for entry in StrettoProgressiveResolution.define_schema().inputs[1:]}
    given = {**defaults, "stages": "0.5 1", "switches": "25", "min_side": 2}
    model = StrettoProgressiveResolution.execute(tiny("flux"), **given).result[0]
    (asked_for,) = host.plan_of(model).requests
    assert asked_for.settings["stages"] == [0.5, 1.0] and asked_for.settings["switches"] == [0.25]
    euler = comfy.samplers.ksampler("euler")
    wrapped = StrettoProgressiveSampler.execute(euler, **given).result[0]
    assert torch.equal(custom(model, euler), custom(tiny("flux"), wrapped))
    assert asked_for.settings["refresh"] == 4
    with pytest.raises(StrettoError, match="switches is 'soon'"):
        StrettoProgressiveResolution.execute(tiny("flux"), **{**given, "switches": "soon"})
    from stretto.acceleration.resolution.spectral import idct

    rows = torch.arange(16.0)
    power = (1 + rows[:, None] ** 2 + rows**2) ** -1.0
    latent = {"samples": idct(torch.randn(8, 16, 16, 16) * power.sqrt())}
    amplitude, exponent, words, ready = StrettoSpectrum.execute(tiny("flux"), latent, min_side=2).result
    assert 1.0 < exponent < 2.5 and amplitude > 0 and "16x16" in words
    (wanted,) = host.plan_of(ready).requests
    assert wanted.settings["amplitude"] == amplitude and wanted.settings["method"] == "Corrected"
    sample(ready, "flux", shape=(16, 16, 16), steps=20)
    stage = trace()["resolution"]["stages"][0]
    level = float(words.split("0.5 of the side until noise level ")[1])
    sigmas = trace()["sigmas"]
    assert 0 < stage["steps"][1] < 20 and sigmas[stage["steps"][1]] <= level + 1e-3 < sigmas[stage["steps"][1] - 1] + 2e-3
    assert "switches by the spectrum custom (given at the node), delta 0.05" in trace()["techniques"][0]["reason"]
    with pytest.raises(ConflictError, match="cannot share"):
        StrettoSpectrum.execute(host.request(tiny("flux"), GROWING), latent)


def test_stages_are_chosen_from_the_spectrum(tiny):
    """A steeper spectrum or a larger delta lets the small stage last longer."""

    def coarse(**changes):
        settings = {"min_side": 2, "spectrum": "custom", "amplitude": 5.0, "exponent": 2.0, **changes}
        sample(host.request(tiny("flux"), Request("resolution", settings)), "flux", shape=SHAPE, steps=20)
        return trace()["resolution"]["stages"][0]["steps"][1]

    usual = coarse()
    assert 0 < usual < coarse(delta=0.1) < 20
    assert usual < coarse(exponent=3.0)


def test_conditioning_with_hooks_is_refused():
    from comfy.hooks import HookGroup

    from stretto.acceleration.hosts.comfy_resolution import _entry_obstacle

    assert "LoRA or model hooks" in _entry_obstacle({"hooks": HookGroup()})


# Corrected runs

CORRECTED = Request("resolution", {**HALF, "switches": [0.8], "method": "Corrected"})


def test_corrected_runs_keep_the_sampler_at_full_size_and_ask_the_network_at_both(tiny):
    seen = []
    result = sample(
        host.request(tiny("flux"), CORRECTED), "flux", shape=SHAPE, steps=10,
        callback=lambda step, denoised, x, steps: seen.append((step, tuple(x.shape[-2:]))),
    )  # fmt: skip
    document, full = trace(), tokens()[-1]
    small = full // 4
    assert tokens() == [full, small, small, small, small, full, small, small, small, small, full, full]
    assert [entry["position"] for entry in document["evaluations"]] == pytest.approx([0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9])
    assert seen == [(step, SHAPE[-2:]) for step in range(10)] and torch.isfinite(result).all()
    assert document["resolution"]["method"] == "Corrected"
    assert document["resolution"]["cost"] == pytest.approx((4 + 8 * 0.25) / 10)


def test_anchors_at_every_step_are_the_plain_run(tiny):
    """One small step in two, none of them used: predictions of the full size pass through untouched."""
    wanted = {**HALF, "method": "Corrected", "switches": [0.2], "refresh": 2}
    plain = sample(tiny("flux"), "flux", shape=SHAPE, steps=5)
    assert torch.equal(plain, sample(host.request(tiny("flux"), Request("resolution", wanted)), "flux", shape=SHAPE, steps=5))


@pytest.mark.parametrize("sampler", [name for name, traits in SAMPLERS.items() if "gpu" not in name])
def test_every_sampler_runs_corrected_or_says_why_not(tiny, sampler):
    name = {"unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}.get(sampler, sampler)
    if name not in comfy.samplers.SAMPLER_NAMES:
        pytest.skip(f"ComfyUI here has no {name}")
    result = sample(host.request(tiny("flux"), CORRECTED), "flux", shape=SHAPE, sampler=name, steps=6)
    assert torch.isfinite(result).all()
    found = trace()["techniques"][0]
    if SAMPLERS[sampler].adaptive or "cfg_pp" in sampler:
        assert found["status"] == "off" and (SAMPLERS[sampler].adaptive or "reads the unconditional branch" in found["reason"])
    else:
        assert found["status"] == "active" and "begins anew" not in found["reason"]
        assert {tokens()[-1], tokens()[-1] // 4} == set(tokens())


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_inpainting_in_a_corrected_run_keeps_what_is_outside_the_mask(tiny, family):
    shape = LARGER[family]
    latent = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, *shape[-2:])
    mask[..., : shape[-2] // 2, :] = 1.0
    euler = comfy.samplers.ksampler("euler")
    result = custom(host.request(tiny(family), CORRECTED), euler, family, denoise_mask=mask, latent=latent)
    assert trace()["techniques"][0]["status"] == "active" and len(set(tokens())) == 2
    kept = slice(shape[-2] // 2, None)
    assert (result[..., kept, :] - latent[..., kept, :]).abs().max() < 1e-4 and not torch.equal(result, latent)
    alone = custom(tiny(family), host.progressive_sampler(euler, CORRECTED), family, denoise_mask=mask, latent=latent)
    assert torch.equal(result, alone)


def test_corrected_runs_beside_caches_and_guidance_and_leave_nothing_behind(tiny):
    cache = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 1, "tail": 1})
    wanted = Request("resolution", {**HALF, "switches": [0.4], "method": "Corrected"})
    model = tiny("wan")
    for request in (cache, wanted, PERIODIC):
        model = host.request(model, request)
    first = sample(model, "wan", shape=CLIP, steps=16)
    found = trace()
    assert [item["status"] for item in found["techniques"]] == ["active"] * 3
    sizes = tokens()
    changes = [place for place in range(1, len(sizes)) if sizes[place] != sizes[place - 1]]
    assert changes and all(found["evaluations"][place]["decision"] == "computed" for place in changes)
    assert found["guidance"]["saved"] > 0 and any(e["decision"] != "computed" for e in found["evaluations"])

    def stop(step, *args):
        if step == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(model, "wan", shape=CLIP, steps=16, callback=stop)
    assert torch.equal(first, sample(model, "wan", shape=CLIP, steps=16))


@pytest.mark.parametrize("wanted", [GROWING, CORRECTED])
def test_guidance_with_momentum_is_refused_and_without_it_runs(tiny, wanted):
    from comfy_extras.nodes_apg import APG

    def adaptive(momentum):
        return APG.execute(host.request(tiny("flux"), wanted), eta=1.0, norm_threshold=5.0, momentum=momentum).result[0]

    assert torch.isfinite(sample(adaptive(0.0), "flux", shape=SHAPE, steps=5)).all()
    assert trace()["techniques"][0]["status"] == "active"
    assert torch.isfinite(sample(adaptive(-0.5), "flux", shape=SHAPE, steps=5)).all()
    assert "momentum (APG)" in trace()["techniques"][0]["reason"]
