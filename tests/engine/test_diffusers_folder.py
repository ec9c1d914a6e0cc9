"""Folders of diffusers pipelines are checked before anything in them is loaded; diffusers is not needed for that."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts.diffusers_folder import check_folder, find_folders

INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.39.0",
    "boundary_ratio": 0.5,
    "text_encoder": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
CONFIGS = {
    "transformer/config.json": {"_class_name": "SD3Transformer2DModel", "num_layers": 2},
    "vae/config.json": {"_class_name": "AutoencoderTiny"},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "tokenizer/tokenizer_config.json": {"model_max_length": 10**30},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A whole pipeline folder, with weights of two numbers each."""
    made = tmp_path / "models" / "tiny"
    for name, document in {"model_index.json": INDEX, **CONFIGS}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(json.dumps(document))
    for part in ("transformer", "vae"):
        save_file({"a.weight": torch.zeros(2, 1, dtype=torch.bfloat16), "a.bias": torch.zeros(1)}, made / part / WEIGHTS)
    return made


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_folder_is_described(folder):
    found = check_folder(folder)
    assert found.class_name == "StableDiffusion3Pipeline" and found.absent == ("text_encoder",) and found.variant is None
    assert list(found.components) == ["transformer", "vae", "scheduler", "tokenizer"]
    transformer = found.components["transformer"]
    assert transformer.shapes == {"a.weight": (2, 1), "a.bias": (1,)} and transformer.nbytes == 8
    assert transformer.dtype in (torch.bfloat16, torch.float32) and found.components["scheduler"].dtype is None


def test_folders_are_found_below_a_base(folder, tmp_path):
    base = tmp_path / "models"
    for name in ("deep/er/one", ".hidden", "no pipeline"):
        (base / name).mkdir(parents=True)
    for name in ("deep/er/one", ".hidden"):
        (base / name / "model_index.json").write_text("{}")
    assert find_folders(base) == ["deep/er/one", "tiny"]
    assert find_folders(base / "nothing") == []


def test_files_may_be_links_inside_the_base_alone(folder, tmp_path):
    """As the hub's cache has them: snapshots are links to blobs beside."""
    blob = tmp_path / "models" / "blob"
    (folder / "transformer" / WEIGHTS).rename(blob)
    (folder / "transformer" / WEIGHTS).symlink_to(blob)
    assert check_folder(folder, tmp_path / "models").components["transformer"].nbytes == 8
    with pytest.raises(StrettoError, match="is a link to .*outside of"):
        check_folder(folder)
    outside = tmp_path / "elsewhere.safetensors"
    blob.rename(outside)
    os.unlink(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).symlink_to(outside)
    with pytest.raises(StrettoError, match="is a link to .*outside of"):
        check_folder(folder, tmp_path / "models")
    os.unlink(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).symlink_to(folder / "transformer" / WEIGHTS)
    with pytest.raises(StrettoError):
        check_folder(folder, tmp_path / "models")


def test_a_folder_with_one_variant_alone_is_read_as_that(folder):
    for part in ("transformer", "vae"):
        (folder / part / WEIGHTS).rename(folder / part / WEIGHTS.replace(".safe", ".fp16.safe"))
    assert check_folder(folder).variant == "fp16"


def test_shards_are_read_through_their_index(folder):
    file = folder / "transformer" / WEIGHTS
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for number, shard in enumerate(shards):
        save_file({f"part{number}.weight": torch.zeros(3, 1)}, file.with_name(shard))
    file.unlink()
    index = file.with_name(WEIGHTS + ".index.json")
    index.write_text(json.dumps({"weight_map": {"part0.weight": shards[0], "part1.weight": shards[1]}}))
    assert set(check_folder(folder).components["transformer"].shapes) == {"part0.weight", "part1.weight"}
    index.write_text(json.dumps({"weight_map": {"part0.weight": "../../secret.safetensors"}}))
    with pytest.raises(StrettoError, match="shards are .safetensors files in the same folder"):
        check_folder(folder)
    index.write_text(json.dumps({"weight_map": {"part0.weight": "gone.safetensors"}}))
    with pytest.raises(StrettoError, match="gone.safetensors is missing"):
        check_folder(folder)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def _remove(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _pickle(file):
    torch.save({"a": torch.zeros(1)}, file)


def _eight_bits(file):
    save_file({"a.weight": torch.zeros(2, 1, dtype=torch.float8_e4m3fn)}, file)


def _to_bin(file):
    file.unlink()
    _pickle(file.with_suffix(".bin"))


def _nested(file):
    file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


HOSTILE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: is not valid JSON"),
    "an index that is no object": (lambda f: (f / "model_index.json").write_text("[1]"), "expected an object"),
    "an index that is nested": (lambda f: _nested(f / "model_index.json"), "is not valid JSON"),
    "an index of megabytes": (lambda f: (f / "model_index.json").write_text(" " * (5 << 20)), "no configuration is larger"),
    "an index in no text": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "a pipeline of its own": (
        lambda f: rewrite(f / "model_index.json", _class_name=["my_code", "MyPipeline"]), "code of its own"
    ),
    "no class": (lambda f: rewrite(f / "model_index.json", _class_name=None), "expected a pipeline class"),
    "a path as a class": (lambda f: rewrite(f / "model_index.json", _class_name="../Evil"), "expected a pipeline class"),
    "a library of its own": (
        lambda f: rewrite(f / "model_index.json", transformer=["my_code", "MyModel"]), "my_code.MyModel, code from outside"
    ),
    "a class that is none": (
        lambda f: rewrite(f / "model_index.json", vae=["diffusers", "os.system"]), "'os.system', which is no class of diffusers"
    ),
    "a component that is a path": (
        lambda f: rewrite(f / "model_index.json", **{"../vae": ["diffusers", "AutoencoderTiny"]}), "no name of a component"
    ),
    "half a component": (lambda f: rewrite(f / "model_index.json", vae=["diffusers"]), "expected a library and a class"),
    "remote code": (lambda f: rewrite(f / "model_index.json", trust_remote_code=True), "trust_remote_code asks for code"),
    "code of a component": (
        lambda f: rewrite(f / "transformer" / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map asks for code"
    ),
    "code of a tokenizer": (
        lambda f: rewrite(f / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}), "auto_map asks for code"
    ),
    "a U-Net": (
        lambda f: rewrite(f / "model_index.json", transformer=[None, None], unet=["diffusers", "UNet2DConditionModel"]),
        "has a U-Net",
    ),
    "no transformer": (lambda f: rewrite(f / "model_index.json", transformer=[None, None]), "names no transformer"),
    "a missing component": (lambda f: _remove(f / "vae"), "vae: the component is missing"),
    "a missing configuration": (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
    "a missing schedule": (lambda f: _remove(f / "scheduler"), "scheduler: the component is missing"),
    "another class": (
        lambda f: rewrite(f / "transformer" / "config.json", _class_name="FluxTransformer2DModel"),
        "is for 'FluxTransformer2DModel', but model_index.json says SD3Transformer2DModel",
    ),
    "too many layers": (
        lambda f: rewrite(f / "transformer" / "config.json", num_layers=10**9), "num_layers is 1,000,000,000"
    ),
    "a size beyond all": (
        lambda f: rewrite(f / "transformer" / "config.json", nested={"hidden_size": 2**40}), "hidden_size is 1,099,511,627,776"
    ),
    "no weights": (lambda f: (f / "transformer" / WEIGHTS).unlink(), "its weights are missing"),
    "pickled weights": (lambda f: _to_bin(f / "transformer" / WEIGHTS), "diffusion_pytorch_model.bin, a pickle"),
    "a pickle by another name": (lambda f: _pickle(f / "transformer" / WEIGHTS), "pickle"),
    "half a file": (lambda f: _cut(f / "transformer" / WEIGHTS), "truncated|ends|bytes"),
    "weights in eight bits": (lambda f: _eight_bits(f / "transformer" / WEIGHTS), "a.weight is float8_e4m3fn; pipelines run in"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_folder_that_is_broken_or_hostile_is_refused_in_words(folder, what):
    damage, words = HOSTILE[what]
    damage(folder)
    with pytest.raises(StrettoError, match=words) as caught:
        check_folder(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 800


def test_a_folder_that_is_none(folder):
    with pytest.raises(StrettoError, match="no such folder"):
        check_folder(folder / "nowhere")
    with pytest.raises(StrettoError, match="this looks like one component: name the folder above"):
        check_folder(folder / "transformer")
