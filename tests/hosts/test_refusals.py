"""What cannot work is refused, in one sentence that says why."""

from itertools import permutations

import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheHolder, LazyCacheHolder

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample

TAYLOR = Request("cache", {"method": "Taylor", "interval": 2, "tail": 1})
EASY = Request("cache", {"method": "EasyCache"})


def test_two_caches_are_refused_naming_both(tiny):
    model = host.request(tiny("sd3"), TAYLOR)
    with pytest.raises(ConflictError, match=r"Stretto Cache \(EasyCache\).*Stretto Cache \(Taylor\)"):
        host.request(model, EASY)


@pytest.mark.parametrize("holder", [EasyCacheHolder, LazyCacheHolder])
def test_core_caches_are_named(tiny, holder):
    name = holder.__name__.removesuffix("Holder")
    core = tiny("sd3")
    core.model_options["transformer_options"]["easycache"] = holder(0.2, 0.1, 0.9, 8, False, output_channels=16)
    with pytest.raises(ConflictError, match=f"own {name} node"):
        host.request(core, TAYLOR)
    ours_first = host.request(tiny("sd3"), TAYLOR)
    ours_first.model_options["transformer_options"]["easycache"] = holder(0.2, 0.1, 0.9, 8, False, output_channels=16)
    with pytest.raises(ConflictError, match=f"own {name} node"):
        sample(ours_first, "sd3")


def test_every_order_of_nodes_gives_one_plan_and_one_picture(tiny):
    requests = [TAYLOR, Request("measure", {"nonce": 3})]
    plans, pictures = [], []
    for order in permutations(requests):
        model = tiny("sd3")
        for wanted in order:
            model = host.request(model, wanted)
        plans.append(host.plan_of(model))
        pictures.append(sample(model, "sd3"))
    assert all(plan == plans[0] for plan in plans)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def unknown_network(tiny, monkeypatch):
    model = tiny("sd3")
    network = model.model.diffusion_model
    monkeypatch.setattr(network, "__class__", type("UNetModel", (type(network),), {}))
    return model


def test_unsupported_network_samples_plainly_and_says_so(tiny, monkeypatch):
    model = unknown_network(tiny, monkeypatch)
    plain = sample(model, "sd3")
    result = sample(host.request(model, TAYLOR), "sd3")
    reason = host.TRACES.of_prompt(None)[-1]["techniques"][0]
    assert torch.equal(plain, result)
    assert reason["status"] == "off" and "UNetModel is not supported" in reason["reason"]


def test_required_refuses_instead_of_falling_back(tiny, monkeypatch):
    model = unknown_network(tiny, monkeypatch)
    wanted = Request("cache", {"method": "Taylor"}, required=True)
    with pytest.raises(StrettoError, match="required but cannot run: the network UNetModel"):
        sample(host.request(model, wanted), "sd3")


def test_unknown_sampler_samples_plainly(tiny, monkeypatch):
    import comfy.k_diffusion.sampling as sampling

    def sample_mystery(*args, **kwargs):
        return sampling.sample_euler(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample_euler_cfg_pp", sample_mystery)
    plain = sample(tiny("sd3"), "sd3", sampler="euler_cfg_pp")
    assert torch.equal(plain, sample(host.request(tiny("sd3"), TAYLOR), "sd3", sampler="euler_cfg_pp"))
    assert "mystery is not known" in host.TRACES.of_prompt(None)[-1]["techniques"][0]["reason"]


def test_stochastic_sampler_reduces_to_reuse(tiny):
    sample(host.request(tiny("sd3"), TAYLOR), "sd3", sampler="euler_ancestral")
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["techniques"][0]["status"] == "reduced"
    assert trace["totals"]["forecast"] == 0 and trace["totals"]["reused"] == 2
    assert trace["totals"]["computed"] == 6


def test_few_steps_turn_the_cache_off(tiny):
    sample(host.request(tiny("sd3"), TAYLOR), "sd3", steps=4)
    outcome = host.TRACES.of_prompt(None)[-1]["techniques"][0]
    assert outcome["status"] == "off" and "nothing to skip" in outcome["reason"]


def test_nothing_is_reserved_when_off_and_something_when_on(tiny, monkeypatch):
    seen = []
    network = type(tiny("sd3").model)
    original = network.memory_required

    def spy(self, shape, **kwargs):
        seen.append(shape[0])
        return original(self, shape, **kwargs)

    monkeypatch.setattr(network, "memory_required", spy)

    def largest(model):
        seen.clear()
        sample(model, "sd3")
        return max(seen)

    plain = largest(tiny("sd3"))
    assert largest(host.request(tiny("sd3"), Request("cache", {"interval": 1}))) == plain
    assert largest(host.request(tiny("sd3"), TAYLOR)) > plain
