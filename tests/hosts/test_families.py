"""What descriptors say of a family is what its real network does: a tiny one of each, run through ComfyUI."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from stretto.acceleration.models import FAMILIES, describe

from . import tiny_models
from .tiny_models import CONFIGS, LATENTS, sample

#: Tiny network -> family.
EXPECTED = {
    "sd3": "sd3",
    "sd3.5": "sd3",
    "wan": "wan",
    "wan_i2v": "wan",
    "wan2.2_i2v": "wan",
    "wan2.2_5b": "wan",
    "wan_reference": "wan",
    "wan_phantom": "wan",
    "wan_vace": "wan_vace",
    "flux": "flux",
    "kontext": "flux",
    "flux_fill": "flux",
    "flux2": "flux",
    "chroma": "chroma",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_reference": "hunyuan_video",
    "hunyuan_i2v": "hunyuan_video",
    "hunyuan_video_1.5": "hunyuan_video",
    "hunyuan_image": "hunyuan_video",
    "ltxv": "ltxv",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "auraflow": "auraflow",
    "mochi": "mochi",
    "lumina2": "lumina2",
    "z_image": "lumina2",
    "pixart": "pixart",
    "cosmos_predict2": "cosmos_predict2",
    "hidream": "hidream",
}
HOOKLESS = ["wan_vace", "lumina2", "z_image", "pixart", "cosmos_predict2", "hidream"]
HOOKED = [name for name in EXPECTED if name not in HOOKLESS]
#: Image tokens of pictures beside the one that is sampled.
REFERENCES = {"kontext": 4 + 3, "qwen_image_edit": 4, "wan_reference": 6, "wan_phantom": 12, "hunyuan_reference": 6}
#: Text tokens of a block, where they are not the five of the conditioning.
TEXT = {"flux2": 512, "auraflow": 8 + 5, "hunyuan_video_1.5": 3 + 5}
#: Networks with blocks for text and image together, after others that keep them apart.
JOINING = ["flux", "kontext", "flux2", "chroma", "auraflow", "hunyuan_video", "hunyuan_reference", "hunyuan_image"]
#: Families that accept latents with odd sides.
PADDED = ["sd3", "wan", "flux", "chroma", "qwen_image", "auraflow"]
#: The module whose input is the tensor that TeaCache watches. Wan's is what a module gives.
TEA_READERS = {
    "sd3": lambda network: network.joint_blocks[0].x_block.attn.qkv,
    "flux": lambda network: network.double_blocks[0].img_attn.qkv,
    "chroma": lambda network: network.double_blocks[0].img_attn.qkv,
    "hunyuan_video": lambda network: network.double_blocks[0].img_attn.qkv,
    "ltxv": lambda network: network.transformer_blocks[0].attn1.to_q,
    "qwen_image": lambda network: network.transformer_blocks[0].attn.to_q,
    "auraflow": lambda network: network.double_layers[0].attn.w2q,
    "mochi": lambda network: network.blocks[0].attn.qkv_x,
}


@dataclass
class Visit:
    """One passage through a replaced block: what went in (copied), what came out."""

    site: Any
    args: dict
    image: torch.Tensor
    text: torch.Tensor | None
    wrote: bool
    out: dict


@dataclass
class Watched:
    """A tiny model whose blocks are all replaced, by what they were, and watched."""

    model: Any
    visits: list[Visit] = field(default_factory=list)
    lookups: list = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def network(self):
        return self.model.model.diffusion_model

    @property
    def family(self):
        return describe(self.network)

    @property
    def sites(self):
        return self.family.sites(self.network)


class Lookups(dict):
    """Replacements that remember which keys were asked for."""

    def __init__(self, entries, log):
        super().__init__(entries)
        self.log = log

    def __contains__(self, key):
        self.log.append(key)
        return super().__contains__(key)


@contextmanager
def watch_network(network, watched):
    """Record raw outputs, and the hook keys that the forward looks up."""

    def before(module, args, kwargs):
        options = dict(kwargs["transformer_options"])
        replaces = options["patches_replace"] = dict(options.get("patches_replace", {}))
        replaces["dit"] = Lookups(replaces.get("dit", {}), watched.lookups)
        return args, {**kwargs, "transformer_options": options}

    handles = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(lambda module, args, out: watched.outputs.append(out.clone())),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_of(tensor):
    return tensor.clone() if torch.is_tensor(tensor) else None


def recorder(watched, site):
    """Return an identity replacement that records the passage."""

    def patch(args, extra):
        image, text = args["img"].clone(), copy_of(args.get("txt"))
        given = args["img"], args.get("txt")
        out = extra["original_block"](args)
        wrote = not torch.equal(given[0], image) or (text is not None and not torch.equal(given[1], text))
        kept = {name: copy_of(tensor) for name, tensor in out.items()}
        watched.visits.append(Visit(site, args, image, text, wrote, kept))
        return out

    return patch


def run(model, name, *, replace=None, steps=1, **options):
    """Sample without guidance and return what was seen. ``replace(watched, site)`` makes each site's replacement."""
    watched = Watched(model)
    if replace is not None:
        for site in watched.sites:
            patch = replace(watched, site)
            if patch is not None:
                model.set_model_patch_replace(patch, "dit", *site.key)
    with torch.no_grad(), watch_network(watched.network, watched):
        sample(model, name, steps=steps, cfg=1.0, **options)
    return watched


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and wait for it when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def seen(tiny):
    """Return ``seen(name)``: two watched network calls of a family, run once."""
    made = {}

    def get(name) -> Watched:
        if name not in made:
            made[name] = run(tiny(name), name, replace=recorder, steps=2)
        return made[name]

    return get


def test_every_family_has_a_tiny_network():
    assert set(EXPECTED) == set(CONFIGS) == set(LATENTS)
    assert set(EXPECTED.values()) == {family.family for family in FAMILIES}


@pytest.mark.parametrize("name", EXPECTED)
def test_found_by_class_and_honest_about_blocks(tiny, name):
    network = tiny(name).model.diffusion_model
    family = describe(network)
    assert family.family == EXPECTED[name]
    assert family.has_blocks == bool(family.sites(network)) == (name in HOOKED)
    assert bool(family.no_blocks) != family.has_blocks
    assert family.variant(network) == ""  # nobody published weights of these sizes


@pytest.mark.parametrize("name", HOOKED)
def test_sites_are_the_keys_that_the_network_asks_for_in_its_order(seen, name):
    watched = seen(name)
    keys = [site.key for site in watched.sites]
    assert len(watched.outputs) == 2
    assert watched.lookups == keys * 2
    assert [visit.site.key for visit in watched.visits] == keys * 2
    assert [site.last for site in watched.sites] == [False] * (len(keys) - 1) + [True]


@pytest.mark.parametrize("name", HOOKED)
def test_replacing_every_block_by_itself_changes_no_bit(tiny, seen, name):
    plain = run(tiny(name), name, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.outputs, seen(name).outputs, strict=True))
    assert plain.outputs[0].isfinite().all() and plain.outputs[0].std() > 0.05


@pytest.mark.parametrize("name", HOOKED)
def test_streams_hold_what_the_descriptor_says(seen, name):
    watched = seen(name)
    network, family = watched.network, watched.family
    tokens = family.tokens(network, (1, *LATENTS[name])) + REFERENCES.get(name, 0)
    text = TEXT.get(name, 5)
    joint = family.text_in_stream | family.text_after_image
    for visit in watched.visits:
        kind = visit.site.kind
        assert visit.image.shape == (1, tokens + (text if kind in joint else 0), family.hidden_size(network))
        part = family.image_slice(kind, visit.args, text)
        assert part.stop - part.start == tokens
        assert (kind in family.txt_out) == ("txt" in visit.out)
        assert kind not in family.txt_out or visit.text.shape[1] == text


@pytest.mark.parametrize("name", JOINING)
def test_text_stands_where_it_should_where_the_streams_join(seen, name):
    watched = seen(name)
    first = next(i for i, visit in enumerate(watched.visits) if visit.site.kind == "single_block")
    apart, joined = watched.visits[first - 1], watched.visits[first]
    text = apart.text.shape[1]
    part = watched.family.image_slice("single_block", joined.args, text)
    assert torch.equal(joined.image[:, part], apart.out["img"])
    rest = torch.cat((joined.image[:, : part.start], joined.image[:, part.stop :]), dim=1)
    assert torch.equal(rest, apart.out["txt"])
    assert (part.start == text) == ("single_block" in watched.family.text_in_stream)


@pytest.mark.parametrize("name", HOOKED)
def test_the_target_is_where_the_latent_goes_in(tiny, seen, name):
    """Of the first block's input, another noise changes the target's tokens and no others."""
    one, two = seen(name), run(tiny(name), name, replace=recorder, seed=2)
    changed = (one.visits[0].image != two.visits[0].image).any(-1)[0]
    image_tokens = changed.shape[0]
    part = one.family.target_slice(one.network, (1, *LATENTS[name]), image_tokens)
    expected = torch.zeros(image_tokens, dtype=torch.bool)
    expected[part] = True
    assert part.stop - part.start == one.family.tokens(one.network, (1, *LATENTS[name]))
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("name", HOOKED)
def test_only_the_targets_tokens_of_the_last_block_reach_the_head(tiny, name):
    """Everything else of its output may be anything: text, references, and what went before."""
    shape = (1, *LATENTS[name])

    def output(value, seed):
        generator = torch.Generator().manual_seed(seed)
        text = 0

        def noise(tensor):
            return None if tensor is None else torch.randn(tensor.shape, generator=generator)

        def replace(watched, site):
            def patch(args, extra):
                nonlocal text
                text = args["txt"].shape[1] if "txt" in args else text
                out = extra["original_block"](args)
                if not site.last:
                    return out
                image = noise(out["img"])
                part = watched.family.image_slice(site.kind, args, text)
                target = image[:, part][:, watched.family.target_slice(watched.network, shape, part.stop - part.start)]
                target.copy_(torch.linspace(-1, value, target.numel()).reshape(target.shape))
                return {"img": image, "txt": noise(out.get("txt"))}

            return patch

        return run(tiny(name), name, replace=replace, seed=seed).outputs[0]

    first, second, other = output(1.0, 1), output(1.0, 2), output(2.0, 2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", HOOKED)
def test_in_place_means_that_a_block_writes_into_its_input(seen, name):
    watched = seen(name)
    assert any(visit.wrote for visit in watched.visits) == watched.family.in_place


@pytest.mark.parametrize("name", HOOKED)
def test_tea_input_is_what_the_first_block_makes_of_its_input(tiny, name):
    model = tiny(name)
    network, family = model.model.diffusion_model, describe(model.model.diffusion_model)
    read, computed = [], []

    def first_only(watched, site):
        def patch(args, extra):
            before = args["img"].clone()
            computed.append(family.tea_input(network, args))
            assert torch.equal(before, args["img"])
            return extra["original_block"](args)

        return patch if site.depth == 0 else None

    if family.family == "wan":
        handle = network.time_projection.register_forward_hook(lambda module, args, out: read.append(out.clone()))
    else:
        reader = TEA_READERS[family.family](network)
        handle = reader.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    try:
        run(model, name, replace=first_only, steps=2)
    finally:
        handle.remove()
    assert len(read) == len(computed) == 2
    for theirs, ours in zip(read, computed, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-6, atol=1e-6)
    assert not torch.equal(computed[0], computed[1])


@pytest.mark.parametrize("name", EXPECTED)
def test_output_channels_are_those_of_the_prediction(tiny, name):
    watched = run(tiny(name), name)
    assert watched.outputs[0].shape == (1, *LATENTS[name])
    assert watched.family.output_channels(watched.network) == LATENTS[name][0]


@pytest.mark.parametrize("name", EXPECTED)
def test_hooks_are_those_that_comfyui_calls(tiny, name):
    model = tiny(name)
    called = set()

    def wrapper(executor, *args, **kwargs):
        called.add("diffusion_model")
        return executor(*args, **kwargs)

    def attention(function, *args, **kwargs):
        called.add("attention_override")
        return function(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    model.model_options["transformer_options"]["optimized_attention_override"] = attention
    watched = run(model, name)
    if watched.lookups and watched.family.has_blocks:
        called.add("block_replace")
    assert watched.family.hooks == called


@pytest.mark.parametrize("name", PADDED)
def test_odd_sides_are_padded_up(tiny, name):
    shape = (*LATENTS[name][:-2], 5, 7)
    watched = run(tiny(name), name, replace=recorder, shape=shape)
    tokens = watched.visits[0].image.shape[1]
    assert tokens == watched.family.tokens(watched.network, (1, *shape)) == 12 * prod(shape[1:-2])


@pytest.mark.parametrize("name", HOOKLESS)
def test_hookless_blocks_are_really_out_of_reach(tiny, name):
    """No key is looked up; or, in VACE, its own blocks run whatever replaces Wan's."""
    model = tiny(name)
    network = model.model.diffusion_model
    if name != "wan_vace":
        assert not run(model, name).lookups
        return
    ran = []
    handles = [block.register_forward_hook(lambda *args: ran.append(1)) for block in network.vace_blocks]
    for index in range(len(network.blocks)):
        model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", index)
    try:
        watched = run(model, name)
    finally:
        for handle in handles:
            handle.remove()
    assert len(watched.lookups) == len(network.blocks) and len(ran) == len(network.vace_blocks)


@pytest.mark.parametrize("name", HOOKLESS)
def test_hookless_families_have_the_tokens_and_width_they_claim(tiny, name):
    model = tiny(name)
    network = model.model.diffusion_model
    family, shapes = describe(network), []

    def shape_of(module, args, kwargs):
        shapes.append(tuple((args[0] if args else kwargs["image_tokens"]).shape))

    blocks = next(
        getattr(network, name) for name in ("double_stream_blocks", "layers", "blocks") if hasattr(network, name)
    )
    handle = blocks[0].register_forward_pre_hook(shape_of, with_kwargs=True)
    try:
        run(model, name)
    finally:
        handle.remove()
    tokens, width = family.tokens(network, (1, *LATENTS[name])), family.hidden_size(network)
    shape = shapes[0]
    if name == "cosmos_predict2":
        assert shape == (1, *family.grid(network, (1, *LATENTS[name])), width)
    elif name == "z_image":
        assert shape == (1, 32 + 32, width)  # text and image, each padded up to a multiple of 32
        assert tokens == 12
    else:
        assert shape == (1, tokens + (5 if name == "lumina2" else 0), width)


def test_blocks_that_chroma_leaves_out_are_no_sites(tiny, monkeypatch):
    model = tiny("chroma")
    network = model.model.diffusion_model
    monkeypatch.setattr(network, "skip_mmdit", [0])
    monkeypatch.setattr(network, "skip_dit", [1])
    watched = run(model, "chroma", replace=recorder)
    assert [site.key for site in watched.sites] == [("double_block", 1), ("single_block", 0)] == watched.lookups
    assert watched.sites[-1].last and watched.visits[-1].site.last


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in tiny_models.ONE_ROW])
def test_runs_with_guidance_and_a_batch(tiny, name):
    with torch.no_grad():
        result = sample(tiny(name), name, steps=1, cfg=4.0, batch=2)
    assert result.shape == (2, *LATENTS[name]) and result.isfinite().all()
