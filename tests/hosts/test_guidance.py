"""Guidance saver inside ComfyUI: exact where it must be, two outputs for everybody, honest where it cannot act."""

import importlib
import itertools

import comfy.model_base
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from . import tiny_models
from .tiny_models import LATENTS, conditioning, sample

FAMILIES = ["sd3", "wan", "flux"]
SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_sde", "res_multistep"]
PERIODIC = Request("guidance", {"method": "Periodic", "interval": 3, "warmup": 2, "tail": 1})
EVERY = Request("guidance", {"method": "Periodic", "interval": 1}, force=True)
ALL = {
    "Periodic": {"interval": 3, "warmup": 2, "tail": 1},
    "FasterCache": {"interval": 3, "warmup": 2, "tail": 1},
    "Adaptive": {"agreement": -1.0, "patience": 1, "warmup": 2, "tail": 0},
    "Interval": {"guide_until": 0.5},
}


def split_guidance(monkeypatch):
    """Make ComfyUI believe that cond and uncond do not fit into one batch."""
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)


def trace():
    return host.TRACES.of_prompt(None)[-1]


def asked(document=None):
    """Return per evaluation whether the network was asked for the unconditional branch."""
    entries = (document or trace())["evaluations"]
    return "".join("#" if any(b["branch"] == "uncond" for b in entry["branches"]) else "." for entry in entries)


def guide(model, guider, *, cfg=5.0, sampler="euler", steps=8, family="sd3", seed=1):
    """Sample with a guider of one's own."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros(1, *LATENTS[family])
    noise = comfy.sample.prepare_noise(latent, seed)
    return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_off_and_asking_every_step_are_bit_exact(tiny, family, sampler, monkeypatch):
    off = Request("guidance", {"method": "Periodic", "interval": 1})
    for merged in (True, False):
        if not merged:
            split_guidance(monkeypatch)
        options = {"sampler": sampler, "steps": 5, "batch": 2}
        plain = sample(tiny(family), family, **options)
        assert torch.equal(plain, sample(host.request(tiny(family), off), family, **options))
        assert trace()["techniques"][0]["status"] == "off"
        assert torch.equal(plain, sample(host.request(tiny(family), EVERY), family, **options))
        assert trace()["techniques"][0]["status"] != "off" and trace()["guidance"]["saved"] == 0


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_branches_make_any_saving_exact(tiny, family, method, monkeypatch):
    """One conditioning for both: their difference is nothing, so no stand-in may change the picture."""
    monkeypatch.setattr(tiny_models, "conditioning", lambda seed, family="": conditioning(0, family))
    model = host.request(tiny(family), Request("guidance", {"method": method, **ALL[method]}))
    plain = sample(tiny(family), family, steps=10)
    fast = sample(model, family, steps=10)
    assert trace()["guidance"]["saved"] >= 4
    assert (plain - fast).norm() <= 1e-5 * plain.norm()
    split_guidance(monkeypatch)
    assert torch.equal(sample(tiny(family), family, steps=10), sample(model, family, steps=10))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_saved_steps_ask_only_the_conditional_branch(tiny, sampler):
    plain = sample(tiny("sd3"), "sd3", sampler=sampler, steps=12)
    fast = sample(host.request(tiny("sd3"), PERIODIC), "sd3", sampler=sampler, steps=12)
    document = trace()
    entries = document["evaluations"]
    by_step = {}
    for entry, mark in zip(entries, asked(document)):
        by_step.setdefault(min(int(entry["position"] + 1e-9), 11), set()).add(mark)
    assert all(len(marks) == 1 for marks in by_step.values())  # evaluations of one step share a decision
    assert "".join(marks.copy().pop() for _, marks in sorted(by_step.items())) == "##..#..#..##"
    assert document["guidance"]["asked"] + document["guidance"]["saved"] == len(entries)
    assert document["guidance"]["asked"] == asked(document).count("#")
    assert all(len(entry["branches"]) == (2 if mark == "#" else 1) for entry, mark in zip(entries, asked(document)))
    assert not torch.equal(plain, fast) and torch.isfinite(fast).all()


def test_the_reason_and_the_notes_tell_what_was_saved(tiny):
    sample(host.request(tiny("sd3"), PERIODIC), "sd3", steps=12)
    document = trace()
    assert "asks the unconditional branch at 6 of 12 steps, ##..#..#..##" in document["techniques"][0]["reason"]
    assert "1.33x fewer rows" in document["techniques"][0]["reason"]
    assert any("asked at 6 evaluations and saved at 6" in note for note in document["notes"])


def outputs_seen(model, seen):
    """Let a post-CFG function write down both branches, as rescaling, APG and their like read them."""
    model = model.clone()

    def look(args):
        seen.append((args["cond_denoised"].clone(), args["uncond_denoised"].clone()))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(look)
    return model


def test_everybody_still_sees_two_outputs(tiny):
    seen = []
    sample(outputs_seen(host.request(tiny("sd3"), PERIODIC), seen), "sd3", steps=12)
    assert len(seen) == 12
    assert all(not torch.equal(cond, uncond) and uncond.abs().max() > 0 for cond, uncond in seen)
    seen.clear()
    sample(
        outputs_seen(host.request(tiny("sd3"), Request("guidance", {"method": "Interval", "guide_until": 0.5})), seen),
        "sd3",
    )
    assert all(torch.equal(*pair) for pair in seen[4:]) and not any(torch.equal(*pair) for pair in seen[:4])


def test_frequencies_weighted_alike_are_the_plain_difference(tiny):
    settings = {"interval": 3, "warmup": 2, "tail": 1}
    plain = sample(host.request(tiny("wan"), Request("guidance", {"method": "Periodic", **settings})), "wan", steps=10)
    alike = {"method": "FasterCache", **settings, "low_weight": 1.0, "high_weight": 1.0, "forecast": "line"}
    assert torch.equal(plain, sample(host.request(tiny("wan"), Request("guidance", alike)), "wan", steps=10))
    weighted = {"method": "FasterCache", **settings}
    assert not torch.equal(plain, sample(host.request(tiny("wan"), Request("guidance", weighted)), "wan", steps=10))


@pytest.mark.parametrize("cache", [
    Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1}),
    Request("cache", {"method": "EasyCache", "threshold": 0.8, "warmup": 2, "tail": 1}),
    Request("cache", {"method": "FBCache", "threshold": 0.8, "warmup": 2, "tail": 1}),
    Request("table", {"steps": [[True, True, True], [True, False, True]] * 5}),
], ids=["taylor", "easycache", "fbcache", "table"])  # fmt: skip
def test_beside_a_cache_in_any_order(tiny, cache, monkeypatch):
    if cache.technique == "table":
        from stretto.acceleration.caching.masks import Table
        from stretto.acceleration.caching.table import table_settings

        cache = Request("table", table_settings(Table.from_json(["###", "#.#"] * 5, "test")))
    plans, results = [], []
    for order in itertools.permutations([cache, PERIODIC, Request("measure", {"nonce": 1})]):
        model = tiny("wan")
        for wanted in order:
            model = host.request(model, wanted)
        plans.append(host.plan_of(model))
        results.append(sample(model, "wan", steps=10))
    assert all(plan == plans[0] for plan in plans)
    assert all(torch.equal(result, results[0]) for result in results)
    document = trace()
    assert document["guidance"]["saved"] > 0
    assert document["totals"]["forecast"] + document["totals"]["reused"] + document["totals"]["mixed"] > 0


@pytest.mark.parametrize("method", ["Taylor", "EasyCache", "FBCache"])
def test_asking_every_step_beside_a_cache_is_the_cache_alone(tiny, method):
    cache = Request("cache", {"method": method, "interval": 2, "threshold": 0.8, "warmup": 2, "tail": 1})
    alone = sample(host.request(tiny("wan"), cache), "wan", steps=12)
    assert trace()["totals"]["computed"] < 12
    both = sample(host.request(host.request(tiny("wan"), cache), EVERY), "wan", steps=12)
    assert torch.equal(alone, both)


@pytest.mark.parametrize("method", ["Taylor", "EasyCache", "FBCache", "Output"])
def test_no_branch_is_ever_answered_from_features_older_than_the_other_ones(tiny, method):
    """Where a cache skips and both branches are asked, both were asked when it computed last."""
    cache = Request("cache", {"method": method, "interval": 2, "threshold": 0.8, "warmup": 2, "tail": 1})
    sample(host.request(host.request(tiny("wan"), cache), PERIODIC), "wan", steps=16)
    level, skipped = True, 0
    for entry in trace()["evaluations"]:
        names = {branch["branch"] for branch in entry["branches"]}
        if entry["decision"] == "computed":
            level = names == {"cond", "uncond"}
        elif method != "FBCache":  # a probe decides after the branches were asked for; the answer is then put aside
            assert names == {"cond"} or level
        skipped += entry["decision"] != "computed"
    assert skipped > 2 and trace()["guidance"]["saved"] >= 1


def test_a_probe_that_skips_a_step_with_both_branches_puts_the_answer_aside(tiny):
    seen = []
    cache = Request("cache", {"method": "FBCache", "threshold": 0.8, "warmup": 2, "tail": 1})
    saver = Request("guidance", {"method": "Periodic", "interval": 2, "warmup": 2, "tail": 1})
    sample(outputs_seen(host.request(host.request(tiny("sd3"), cache), saver), seen), "sd3", steps=16)
    document = trace()
    aside = [e for e in document["evaluations"] if e["decision"] != "computed" and len(e["branches"]) == 2]
    assert document["guidance"]["asked"] + len(aside) >= asked(document).count("#") > 0


def test_conditioning_of_several_areas_and_times(tiny, monkeypatch):
    """A part that sets in during the run asks both branches anew; nothing is mixed up."""

    def parts(seed, family=""):
        ((tokens, options),) = conditioning(seed, family)
        left = {**options, "area": (6, 4, 0, 0), "strength": 1.0}
        late = {**options, "start_percent": 0.4, "end_percent": 1.0}
        return [[tokens, left], [conditioning(seed + 5, family)[0][0], late]]

    monkeypatch.setattr(tiny_models, "conditioning", parts)
    plain = sample(tiny("sd3"), "sd3", steps=12)
    assert torch.equal(plain, sample(host.request(tiny("sd3"), EVERY), "sd3", steps=12))
    late = Request("guidance", {"method": "Periodic", "interval": 12, "warmup": 1, "tail": 0, "forecast": "repeat"})
    fast = sample(host.request(tiny("sd3"), late), "sd3", steps=12)
    assert torch.isfinite(fast).all()
    assert asked().count("#") == 2 and asked()[0] == "#"  # at the start, and where the late part sets in


def test_context_windows_keep_differences_apart(tiny):
    from comfy.context_windows import (
        ContextFuseMethod,
        IndexListContextHandler,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    def windowed(model):
        model = model.clone()
        model.model_options["context_handler"] = IndexListContextHandler(
            get_matching_context_schedule("standard_static"), get_matching_fuse_method("pyramid"),
            context_length=2, context_overlap=1, dim=2,
        )  # fmt: skip
        return model

    assert ContextFuseMethod
    plain = sample(windowed(tiny("wan")), "wan", steps=6)
    assert torch.equal(plain, sample(windowed(host.request(tiny("wan"), EVERY)), "wan", steps=6))
    fast = sample(windowed(host.request(tiny("wan"), PERIODIC)), "wan", steps=6)
    assert not torch.equal(plain, fast) and trace()["guidance"]["saved"] == asked().count(".") > 0
    assert trace()["memory"]["store_peak_bytes"] >= 2 * 2 * 16 * 6 * 4 * 4  # one difference for each window


def _nodes():
    """Nodes of ComfyUI that read both branches, or ask for them again: name -> what it does to a model."""

    def of(module, name, **values):
        def patched(model):
            node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
            if hasattr(node, "execute"):
                return node.execute(model, **values).result[0]
            return getattr(node(), node.FUNCTION)(model, *values.values())[0]

        return patched

    layers = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 0.6}
    return {
        "rescale": of("nodes_model_advanced", "RescaleCFG", multiplier=0.7),
        "slg": of("nodes_slg", "SkipLayerGuidanceDiT", **layers, scale=3.0, rescaling_scale=0.0),
        "slg simple": of("nodes_slg", "SkipLayerGuidanceDiTSimple", **layers),
        "pag": of("nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
        "apg": of("nodes_apg", "APG", eta=0.5, norm_threshold=5.0, momentum=-0.5),
        "cfg zero star": of("nodes_cfg", "CFGZeroStar"),
        "cfg norm": of("nodes_cfg", "CFGNorm", strength=0.9),
        "tcfg": of("nodes_tcfg", "TCFG"),
        "renorm": of("nodes_lumina2", "RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0),
        "mahiro": of("nodes_mahiro", "Mahiro"),
    }


@pytest.mark.parametrize("name", _nodes())
def test_beside_nodes_that_read_or_repeat_the_branches(tiny, name):
    patched = _nodes()[name]
    plain = sample(patched(tiny("sd3")), "sd3", steps=12)
    assert not torch.equal(plain, sample(tiny("sd3"), "sd3", steps=12)) or name == "renorm", "the node does something"
    assert torch.equal(plain, sample(patched(host.request(tiny("sd3"), EVERY)), "sd3", steps=12))
    fast = sample(patched(host.request(tiny("sd3"), PERIODIC)), "sd3", steps=12)
    assert torch.isfinite(fast).all() and not torch.equal(plain, fast)
    assert trace()["guidance"]["saved"] > 0
    if name == "slg simple":
        assert trace()["guidance"]["left"] == {"a node that asks for the unconditional branch on its own": 8}
    unguided = Request("guidance", {"method": "Interval", "guide_from": 0.3, "guide_until": 0.6})
    assert torch.isfinite(sample(patched(host.request(tiny("sd3"), unguided)), "sd3", steps=12)).all()


def test_cfg_1_has_nothing_to_save(tiny):
    model = host.request(tiny("sd3"), PERIODIC)
    assert torch.equal(sample(tiny("sd3"), "sd3", cfg=1.0), sample(model, "sd3", cfg=1.0))
    assert trace()["techniques"][0]["status"] == "off" and "guidance scale is 1" in trace()["techniques"][0]["reason"]
    with pytest.raises(StrettoError, match="marked as required"):
        sample(host.request(tiny("sd3"), Request("guidance", {}, required=True)), "sd3", cfg=1.0)


def test_a_node_that_wants_both_branches_at_cfg_1_gets_them(tiny):
    seen = []
    model = outputs_seen(host.request(tiny("sd3"), PERIODIC), seen)
    model.model_options["disable_cfg1_optimization"] = True
    sample(model, "sd3", cfg=1.0, steps=10)
    assert trace()["guidance"]["saved"] > 0
    assert all(uncond.abs().max() > 0 and not torch.equal(cond, uncond) for cond, uncond in seen)


def test_guiders_of_three_branches(tiny):
    def perp(model):
        guider = perpneg.Guider_PerpNeg(model)
        guider.set_conds(conditioning(0), conditioning(1), conditioning(2))
        guider.set_cfg(5.0, 0.8)
        return guide(model, guider)

    def dual(model):
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(conditioning(0), conditioning(1), conditioning(2))
        guider.set_cfg(5.0, 3.0)
        return guide(model, guider)

    model = host.request(tiny("sd3"), PERIODIC)
    assert torch.equal(perp(tiny("sd3")), perp(model))
    assert trace()["guidance"]["left"] == {"a guider that asks for 3 branches at once": 8}
    assert any("3 branches" in note for note in trace()["notes"])
    assert torch.equal(dual(tiny("sd3")), dual(model))
    assert "several scales" in trace()["techniques"][0]["reason"]


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast"])
def test_samplers_that_pick_their_own_noise_levels_stay_plain(tiny, sampler):
    plain = sample(tiny("sd3"), "sd3", sampler=sampler, steps=4)
    assert torch.equal(plain, sample(host.request(tiny("sd3"), PERIODIC), "sd3", sampler=sampler, steps=4))
    assert trace()["techniques"][0]["status"] == "off"


def test_noise_that_rises_again_asks_both_branches(tiny, monkeypatch):
    """A sampler that goes back up starts a new trajectory: differences of the old one are foreign."""
    import comfy.k_diffusion.sampling as sampling

    def up_and_down(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for sigma in (1.0, 0.8, 0.6, 0.9, 0.7):
            x = x - 0.05 * (x - model(x, sigma * ones, **extra_args))
        return x

    up_and_down.__name__ = "sample_euler"
    monkeypatch.setattr(sampling, "sample_euler", up_and_down)
    sample(
        host.request(tiny("sd3"), Request("guidance", {"interval": 16, "warmup": 0, "tail": 0, "forecast": "repeat"})),
        "sd3",
        steps=10,
    )
    assert asked() == "#..#."


def test_the_batch_may_differ_and_runs_leave_nothing_behind(tiny):
    model = host.request(tiny("sd3"), PERIODIC)
    first = sample(model, "sd3")
    sample(model, "sd3", batch=3, seed=4)
    sample(model, "sd3", shape=(16, 4, 4), seed=5)

    def stop(step, *args):
        if step == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(model, "sd3", callback=stop)
    assert torch.equal(first, sample(model, "sd3"))


def test_a_second_saver_and_a_profile_are_refused_by_name(tiny):
    with pytest.raises(ConflictError, match=r"Stretto Guidance Saver \(Interval\) cannot share .* \(Periodic\)"):
        host.request(host.request(tiny("sd3"), PERIODIC), Request("guidance", {"method": "Interval"}))
    with pytest.raises(ConflictError, match="Stretto Profile"):
        host.request(host.request(tiny("sd3"), PERIODIC), Request("profile", {"token": "t"}))


def test_the_node_asks_for_what_its_inputs_say(tiny):
    from stretto.nodes.guidance import StrettoGuidanceSaver

    defaults = {entry.id: entry.default for entry in StrettoGuidanceSaver.define_schema().inputs[1:]}
    assert list(defaults)[:8] == [
        "method", "interval", "warmup", "tail", "guide_from", "guide_until", "agreement", "required",
    ]  # fmt: skip
    model = StrettoGuidanceSaver.execute(tiny("sd3"), **defaults).result[0]
    (asked_for,) = host.plan_of(model).requests
    assert asked_for.settings["guide_until"] == 1.0 and asked_for.settings["interval"] == 3
    sample(model, "sd3", steps=16)
    assert trace()["guidance"]["saved"] == 8
    with pytest.raises(StrettoError, match="interval is 0"):
        StrettoGuidanceSaver.execute(tiny("sd3"), **{**defaults, "interval": 0})


def test_the_report_shows_the_branch_with_gaps(tiny):
    from stretto.acceleration.summary import summary

    sample(host.request(tiny("sd3"), PERIODIC), "sd3", steps=12)
    told = summary(trace())
    assert "uncond  ##  #  #  ##" in told and "cond    ############" in told
    assert "asked at 6 evaluations and saved at 6" in told


def test_weights_that_are_scheduled_over_the_run_are_left_alone():
    from comfy.hooks import Hook, HookGroup, HookKeyframe

    from stretto.acceleration.hosts.comfy_guidance import _obstacle

    constant, scheduled = HookGroup(), HookGroup()
    constant.add(Hook())
    hook = Hook()
    hook.hook_keyframe.add(HookKeyframe(strength=0.5, start_percent=0.3))
    scheduled.add(hook)
    assert _obstacle([[{"hooks": constant}], [{}]]) is None
    assert "scheduled over the run" in _obstacle([[{}], [{"hooks": scheduled}]])
