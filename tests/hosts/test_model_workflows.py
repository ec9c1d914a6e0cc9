"""The settings of the workflows for published models are legal: on a tiny network of the same family nothing is off.

Weights of these models are not needed to know that. Each workflow is asked twice: at its own size and steps, up to where
sampling would begin; and run to the end, at a size that a tiny network can bear.
"""

import asyncio
import functools
from dataclasses import replace

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_lt, nodes_model_advanced

import stretto
from stretto.acceleration.hosts import comfy as host
from stretto.scripts.shipped_workflows.catalogue import WORKFLOWS
from stretto.scripts.shipped_workflows.graphs import PROMPT_FIRST, build

from .test_frame_rate import calm_vae, vae  # noqa: F401  (fixtures)
from .tiny_models import conditioning

#: Family -> tiny network, and the variant whose published numbers the real model gets.
NETWORKS = {
    "flux": ("flux", "dev"),
    "sd35": ("sd3", "3.5-large"),
    "qwen-image": ("qwen_image", "any"),
    "z-image": ("z_image", "z-image"),
    "wan21": ("wan", "2.1-t2v-1.3b"),
    "wan22": ("wan", "2.1-t2v-14b"),
    "hunyuan-video": ("hunyuan_video", "1"),
    "ltx": ("ltxv", "any"),
    "demo-image": ("sd3", ""),
    "demo-video": ("wan", ""),
}
#: Sizes below which nodes are off; a tiny run is below all of them.
THRESHOLDS = {"min_tokens": 0, "min_side": 2}
#: Latents of the runs: as small as lets every method draw its pattern.
SMALL = {
    "flux": (16, 32, 32),
    "sd35": (16, 16, 16),
    "qwen-image": (16, 1, 16, 16),
    "z-image": (16, 16, 16),
    "ltx": (128, 3, 6, 6),
}
SMALL_CLIP = (16, 5, 16, 16)
REAL = [workflow for workflow in WORKFLOWS if not workflow.model.demo]


class Enough(Exception):
    """Raised where sampling would begin."""


@pytest.fixture(autouse=True)
def _quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@functools.cache
def classes():
    extension = asyncio.run(stretto.comfy_entrypoint())
    ours = {item.GET_SCHEMA().node_id: item for item in asyncio.run(extension.get_node_list())}
    shifts = {name: getattr(nodes_model_advanced, name) for name in ("ModelSamplingSD3", "ModelSamplingAuraFlow")}
    return ours, shifts


@pytest.fixture
def known(monkeypatch):
    """``known(variant)``: networks are taken for that published model, whose presets they get."""

    def as_variant(variant):
        real = host.describe
        monkeypatch.setattr(host, "describe", lambda network: replace(real(network), variant=lambda network: variant))

    return as_variant


def settings_of(entry, **changes):
    """All settings of a node of the pack: those of the workflow, and the defaults of the others."""
    declared = classes()[0][entry["class_type"]].define_schema().inputs
    values = {item.id: item.options[0] for item in declared if getattr(item, "options", None)}
    values |= {item.id: item.default for item in declared if getattr(item, "default", None) is not None}
    values |= {name: value for name, value in entry["inputs"].items() if not isinstance(value, list)}
    return values | {name: value for name, value in changes.items() if name in values}


def with_techniques(api, model_link, model, **changes):
    """Execute, from the loader down to ``model_link``, the nodes that a model passes through."""
    key, _ = model_link
    entry = api[key]
    ours, shifts = classes()
    if "model" not in entry["inputs"]:
        return model  # the loader
    model = with_techniques(api, entry["inputs"]["model"], model, **changes)
    if entry["class_type"] in shifts:
        return shifts[entry["class_type"]]().patch(model, entry["inputs"]["shift"])[0]
    values = settings_of(entry, **changes)
    return ours[entry["class_type"]].execute(model=model, **values).result[0]


def full_size(workflow, model):
    """The shape of the workflow's own latent."""
    format_, family = model.model.latent_format, workflow.model
    side = 32 if family.latent == "EmptyLTXVLatentVideo" else 8
    shape = [family.size[1] // side, family.size[0] // side]
    if format_.latent_dimensions == 3:
        frames = family.size[2] if family.is_video else 1
        shape.insert(0, (frames - 1) // (8 if side == 32 else 4) + 1)
    return (format_.latent_channels, *shape)


def sampler_of(api, link, family, **changes):
    """The SAMPLER of SamplerCustom, with stages where a node puts them in."""
    entry = api[link[0]]
    sampler = comfy.samplers.sampler_object(family.sampler)
    if entry["class_type"] == "KSamplerSelect":
        return sampler
    values = settings_of(entry, **changes)
    return classes()[0][entry["class_type"]].execute(sampler=sampler, **values).result[0]


def sigmas_of(api, link, model, latent):
    """The noise levels that SamplerCustom is given."""
    entry = api[link[0]]
    if entry["class_type"] == "LTXVScheduler":
        values = {"max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
        return nodes_lt.LTXVScheduler.execute(entry["inputs"]["steps"], **values, latent={"samples": latent}).result[0]
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, entry["inputs"]["scheduler"], entry["inputs"]["steps"])


def run(workflow, api, entry, model, network, shape, **changes):
    """Sample as the sampler node ``entry`` would."""
    family, inputs = workflow.model, entry["inputs"]
    latent = torch.zeros(1, *shape)
    noise = comfy.sample.prepare_noise(latent, 1)
    words = conditioning(3, network), conditioning(4, network)
    if entry["class_type"] == "SamplerCustom":
        sigmas = sigmas_of(api, inputs["sigmas"], model, latent)
        sampler = sampler_of(api, inputs["sampler"], family, **changes)
        return comfy.sample.sample_custom(
            model, noise, family.cfg, sampler, sigmas, *words, latent, disable_pbar=True, seed=1
        )
    part = {}
    if entry["class_type"] == "KSamplerAdvanced":
        last = inputs["end_at_step"]
        part = {
            "start_step": inputs["start_at_step"],
            "last_step": min(last, inputs["steps"]),
            "disable_noise": inputs["add_noise"] == "disable",
            "force_full_denoise": inputs["return_with_leftover_noise"] == "disable",
        }
    return comfy.sample.sample(
        model,
        noise,
        inputs["steps"],
        inputs["cfg"],
        inputs["sampler_name"],
        inputs["scheduler"],
        *words,
        latent,
        disable_pbar=True,
        seed=1,
        **part,
    )


def samplers(api):
    return [entry for entry in api.values() if entry["class_type"] in ("KSampler", "KSamplerAdvanced", "SamplerCustom")]


def asked_for(outcomes):
    return {outcome["technique"]: outcome for outcome in outcomes if outcome["technique"] != "measure"}


@pytest.mark.parametrize("workflow", REAL, ids=lambda workflow: workflow.name)
def test_at_its_own_size_every_technique_is_on(workflow, tiny, known, monkeypatch):
    network, variant = NETWORKS[workflow.family]
    known(variant)
    seen = []

    def stop(plan, facts, notes):
        seen.append((len(plan.requests), real(plan, facts, notes)))
        raise Enough

    real = host.resolve
    monkeypatch.setattr(host, "resolve", stop)
    api = build(workflow).api
    for entry in samplers(api):
        model = with_techniques(api, entry["inputs"]["model"], tiny(network))
        with pytest.raises(Enough):
            run(workflow, api, entry, model, network, full_size(workflow, model))
    for requests, execution in seen:
        outcomes = [outcome.to_json() for outcome in execution.outcomes]
        assert len(outcomes) == requests
        for name, outcome in asked_for(outcomes).items():
            assert outcome["status"] in ("active", "reduced"), (name, outcome["reason"])
            assert "there is no" not in outcome["reason"], outcome["reason"]
    assert len(seen) == len(samplers(api))


@pytest.mark.parametrize(
    "workflow", [item for item in WORKFLOWS if samplers(build(item).api)], ids=lambda workflow: workflow.name
)
def test_it_runs_to_the_end_with_every_technique_on(workflow, tiny, known):
    network, variant = NETWORKS[workflow.family]
    known(variant)
    api = build(workflow).api
    shape = SMALL.get(workflow.family, SMALL["sd35"] if workflow.family == "demo-image" else SMALL_CLIP)
    for entry in samplers(api):
        model = with_techniques(api, entry["inputs"]["model"], tiny(network), **THRESHOLDS)
        result = run(workflow, api, entry, model, network, shape, **THRESHOLDS)
        trace = host.TRACES.of_prompt(None)[-1]
        assert trace["outcome"] == "completed" and bool(torch.isfinite(result).all())
        wanted = {kind for kind in workflow.techniques if kind not in NOT_IN_PLANS}
        found = asked_for(trace["techniques"])
        assert len(found) == len(wanted), (wanted, found)
        for name, outcome in found.items():
            assert outcome["status"] in ("active", "reduced"), (name, outcome["reason"])


#: Nodes of the pack that are no request to a sampler.
NOT_IN_PLANS = {
    "StrettoProfile", "StrettoCalibrate", "StrettoAttentionProbe", "StrettoAttentionSearch", "StrettoBlockProbe",
    "StrettoQuantizationStatistics", "StrettoQuantize", "StrettoDynamicFrameRate", "StrettoDynamicVAEDecode",
    "StrettoFrameSchedule", "StrettoDynamicVAEEncode", "StrettoRegionMap",
}  # fmt: skip


@pytest.mark.parametrize("name", ["wan21-dynamic", "hunyuan-video-dynamic"])
def test_fewer_latent_frames_are_known_to_the_family(name, tiny, calm_vae):  # noqa: F811
    workflow = next(item for item in REAL if item.name == name)
    (entry,) = (item for item in build(workflow).api.values() if item["class_type"] == "StrettoDynamicFrameRate")
    network, _ = NETWORKS[workflow.family]
    values = {key: value for key, value in entry["inputs"].items() if not isinstance(value, list)}
    node = classes()[0]["StrettoDynamicFrameRate"]
    latent = {"samples": torch.zeros(1, 16, 9, 2, 2)}
    samples, schedule, report = node.execute(
        model=tiny(network), vae=calm_vae, positive=conditioning(3, network), negative=conditioning(4, network),
        latent_image=latent, **values | {"denoise": 1.0},
    ).result  # fmt: skip
    assert samples["samples"].shape[2] == schedule.latents < 9, report
    (found,) = (item for item in host.TRACES.of_prompt(None)[-1]["techniques"] if item["technique"] == "frame_rate")
    assert found["status"] == "active", found["reason"]


@pytest.mark.parametrize("workflow", [item for item in REAL if item.recipe in PROMPT_FIRST], ids=lambda item: item.name)
def test_recorded_runs_are_possible_on_the_family(workflow, tiny):
    """What profiles, probes and statistics begin with: one run that is watched. Two steps of it."""
    network, _ = NETWORKS[workflow.family]
    model, api = tiny(network), build(workflow).api
    (entry,) = (item for item in api.values() if item["class_type"] in FIRST)
    values = settings_of(entry, steps=4, count=1, probes=1)
    shape = SMALL.get(workflow.family, SMALL_CLIP)
    ends = {
        "positive": conditioning(3, network),
        "negative": conditioning(4, network),
        "latent_image": {"samples": torch.zeros(1, *shape)},
    }
    found = classes()[0][entry["class_type"]].execute(model=model, **ends, **values).result
    assert len(found) == len(classes()[0][entry["class_type"]].define_schema().outputs)
    assert host.TRACES.of_prompt(None)[-1]["outcome"] == "completed"


#: Nodes that watch a run.
FIRST = ("StrettoProfile", "StrettoAttentionProbe", "StrettoBlockProbe")
