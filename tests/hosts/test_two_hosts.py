"""One set of weights, noise and noise levels in ComfyUI and in diffusers: the same prediction, decisions and pictures."""

from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.models.diffusers_names import from_diffusers, sd3_config, to_diffusers
from stretto.acceleration.plan import Request

from ..oracles.packages import required

required("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # noqa: E402

from stretto.acceleration.hosts.diffusers import accelerate  # noqa: E402
from stretto.acceleration.hosts.diffusers_files import load_transformer  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "demo" / "models" / "diffusion_models" / "stretto-demo-image.safetensors"
CFG = 5.0
#: Before the shift: ComfyUI's "simple" schedule of 20 steps, which the fitted preset belongs to.
LEVELS = [1.0 - step / 20 for step in range(20)]


@pytest.fixture(scope="module")
def model():
    return comfy.sd.load_diffusion_model(str(DEMO), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def pipe():
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"))
    made = StableDiffusion3Pipeline(load_transformer(DEMO), FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def prompt():
    """Text [1, 12, 384] and pooled text [1, 384] of two captions that do not matter."""
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(1, 12, 384, generator=generator), torch.randn(1, 384, generator=generator)) for _ in range(2)]


def noise_of(batch, side=8):
    return torch.randn(batch, 16, side, side, generator=torch.Generator().manual_seed(9))


def in_comfy(model, prompt, request, batch=1, side=8):
    """Sample with ComfyUI; return the latent as the network knows it, and the trace."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=LEVELS)
    conditionings = [[[text, {"pooled_output": pooled}]] for text, pooled in prompt]
    noise, patched = noise_of(batch, side), model
    for each in request if isinstance(request, list) else [request]:
        patched = host.request(patched, each)
    latent = comfy.sample.sample_custom(
        patched, noise, CFG, comfy.samplers.sampler_object("euler"), scheduler.sigmas,
        *conditionings, torch.zeros_like(noise), disable_pbar=True,
    )  # fmt: skip
    return model.model.process_latent_in(latent), host.TRACES.all()[-1]


def in_diffusers(pipe, prompt, request, batch=1, side=8):
    """Sample with diffusers; return the latent and the trace."""
    (text, pooled), (no_text, no_pooled) = ([part.repeat(batch, *[1] * (part.ndim - 1)) for part in pair] for pair in prompt)
    with accelerate(pipe, request) as run:
        latent = pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_text,
            negative_pooled_prompt_embeds=no_pooled, guidance_scale=CFG, sigmas=LEVELS,
            num_inference_steps=len(LEVELS), latents=noise_of(batch, side), height=8 * side, width=8 * side, output_type="latent",
        ).images  # fmt: skip
    return latent, run.trace


def distance(first, second):
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1])
def test_one_prediction(model, pipe, prompt, sigma):
    network, (text, pooled) = model.model.diffusion_model, prompt[0]
    x = noise_of(2)
    t, text, pooled = torch.full((2,), 1000.0 * sigma), text.repeat(2, 1, 1), pooled.repeat(2, 1)
    with torch.no_grad():
        comfys = network(x, t, context=text, y=pooled)
        theirs = pipe.transformer(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample
    assert distance(theirs, comfys) < 1e-5


SETTINGS = {
    "measure": Request("measure", {"nonce": 1}),
    "Taylor": Request("cache", {"method": "Taylor", "interval": 3, "tail": 3}),
    "EasyCache": Request("cache", {"method": "EasyCache", "threshold": 0.1, "tail": 1}),
    "Adaptive": Request("cache", {"method": "Adaptive", "threshold": 0.1, "tail": 2}),
    "LazyCache": Request("cache", {"method": "LazyCache", "threshold": 0.05, "tail": 1}),
    "FBCache": Request("cache", {"method": "FBCache", "threshold": 0.1, "warmup": 2, "tail": 1}),
    "TeaCache": Request("cache", {"method": "TeaCache", "threshold": 0.1, "warmup": 1, "tail": 1}),
    "DBCache": Request("cache", {"method": "DBCache", "threshold": 0.1, "first_blocks": 1, "last_blocks": 1, "tail": 1}),
    "DBCache-Taylor": Request("cache", {"method": "DBCache-Taylor", "threshold": 0.1, "coordinate": "logsnr", "tail": 0}),
    "CG-Taylor": Request("cache", {"method": "CG-Taylor", "threshold": 0.05, "warmup": 6, "tail": 1}),
    "DiCache": Request("cache", {"method": "DiCache", "threshold": 0.1, "warmup": 6, "tail": 1}),
    "AdaCache": Request("cache", {"method": "AdaCache", "threshold": 0.02, "interval": 4, "warmup": 2, "tail": 1}),
    "DeltaDiT": Request("cache", {"method": "DeltaDiT", "interval": 2, "tail": 2}),
    "Output": Request("cache", {"method": "Output", "interval": 3, "tail": 3}),
    "Fitted": Request("cache", {"method": "Fitted", "preset": "balanced", "warmup": 0, "tail": 0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_hosts_decide_alike(model, pipe, prompt, name):
    """Equal decisions, reasons and signals at every step, and outputs within the tolerance of one prediction."""
    ours, comfys = in_comfy(model, prompt, SETTINGS[name])
    theirs, other = in_diffusers(pipe, prompt, SETTINGS[name])
    assert comfys["sigmas"] == other["sigmas"] and comfys["model"]["family"] == other["model"]["family"] == "sd3"
    assert [t["status"] for t in comfys["techniques"]] == [t["status"] for t in other["techniques"]]
    for first, second in zip(comfys["evaluations"], other["evaluations"], strict=True):
        assert first["decision"] == second["decision"], first["index"]
        for field in ("position", "on_rails", "threshold", "computed_share"):
            assert first[field] == second[field], (field, first["index"])
        for field in ("signal", "compared"):
            near = first[field] == second[field] or first[field] == pytest.approx(second[field], rel=1e-3)
            assert near, (field, first["index"])
        by_name = [{b["branch"]: b for b in entry["branches"]} for entry in (first, second)]
        assert by_name[0] == by_name[1] or name == "measure"
    if name != "measure":
        assert 3 <= comfys["totals"]["computed"] <= 17
    assert distance(theirs, ours) < 1e-5


SAVERS = {
    "Periodic": {"method": "Periodic", "interval": 3, "warmup": 3, "tail": 2},
    "FasterCache": {"method": "FasterCache", "interval": 3, "warmup": 3, "tail": 2},
    "Adaptive": {"method": "Adaptive", "agreement": 0.9, "patience": 2},
    "Interval": {"method": "Interval", "guide_from": 0.1, "guide_until": 0.6},
}


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("cached", [False, True], ids=["alone", "beside a cache"])
def test_both_hosts_save_guidance_alike(model, pipe, prompt, name, cached):
    """The unconditional branch is asked at the same steps, whether its rows or its entry in a list is left out."""
    requests = [Request("guidance", SAVERS[name]), *([SETTINGS["EasyCache"]] if cached else [])]
    ours, comfys = in_comfy(model, prompt, requests, batch=2)
    theirs, other = in_diffusers(pipe, prompt, requests, batch=2)
    first, second = comfys["guidance"], other["guidance"]
    assert {key: first[key] for key in ("asked", "saved", "left")} == {key: second[key] for key in ("asked", "saved", "left")}
    assert first["saved"] >= 2 and first["asked"] >= 2
    assert [index for index, _ in first["agreement"]] == [index for index, _ in second["agreement"]]
    for a, b in zip(comfys["evaluations"], other["evaluations"], strict=True):
        assert a["decision"] == b["decision"]
        assert sorted(branch["branch"] for branch in a["branches"]) == sorted(branch["branch"] for branch in b["branches"])
    assert distance(theirs, ours) < 1e-5


ATTENTIONS = {
    "Block mass": {"method": "Block mass", "keep": 0.5},
    "Top-k": {"method": "Top-k", "keep": 0.5},
    "CLEAR": {"method": "CLEAR", "radius": 3},
    "Sol": {"method": "Sol", "keep": 0.5},
    "SLA": {"method": "SLA", "keep": 0.4},
}


@pytest.mark.parametrize(("name", "cached"), [*((name, False) for name in ATTENTIONS), ("Block mass", True)])
def test_both_hosts_attend_alike(model, pipe, prompt, name, cached):
    """The same key blocks are kept, in every layer and head, though text stands on the other side of the picture."""
    settings = {"min_tokens": 0, "block": 16, "dense_until": 0.2, **ATTENTIONS[name]}
    requests = [Request("attention", settings, required=True), *([SETTINGS["Taylor"]] if cached else [])]
    ours, comfys = in_comfy(model, prompt, requests, side=16)
    theirs, other = in_diffusers(pipe, prompt, requests, side=16)
    plain, _ = in_diffusers(pipe, prompt, SETTINGS["measure"], side=16)
    for field in ("method", "first_sparse_step", "plan", "backends", "dense"):
        assert comfys["attention"][field] == other["attention"][field], field
    assert len(comfys["attention"]["layers"]) == len(other["attention"]["layers"]) == 4
    for first, second in zip(comfys["attention"]["layers"], other["attention"]["layers"], strict=True):
        assert first["kept"] == pytest.approx(second["kept"], rel=1e-6)
    for first, second in zip(comfys["evaluations"], other["evaluations"], strict=True):
        assert first["decision"] == second["decision"]
        kept = first["attention_kept"], second["attention_kept"]
        assert kept[0] == kept[1] or kept[0] == pytest.approx(kept[1], rel=1e-6)
    assert distance(theirs, ours) < 1e-5 and distance(theirs, plain) > 1e-3


def test_a_batch_in_both_hosts(model, pipe, prompt):
    ours, comfys = in_comfy(model, prompt, SETTINGS["EasyCache"], batch=3)
    theirs, other = in_diffusers(pipe, prompt, SETTINGS["EasyCache"], batch=3)
    assert [e["decision"] for e in comfys["evaluations"]] == [e["decision"] for e in other["evaluations"]]
    assert comfys["latent_shape"] == other["latent_shape"] == [3, 16, 8, 8]
    assert distance(theirs, ours) < 1e-5


def test_names_go_there_and_back(model, pipe):
    weights = model.model.diffusion_model.state_dict()
    back = from_diffusers(to_diffusers(weights))
    assert set(back) == set(weights) and all(torch.equal(back[name], weights[name]) for name in weights)
    assert sd3_config(weights).items() <= dict(pipe.transformer.config).items()


def test_other_weights_are_refused_by_name(model, tmp_path):
    weights = model.model.diffusion_model.state_dict()
    with pytest.raises(StrettoError, match="extra is no weight"):
        to_diffusers({**weights, "extra": torch.zeros(1)})
    with pytest.raises(StrettoError, match="no complete row"):
        to_diffusers({"double_blocks.0.img_mod.lin.weight": torch.zeros(1)})
    with pytest.raises(StrettoError, match="pos_embed is missing"):
        sd3_config({name: tensor for name, tensor in weights.items() if name != "pos_embed"})
    theirs = to_diffusers(weights)
    theirs.pop("transformer_blocks.0.attn.to_k.weight")
    with pytest.raises(StrettoError, match="not all of"):
        from_diffusers(theirs)
    pickle = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(1)}, pickle)
    with pytest.raises(StrettoError, match="pickle"):
        load_transformer(pickle)
    video = DEMO.with_name("stretto-demo-video.safetensors")
    with pytest.raises(StrettoError, match="stretto-demo-video"):
        load_transformer(video)
