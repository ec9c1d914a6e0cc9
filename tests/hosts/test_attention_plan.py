"""Planned attention in ComfyUI: full it changes nothing, elsewhere every head does what its plan says, or is full."""

import gc
import itertools
import json
import weakref

import comfy.model_management
import jsonschema
import numpy as np
import pytest
import torch

from stretto.acceleration.attention.planned.schedules import SCHEDULES
from stretto.acceleration.attention.planned.session import LETTERS
from stretto.acceleration.attention.reuse import Mode, ModeTable
from stretto.acceleration.attention.search import ModelTag, Pattern, from_steps, save_plan
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import summary

from .test_attention import FAMILIES, FEW, FIXED, options_of, relative, spatial, trace_of
from .tiny_models import sample

STEPS = 4


def request(*, force=False, required=True, **settings):
    if "file" not in settings:
        settings.setdefault("schedule", "Re-ttention, routed")
    return Request("attention_plan", {"min_tokens": 0, **settings}, force=force, required=required)


def plan_file(path, tiny, family, by_step, *, budget=0.5, cfg=None, heads=None, **fields):
    """Write a plan whose heads all do the same, one mode per step, for the noise levels of a run of as many steps."""
    network = tiny(family).model.diffusion_model
    heads = heads or describe(network).heads(network)
    options = {"steps": len(by_step), "shape": spatial(family), **options_of(family)}
    sample(host.request(tiny(family), Request("measure")), family, **options)
    sigmas = trace_of()["sigmas"][:-1]
    shape = len(by_step), describe(network).module_blocks(network), heads
    modes = np.array([int(mode) for mode in by_step], np.uint8)[:, None, None] * np.ones(shape, np.uint8)
    shared = np.array(list(cfg) if cfg else [False] * len(by_step))[:, None, None] & np.ones(shape, bool)
    plan = from_steps(
        ModeTable(modes, shared), sigmas, model=ModelTag(describe(network).family), patterns=(Pattern("router", 0),),
        budget=np.full(shape, budget, np.float32), grid=(1, 5, 7), tokens=35, block=(16, 16), **fields,
    )  # fmt: skip
    save_plan(path, plan)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_everywhere_is_plain_sampling_off_and_engaged(tiny, family, tmp_path):
    options = {"steps": 3, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    file = plan_file(tmp_path / "full.safetensors", tiny, family, [Mode.FULL] * 3)
    off = sample(host.request(tiny(family), request(file=file, required=False)), family, **options)
    assert torch.equal(off, plain)
    assert "every head is full" in trace_of()["techniques"][0]["reason"]
    engaged = sample(host.request(tiny(family), request(file=file, force=True)), family, **options)
    assert torch.equal(engaged, plain)
    assert trace_of()["techniques"][0]["status"] == "active"
    assert set("".join(itertools.chain(*trace_of()["attention"]["modes"]))) == {"F"}


@pytest.mark.parametrize("mode", [Mode.LIST, Mode.RESIDUAL, Mode.RHO, Mode.MEAN, Mode.BLEND])
@pytest.mark.parametrize("family", FEW)
def test_lists_of_everything_are_full_attention_within_rounding(tiny, family, mode, tmp_path):
    options = {"steps": 3, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    file = plan_file(tmp_path / "all.safetensors", tiny, family, [Mode.FULL, mode, mode], budget=1.0)
    result = sample(host.request(tiny(family), request(file=file)), family, **options)
    assert relative(result, plain) < 1e-5
    trace = trace_of()
    assert {letter for layers in trace["attention"]["modes"][1:] for letter in "".join(layers)} == {LETTERS[mode]}
    assert all(share == 1.0 for item in trace["attention"]["layers"] for share in item["kept"])
    assert all(error < 1e-5 for item in trace["attention"]["samples"] for error in item["relative_l2"])


@pytest.mark.parametrize("schedule_name", sorted(SCHEDULES))
@pytest.mark.parametrize("family", FEW)
def test_every_schedule_runs_and_is_reported(tiny, family, schedule_name):
    options = {"steps": 8, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    result = sample(host.request(tiny(family), request(schedule=schedule_name)), family, **options)
    trace = trace_of()
    jsonschema.validate(json.loads(json.dumps(trace)), schema("trace"))
    found, network = trace["attention"], tiny(family).model.diffusion_model
    complete = all(share == 1.0 for item in found["layers"] for share in item["kept"])
    assert torch.isfinite(result).all() and (complete or not torch.equal(result, plain))
    assert relative(result, plain) < 0.1
    assert len(found["modes"]) == 8 and len(found["modes"][0]) == describe(network).module_blocks(network)
    first = round(8 * SCHEDULES[schedule_name].full_until)
    assert found["first_sparse_step"] == first
    assert found["memory"]["missed"] == 0
    assert trace["memory"]["store_peak_bytes"] <= trace["techniques"][0]["store_bytes"]
    assert "of the key blocks kept" in summary(trace)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - FIXED))
def test_every_family_shares_and_corrects(tiny, family, tmp_path):
    options = {"steps": STEPS, "shape": spatial(family), **options_of(family)}
    for last, letter in ((Mode.RHO, "H"), (Mode.RESIDUAL, "F")):  # another correction needs a full step of its own
        file = plan_file(tmp_path / f"{letter}.safetensors", tiny, family, [Mode.FULL, Mode.RHO, Mode.SHARE, last])
        result = sample(host.request(tiny(family), request(file=file)), family, **options)
        assert torch.isfinite(result).all()
        done = ["".join(sorted(set("".join(layers)))) for layers in trace_of()["attention"]["modes"]]
        assert done == ["F", "H", "S", letter]


@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.parametrize("mode", [Mode.SHARE, Mode.RHO])
def test_sharing_between_guidance_branches_works_merged_and_split(tiny, family, mode, tmp_path, monkeypatch):
    options = {"steps": STEPS, "cfg": 4.0, "shape": spatial(family)}
    modes = [Mode.FULL, mode, Mode.FULL, mode]
    file = plan_file(tmp_path / "plan.safetensors", tiny, family, modes, cfg=[False, True, True, True])
    merged = sample(host.request(tiny(family), request(file=file)), family, **options)
    assert trace_of()["attention"]["memory"]["heads"]["donated"] > 0
    donated = trace_of()["attention"]["memory"]["heads"]["donated"]
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 0)
    split = sample(host.request(tiny(family), request(file=file, memory=64)), family, **options)
    # In one batch the prompt's branch gives to the other; called one by one, whichever comes first gives.
    assert relative(split, merged) < 0.1
    assert trace_of()["attention"]["memory"]["heads"]["donated"] == donated
    alone = sample(host.request(tiny(family), request(file=file)), family, **{**options, "cfg": 1.0})
    assert torch.isfinite(alone).all() and trace_of()["attention"]["memory"]["heads"].get("donated", 0) == 0


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "dpm_2"])
def test_samplers_that_evaluate_twice_or_add_noise_keep_in_step(tiny, sampler):
    options = {"steps": 8, "shape": spatial("wan"), "sampler": sampler}
    plain = sample(tiny("wan"), "wan", **options)
    result = sample(host.request(tiny("wan"), request()), "wan", **options)
    assert relative(result, plain) < 0.1
    trace = trace_of()
    assert trace["attention"]["memory"]["missed"] == 0
    modes = ["".join(layers) for layers in trace["attention"]["modes"]]
    assert set(modes[0]) == set(modes[1]) == {"F"} and set(modes[2]) == {"H"}


def test_a_run_that_starts_in_the_middle_is_full_first(tiny):
    options = {"steps": 8, "shape": spatial("wan"), "denoise": 0.5}
    file_free = request(full_until=0.0, period=5)
    result = sample(host.request(tiny("wan"), file_free), "wan", **options)
    modes = ["".join(layers) for layers in trace_of()["attention"]["modes"]]
    assert torch.isfinite(result).all()
    assert set(modes[0]) == {"F"} and set(modes[1]) == {"H"}


def test_a_plan_made_at_another_number_of_steps_is_mapped_by_noise_level(tiny, tmp_path):
    file = plan_file(tmp_path / "plan.safetensors", tiny, "wan", [Mode.FULL] * 3 + [Mode.LIST] * 3)
    for steps in (6, 12, 4):
        sample(host.request(tiny("wan"), request(file=file)), "wan", steps=steps, shape=spatial("wan"))
        found = trace_of()
        modes = ["".join(layers)[0] for layers in found["attention"]["modes"]]
        assert modes == sorted(modes) and abs(modes.count("F") - steps / 2) <= 1
        assert ("mapped by noise level" in found["techniques"][0]["reason"]) == (steps != 6)


def test_plans_for_other_models_are_refused_in_words(tiny, tmp_path):
    file = plan_file(tmp_path / "wan.safetensors", tiny, "wan", [Mode.FULL, Mode.LIST], heads=4)
    with pytest.raises(StrettoError, match="has 3 layers of 4 heads, this model 3 of 2"):
        sample(host.request(tiny("wan"), request(file=file)), "wan", steps=2, shape=spatial("wan"))
    with pytest.raises(StrettoError, match="made for wan, this model is sd3"):
        sample(host.request(tiny("sd3"), request(file=file)), "sd3", steps=2, shape=spatial("sd3"))
    lost = request(file=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(StrettoError, match="nowhere.safetensors"):
        sample(host.request(tiny("wan"), lost), "wan", steps=2, shape=spatial("wan"))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"schedule": "DiTFastAttn", "file": "x"}, "one of the two"),
        ({"schedule": "", "file": ""}, "one of the two"),
        ({"schedule": "Nobody's"}, "known schedules: DiTFastAttn"),
        ({"keep": 1.5}, r"keep is 1.5; it must be a number in \[0, 1\]"),
        ({"period": 1}, "period is 1"),
        ({"store": "shelf"}, "store is 'shelf'; it must be one of auto"),
        ({"memory": -1}, "memory is -1"),
        ({"speed": 2}, "unknown setting 'speed'"),
    ],
)
def test_bad_settings_are_refused_at_the_node(tiny, settings, words):
    with pytest.raises(StrettoError, match=words):
        host.request(tiny("wan"), Request("attention_plan", {"schedule": "DiTFastAttn", **settings}))


def test_short_sequences_are_left_alone(tiny):
    plain = sample(tiny("wan"), "wan", steps=3)
    result = sample(host.request(tiny("wan"), request(min_tokens=8192, required=False)), "wan", steps=3)
    assert torch.equal(result, plain)
    assert "below min_tokens" in trace_of()["techniques"][0]["reason"]


def test_two_kinds_of_attention_on_one_model_are_refused(tiny):
    model = host.request(tiny("wan"), request())
    with pytest.raises(ConflictError, match="Stretto Attention Plan"):
        host.request(model, Request("attention", {"min_tokens": 0}))


CACHE = Request("cache", {"method": "Schedule", "mask": "##.#.##.", "order": 1, "warmup": 0, "tail": 0}, required=True)


def test_it_stacks_with_a_cache_in_either_order_within_the_memory_announced(tiny):
    options = {"steps": 8, "shape": spatial("wan")}
    results = []
    for order in itertools.permutations([CACHE, request(), Request("measure")]):
        model = tiny("wan")
        for wanted in order:
            model = host.request(model, wanted)
        results.append(sample(model, "wan", **options))
        trace = trace_of()
        announced = sum(item.get("store_bytes", 0) for item in trace["techniques"])
        assert 0 < trace["memory"]["store_peak_bytes"] <= announced
        modes = ["".join(layers) for layers in trace["attention"]["modes"]]
        assert [set(row) == {"."} for row in modes] == [mark == "." for mark in "##.#.##."]
        assert trace["totals"]["forecast"] == 3
    assert all(torch.equal(result, results[0]) for result in results)
    plain = sample(tiny("wan"), "wan", **options)
    assert relative(results[0], plain) < 0.2


def test_a_budget_that_does_not_suffice_makes_heads_full_not_wrong(tiny, monkeypatch):
    options = {"steps": 8, "shape": (16, 2, 32, 32)}
    plain = sample(tiny("wan"), "wan", **options)
    free = sample(host.request(tiny("wan"), request()), "wan", **options)
    peak = trace_of()["memory"]["store_peak_bytes"]
    assert peak > 0
    from stretto.acceleration.attention.planned import technique

    monkeypatch.setattr(technique, "FREE_SHARE", 0.0)
    short = sample(host.request(tiny("wan"), request(store="as computed")), "wan", **options)
    trace = trace_of()
    assert trace["memory"]["store_peak_bytes"] == 0
    assert "memory is short" in trace["techniques"][0]["reason"]
    assert relative(short, plain) <= relative(free, plain)


@pytest.mark.parametrize("store", ["eighth", "system memory", "eighth in system memory"])
def test_features_may_be_kept_in_eight_bits_or_in_system_memory(tiny, store):
    options = {"steps": 8, "shape": spatial("wan")}
    as_computed = sample(host.request(tiny("wan"), request(store="as computed")), "wan", **options)
    peak = trace_of()["memory"]["store_peak_bytes"]
    result = sample(host.request(tiny("wan"), request(store=store)), "wan", **options)
    assert relative(result, as_computed) < (1e-6 if store == "system memory" else 2e-2)
    trace = trace_of()
    assert trace["attention"]["memory"]["policy"] == store
    assert trace["attention"]["memory"]["peak_system_bytes"] > 0 or "system" not in store
    if "eighth" in store:
        assert trace["memory"]["store_peak_bytes"] < 0.7 * peak


def test_two_runs_of_a_seed_agree_and_nothing_is_left_behind(tiny):
    options = {"steps": 6, "shape": spatial("wan")}
    model = host.request(tiny("wan"), request())
    first = sample(model, "wan", **options)
    sample(model, "wan", **{**options, "shape": (16, 2, 8, 6)})
    seen = []

    def interrupt(step, *_):
        if step == 4:
            seen.extend(
                weakref.ref(x) for x in gc.get_objects() if type(x).__name__ in ("AttentionMemory", "PlannedSession")
            )
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, "wan", **options, callback=interrupt)
    assert trace_of()["outcome"] == "interrupted"
    gc.collect()
    assert seen and all(ref() is None for ref in seen)
    assert torch.equal(sample(model, "wan", **options), first)
