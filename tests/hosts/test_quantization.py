"""Quantized checkpoints in ComfyUI: who loads them, what they compute, LoRAs, memory, and stock ComfyUI beside us."""

import json
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy_quantization as host
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.quality import psnr
from stretto.acceleration.quantization import arena as arenas
from stretto.acceleration.quantization import renaming
from stretto.acceleration.quantization.architectures import find_architecture
from stretto.acceleration.quantization.balancing import fold_edits
from stretto.acceleration.quantization.layouts import Int8Rows, fitting
from stretto.acceleration.quantization.quantizing import plan_file, write_file
from stretto.demo.text_encoder import load

from .tiny_models import conditioning

DEMO = Path(__file__).resolve().parents[2] / "demo" / "models"
IMAGE = DEMO / "diffusion_models" / "stretto-demo-image.safetensors"
VIDEO = DEMO / "diffusion_models" / "stretto-demo-video.safetensors"
LAYER = "joint_blocks.0.x_block.mlp.fc1"
STEPS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return ``made(format, source)``: path of the demo model in a format, written once."""
    folder, paths = tmp_path_factory.mktemp("quantized"), {}

    def make(form, source=IMAGE):
        if (form, source) not in paths:
            path = folder / f"{source.stem}-{form}.safetensors"
            plan = plan_file(source, format=form)
            with plan.checkpoint:
                write_file(plan, path)
            paths[form, source] = path
        return paths[form, source]

    return make


@pytest.fixture(scope="module")
def text():
    encoder = load(DEMO / "text_encoders" / "stretto-demo-text.safetensors")

    def encode(words):
        states, pooled, _ = encoder.encode([words])
        return [[states, {"pooled_output": pooled}]]

    return encode


@pytest.fixture(scope="module")
def sample(text):
    """Return ``sample(model, words)``: the latent of a short run of the demo image model."""

    def run(model, words="fluent red apple", steps=STEPS):
        job = SamplingJob(
            model, text(words), text(""), {"samples": torch.zeros(1, 16, 8, 8)}, 7, steps, 4.0, "euler", "simple"
        )
        return job(callback=lambda *arguments: None)

    return run


@pytest.fixture(scope="module")
def plain(sample):
    return sample(comfy.sd.load_diffusion_model(str(IMAGE)))


def layer_of(model, name=LAYER):
    return comfy.utils.get_attr(model.model.diffusion_model, name)


def relative(got, right):
    return float((got.detach().double() - right.detach().double()).norm() / right.detach().double().norm())


# stock ComfyUI of this age


def test_an_fp8_file_of_ours_loads_in_stock_comfyui_and_gives_the_same_picture(made, sample, plain):
    stock = comfy.sd.load_diffusion_model(str(made("fp8")))
    assert type(layer_of(stock).weight.data).__name__ == "QuantizedTensor"
    ours, report = host.load_diffusion_model(str(made("fp8")), loader=host.STRETTO)
    assert report.loader == host.STRETTO and layer_of(ours).stretto_state is not None
    stocks_latent = sample(stock)
    assert relative(sample(ours), stocks_latent) <= 1e-3
    assert psnr(stocks_latent, plain) > 22


def test_automatic_leaves_to_comfyui_what_it_loads_itself(made):
    _, report = host.load_diffusion_model(str(made("fp8")))
    assert report.loader == host.CORE and report.why == "ComfyUI knows the format"
    model, report = host.load_diffusion_model(str(IMAGE))
    assert report.loader == host.CORE and report.why == "nothing to add"
    assert type(layer_of(model)) is not type(layer_of(host.load_diffusion_model(str(made("int8")))[0]))
    if "int8_tensorwise" not in comfy.ops.QUANT_ALGOS:
        with pytest.raises(StrettoError, match="does not know int8_tensorwise"):
            host.load_diffusion_model(str(made("int8")), loader=host.CORE)


# the pack's own path


@pytest.mark.parametrize(
    ("form", "decibels"), [("int8", 35), ("w6a8", 28), ("w4a8", 20), ("fp8_rows", 25), ("w4a16", 17)]
)
def test_every_format_loads_and_stays_near_the_16_bit_run(made, sample, plain, form, decibels):
    model, report = host.load_diffusion_model(str(made(form)), loader=host.STRETTO)
    assert report.layers == {form: 29}
    assert psnr(sample(model), plain) >= decibels
    words = report.text()
    assert form in words and "MB" in words and "step" in words
    assert report.nbytes < 0.8 * report.nbytes_16


def test_a_file_and_quantizing_while_loading_give_the_same_run(made, sample):
    from_file, _ = host.load_diffusion_model(str(made("w6a8")))
    on_the_fly, report = host.load_diffusion_model(str(IMAGE), format="w6a8")
    assert "quantized while loading" in report.kind
    assert torch.equal(sample(from_file, steps=2), sample(on_the_fly, steps=2))
    with pytest.raises(StrettoError, match="already"):
        host.load_diffusion_model(str(made("w6a8")), format="int8")


def rewritten(path, target, markers, header):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if markers or not name.endswith("comfy_quant")}
        metadata = {key: value for key, value in file.metadata().items() if header or key != "_quantization_metadata"}
    save_file(tensors, target, metadata=metadata)
    return str(target)


@pytest.mark.parametrize("source", [IMAGE, VIDEO], ids=["sd3", "wan"])
@pytest.mark.parametrize(
    ("markers", "header"), [(True, True), (True, False), (False, True)], ids=["both", "markers", "header"]
)
def test_t11_either_carrier_is_enough(made, tmp_path, source, markers, header):
    path = rewritten(made("int8", source), tmp_path / "x.safetensors", markers, header)
    model, report = host.load_diffusion_model(path, loader=host.STRETTO)
    assert report.layers == {"int8": 29 if source is IMAGE else 64}
    states = [m.stretto_state for m in model.model.diffusion_model.modules() if getattr(m, "stretto_state", None)]
    assert len(states) == sum(report.layers.values()) and {state.layout for state in states} == {Int8Rows(256)}


def test_t11_without_any_carrier_unknown_formats_and_wrong_rotations_are_errors(made, tmp_path):
    path = rewritten(made("int8"), tmp_path / "x.safetensors", False, False)
    with pytest.raises(StrettoError, match="does not say whether its weights are rotated"):
        host.load_diffusion_model(path)
    with safe_open(made("int8"), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    document = json.loads(metadata["_quantization_metadata"])
    for change, words in (({"format": "int3"}, "format is 'int3'"), ({"convrot": False}, "rotation")):
        document["layers"][LAYER] = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256} | change
        save_file(
            tensors, tmp_path / "y.safetensors", metadata={**metadata, "_quantization_metadata": json.dumps(document)}
        )
        with pytest.raises(StrettoError, match=words) as error:
            host.load_diffusion_model(str(tmp_path / "y.safetensors"))
        assert LAYER in str(error.value)


def test_t11_scaled_fp8_goes_to_comfyui_and_is_read_by_us(tmp_path, sample):
    tensors = {}
    with safe_open(IMAGE, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if ".mlp." in name and name.startswith("joint") and name.endswith("weight"):
                scale = tensor.float().abs().max() / 448
                tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                tensors[name.replace(".weight", ".scale_weight")] = scale
            else:
                tensors[name] = tensor
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "scaled.safetensors")
    _, report = host.load_diffusion_model(str(tmp_path / "scaled.safetensors"))
    assert report.loader == host.CORE
    ours, report = host.load_diffusion_model(str(tmp_path / "scaled.safetensors"), loader=host.STRETTO)
    assert report.layers == {"fp8": 14}
    assert torch.isfinite(sample(ours, steps=2)).all()


def test_t11_gguf_is_loaded_and_quantized_while_loading(tmp_path, sample):
    gguf = pytest.importorskip("gguf", reason="the package gguf decodes GGUF blocks; it is optional")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "sd3")
    kind = gguf.GGMLQuantizationType.Q8_0
    with safe_open(IMAGE, "pt") as file:
        for name in file.keys():
            values = file.get_tensor(name)
            if values.dim() == 2 and name.startswith("joint"):
                writer.add_tensor(name, gguf.quants.quantize(values.float().numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unpacked, report = host.load_diffusion_model(str(tmp_path / "m.gguf"))
    assert report.kind == "GGUF" and not report.layers
    packed, report = host.load_diffusion_model(str(tmp_path / "m.gguf"), format="int8")
    assert report.layers == {"int8": 29} and report.nbytes < 0.8 * report.nbytes_16
    assert psnr(sample(packed), sample(unpacked)) >= 35


def test_t12_modes_of_autograd_moving_and_sizes(made):
    model, _ = host.load_diffusion_model(str(made("int8")))
    layer = layer_of(model)
    x = torch.randn(3, 5, layer.in_features)
    with torch.inference_mode():
        inside = layer(x)
    with torch.no_grad():
        outside = layer(x)
    assert (
        torch.equal(inside, outside) and torch.equal(layer(x), outside) and outside.shape == (3, 5, layer.out_features)
    )
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    with safe_open(IMAGE, "pt") as file:
        right = torch.nn.functional.linear(
            x, file.get_tensor(f"{LAYER}.weight").float(), file.get_tensor(f"{LAYER}.bias").float()
        )
    assert relative(outside, right) < 0.015
    assert layer.weight.dtype == torch.uint8 and layer.half().weight.dtype == torch.uint8  # scales are never cast
    stored = (
        layer.stretto_state.layout.nbytes(*layer.stretto_state.shape) + layer.out_features * layer.bias.element_size()
    )
    assert stored <= comfy.model_management.module_size(layer) <= stored + 200  # and the marker


def lora(model, rank=4, scale=0.05, count=10):
    """Random low-rank changes of the first quantized layers, as ComfyUI's LoRA code keeps them."""
    generator, patches = torch.Generator().manual_seed(1), {}
    names = [
        name for name, module in model.model.diffusion_model.named_modules() if getattr(module, "stretto_state", None)
    ][:count]
    for name in names:
        layer = layer_of(model, name)
        up = torch.randn(layer.out_features, rank, generator=generator) * scale
        down = torch.randn(rank, layer.in_features, generator=generator) * scale
        patches[f"diffusion_model.{name}"] = (up, down)
    sd = {}
    for name, (up, down) in patches.items():
        sd[f"{name}.lora_up.weight"], sd[f"{name}.lora_down.weight"], sd[f"{name}.alpha"] = (
            up,
            down,
            torch.tensor(float(rank)),
        )
    keys = {name: f"{name}.weight" for name in patches}
    return comfy.lora.load_lora(sd, keys), {f"{name}.weight": up @ down for name, (up, down) in patches.items()}


@pytest.mark.parametrize("form", ["int8", "w6a8", "w4a8"])
@pytest.mark.parametrize("mode", [host.BRANCH, host.REQUANTIZE])
def test_t13_ten_loras_in_both_modes(made, form, mode):
    model, _ = host.load_diffusion_model(str(made(form)), lora=mode)
    patched = model.clone()
    patches, deltas = lora(patched)
    assert len(patched.add_patches(patches)) == 10
    before = {key: comfy.utils.get_attr(model.model, key).clone() for key in deltas}
    original = {}
    with safe_open(IMAGE, "pt") as file:
        original = {key: file.get_tensor(key.removeprefix("diffusion_model.")).float() for key in deltas}
    patched.patch_model()
    for key, delta in deltas.items():
        layer = layer_of(model, key.removeprefix("diffusion_model.").removesuffix(".weight"))
        base = arenas.dequantize_arena(layer.stretto_state, before[key])
        now = arenas.dequantize_arena(layer.stretto_state, layer.weight)
        if mode == host.BRANCH:
            assert relative(now - base, delta) < 1e-2
            x = torch.randn(4, layer.in_features)
            bias = layer.bias.float()
            without = arenas.arena_linear(layer.stretto_state, x, before[key], bias)
            assert relative(layer(x) - without, x @ delta.T) < 1e-2
        else:
            once = float((base - original[key]).norm())
            added, lost = float((now - base - delta).norm()), float((now - original[key] - delta).norm())
            assert added <= 1.2 * once
            # Two independent roundings to nearest.
            assert lost <= 1.05 * 2**0.5 * once
            # the change itself is there, beyond the noise of rounding
            assert float(((now - base) * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.1)
    patched.unpatch_model()
    for key, arena in before.items():
        assert torch.equal(comfy.utils.get_attr(model.model, key), arena)


def test_t13_a_change_in_place_keeps_the_arena_and_can_be_restored(made):
    """Hooks patch in place and copy the backup back."""
    model, _ = host.load_diffusion_model(str(made("int8")))
    layer = layer_of(model)
    before, pointer = layer.weight.clone(), layer.weight.data_ptr()
    base = arenas.dequantize_arena(layer.stretto_state, before)
    layer.set_weight(base + 0.05, inplace_update=True, seed=3)
    assert layer.weight.data_ptr() == pointer and layer.weight.shape == before.shape
    assert relative(arenas.dequantize_arena(layer.stretto_state, layer.weight), base + 0.05) < 0.02
    comfy.utils.copy_to_param(model.model, f"diffusion_model.{LAYER}.weight", before)
    assert torch.equal(layer.weight, before)


def test_t13_loras_on_offloaded_layers_are_exact(made):
    """Partial loading leaves a LoRA to a function of the weight, called in every forward."""
    model, _ = host.load_diffusion_model(str(made("w4a8")))
    patches, deltas = lora(model)
    model.add_patches(patches)
    name = next(iter(deltas))
    layer = layer_of(model, name.removeprefix("diffusion_model.").removesuffix(".weight"))
    x = torch.randn(4, layer.in_features)
    base = arenas.dequantize_arena(layer.stretto_state, layer.weight)
    patch = comfy.model_patcher.LowVramPatch(name, model.patches, layer.convert_weight, layer.set_weight)
    layer.weight_function = [patch]
    right = torch.nn.functional.linear(x, base + deltas[name], layer.bias.float())
    assert relative(layer(x), right) < 1e-5
    layer.weight_function = []


@pytest.mark.parametrize("form", ["w4a8", "fp8"])
def test_decoded_weights_are_kept_within_their_room_and_change_nothing(made, sample, form, monkeypatch):
    """A processor decodes each weight once; beyond the room, in every step; never a weight that has changed."""
    decodings = []
    layout = type(fitting(form, 256, 256))
    for name in ("int8", "decode"):
        if hasattr(layout, name):
            original = getattr(layout, name)
            monkeypatch.setattr(layout, name, lambda *a, original=original: decodings.append(1) or original(*a))

    def run(keep):
        model, report = host.load_diffusion_model(str(made(form)), loader=host.STRETTO, keep=keep)
        decodings.clear()
        return sample(model, steps=3), len(decodings), model, report

    none, always, _, plain = run(0)
    everything, once, model, report = run(1 << 30)
    assert torch.equal(none, everything) and always == 3 * once and once == 29
    assert "kept" in report.text() and "kept" not in plain.text()
    layers = [m for m in model.model.diffusion_model.modules() if getattr(m, "stretto_state", None)]
    sizes = [m.stretto_kept._decoded.nbytes for m in layers]
    some, between, small, _ = run(sum(sizes) // 2)
    assert torch.equal(some, none) and once < between < always
    assert small.model.diffusion_model.get_submodule(LAYER).stretto_kept._room.free >= 0

    patched = model.clone()
    patched.add_patches(lora(patched)[0])
    changed = sample(patched, steps=3)
    fresh, _ = host.load_diffusion_model(str(made(form)), loader=host.STRETTO, keep=0)
    fresh.add_patches(lora(fresh)[0])
    assert torch.equal(changed, sample(fresh, steps=3)) and not torch.equal(changed, none)
    assert torch.equal(sample(model, steps=3), none)


def test_a_saved_model_is_a_complete_file(made, tmp_path, sample):
    model, _ = host.load_diffusion_model(str(made("w6a8")))
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
    save_file(tensors, tmp_path / "saved.safetensors")
    again, report = host.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert report.layers == {"w6a8": 29}
    assert torch.equal(sample(again, steps=2), sample(model, steps=2))


@pytest.mark.parametrize("form", ["int8", "w6a8", "w4a8", "fp8"])
@pytest.mark.parametrize("strength", [0.02, 0.3, 0.6, 1.0, 2.0, 5.0])
def test_t13_a_change_below_a_step_keeps_its_size_when_it_is_rounded(form, strength):
    """``strength``: of the change, in errors of rounding (a third of a step)."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 512, generator=generator) * 0.02
    state = arenas.LayerState(fitting(form, 256, 512), (256, 512))
    arena = state.layout.quantize(weight).arena()
    base = arenas.dequantize_arena(state, arena)
    once = float((base - weight).norm())
    delta = torch.randn(256, 4, generator=generator) @ torch.randn(4, 512, generator=generator)
    delta *= strength * once / float(delta.norm())
    now = arenas.dequantize_arena(
        state, arenas.patched_arena(state, arena, base + delta, 1, host.REQUANTIZE)
    )
    assert float(((now - base) * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.05 if strength > 0.1 else 0.2)
    assert float((now - base - delta).norm()) <= 1.2 * once
    assert float((now - weight - delta).norm()) <= 1.05 * 2**0.5 * once


def test_a_change_of_full_rank_is_rounded_into_the_weights():
    state = arenas.LayerState(Int8Rows(64), (64, 128))
    weight = torch.randn(64, 128)
    arena = state.layout.quantize(weight).arena()
    delta = torch.randn(64, 128)
    assert arenas.low_rank(delta) is None
    made = arenas.patched_arena(state, arena, weight + delta, 1)
    assert made.numel() == arena.numel() and relative(arenas.dequantize_arena(state, made), weight + delta) < 0.02


# T4: folds, in ComfyUI's own networks

FOLDING = [
    "flux",
    "flux2",
    "chroma",
    "hunyuan_video",
    "qwen_image",
    "sd3",
    "sd3.5",
    "wan",
    "z_image",
    "lumina2",
    "ltxv",
]
SHAPES = {
    "wan": (16, 3, 6, 4),
    "hunyuan_video": (16, 3, 6, 4),
    "ltxv": (128, 3, 3, 4),
    "flux2": (128, 3, 4),
    "qwen_image": (16, 1, 6, 8),
}


@pytest.mark.parametrize("family", FOLDING)
def test_t4_legal_folds_leave_the_output_as_it_was(family):
    from .tiny_models import LATENTS, build

    model = build(family)
    network = model.model.diffusion_model
    job = SamplingJob(
        model,
        conditioning(1, family),
        conditioning(2, family),
        {"samples": torch.zeros(1, *LATENTS[family])},
        3,
        1,
        1.0,
        "euler",
        "simple",
    )
    before = job(callback=lambda *arguments: None)
    tensors = dict(network.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = find_architecture(shapes)
    generator = torch.Generator().manual_seed(0)
    maxima = {
        name.removesuffix(".weight"): t.abs().amax(0)
        for name, t in tensors.items()
        if name.endswith(".weight") and t.dim() == 2
    }
    activations = {name: torch.rand(m.shape, generator=generator) * 10 + 0.1 for name, m in maxima.items()}
    edits = fold_edits(architecture, shapes, maxima, activations)
    assert edits, architecture.name
    with torch.no_grad():
        for name, edit in edits.items():
            tensor = tensors[name]
            changed = edit.apply(tensor.float(), 0, tensor.shape[0])
            assert not torch.allclose(changed, tensor)
            tensor.copy_(changed)
    after = job(callback=lambda *arguments: None)
    assert relative(after, before) <= 1e-4


def test_g7_loras_reach_folded_layers_in_the_basis_they_were_made_for(tmp_path, sample, plain):
    """A folded file gives the same picture, stock ComfyUI refuses it, and a LoRA does to it what it does to the original."""
    with safe_open(IMAGE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    maxima = {
        n.removesuffix(".weight"): t.float().abs().amax(0)
        for n, t in tensors.items()
        if n.endswith(".weight") and t.dim() == 2
    }
    generator = torch.Generator().manual_seed(0)
    activations = {name: torch.rand(m.shape, generator=generator) * 4 + 0.5 for name, m in maxima.items()}
    edits = fold_edits(find_architecture(shapes), shapes, maxima, activations)
    plan = plan_file(IMAGE, edits=edits)
    with plan.checkpoint:
        write_file(plan, tmp_path / "folded.safetensors")
    model, report = host.load_diffusion_model(str(tmp_path / "folded.safetensors"))
    assert report.loader == host.STRETTO and report.layers == {"int8": 29}
    with safe_open(tmp_path / "folded.safetensors", "pt") as file:
        markers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert markers[LAYER]["format"] == "stretto_folded:int8_tensorwise"
    assert psnr(sample(model), plain) >= 33
    model, _ = host.load_diffusion_model(str(tmp_path / "folded.safetensors"))  # one that no run has loaded yet
    producer = "joint_blocks.0.x_block.adaLN_modulation.1"
    for name in (LAYER, "joint_blocks.0.x_block.attn.qkv", producer):
        layer, key = layer_of(model, name), f"diffusion_model.{name}.weight"
        delta = (
            torch.randn(layer.out_features, 2, generator=generator)
            @ torch.randn(2, layer.in_features, generator=generator)
            * 0.02
        )
        original = tensors[f"{name}.weight"].float()
        assert relative(layer.convert_weight(layer.weight.detach().float()), original) < 0.02
        patched = model.clone()
        patched.add_patches({key: ("diff", (delta,))})
        patched.patch_model()
        now = layer_of(patched, name)
        assert relative(now.convert_weight(now.weight.detach().float()), original + delta) < 0.02
        patched.unpatch_model()


@pytest.mark.parametrize(
    ("family", "layer", "words"),
    [
        ("flux", "double_blocks.0.img_mlp.2", "GELU"),
        ("flux2", "double_blocks.0.img_attn.qkv", "shared by all blocks"),
        ("wan", "blocks.0.self_attn.q", "all blocks share"),
        ("sd3", "joint_blocks.0.x_block.mlp.fc2", "GELU"),
    ],
)
def test_t4_illegal_folds_are_refused_with_the_reason(tiny, family, layer, words):
    tensors = tiny(family).model.diffusion_model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with pytest.raises(StrettoError, match=words) as error:
        fold_edits(find_architecture(shapes), shapes, {}, {}, layers=[layer])
    assert layer in str(error.value)


# names


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_names_of_diffusers_are_mapped_as_comfyui_maps_them(family):
    if family == "flux":
        theirs = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 64})
        rules = renaming.FLUX
    else:
        theirs = comfy.utils.mmdit_to_diffusers({"depth": 1, "num_blocks": 1})
        rules = renaming.SD3
    import re

    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    for name, target in theirs.items():
        if name.startswith("controlnet") or "pos_embed_input" in str(target):
            continue
        expected = target if isinstance(target, str) else target[0]
        got, rule = renaming._target(name, compiled, "FLUX" if family == "flux" else "SD3", 0)
        assert got == expected, name
        pieces = isinstance(target, tuple) and target[1] is not None
        assert (rule.place is not None) == pieces, name
        if pieces:
            assert rule.place == target[1][1] // 64
        assert rule.swap == (isinstance(target, tuple) and len(target) > 2), name


# the nodes


def test_the_nodes_load_what_comfyui_lists(made, monkeypatch):
    import folder_paths

    from stretto.nodes.load_quantized import StrettoLoadDiffusionModel, StrettoLoadTextEncoder

    monkeypatch.setattr(
        folder_paths, "get_full_path", lambda kind, name: str(made("int8")) if name == "here.safetensors" else None
    )
    output = StrettoLoadDiffusionModel.execute("here.safetensors", host.AS_IS, host.BRANCH, host.AUTOMATIC)
    assert "29 layers int8: int8 product (torch._int_mm)" in output.args[1]
    assert "measured here: the int8 product" in output.args[1]
    with pytest.raises(StrettoError, match=r"'gone.safetensors' is in none of ComfyUI's diffusion_models folders"):
        StrettoLoadDiffusionModel.execute("gone.safetensors", host.AS_IS, host.BRANCH, host.AUTOMATIC)
    for node in (StrettoLoadDiffusionModel, StrettoLoadTextEncoder):
        assert node.GET_SCHEMA().node_id == node.__name__


def test_a_text_encoder_keeps_its_products_and_never_goes_to_a_deaf_comfyui(tmp_path, monkeypatch):
    """A T5 of two blocks: only weights are rounded, and a release that would take codes for weights does not get them."""
    generator, tensors = torch.Generator().manual_seed(0), {}

    def add(name, *shape):
        tensors[name] = torch.randn(shape, generator=generator) * 0.05

    add("shared.weight", 64, 384)
    add("encoder.final_layer_norm.weight", 384)
    for index in range(2):
        block = f"encoder.block.{index}.layer"
        for part in "qkvo":
            add(f"{block}.0.SelfAttention.{part}.weight", 384, 384)
        add(f"{block}.0.layer_norm.weight", 384)
        add(f"{block}.1.layer_norm.weight", 384)
        for part, shape in (("wi_0", (512, 384)), ("wi_1", (512, 384)), ("wo", (384, 512))):
            add(f"{block}.1.DenseReluDense.{part}.weight", *shape)
    save_file(tensors, tmp_path / "t5.safetensors")
    for form in ("int8", "fp8"):
        plan = plan_file(tmp_path / "t5.safetensors", format=form)
        with plan.checkpoint:
            assert plan.architecture.name == "t5" and len(plan.quantized) == 14
            write_file(plan, tmp_path / f"t5-{form}.safetensors")
            assert all(plan.marker(choice)["full_precision_matrix_mult"] for choice in plan.quantized.values())

    class Encoder(torch.nn.Module):
        """What ComfyUI builds with the operations it is given."""

        def __init__(self, operations):
            super().__init__()
            self.layers = torch.nn.ModuleDict()
            for name, tensor in tensors.items():
                if name.endswith(".weight") and tensor.dim() == 2 and "block" in name:
                    self.layers[name.removesuffix(".weight").replace(".", "/")] = operations.Linear(
                        *tensor.shape[::-1], bias=False
                    )

    def load_state_dicts(dicts, model_options, **options):
        encoder = Encoder(model_options["custom_operations"])
        for key, layer in encoder.layers.items():
            name = key.replace("/", ".")
            layer._load_from_state_dict(dict(dicts[0]), f"{name}.", {}, True, [], [], [])
        return encoder

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load_state_dicts)
    for form in ("int8", "fp8"):
        loaded, (report,) = host.load_text_encoder([str(tmp_path / f"t5-{form}.safetensors")], "sd3")
        assert report.loader == host.STRETTO and report.layers == {form: 14}
        layer = loaded.layers["encoder/block/1/layer/1/DenseReluDense/wo"]
        assert layer.stretto_state.full_precision
        x = torch.randn(5, 512)
        right = x @ tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"].T
        assert relative(layer(x), right) < (0.01 if form == "int8" else 0.04)
    if "nvfp4" not in comfy.ops.QUANT_ALGOS:
        with pytest.raises(StrettoError, match="does not know quantized text encoders"):
            host.load_text_encoder([str(tmp_path / "t5-fp8.safetensors")], "sd3", loader=host.CORE)
    with pytest.raises(StrettoError, match="type 'nothing'"):
        host.load_text_encoder([str(tmp_path / "t5.safetensors")], "nothing")


def test_dequantizing_is_the_same_everywhere():
    for form in ("int8", "w6a8", "w4a8", "fp8", "fp8_rows", "w4a16"):
        layout = fitting(form, 48, 256)
        packed = layout.quantize(torch.randn(48, 256))
        state = arenas.LayerState(layout, (48, 256))
        arena = packed.arena()
        assert torch.equal(arenas.dequantize_arena(state, arena.float()), packed.dequantize())
        x = torch.randn(7, 256)
        full = arenas.LayerState(layout, (48, 256), full_precision=True)
        assert relative(arenas.arena_linear(full, x, arena, None), x @ packed.dequantize().T) < 1e-5
