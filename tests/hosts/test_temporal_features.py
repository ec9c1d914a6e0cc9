"""Temporal and prompt features kept in tables (T14): the same picture to the bit, and weights that are never loaded."""

import gc
import os
import shutil
import weakref
from pathlib import Path

import comfy.sample
import comfy.sd
import pytest
import torch

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts import comfy_quantization as quantization
from stretto.acceleration.hosts.comfy_features import FeaturePatch
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.temporal_features import technique
from stretto.acceleration.temporal_features.session import BATCHED, EXACT
from stretto.acceleration.temporal_features.tables import FeatureTables
from stretto.acceleration.temporal_features.technique import prompt_paths

from .tiny_models import CONFIGS, conditioning, sample

TEMPORAL = [
    "sd3", "sd3.5", "flux", "kontext", "flux_fill", "qwen_image", "qwen_image_edit", "hunyuan_video", "hunyuan_image",
    "hunyuan_video_1.5", "auraflow",
]  # fmt: skip
PROMPT = [
    "wan", "wan_i2v", "wan2.2_i2v", "wan2.2_5b", "wan_reference", "wan_phantom", "wan_vace", "ltxv", "pixart",
    "cosmos_predict2",
]  # fmt: skip
#: ComfyUI runs these with a single row only.
SINGLE = ["hunyuan_i2v", "hunyuan_reference"]
#: Evaluate on the grid, at its next point, between its points, and at points that noise moves.
SAMPLERS = ["euler", "heun", "dpm_2", "euler_ancestral", "dpmpp_2s_ancestral"]
MATRIX = [(family, sampler) for family in ("flux", "sd3", "qwen_image", "wan") for sampler in SAMPLERS]
MATRIX += [(family, "dpm_2") for family in TEMPORAL + PROMPT + SINGLE if (family, "dpm_2") not in MATRIX]
STEPS = 5


def request(**settings):
    return Request("temporal_features", {"mode": EXACT, "prompt": True, **settings})


def tables_of(model):
    return next(patch.part.tables for patch in model.object_patches.values() if isinstance(patch, FeaturePatch))


def features():
    return host.TRACES.of_prompt(None)[-1]["features"]


def component(name):
    return next(item for item in features()["components"] if item["name"] == name)


@pytest.mark.parametrize("family,sampler", MATRIX)
def test_pictures_are_equal_to_the_bit_in_every_family_that_qualifies(tiny, family, sampler):
    options = {"sampler": sampler, "steps": STEPS, "cfg": 1.0 if family in SINGLE else 5.0}
    plain = sample(tiny(family), family, **options)
    model = host.request(tiny(family), request())
    assert torch.equal(plain, sample(model, family, **options))
    first = component("prompt" if family in PROMPT else "modulation")
    assert first["computed"] and first["exact"] and not first["left"]
    assert torch.equal(plain, sample(model, family, **options))
    again = component(first["name"])  # all of it looked up, from the run before
    assert not again["computed"] and again["reused"] >= first["reused"] > 0


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {*TEMPORAL, *PROMPT, *SINGLE}))
def test_families_without_such_layers_say_so(tiny, family):
    model = host.request(tiny(family), request())
    assert not any(isinstance(patch, FeaturePatch) for patch in model.object_patches.values())
    with pytest.raises(StrettoError, match="marked as required"):
        sample(host.request(tiny(family), Request("temporal_features", {}, required=True)), family, steps=2)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "sd3"])
def test_one_rehearsal_fills_the_table_of_a_run(tiny, family):
    """Every layer sees all noise levels at the first step, and is not needed afterwards."""
    model = host.request(tiny(family), request())
    network = model.model.diffusion_model
    layers = describe(network).modulation_parts(network)
    sample(model, family, steps=STEPS, sampler="euler")
    item = component("modulation")
    assert item["layers"] == len(layers)
    assert item["computed"] == len(layers) * STEPS and item["reused"] == len(layers) * (STEPS - 1)
    # Off the grid (the middle of a step) the layers run again, and are right.
    sample(host.request(tiny(family), request()), family, steps=STEPS, sampler="dpm_2")
    assert component("modulation")["computed"] > len(layers) * STEPS


@pytest.mark.parametrize("cfg,batch", [(1.0, 1), (1.0, 3), (5.0, 1), (5.0, 2)])
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_batches_and_guidance(tiny, family, cfg, batch):
    options = {"cfg": cfg, "batch": batch, "steps": 4}
    plain = sample(tiny(family), family, **options)
    assert torch.equal(plain, sample(host.request(tiny(family), request()), family, **options))


@pytest.mark.parametrize("mode", [EXACT, BATCHED])
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "hunyuan_video", "auraflow"])
def test_batched_tables_round_the_last_bits(tiny, family, mode):
    plain = sample(tiny(family), family, steps=STEPS)
    made = sample(host.request(tiny(family), request(mode=mode)), family, steps=STEPS)
    assert torch.equal(plain, made) if mode == EXACT else torch.allclose(plain, made, rtol=1e-4, atol=1e-4)
    assert component("modulation")["exact"] == (mode == EXACT)


def test_guidance_pooled_text_and_prompt_are_part_of_the_key(tiny, monkeypatch):
    from . import tiny_models

    model = host.request(tiny("flux"), request())
    for number in range(3):
        def changed(seed, family="", number=number):
            ((text, options),) = conditioning(seed, family)
            pooled = options["pooled_output"] + (number == 1)
            return [[text, {**options, "pooled_output": pooled, "guidance": 3.5 + (number == 2)}]]

        monkeypatch.setattr(tiny_models, "conditioning", changed)
        assert torch.equal(sample(tiny("flux"), "flux", steps=4), sample(model, "flux", steps=4))
        assert component("modulation")["computed"]  # none of the others' was taken


def _lora(model, family, strength=0.5):
    """Return a clone with a LoRA on a layer whose features are kept."""
    network = model.model.diffusion_model
    path = (describe(network).modulation_parts(network) or prompt_paths(describe(network), network))[0]
    inner = next(name for name, module in network.get_submodule(path).named_modules() if hasattr(module, "out_features"))
    key = ".".join(filter(None, ("diffusion_model", path, inner, "weight")))
    layer = network.get_submodule(key.removeprefix("diffusion_model.").removesuffix(".weight"))
    generator = torch.Generator().manual_seed(5)
    change = torch.randn(layer.out_features, layer.in_features, generator=generator) * 0.2
    clone = model.clone()
    assert clone.add_patches({key: ("diff", (change,))}, strength) == [key]
    return clone


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "hunyuan_video", "wan", "ltxv"])
def test_a_lora_on_such_a_layer_makes_tables_of_its_own(tiny, family):
    model = host.request(tiny(family), request())
    plain = sample(tiny(family), family, steps=4)
    assert torch.equal(plain, sample(model, family, steps=4))
    changed = sample(_lora(tiny(family), family), family, steps=4)
    assert not torch.equal(plain, changed)
    with_lora = _lora(model, family)
    assert torch.equal(changed, sample(with_lora, family, steps=4))
    assert torch.equal(plain, sample(model, family, steps=4))
    assert torch.equal(changed, sample(with_lora, family, steps=4))


def test_tables_stay_within_their_budget_and_go_with_the_model(tiny, monkeypatch):
    model = host.request(tiny("flux"), request())
    plain = sample(tiny("flux"), "flux", steps=4)
    sample(model, "flux", steps=4)
    tables = tables_of(model)
    assert 0 < tables.bytes <= tables.budget_bytes and features()["table_bytes"] == tables.bytes
    for name in ("MEMORY_SHARE", "LEAST_BYTES"):
        monkeypatch.setattr(technique, name, 0 if name == "MEMORY_SHARE" else 3000)
    model = host.request(tiny("flux"), request())
    assert torch.equal(plain, sample(model, "flux", steps=4)) and 0 < tables_of(model).bytes <= 3000
    going = weakref.ref(tables_of(model))
    del model
    sample(tiny("flux"), "flux", steps=1)  # ComfyUI holds on to the model it used last
    gc.collect()
    assert going() is None


def test_beside_a_cache_and_twice(tiny):
    cache = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1, "text_features": True}, force=True)
    for family in ("sd3", "wan"):
        alone = sample(host.request(tiny(family), cache), family, steps=8)
        both = host.request(host.request(tiny(family), request()), cache)
        other = host.request(host.request(tiny(family), cache), request())
        assert torch.equal(alone, sample(both, family, steps=8)) and torch.equal(alone, sample(other, family, steps=8))
    with pytest.raises(ConflictError, match="cannot share a model"):
        host.request(host.request(tiny("sd3"), request()), request(mode=BATCHED))
    for bad in ({"mode": "quick"}, {"size": 1}):
        with pytest.raises(StrettoError, match="Stretto Temporal Feature Cache"):
            host.request(tiny("sd3"), Request("temporal_features", bad))


DEMO = Path(__file__).resolve().parents[2] / "demo" / "models" / "diffusion_models"
#: File, latent, width of the text.
FILES = {
    "image": ("stretto-demo-image.safetensors", "modulation"),
    "video": ("stretto-demo-video.safetensors", "prompt"),
}
FROM_FILE = quantization.FEATURE_WEIGHTS[1]


def noise_of(model):
    latent = model.model.latent_format
    return torch.randn(1, latent.latent_channels, *((8, 8) if latent.latent_dimensions == 2 else (2, 4, 4)))


def sampled(model, steps=4):
    """Sample with random conditioning of the demo models' sizes."""
    network, generator = model.model.diffusion_model, torch.Generator().manual_seed(2)
    embedder = getattr(network, "context_embedder", None) or network.text_embedding[0]
    width = embedder.in_features
    latent = torch.zeros_like(noise_of(model))
    texts = [[[torch.randn(1, 6, width, generator=generator), {"pooled_output": torch.randn(1, 384, generator=generator)}]]
             for _ in range(2)]  # fmt: skip
    noise = torch.randn(latent.shape, generator=generator)
    return comfy.sample.sample(model, noise, steps, 4.0, "euler", "simple", *texts, latent, disable_pbar=True, seed=1)


@pytest.mark.parametrize("kind", FILES)
def test_weights_left_in_the_file_are_never_loaded_and_the_picture_is_the_same(kind):
    name, wanted = FILES[kind]
    stock = comfy.sd.load_diffusion_model(str(DEMO / name))
    plain = sampled(stock)
    model, report = quantization.load_diffusion_model(str(DEMO / name), features=FROM_FILE)
    assert "weights stay in the file" in report.text()
    assert torch.equal(plain, sampled(model))  # without the node, read at every step
    model = host.request(model, request())
    assert torch.equal(plain, sampled(model))
    item = component(wanted)
    assert item["loaded_bytes"] == 0 < item["weight_bytes"] and features()["table_bytes"] > 0
    freed = stock.model_size() - model.model_size()
    biases = sum(tensor.nbytes for name, tensor in stock.model.state_dict().items() if name.endswith("bias"))
    assert item["weight_bytes"] - biases <= freed <= item["weight_bytes"]
    network = model.model.diffusion_model
    resident = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    whole = stock.model.diffusion_model
    assert resident == sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers())) - freed
    # Saving needs all of it, and has it.
    saved, right = network.state_dict(), whole.state_dict()
    assert saved.keys() == right.keys() and all(torch.equal(saved[key], right[key]) for key in right)


@pytest.mark.parametrize("kind", FILES)
def test_loras_reach_weights_in_the_file(kind):
    name, _ = FILES[kind]
    family = "sd3" if kind == "image" else "wan"
    stock = _lora(comfy.sd.load_diffusion_model(str(DEMO / name)), family)
    model, _ = quantization.load_diffusion_model(str(DEMO / name), features=FROM_FILE)
    model = host.request(model, request())
    without, with_lora = sampled(model), _lora(model, family)
    changed = sampled(stock)
    assert not torch.equal(without, changed) and torch.equal(changed, sampled(with_lora))
    assert torch.equal(without, sampled(model))
    # Where memory is short, ComfyUI patches a weight whenever it is used.
    made = []
    for patcher in (stock, with_lora):
        patcher.detach()
        patcher.partially_load(torch.device("cpu"), 1)
        (key,) = patcher.patches
        layer = patcher.model.get_submodule(key.removesuffix(".weight"))
        assert layer.weight_function
        made.append(layer(torch.ones(1, 3, layer.in_features)))
        patcher.detach()
    assert torch.equal(*made)
    with pytest.raises(StrettoError, match="a weight hook changes a layer"):
        layer.set_weight(torch.zeros(layer.out_features, layer.in_features), inplace_update=True)


def test_files_that_changed_are_named_and_core_is_not_asked(tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(DEMO / "stretto-demo-image.safetensors", path)
    model, _ = quantization.load_diffusion_model(str(path), features=FROM_FILE)
    model = host.request(model, request())
    before = sampled(model)
    os.utime(path, ns=(1, 1))
    assert torch.equal(before, sampled(model))  # the tables know everything
    with pytest.raises(StrettoError, match=r"model\.safetensors: was changed, replaced or removed"):
        sampled(model, steps=5)
    with pytest.raises(StrettoError, match="loads all weights"):
        quantization.load_diffusion_model(str(path), loader=quantization.CORE, features=FROM_FILE)
    with pytest.raises(StrettoError, match="feature weights 'x': known are"):
        quantization.load_diffusion_model(str(path), features="x")


def test_tables_forget_what_was_used_longest_ago():
    tables = FeatureTables(budget_bytes=100)
    for name in "abc":
        tables.keep(name, "layer", torch.full((10,), ord(name)))  # 80 bytes each
    assert list(tables.entries) == ["c"] and tables.bytes == 80
    found = tables.find("c", "layer")
    found.zero_()
    assert tables.find("c", "layer")[0] == ord("c") and tables.find("a", "layer") is None
    tables.keep("c", "other", torch.zeros(10))  # no room beside its own
    assert not tables.knows("c", "other") and tables.bytes == 80
