"""A run leaves no trace in the next one: not on the model, not in memory, not after an error."""

import copy
import gc
import weakref

import comfy.model_management
import pytest
import torch

from stretto.acceleration.caching import store as store_module
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample

TAYLOR = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
EASY = Request("cache", {"method": "EasyCache", "threshold": 0.8, "warmup": 2, "tail": 1})


@pytest.fixture(params=[TAYLOR, EASY], ids=["taylor", "easycache"])
def cached(request, tiny):
    return host.request(tiny("wan"), request.param)


def frozen(options):
    """Return what model options hold, down to object identities."""
    if isinstance(options, dict):
        return {key: frozen(value) for key, value in options.items()}
    return [frozen(item) for item in options] if isinstance(options, list) else id(options)


def test_same_seed_same_picture_and_untouched_options(cached):
    before = frozen(cached.model_options)
    first, second = sample(cached, "wan"), sample(cached, "wan")
    assert torch.equal(first, second)
    assert frozen(cached.model_options) == before


def test_other_resolution_seed_and_batch_between_runs(cached):
    first = sample(cached, "wan")
    sample(cached, "wan", shape=(16, 2, 4, 4), seed=5)
    sample(cached, "wan", batch=3, seed=9)
    assert torch.equal(first, sample(cached, "wan"))


def test_a_second_sampler_on_the_same_model(cached):
    first = sample(cached, "wan", sampler="euler")
    sample(cached, "wan", sampler="dpmpp_2m")
    assert torch.equal(first, sample(cached, "wan", sampler="euler"))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(comfy.model_management.InterruptProcessingException, "interrupted"), (RuntimeError, "failed")],
)
def test_interrupt_and_failure_in_mid_run(cached, error, outcome):
    first = sample(cached, "wan")

    def stop(step, *args):
        if step == 4:
            raise error("stop")

    with pytest.raises(error):
        sample(cached, "wan", callback=stop)
    assert host.TRACES.of_prompt(None)[-1]["outcome"] == outcome
    assert host._CALL.get() is None
    assert torch.equal(first, sample(cached, "wan"))


def test_an_exception_inside_a_block(cached):
    first = sample(cached, "wan")
    broken = cached.clone()
    calls = []

    def explode(args, extra):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("block")
        return extra["original_block"](args)

    broken.set_model_patch_replace(explode, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="block"):
        sample(broken, "wan")
    assert host._CALL.get() is None
    assert torch.equal(first, sample(cached, "wan"))


def test_no_tensor_survives_its_run(cached, monkeypatch):
    alive: list[weakref.ref] = []
    push = store_module.SnapshotStore.push

    def spy(self, key, position, tensor, **options):
        kept = push(self, key, position, tensor, **options)
        alive.append(weakref.ref(self.histories[key].tensors[0]))
        return kept

    monkeypatch.setattr(store_module.SnapshotStore, "push", spy)
    sample(cached, "wan")
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)


def test_removing_the_node_restores_the_plain_picture(tiny, cached):
    plain = sample(tiny("wan"), "wan")
    assert not torch.equal(plain, sample(cached, "wan"))
    assert torch.equal(plain, sample(tiny("wan"), "wan"))


def test_clones_and_deep_copies_share_no_state(cached):
    first = sample(cached, "wan")
    clone = cached.clone()
    clone.model_options = copy.deepcopy(clone.model_options)
    assert torch.equal(first, sample(clone, "wan"))
    assert host.plan_of(clone) == host.plan_of(cached)


def test_inputs_are_never_written_to(cached, monkeypatch):
    """Core EasyCache adds in place to the sampler's own x; ours must not."""
    network = type(cached.model)
    original, seen = network._apply_model, []

    def watch(self, x, t, *args, **kwargs):
        before = x.clone()
        result = original(self, x, t, *args, **kwargs)
        seen.append(torch.equal(before, x))
        return result

    monkeypatch.setattr(network, "_apply_model", watch)
    sample(cached, "wan")
    assert seen and all(seen)
