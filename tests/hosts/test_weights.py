"""Pruned and combined models in ComfyUI, and the probe of blocks."""

import types

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_block_probe import probe_blocks
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.weights.block_probe import DROP, REUSE, Ranking, probed_steps, rank_correlation
from stretto.acceleration.weights.combining import open_combination, write_combination
from stretto.acceleration.weights.depth import prune_file, prune_lora
from stretto.nodes import StrettoBlockProbe, StrettoCombineWeights, block_probe
from stretto.nodes.schedule import schedule_request

from .test_temporal_features import DEMO, sampled
from .tiny_models import LATENTS, conditioning, sample

VIDEO, IMAGE = DEMO / "stretto-demo-video.safetensors", DEMO / "stretto-demo-image.safetensors"


def without(model, *blocks):
    """Return a clone that skips blocks: each returns its input."""
    clone = model.clone()
    for index in blocks:
        clone.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", index)
    return clone


def test_a_pruned_demo_model_loads_in_stock_comfyui_and_equals_skipping(tmp_path):
    path = tmp_path / "pruned.safetensors"
    prune_file(VIDEO, "2,5-6", path)
    pruned, whole = (comfy.sd.load_diffusion_model(str(each)) for each in (path, VIDEO))
    assert len(pruned.model.diffusion_model.blocks) == len(whole.model.diffusion_model.blocks) - 3 == 5
    assert torch.equal(sampled(pruned), sampled(without(whole, 2, 5, 6)))
    # A LoRA of the whole model, renumbered, does what the LoRA does.
    adapter, generator = {}, torch.Generator().manual_seed(3)
    for index in range(8):
        layer = whole.model.diffusion_model.blocks[index].self_attn.q
        name = f"diffusion_model.blocks.{index}.self_attn.q"
        adapter[f"{name}.lora_down.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.1
        adapter[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.1
    save_file(adapter, tmp_path / "lora.safetensors")
    prune_lora(tmp_path / "lora.safetensors", path, tmp_path / "renumbered.safetensors")
    with_lora = [
        comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / name), 1.0, 0.0)[0]
        for model, name in ((pruned, "renumbered.safetensors"), (without(whole, 2, 5, 6), "lora.safetensors"))
    ]
    made = [sampled(model) for model in with_lora]
    assert torch.equal(*made) and not torch.equal(made[0], sampled(pruned))


def test_combined_models_load_and_the_node_makes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(tmp_path / name) if "gone" not in name else None)
    other = {name: tensor * (1.01 if tensor.dim() == 2 else 1) for name, tensor in load_file(IMAGE).items()}
    save_file(load_file(IMAGE), tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    with open_combination([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], (1.5, -0.5)) as group:
        write_combination(group, tmp_path / "c.safetensors")
    from_file = sampled(comfy.sd.load_diffusion_model(str(tmp_path / "c.safetensors")))
    (made,) = StrettoCombineWeights.execute("1.5 a.safetensors\n -0.5  b.safetensors\n").args
    assert torch.equal(from_file, sampled(made))
    plain = sampled(comfy.sd.load_diffusion_model(str(IMAGE)))
    # One file alone, and the shipped workflow: one file, 1.5 times and -0.5 times.
    for text in ("1 a.safetensors\n0 b.safetensors", "1.5 a.safetensors\n-0.5 a.safetensors"):
        (same,) = StrettoCombineWeights.execute(text).args
        assert torch.equal(sampled(same), plain)
    bad = {"a.safetensors": "no weight and file", "": "no files are named", "1 gone.safetensors": "in none of"}
    for text, words in bad.items():
        with pytest.raises(StrettoError, match=words):
            StrettoCombineWeights.execute(text)


def test_lora_epochs_are_summed_on_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(tmp_path / name))
    model, generator = comfy.sd.load_diffusion_model(str(VIDEO)), torch.Generator().manual_seed(1)
    layer, name = model.model.diffusion_model.blocks[0].self_attn.q, "diffusion_model.blocks.0.self_attn.q"
    factors = []
    for epoch in "ab":
        sizes = (layer.out_features, 2), (2, layer.in_features)
        factors.append([torch.randn(size, generator=generator) for size in sizes])
        tensors = {f"{name}.lora_up.weight": factors[-1][0], f"{name}.lora_down.weight": factors[-1][1]}
        save_file(tensors, tmp_path / f"{epoch}.safetensors")
    (made,) = StrettoCombineWeights.execute("0.7 a.safetensors\n-0.3 b.safetensors", model).args
    before = layer.weight.detach().float().clone()
    made.patch_model()
    change = layer.weight.detach().float() - before
    made.unpatch_model()
    right = 0.7 * factors[0][0] @ factors[0][1] - 0.3 * factors[1][0] @ factors[1][1]
    assert torch.allclose(change, right, atol=0.02)
    with pytest.raises(StrettoError, match="connect the model"):
        StrettoCombineWeights.execute("1 a.safetensors")


FAMILIES = ["sd3", "flux", "qwen_image", "wan", "hunyuan_video", "chroma"]


def job_of(family, model, steps=6):
    latent = {"samples": torch.zeros(1, *LATENTS[family])}
    return SamplingJob(model, conditioning(3, family), conditioning(4, family), latent, 1, steps, 5.0, "euler", "simple")


@pytest.mark.parametrize("family", FAMILIES)
def test_probing_leaves_the_picture_alone_and_sees_the_damage(tiny, family):
    plain, model = sample(tiny(family), family, steps=6), tiny(family)
    ranking, latent = probe_blocks(model, job_of(family, model), 2)
    assert torch.equal(plain, latent)
    network = model.model.diffusion_model
    assert ranking.sites == describe(network).sites(network)
    assert all(len(values) == len(ranking.sites) and min(values) >= 0 for values in ranking.damage.values())
    assert sum(ranking.damage[REUSE]) < sum(ranking.damage[DROP])


def test_a_block_that_does_nothing_costs_nothing(tiny):
    model = tiny("wan")
    keys = [f"diffusion_model.blocks.1.{name}.weight" for name in ("self_attn.o", "cross_attn.o", "ffn.2")]
    keys += [key.replace(".weight", ".bias") for key in keys]
    values = {key: model.model.state_dict()[key] for key in keys}
    model.add_patches({key: ("diff", (-value,)) for key, value in values.items()}, 1.0)
    ranking, _ = probe_blocks(model, job_of("wan", model), 2)
    assert ranking.order(DROP)[0] == 1 and ranking.damage[DROP][1] < 1e-5 < ranking.damage[DROP][0]


def test_the_probe_refuses_what_it_cannot_see(tiny):
    with pytest.raises(StrettoError, match="no replacement hook"):
        probe_blocks(tiny("pixart"), lambda model: sample(model, "pixart", steps=3))
    cached = host.request(tiny("wan"), Request("cache", {"method": "EasyCache"}))
    with pytest.raises(ConflictError, match="Stretto Block Probe cannot share"):
        probe_blocks(cached, lambda model: sample(model, "wan", steps=3))
    with pytest.raises(StrettoError, match="probes is 9"):
        probe_blocks(tiny("wan"), lambda model: sample(model, "wan", steps=3), 9)
    assert probed_steps(28, 3) == (5, 14, 23) and probed_steps(2, 3) == (1,)


def test_the_node_writes_a_schedule_and_a_list_that_run(tiny, monkeypatch):
    model = tiny("flux")
    job = job_of("flux", model)
    monkeypatch.setattr(block_probe.ui, "PreviewImage", lambda picture, cls: types.SimpleNamespace(as_dict=dict))
    output = StrettoBlockProbe.execute(
        model, job.positive, job.negative, job.latent, 1, 6, 5.0, "euler", "simple", 2, 2, 20, 90
    )
    schedule, drop, picture, text, latent = output.args
    assert picture.shape[-1] == 3 and f"--drop {drop}" in text
    assert torch.equal(latent["samples"], sample(model, "flux", steps=6))
    ranking, _ = probe_blocks(model, job, 2)
    reused = sample(host.request(model, schedule_request(schedule, "line")), "flux", steps=6)
    assert not torch.equal(reused, sample(model, "flux", steps=6))
    names = describe(model.model.diffusion_model).block_lists
    assert set(ranking.drop_text(4, names).replace(",", " ").replace(":", " ").split()) >= {"double_blocks", "single_blocks"}


def test_ranks_and_lists():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    ranking = Ranking((), {DROP: (), REUSE: ()})
    assert ranking.order(DROP) == []
