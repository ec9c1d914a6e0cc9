"""The second pass in a graph of ComfyUI's custom samplers: the nodes themselves, joined by their links."""

import asyncio

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

import stretto
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.frame_rate.schedule import schedule_of_latent

from .test_frame_rate import calm_vae, image_to_video, vae  # noqa: F401  (fixtures)
from .tiny_models import conditioning

STEPS, FIRST, SEED, CFG = 6, 2, 1, 5.0


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def classes():
    extension = asyncio.run(stretto.comfy_entrypoint())
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    names = ("BasicScheduler", "SplitSigmas", "RandomNoise", "KSamplerSelect", "CFGGuider", "SamplerCustomAdvanced")
    return ours | {name: getattr(custom, name) for name in names}


def run_graph(graph, classes, given, wanted):
    """Run the nodes above ``wanted`` (an id) and return its outputs; a text ``"id:slot"`` is a link, ``"=name"`` is given."""
    done = {}

    def value(entry):
        if isinstance(entry, str) and entry.startswith("="):
            return given[entry[1:]]
        if isinstance(entry, str) and ":" in entry:
            key, slot = entry.split(":")
            return outputs(key)[int(slot)]
        return entry

    def outputs(key):
        if key not in done:
            name, inputs = graph[key]
            node = classes[name]
            declared = [item.id for item in node.define_schema().inputs]
            assert set(inputs) <= set(declared), name
            done[key] = node.execute(**{entry: value(inputs[entry]) for entry in declared if entry in inputs}).result
            assert len(done[key]) == len(node.define_schema().outputs)
        return done[key]

    return outputs(wanted)


def in_two(sampler, keep=60.0, layers="0, 2"):
    """The graph of the help page."""
    words = {"positive": "=positive", "negative": "=negative"}
    return {
        "sigmas": ("BasicScheduler", {"model": "=model", "scheduler": "simple", "steps": STEPS, "denoise": 1.0}),
        "split": ("SplitSigmas", {"sigmas": "sigmas:0", "step": FIRST}),
        "noise": ("RandomNoise", {"noise_seed": SEED}),
        "sampler": ("KSamplerSelect", {"sampler_name": sampler}),
        "guide": ("CFGGuider", {"model": "=model", **words, "cfg": CFG}),
        "first": ("SamplerCustomAdvanced", {"noise": "noise:0", "guider": "guide:0", "sampler": "sampler:0",
                                            "sigmas": "split:0", "latent_image": "=latent"}),
        "middle": ("StrettoFrameRateSecondPass", {"model": "=model", "vae": "=vae", **words, "noise": "noise:0",
                                                  "denoised": "first:1", "keep": keep, "layers": layers}),
        "guide again": ("CFGGuider", {"model": "middle:0", "positive": "middle:1", "negative": "middle:2", "cfg": CFG}),
        "second": ("SamplerCustomAdvanced", {"noise": "middle:3", "guider": "guide again:0", "sampler": "sampler:0",
                                             "sigmas": "split:1", "latent_image": "middle:4"}),
        "decode": ("StrettoDynamicVAEDecode", {"samples": "second:0", "vae": "=vae", "restore": "as scheduled"}),
    }  # fmt: skip


def in_one(sampler, keep=60.0, layers="0, 2"):
    """The comfortable node with the same settings."""
    return {
        "one": ("StrettoDynamicFrameRate", {
            "model": "=model", "vae": "=vae", "positive": "=positive", "negative": "=negative", "latent_image": "=latent",
            "seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0,
            "keep": keep, "after": 100.0 * FIRST / STEPS, "layers": layers, "fresh": True}),
        "decode": ("StrettoDynamicVAEDecode", {"samples": "one:0", "vae": "=vae", "restore": "as scheduled"}),
    }  # fmt: skip


def given_for(tiny, vae, family="wan"):  # noqa: F811
    return {
        "model": tiny(family), "vae": vae, "positive": conditioning(3, family), "negative": conditioning(4, family),
        "latent": {"samples": torch.zeros(1, 16, 9, 2, 2)},
    }  # fmt: skip


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_two_custom_samplers_make_what_the_one_node_makes(tiny, calm_vae, classes, sampler):  # noqa: F811
    given = given_for(tiny, calm_vae)
    latent, _ = run_graph(in_two(sampler), classes, given, "second")
    alone, schedule, _ = run_graph(in_one(sampler), classes, given, "one")
    assert schedule_of_latent(latent) == schedule and not schedule.trivial
    assert torch.equal(latent["samples"], alone["samples"])
    two, one = (run_graph(graph(sampler), classes, given, "decode")[0] for graph in (in_two, in_one))
    assert len(two) == 33 and torch.equal(two, one)


def test_layers_and_share_reach_the_second_sampler(tiny, calm_vae, classes):  # noqa: F811
    """The equality above says something: other settings make another video."""
    given = given_for(tiny, calm_vae)
    found = [
        run_graph(in_two("euler", keep, layers), classes, given, "second")[0]["samples"]
        for keep, layers in ((60.0, "0, 2"), (60.0, "none"), (40.0, "0, 2"))
    ]
    assert found[0].shape == found[1].shape and not torch.equal(found[0], found[1])
    assert found[2].shape[2] < found[0].shape[2]


def test_given_frames_go_through_both_the_same(tiny, calm_vae, classes):  # noqa: F811
    given = given_for(tiny, calm_vae, "wan2.2_i2v")
    given |= {"positive": image_to_video((0, 8)), "negative": image_to_video((0, 8))}
    latent, _ = run_graph(in_two("euler"), classes, given, "second")
    alone, schedule, _ = run_graph(in_one("euler"), classes, given, "one")
    assert schedule.rates[-1] == 1 and torch.equal(latent["samples"], alone["samples"])


def test_wires_that_are_mixed_up_are_refused_in_words(tiny, calm_vae, classes):  # noqa: F811
    given, graph = given_for(tiny, calm_vae), in_two("euler")
    name, inputs = graph["second"]
    full_latent = graph | {"second": (name, inputs | {"latent_image": "first:0", "noise": "noise:0"})}
    with pytest.raises(StrettoError, match="prepared for 5 latent frames"):
        run_graph(full_latent, classes, given, "second")
    full_noise = graph | {"second": (name, inputs | {"latent_image": "first:0"})}
    with pytest.raises(StrettoError, match="this noise is for 5 latent frames"):
        run_graph(full_noise, classes, given, "second")
