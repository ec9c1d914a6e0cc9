"""Loading attention weights in ComfyUI: CLEAR's change FLUX's attention and nothing else, and can be taken back."""

import comfy.weight_adapter
import folder_paths
import pytest
import torch

from stretto.acceleration.attention.weights import load_weights
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts.comfy_attention_weights import apply_clear
from stretto.nodes.load_attention_weights import StrettoLoadAttentionWeights

from .tiny_models import build, sample

safetensors = pytest.importorskip("safetensors.torch")
WIDTH, DOUBLE, SINGLE, HEAD = 32, 2, 2, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clear_state(width=WIDTH, down=1):
    """Return weights as CLEAR publishes them, in diffusers' names."""
    found, seed = {}, 0
    for name, parts in (
        ("transformer_blocks", ("to_q", "to_k", "to_v", "to_out.0")),
        ("single_transformer_blocks", ("to_q", "to_k", "to_v")),
    ):
        for index in range(2):
            for part in parts:
                seed += 1
                found[f"{name}.{index}.attn.{part}.weight"] = normal(width, width, seed=seed).bfloat16() * 0.1
                found[f"{name}.{index}.attn.{part}.bias"] = normal(width, seed=100 + seed).bfloat16() * 0.1
            if down > 1:
                found[f"{name}.{index}.attn.processor.spatial_weight"] = torch.full(
                    (1, 1, 1, down, 1, down, 1), down**-2
                )
    return found


def expected(before):
    """Return the network's state with CLEAR's weights in, put together by hand."""
    after, state = dict(before), clear_state()
    for index in range(2):
        for end in ("weight", "bias"):
            diffusers = f"transformer_blocks.{index}.attn.{{}}.{end}"
            after[f"double_blocks.{index}.img_attn.qkv.{end}"] = torch.cat(
                [state[diffusers.format(part)] for part in ("to_q", "to_k", "to_v")]
            ).float()
            after[f"double_blocks.{index}.img_attn.proj.{end}"] = state[diffusers.format("to_out.0")].float()
            joint = before[f"single_blocks.{index}.linear1.{end}"].clone()
            parts = [state[f"single_{diffusers}".format(part)] for part in ("to_q", "to_k", "to_v")]
            joint[: 3 * WIDTH] = torch.cat(parts).float()
            after[f"single_blocks.{index}.linear1.{end}"] = joint
    return after


def state_of(model):
    return {key: x.detach().clone() for key, x in model.model.diffusion_model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture
def flux():
    """A FLUX of this test's own: no sampler has loaded it, so patching it by hand disturbs nobody."""
    return build("flux")


@pytest.fixture
def clear(tmp_path):
    path = tmp_path / "clear_local_16.safetensors"
    safetensors.save_file(clear_state(), path)
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """ComfyUI's folder of models, empty."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    (tmp_path / "models" / "attention").mkdir(parents=True)
    return tmp_path / "models"


def run(**inputs):
    defaults = {
        item.id: item.default for item in StrettoLoadAttentionWeights.define_schema().inputs if item.id != "model"
    }
    return StrettoLoadAttentionWeights.execute(**{**defaults, **inputs}).result


def test_clear_changes_exactly_the_attention_weights_and_can_be_taken_back(flux, clear):
    model = flux
    before = state_of(model)
    patched = apply_clear(model, load_weights(clear))
    assert same(state_of(model), before), "nothing happens before the model is loaded"
    assert not model.patches and patched is not model
    patched.patch_model()
    try:
        assert same(state_of(patched), expected(before))
        changed = [key for key, x in state_of(patched).items() if not torch.equal(x, before[key])]
        assert len(changed) == DOUBLE * 4 + SINGLE * 2
        assert not any("txt" in key or "mlp" in key or "norm" in key for key in changed)
    finally:
        patched.unpatch_model()
    assert same(state_of(model), before), "bit for bit"


def test_a_run_with_clear_differs_and_leaves_no_trace(tiny, clear):
    plain = sample(tiny("flux"), "flux", steps=2, cfg=1.0)
    clone = run(file=str(clear), kind="CLEAR", model=tiny("flux"))[1]
    tuned = sample(clone, "flux", steps=2, cfg=1.0)
    assert (tuned - plain).abs().max() > 1e-3
    assert torch.equal(sample(clone, "flux", steps=2, cfg=1.0), tuned)
    assert torch.equal(sample(tiny("flux"), "flux", steps=2, cfg=1.0), plain)


def test_loras_add_to_clear_wherever_they_stand(flux, clear):
    """A weight patch that replaces would otherwise swallow the LoRA that was loaded before it."""
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    down, up = normal(2, WIDTH, seed=1), normal(3 * WIDTH, 2, seed=2)
    lora = {name: comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))}
    weights, before = load_weights(clear), state_of(flux)
    states = []
    for lora_first in (True, False):
        model = flux.clone()
        if lora_first:
            model.add_patches(lora, 0.5)
        model = apply_clear(model, weights)
        if not lora_first:
            model.add_patches(lora, 0.5)
        model.patch_model()
        states.append(state_of(model))
        model.unpatch_model()
    assert same(*states)
    key = name.removeprefix("diffusion_model.")
    torch.testing.assert_close(states[0][key], expected(before)[key] + 0.5 * up @ down)


def test_models_that_clear_is_not_for_are_refused(tiny, clear, tmp_path):
    weights = load_weights(clear)
    with pytest.raises(StrettoError, match="are for FLUX.1; the model is WanModel"):
        apply_clear(tiny("wan"), weights)
    with pytest.raises(StrettoError, match="are for FLUX.1; the model is Chroma"):
        apply_clear(tiny("chroma"), weights)
    with pytest.raises(StrettoError, match="the model has no diffusion_model.double_blocks.0.img_attn"):
        apply_clear(tiny("flux2"), weights)
    wide = tmp_path / "clear_local_8.safetensors"
    safetensors.save_file(clear_state(width=48), wide)
    with pytest.raises(
        StrettoError, match="2 double and 2 single blocks of 48 channels; the model has 2 .* of 32 channels"
    ):
        apply_clear(tiny("flux"), load_weights(wide))
    with pytest.raises(StrettoError, match="connect a FLUX model"):
        run(file=str(clear))


def sla_file(path):
    tensors = {f"blocks.{i}.proj_l.{end}": normal(*shape, seed=i) for i in range(3)
               for end, shape in (("weight", (HEAD, HEAD)), ("bias", (HEAD,)))}  # fmt: skip
    metadata = {"format": "stretto_attention@1", "variant": "all", "feature_map": "softmax", "topk": "0.1", "block_q": "64",
                "block_k": "64", "smooth_k": "true", "base_model": "wan"}  # fmt: skip
    safetensors.save_file(tensors, path, metadata)
    return path


def turbo_file(path):
    key = "blocks.{}.self_attn.attn_op.local_attn.proj_l.{}"
    torch.save({key.format(i, end): normal(*shape, seed=i) for i in range(3)
                for end, shape in (("weight", (HEAD, HEAD)), ("bias", (HEAD,)))}, path)  # fmt: skip
    return path


def test_other_weights_pass_the_model_through(tiny, models):
    sla_file(models / "attention" / "mine.safetensors")
    model = tiny("wan")
    weights, passed = run(file="mine.safetensors", kind="SLA", model=model)
    assert passed is model and not passed.patches
    assert (weights.kind, weights.layers, weights.path) == ("SLA", 3, str(models / "attention" / "mine.safetensors"))
    assert run(file=f'"{models / "attention" / "mine.safetensors"}" ')[1] is None


def test_files_are_found_in_the_model_folders(models, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    other.mkdir()
    sla_file(other / "there.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(other)], {".safetensors"}))
    assert run(file="there.safetensors")[0].file == str(other / "there.safetensors")
    with pytest.raises(StrettoError, match="no file 'none.safetensors' in .*attention.*elsewhere"):
        run(file="none.safetensors")
    with pytest.raises(StrettoError, match="file is empty"):
        run(file=" ")
    with pytest.raises(StrettoError, match="kind is 'VSA'; known: auto, SLA, SALAD, CLEAR"):
        run(file="there.safetensors", kind="VSA")
    with pytest.raises(StrettoError, match="it holds SLA weights; expected CLEAR"):
        run(file="there.safetensors", kind="CLEAR")


def test_published_checkpoints_load_and_are_saved_on_request(tiny, models):
    source = turbo_file(models / "attention" / "turbo.pth")
    with pytest.raises(StrettoError, match="published checkpoints do not say theirs"):
        run(file="turbo.pth")
    weights, _ = run(file="turbo.pth", variant="all keys", keep=10.0, model=tiny("wan"))
    assert (weights.variant, weights.topk, weights.base_model) == ("all", 0.1, "wan")
    assert load_weights(weights.path).topk == 0.1
    saved, _ = run(file="turbo.pth", variant="complement", keep=15.0, save_as="small one")
    assert saved.file == str(models / "attention" / "small one.safetensors")
    assert (saved.variant, saved.topk, saved.base_model, saved.path) == ("complement", 0.15, "any", saved.file)
    with pytest.raises(StrettoError, match="exists already"):
        run(file="turbo.pth", variant="complement", keep=15.0, save_as="small one.safetensors")
    for name in ("../up", "a/b", "con"):
        with pytest.raises(StrettoError, match="save_as is"):
            run(file="turbo.pth", variant="complement", keep=15.0, save_as=name)
    assert sorted(path.name for path in source.parent.iterdir()) == ["small one.safetensors", "turbo.pth"]


def test_a_changed_file_is_read_again(models):
    path = models / "attention" / "a.safetensors"
    missing = StrettoLoadAttentionWeights.fingerprint_inputs(file="a.safetensors", kind="auto")
    sla_file(path)
    first = StrettoLoadAttentionWeights.fingerprint_inputs(file="a.safetensors", kind="auto")
    assert first == StrettoLoadAttentionWeights.fingerprint_inputs(file="a.safetensors", kind="auto")
    path.write_bytes(b"other")
    assert len({missing, first, StrettoLoadAttentionWeights.fingerprint_inputs(file="a.safetensors")}) == 3


def test_the_node_is_explained_and_its_inputs_keep_their_places():
    schema = StrettoLoadAttentionWeights.define_schema()
    names = [item.id for item in schema.inputs]
    assert names == ["file", "kind", "model", "variant", "keep", "layers", "radius", "save_as"]
    assert schema.node_id == "StrettoLoadAttentionWeights" and schema.category == "Stretto"
    assert all(item.tooltip for item in schema.inputs) and schema.description
    assert [output.display_name for output in schema.outputs] == ["weights", "model"]
