"""Pipelines of diffusers in ComfyUI: loading, refusals, one model in both hosts, plans, memory, interrupts, progress."""

import ast
import json
import shutil
import sys
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts import diffusers_load as loading
from stretto.acceleration.hosts.diffusers_folder import check_folder
from stretto.acceleration.hosts.diffusers_write import write_folder
from stretto.acceleration.plan import Request
from stretto.acceleration.quantization.renaming import comfy_names

from ..oracles.packages import required

required("diffusers")
from stretto.acceleration.hosts.diffusers_pipeline import Pipeline, Sampling, run_pipeline  # noqa: E402
from stretto.nodes import diffusers as nodes  # noqa: E402
from stretto.nodes.cache import StrettoCache  # noqa: E402
from stretto.nodes.demo import StrettoDemoText  # noqa: E402
from stretto.nodes.measure import StrettoMeasure  # noqa: E402

from .tiny_pipelines import PIPELINES, conditioning, pipeline_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "models"
FILES = {
    kind: (DEMO / "diffusion_models" / f"stretto-demo-{kind}.safetensors", DEMO / "vae" / f"stretto-demo-{kind}-vae.safetensors")
    for kind in ("image", "video")
}
TAYLOR = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 1, "tail": 1})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders of both demo models."""
    base = tmp_path_factory.mktemp("diffusers")
    return {kind: write_folder(*files, base / kind) for kind, files in FILES.items()}


@pytest.fixture(scope="module")
def links(folders):
    """Both demo pipelines in float32."""
    return {kind: Pipeline(loading.load_pipeline(check_folder(folder), torch.float32)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def text():
    """``text(words, kind)`` is the demo models' CONDITIONING."""
    if str(DEMO / "text_encoders") not in folder_paths.get_folder_paths("text_encoders"):
        folder_paths.add_model_folder_path("text_encoders", str(DEMO / "text_encoders"))
    return lambda words, kind: StrettoDemoText.execute(words, kind).result[0]


def sample(link, text, kind="image", steps=8, seed=7, **more):
    frames = 5 if kind == "video" else 1
    both = text("fluent red heart", kind), text("", kind)
    return nodes.StrettoDiffusersSample.execute(link, "", "", 64, 64, frames, steps, 5.0, seed, 1, *both, **more).result


def last_trace():
    return host.TRACES.all()[-1]


def distance(first, second):
    return float((first - second).norm() / second.norm())


def test_one_prediction_of_the_video_model_in_both_hosts(links):
    network = links["video"].pipeline.transformer
    model = comfy.sd.load_diffusion_model(str(FILES["video"][0]), model_options={"dtype": torch.float32})
    generator = torch.Generator().manual_seed(1)
    x, words = torch.randn(2, 16, 5, 8, 8, generator=generator), torch.randn(2, 12, 4096, generator=generator)
    for sigma in (1.0, 0.6, 0.1):
        t = torch.full((2,), 1000.0 * sigma)
        with torch.no_grad():
            ours = model.model.diffusion_model(x, t, context=words)
            theirs = network(x, timestep=t, encoder_hidden_states=words).sample
        assert distance(theirs, ours) < 1e-5


@pytest.mark.parametrize("kind, shape", [("image", (2, 16, 8, 8)), ("video", (1, 16, 3, 8, 8))])
def test_one_decoder_in_both_hosts(links, kind, shape):
    vae = links[kind].pipeline.vae
    known = comfy.sd.VAE(sd=load_file(FILES[kind][1]), dtype=torch.float32)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2))  # as the network knows it
    config = vae.config
    with torch.no_grad():
        if kind == "image":
            theirs = vae.decode(latent / config.scaling_factor + config.shift_factor).sample
            ours = known.decode(comfy.latent_formats.SD3().process_out(latent))
        else:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
            theirs = vae.decode(latent * std + mean).sample
            ours = known.decode(comfy.latent_formats.Wan21().process_out(latent))
    pictures = (theirs.movedim(1, -1).clamp(-1, 1) + 1) / 2
    assert distance(pictures, ours) < 1e-5


def test_names_of_the_video_model_go_there_and_back(folders):
    written = load_file(folders["video"] / "transformer" / "diffusion_pytorch_model.safetensors")
    back, words = comfy_names(written)
    there = load_file(FILES["video"][0])
    assert words == "names of diffusers' Wan" and set(back) == set(there)
    assert all(torch.equal(back[name], there[name]) for name in there)


@pytest.mark.parametrize("kind, pictures, steps, forecast", [("image", 1, 20, 8), ("video", 5, 12, 2)])
def test_every_technique_node_takes_a_pipeline(links, text, kind, pictures, steps, forecast):
    """Timing alone changes nothing; the cache skips; the link that was there keeps the plan it had."""
    link = links[kind]
    plain, latent = sample(link, text, kind, steps=steps)
    assert plain.shape == (pictures, 64, 64, 3) and plain.dtype == torch.float32 and 0 <= plain.min() < plain.max() <= 1
    assert latent["samples"].shape[:2] == (1, 16) and latent["samples"].shape[-2:] == (8, 8)
    timed = StrettoMeasure.execute(link, 3).result[0]
    assert torch.equal(sample(timed, text, kind, steps=steps)[0], plain)
    assert last_trace()["totals"]["computed"] == steps and last_trace()["seed"] == 7
    cached = StrettoCache.execute(timed, "Taylor", 3, 1, 0.05, 4, 5, False).result[0]
    skipped = sample(cached, text, kind, steps=steps)[0]
    trace = last_trace()
    assert trace["outcome"] == "completed" and trace["totals"]["forecast"] == forecast
    assert not torch.equal(skipped, plain) and float((skipped - plain).abs().mean()) < 0.02
    assert [r.technique for r in cached.plan.requests] == ["cache", "measure"] and not link.plan.requests
    assert torch.equal(sample(link, text, kind, steps=steps)[0], plain)


def test_requests_that_cannot_share_a_model_cannot_share_a_pipeline(links):
    cached = host.request(links["image"], TAYLOR)
    with pytest.raises(StrettoError):
        host.request(cached, Request("table", {"schedule": "x"}))
    with pytest.raises(StrettoError, match="interval"):
        host.request(links["image"], Request("cache", {"interval": -1}))


def test_a_technique_that_works_on_comfyui_alone_says_so(links, text):
    sample(host.request(links["image"], Request("temporal_features", {})), text)
    (outcome,) = last_trace()["techniques"]
    assert outcome["status"] == "off" and outcome["reason"]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_every_family_run_under_a_plan(name):
    link = Pipeline(pipeline_of(name))
    embedded = None if name == "dit" else (conditioning(3), conditioning(4))
    settings = Sampling("cat 1, cat 5" if name == "dit" else "", "", 64, 64, 9, 5, 4.0, 3, 2, embedded)
    plain, latent = run_pipeline(link, settings, host.TRACES, (None, None))
    again, _ = run_pipeline(link.request(Request("measure", {})), settings, host.TRACES, (None, None))
    run_pipeline(link.request(TAYLOR), settings, host.TRACES, (None, None))
    trace = last_trace()
    assert plain.shape == (PIPELINES[name][1], 64, 64, 3) and plain.isfinite().all()
    assert torch.equal(plain, again) and latent.isfinite().all()
    assert trace["model"]["family"] == name and trace["totals"]["evaluations"] == 5 > trace["totals"]["computed"]


def test_guidance_goes_where_a_pipeline_has_it():
    from stretto.acceleration.hosts.diffusers_pipeline import call_arguments

    settings = Sampling("a cat", "", 64, 64, 9, 5, 4.0, 3, 2)
    flux, qwen = pipeline_of("flux"), pipeline_of("qwen_image")
    embedded = Sampling("", "", 64, 64, 9, 5, 4.0, 3, 2, (conditioning(), conditioning()))
    assert call_arguments(flux, embedded, torch.device("cpu"))["guidance_scale"] == 4.0
    made = call_arguments(qwen, embedded, torch.device("cpu"))
    assert made["true_cfg_scale"] == 4.0 and made["prompt_embeds"].shape[0] == 2 and made["prompt_embeds_mask"].all()
    qwen.text_encoder = torch.nn.Identity()
    assert call_arguments(qwen, settings, torch.device("cpu"))["negative_prompt"] == " "  # else it would not guide


def test_an_interrupt_ends_the_run_and_leaves_the_pipeline_as_it_was(links, text, monkeypatch):
    link = links["image"]
    plain, _ = sample(link, text)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) > 6:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    before = type(link.pipeline)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(host.request(link, TAYLOR), text)
    monkeypatch.undo()
    assert last_trace()["outcome"] == "interrupted" and 0 < len(last_trace()["evaluations"]) < 8
    network, vae = link.pipeline.transformer, link.pipeline.vae
    assert type(link.pipeline) is before and "forward" not in network.__dict__ and not network._forward_pre_hooks
    assert not {"encode", "decode"} & set(vae.__dict__)
    assert torch.equal(sample(link, text)[0], plain)


def test_what_a_pipeline_refuses_is_told_in_its_words(links, text):
    both = text("a", "image"), text("", "image")
    with pytest.raises(StrettoError, match="StableDiffusion3Pipeline: .*divisible"):
        nodes.StrettoDiffusersSample.execute(links["image"], "", "", 72, 64, 1, 4, 5.0, 1, 1, *both)
    with pytest.raises(StrettoError, match="without a text encoder: connect positive"):
        nodes.StrettoDiffusersSample.execute(links["image"], "a heart", "", 64, 64, 1, 4, 5.0, 1)
    with pytest.raises(StrettoError, match="guidance above 1 needs the negative"):
        nodes.StrettoDiffusersSample.execute(links["image"], "", "", 64, 64, 1, 4, 5.0, 1, 1, both[0])
    with pytest.raises(StrettoError, match="connect both or neither"):
        nodes.StrettoDiffusersSample.execute(links["image"], "", "", 64, 64, 1, 4, 5.0, 1, 1, None, both[1])
    with pytest.raises(StrettoError, match="2 conditionings are combined"):
        nodes.StrettoDiffusersSample.execute(links["image"], "", "", 64, 64, 1, 4, 5.0, 1, 1, both[0] * 2, both[1])
    other = text("a", "video"), text("", "video")
    with pytest.raises(StrettoError, match="its text is 4096 numbers wide, and this model reads 384"):
        nodes.StrettoDiffusersSample.execute(links["image"], "", "", 64, 64, 1, 4, 5.0, 1, 1, *other)
    with pytest.raises(StrettoError, match="draws classes, not words: dragon"):
        nodes.StrettoDiffusersSample.execute(Pipeline(pipeline_of("dit")), "cat 1, dragon", "", 64, 64, 1, 4, 5.0, 1)
    assert "forward" not in links["image"].pipeline.transformer.__dict__


def test_a_link_in_the_wrong_place_is_told_in_words(links, tiny):
    import nodes as core

    with pytest.raises(StrettoError, match="Stretto Diffusers Sample take it; nothing of ComfyUI's does"):
        core.common_ksampler(links["image"], 1, 4, 5.0, "euler", "simple", [], [], {"samples": torch.zeros(1, 16, 8, 8)})
    with pytest.raises(StrettoError, match="a model of ComfyUI's; KSampler runs those"):
        nodes.StrettoDiffusersSample.execute(tiny("sd3"), "", "", 64, 64, 1, 4, 5.0, 1)
    assert not hasattr(links["image"], "model")


def test_progress_and_previews_reach_comfyui(links, text, monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: seen.append((done, total, preview)))
    for kind in ("image", "video"):
        seen.clear()
        sample(links[kind], text, kind, steps=3)
        assert [entry[:2] for entry in seen] == [(1, 3), (2, 3), (3, 3)]
        assert all(kind == "JPEG" and picture.size == (8, 8) for kind, picture, _ in (entry[2] for entry in seen))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    seen.clear()
    sample(links["image"], text, steps=2)
    assert [entry[2] for entry in seen] == [None, None]


def test_a_preview_shows_where_a_flow_is_heading():
    from stretto.acceleration.hosts.diffusers_levels import given_levels
    from stretto.acceleration.hosts.diffusers_preview import _denoised

    clean, noise = torch.randn(2, 1, 4, 2, 2)
    before, after = (s * noise + (1 - s) * clean for s in (0.8, 0.5))
    torch.testing.assert_close(_denoised(after, before, given_levels([0.8, 0.5, 0.0]), 0), clean)
    assert _denoised(after, None, given_levels([0.8, 0.5, 0.0]), 0) is after


def test_networks_are_under_comfyuis_memory_management(folders, text):
    link = Pipeline(loading.load_pipeline(check_folder(folders["image"]), torch.float32))
    plain, _ = sample(link, text)
    held = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert all(any(patcher is each for each in held) for patcher in link.residents.patchers.values())
    assert all(patcher.loaded_size() == patcher.model_size() > 0 for patcher in link.residents.patchers.values())
    comfy.model_management.unload_all_models()
    assert all(patcher.loaded_size() == 0 for patcher in link.residents.patchers.values())
    assert torch.equal(sample(link, text)[0], plain)


def test_a_pipeline_that_nobody_holds_is_let_go(folders, text):
    import gc
    import weakref

    link = Pipeline(loading.load_pipeline(check_folder(folders["image"]), torch.float32))
    sample(host.request(link, TAYLOR), text, steps=4)
    network = weakref.ref(link.pipeline.transformer)
    del link
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert network() is None


def test_weights_are_as_stored_or_as_asked_for(folders):
    found = check_folder(folders["video"])
    stored = loading.load_pipeline(found)
    kept = {name: p.dtype for name, p in stored.transformer.named_parameters()}
    assert stored.vae.dtype == torch.float16 and kept["blocks.0.ffn.net.2.weight"] == torch.float16
    assert kept["blocks.0.norm2.weight"] == kept["scale_shift_table"] == torch.float32  # which diffusers keeps precise
    assert loading.load_pipeline(found, torch.bfloat16).vae.dtype == torch.bfloat16
    with pytest.raises(StrettoError, match="expected one of as stored, bfloat16"):
        nodes.StrettoLoadDiffusersPipeline.execute("x", "int3")


def damaged(folders, tmp_path, change, kind="image"):
    copy = tmp_path / "copy"
    shutil.copytree(folders[kind], copy)
    change(copy)
    return copy


def _index(**changes):
    def change(folder):
        path = folder / "model_index.json"
        document = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return change


def _config(part="transformer", **changes):
    def change(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _weights(edit):
    def change(folder):
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


BROKEN = {
    "an unknown pipeline": (_index(_class_name="StableDiffusion9Pipeline"), "has no class StableDiffusion9Pipeline"),
    "a class that is no pipeline": (_index(_class_name="AutoencoderTiny"), "AutoencoderTiny is no pipeline"),
    "an unknown class": (
        lambda f: (_index(vae=["diffusers", "AutoencoderHuge"])(f), _config("vae", _class_name="AutoencoderHuge")(f)),
        "has no class AutoencoderHuge",
    ),
    "a class that loads nothing": (_index(vae=["diffusers", "VaeImageProcessor"]), "no component|missing|cannot load"),
    "a component too many": (
        lambda f: (_index(extra=["diffusers", "AutoencoderTiny"])(f), shutil.copytree(f / "vae", f / "extra")),
        "has no component 'extra'",
    ),
    "a missing component": (_index(vae="gone"), 'vae is missing, .*"vae": \\[null, null\\]'),
    "a missing weight": (_weights(lambda w: w.pop("proj_out.weight")), "the weight proj_out.weight is missing"),
    "a weight of another shape": (
        _weights(lambda w: w.update({"proj_out.bias": torch.zeros(7)})), r"proj_out.bias is \[7\], but config.json"
    ),
    "a configuration that cannot be": (_config(num_attention_heads=0), "can be built from it|is \\["),
    "a size that would fill memory": (_config(joint_attention_dim=1 << 23), r"but config.json describes a network where it is"),
    "a word in the place of a number": (_config(num_layers="many"), "can be built from it"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_before_it_is_allocated(folders, tmp_path, what):
    change, words = BROKEN[what]
    with pytest.raises(StrettoError, match=words):
        loading.load_pipeline(check_folder(damaged(folders, tmp_path, change)))


def test_too_little_memory_is_said_before_loading(folders, monkeypatch):
    from stretto.acceleration.hosts import device

    monkeypatch.setattr(device, "free_memory", lambda _: 1 << 20)
    with pytest.raises(StrettoError, match="GB of system memory are free"):
        loading.load_pipeline(check_folder(folders["image"]))


def test_without_diffusers_the_message_says_what_to_type(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(StrettoError, match="pip install diffusers"):
        loading.load_pipeline(check_folder(folders["image"]))


def test_nothing_imports_diffusers_before_a_node_runs():
    for path in (*(ROOT / "acceleration").rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.partition(".")[0] == "diffusers"], path


@pytest.fixture
def base(tmp_path, monkeypatch):
    """ComfyUI's diffusers folder, empty, and the demo models beside."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, nodes.KIND, ([str(tmp_path / "diffusers")], {"folder"}))
    (tmp_path / "diffusers").mkdir()
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    for kind in ("diffusion_models", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(DEMO / kind)], {".safetensors"}))
    return tmp_path / "diffusers"


def test_the_loader_offers_folders_and_converts_the_demo_when_it_is_chosen(base, folders):
    shutil.copytree(folders["image"], base / "mine" / "pictures")
    assert nodes.folders() == ["mine/pictures", "stretto-demo-image", "stretto-demo-video"]
    link, words = nodes.StrettoLoadDiffusersPipeline.execute("mine/pictures", "float32").result
    assert isinstance(link, Pipeline) and words.startswith("StableDiffusion3Pipeline\ntransformer: SD3Transformer2DModel, 19 MB")
    nodes.StrettoLoadDiffusersPipeline.execute("stretto-demo-image", "as stored")
    made = base.parent / "temp" / "stretto-demo-image-diffusers"
    stamp = (made / "model_index.json").stat().st_mtime_ns
    nodes.StrettoLoadDiffusersPipeline.execute("stretto-demo-image", "as stored")
    assert (made / "model_index.json").stat().st_mtime_ns == stamp and [p.name for p in base.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../../etc", "/etc", "mine/../../x", "", "nothing"])
def test_the_loader_leaves_the_folders_to_nobody(base, name):
    with pytest.raises(StrettoError, match="below ComfyUI's diffusers folders|in none of ComfyUI's diffusers folders"):
        nodes.StrettoLoadDiffusersPipeline.execute(name, "as stored")


class Hub:
    """What stands in for the hub."""

    def __init__(self, folder, fails=False):
        self.folder, self.fails, self.asked = folder, fails, []

    def HfApi(self):
        return self

    def model_info(self, hub_id, files_metadata):
        from types import SimpleNamespace

        names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=10) for name in names])

    def snapshot_download(self, hub_id, local_dir, allow_patterns):
        self.asked.append((hub_id, allow_patterns))
        if self.fails:
            raise OSError("the line is down\nand more")
        shutil.copytree(self.folder, local_dir, dirs_exist_ok=True)


def test_nothing_is_downloaded_unless_it_is_asked_for(base, folders, monkeypatch):
    hub = Hub(folders["image"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in loading._OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StrettoError, match="in none of"):
        nodes.StrettoLoadDiffusersPipeline.execute("a/b", "as stored", False, "owner/pictures")
    assert not hub.asked
    path, _ = nodes._downloaded("owner/pictures")
    assert path == base / "owner--pictures" and check_folder(path, base).class_name == "StableDiffusion3Pipeline"
    assert len(hub.asked) == 1 and not [p for p in hub.asked[0][1] if "bin" in p or "py" in p]
    nodes._downloaded(" owner/pictures ")
    assert len(hub.asked) == 1  # it is there already
    for name in ("no owner", "../x/y", "a/b/c", "https://x/y"):
        with pytest.raises(StrettoError, match="expected owner/name"):
            nodes._downloaded(name)


def test_a_download_that_fails_is_told_and_taken_up_again(base, folders, monkeypatch):
    hub = Hub(folders["image"], fails=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in loading._OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StrettoError, match="owner/x cannot be downloaded: the line is down$"):
        nodes._downloaded("owner/x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StrettoError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        nodes._downloaded("owner/x")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.fails = False
    assert check_folder(nodes._downloaded("owner/x")[0]).absent


def test_pictures_come_in_one_form():
    from stretto.acceleration.hosts.diffusers_pipeline import pictures_of

    assert pictures_of(np.zeros((2, 3, 4, 5, 3))).shape == (6, 4, 5, 3)
    assert pictures_of([np.zeros((4, 5, 3))] * 2).dtype == torch.float32
    with pytest.raises(StrettoError, match="expected pictures or clips"):
        pictures_of(np.zeros((2, 3)))


@pytest.mark.parametrize("kind", FILES)
def test_quantizer_and_loader_take_folders_of_diffusers(base, folders, kind, tmp_path):
    """The network of a pipeline gives the quantized file, and the predictions, that ComfyUI's own file gives."""
    from stretto.acceleration.hosts import comfy_quantization
    from stretto.acceleration.quantization.quantizing import plan_file, write_file
    from stretto.nodes.load_quantized import files, path_of, stem_of

    def quantize(source, target):
        with (plan := plan_file(source)).checkpoint:
            return write_file(plan, target).path

    shutil.copytree(folders[kind], base / "mine")
    name = "diffusers: mine/transformer"
    assert name in files("diffusion_models") and stem_of(name) == "mine-transformer"
    made = [quantize(source, tmp_path / f"{n}.safetensors") for n, source in enumerate((FILES[kind][0], base / "mine"))]
    first, second = map(load_file, made)
    assert set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)
    network, report = comfy_quantization.load_diffusion_model(path_of("diffusion_models", name))
    known = comfy.sd.load_diffusion_model(str(FILES[kind][0]))
    theirs, ours = (each.model.diffusion_model.state_dict() for each in (network, known))
    assert set(theirs) == set(ours) and all(torch.equal(theirs[key].to(ours[key]), ours[key]) for key in ours)
    if kind == "video":
        assert "names of diffusers' Wan" in report.text()
        with pytest.raises(StrettoError, match="ComfyUI's own loader does not read; choose 'automatic'"):
            comfy_quantization.load_diffusion_model(str(base / "mine"), loader=comfy_quantization.CORE)
    shutil.copytree(base / "mine" / "transformer", base / "mine" / "transformer_2")
    with pytest.raises(StrettoError, match="transformer and transformer_2; name the folder of the one network"):
        quantize(base / "mine", tmp_path / "two.safetensors")


def test_a_pipeline_with_text_encoders_reads_words(tmp_path):
    """Saved by diffusers itself, shards included; loaded here; the same pictures from the same words."""
    import tokenizers
    import transformers

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "bus": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = pipeline_of("pixart")
    config = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    made.register_modules(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=transformers.T5EncoderModel(config).eval(),
    )
    made.save_pretrained(tmp_path / "words", max_shard_size="40KB")
    found = check_folder(tmp_path / "words")
    assert len(found.components["transformer"].headers) > 1 and found.components["text_encoder"].library == "transformers"
    link = Pipeline(loading.load_pipeline(found))
    sampled = [
        nodes.StrettoDiffusersSample.execute(each, prompt, "", 64, 64, 1, 3, 4.0, 1).result[0]
        for each, prompt in ((link, "a cat"), (Pipeline(made), "a cat"), (link, "a bus"))
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    held = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(link.residents.patchers["text_encoder"] is each for each in held)
