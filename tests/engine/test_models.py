"""Descriptors against hand-made networks: order, sizes, layouts, published names. Real networks: tests/hosts."""

from types import SimpleNamespace

import pytest
import torch

from stretto.acceleration.caching.presets import builtin_presets
from stretto.acceleration.models import FAMILIES, describe
from stretto.acceleration.models.flux import CHROMA, FLUX, modulated_image
from stretto.acceleration.models.hunyuan_video import HUNYUAN_VIDEO
from stretto.acceleration.models.qwen_image import QWEN_IMAGE
from stretto.acceleration.models.wan import WAN

BY_NAME = {family.family: family for family in FAMILIES}


def network(name="Network", **attributes):
    """Return an object of a class called ``name``; a number of blocks stands for a list of them."""
    made = {key: range(value) if key.endswith(("blocks", "layers")) and key != "vace_layers" else value
            for key, value in attributes.items()}  # fmt: skip
    return type(name, (SimpleNamespace,), {})(**made)


def test_families_and_networks_are_named_once():
    names = [name for family in FAMILIES for name in family.networks]
    assert len(names) == len(set(names)) and len(BY_NAME) == len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
def test_a_family_has_blocks_or_says_why_not(family):
    kinds = {kind for kind, _ in family.block_lists}
    assert bool(family.no_blocks) != family.has_blocks
    assert family.has_blocks == ("block_replace" in family.hooks)
    assert family.text_in_stream | family.text_after_image | family.txt_out <= kinds
    assert not family.text_in_stream & family.text_after_image
    assert family.has_blocks == (family.tea_input is not None)
    assert family.has_blocks or family.sites(network()) == ()


def test_describe_wants_the_exact_class():
    assert describe(network("Flux")) is FLUX
    assert describe(type("FluxWithMore", (type(network("Flux")),), {})()) is None
    assert describe(object()) is None


def test_sites_run_on_over_the_lists_and_indices_start_again():
    sites = FLUX.sites(network(double_blocks=2, single_blocks=2))
    assert [site.key for site in sites] == [
        ("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 1),
    ]  # fmt: skip
    assert [site.depth for site in sites] == [0, 1, 2, 3]
    assert [site.last for site in sites] == [False, False, False, True]


def test_without_single_blocks_the_last_double_block_is_the_last():
    sites = HUNYUAN_VIDEO.sites(network(double_blocks=3, single_blocks=0))
    assert sites[-1].key == ("double_block", 2) and sites[-1].last


def test_chroma_leaves_out_what_the_network_leaves_out():
    chroma = network(double_blocks=3, single_blocks=2, skip_mmdit=[1], skip_dit=[1])
    keys = [site.key for site in CHROMA.sites(chroma)]
    assert keys == [("double_block", 0), ("double_block", 2), ("single_block", 0)]


@pytest.mark.parametrize(
    ("family", "attributes", "shape", "grid"),
    [
        ("flux", {"patch_size": 2}, (1, 16, 6, 8), (1, 3, 4)),
        ("flux", {"patch_size": 2}, (1, 16, 5, 7), (1, 3, 4)),
        ("flux", {"patch_size": 1}, (1, 128, 3, 4), (1, 3, 4)),
        ("wan", {"patch_size": (1, 2, 2)}, (1, 16, 3, 6, 5), (3, 3, 3)),
        ("hunyuan_video", {"patch_size": [1, 1]}, (1, 64, 3, 4), (1, 3, 4)),
        ("qwen_image", {"patch_size": 2}, (1, 16, 1, 6, 7), (1, 3, 4)),
        ("ltxv", {"patchifier": SimpleNamespace(patch_size=(1, 1, 1))}, (1, 128, 3, 3, 4), (3, 3, 4)),
        ("cosmos_predict2", {"patch_temporal": 1, "patch_spatial": 2}, (1, 16, 2, 6, 8), (2, 3, 4)),
    ],
)
def test_grids(family, attributes, shape, grid):
    made = network(**attributes)
    assert BY_NAME[family].grid(made, shape) == grid
    assert BY_NAME[family].tokens(made, shape) == grid[0] * grid[1] * grid[2]


def test_where_image_tokens_stand():
    apart, joint = {"img": torch.zeros(1, 12, 4)}, {"img": torch.zeros(1, 17, 4)}
    assert FLUX.image_slice("double_block", apart, 5) == slice(0, 12)
    assert FLUX.image_slice("single_block", joint, 5) == slice(5, 17)
    assert HUNYUAN_VIDEO.image_slice("single_block", joint, 5) == slice(0, 12)


def test_newer_hosts_may_say_where_they_put_the_image():
    told = {"img": torch.zeros(1, 17, 4), "transformer_options": {"img_slice": [5, 17]}}
    assert HUNYUAN_VIDEO.image_slice("single_block", told, 5) == slice(5, 17)
    apart = {**told, "img": torch.zeros(1, 12, 4)}
    assert HUNYUAN_VIDEO.image_slice("double_block", apart, 5) == slice(0, 12)


def test_references_follow_or_precede_the_target():
    latent = (1, 16, 1, 6, 8)
    assert QWEN_IMAGE.target_slice(network(patch_size=2), latent, 12 + 4) == slice(0, 12)
    wan = {"patch_size": (1, 2, 2)}
    assert WAN.target_slice(network(**wan, ref_conv=None), latent, 12 + 4) == slice(0, 12)
    assert WAN.target_slice(network(**wan, ref_conv=object()), latent, 12 + 4) == slice(4, 16)
    assert HUNYUAN_VIDEO.target_slice(network(patch_size=[1, 2, 2]), latent, 12 + 4) == slice(4, 16)


def test_modulated_image_by_hand():
    """FLUX.2's modulation comes ready-made: n * (1 + scale) + shift; over ranges, each with its own row."""
    block = SimpleNamespace(img_norm1=lambda image: image, modulation=False)
    flux, image = network(), torch.full((1, 3, 2), 2.0)
    flux.double_blocks = [block]
    rows = SimpleNamespace(shift=torch.tensor([[[1.0], [10.0]]]), scale=torch.tensor([[[0.5], [1.0]]]))
    args = {"img": image, "vec": ((rows, None), None)}
    assert modulated_image(flux, args)[0, :, 0].tolist() == [4.0, 4.0, 4.0]
    ranges = {**args, "modulation_dims_img": [(0, 1, 0), (1, None, 1)]}
    assert modulated_image(flux, ranges)[0, :, 0].tolist() == [4.0, 14.0, 14.0]
    assert image.eq(2).all()


def flux(**changes):
    attributes = {"hidden_size": 3072, "double_blocks": 19, "single_blocks": 38, "patch_size": 2, "in_channels": 64,
                  "out_channels": 64, "params": SimpleNamespace(guidance_embed=True)}  # fmt: skip
    return network("Flux", **{**attributes, **changes})


def wan(name="WanModel", **changes):
    attributes = {"dim": 5120, "blocks": 40, "ffn_dim": 13824, "in_dim": 16, "out_dim": 16, "model_type": "t2v",
                  "ref_conv": None, "img_emb": None}  # fmt: skip
    return network(name, **{**attributes, **changes})


PUBLISHED = {
    ("flux", "dev"): flux(),
    ("flux", "schnell"): flux(params=SimpleNamespace(guidance_embed=False)),
    ("flux", "fill"): flux(in_channels=96 * 4),
    ("flux", "control"): flux(in_channels=32 * 4),
    ("flux", "2-dev"): flux(hidden_size=6144, double_blocks=8, single_blocks=48, patch_size=1, in_channels=128),
    ("chroma", "1"): network("Chroma", hidden_size=3072, double_blocks=19, single_blocks=38, in_channels=64),
    ("sd3", "3-medium"): network(
        "OpenAISignatureMMDITWrapper", hidden_size=1536, joint_blocks=24, x_block_self_attn_layers=0
    ),
    ("sd3", "3.5-medium"): network(
        "OpenAISignatureMMDITWrapper", hidden_size=1536, joint_blocks=24, x_block_self_attn_layers=13
    ),
    ("sd3", "3.5-large"): network(
        "OpenAISignatureMMDITWrapper", hidden_size=2432, joint_blocks=38, x_block_self_attn_layers=0
    ),
    ("sd3", "stretto-demo-image"): network(
        "OpenAISignatureMMDITWrapper", hidden_size=256, joint_blocks=4, x_block_self_attn_layers=0
    ),
    ("wan", "2.1-t2v-1.3b"): wan(dim=1536, blocks=30, ffn_dim=8960),
    ("wan", "2.1-t2v-14b"): wan(),
    ("wan", "2.1-i2v-14b"): wan(in_dim=36, model_type="i2v", img_emb=SimpleNamespace(emb_pos=None)),
    ("wan", "2.1-flf2v-14b"): wan(in_dim=36, model_type="i2v", img_emb=SimpleNamespace(emb_pos=1)),
    ("wan", "2.2-i2v-14b"): wan(in_dim=36),
    ("wan", "2.2-ti2v-5b"): wan(dim=3072, blocks=30, ffn_dim=14336, in_dim=48, out_dim=48),
    ("wan", "stretto-demo-video"): wan(dim=256, blocks=8, ffn_dim=1024),
    ("wan_vace", "2.1-1.3b"): wan("VaceWanModel", dim=1536, blocks=30, vace_layers=15),
    ("wan_vace", "2.1-14b"): wan("VaceWanModel", vace_layers=8),
    ("hunyuan_video", "1"): network(
        "HunyuanVideo", hidden_size=3072, double_blocks=20, single_blocks=40, patch_size=[1, 2, 2],
        in_channels=16, out_channels=16,
    ),
    ("hunyuan_video", "1.5"): network(
        "HunyuanVideo", hidden_size=2048, double_blocks=54, single_blocks=0, patch_size=[1, 1, 1],
        in_channels=65, out_channels=32,
    ),
    ("ltxv", "2b"): network("LTXVModel", inner_dim=2048, transformer_blocks=28),
    ("ltxv", "13b"): network("LTXVModel", inner_dim=4096, transformer_blocks=48),
    ("qwen_image", "20b"): network(
        "QwenImageTransformer2DModel", inner_dim=3072, transformer_blocks=60, in_channels=64
    ),
    ("auraflow", "6.8b"): network(
        "MMDiT", init_x_linear=SimpleNamespace(out_features=3072), double_layers=4, single_layers=32
    ),
    ("mochi", "1"): network("AsymmDiTJoint", hidden_size_x=3072, blocks=48),
    ("lumina2", "2"): network("NextDiT", dim=2304, layers=26),
    ("lumina2", "z-image"): network("NextDiT", dim=3840, layers=30),
    ("pixart", "sigma"): network(
        "PixArtMS", hidden_size=1152, blocks=28, micro_conditioning=False,
        y_embedder=SimpleNamespace(y_embedding=torch.zeros(300, 1)),
    ),
    ("cosmos_predict2", "t2i-2b"): network("MiniTrainDIT", model_channels=2048, blocks=28, in_channels=16),
    ("hidream", "i1"): network(
        "HiDreamImageTransformer2DModel", inner_dim=2560, double_stream_blocks=16, single_stream_blocks=32
    ),
}  # fmt: skip


#: Presets that no network's sizes can call for: weights alone, resolution or settings make the difference.
OUT_OF_REACH = {
    "flux": {"kontext"},
    "sd3": {"3.5"},
    "wan": {"2.1-i2v-480p", "2.1-i2v-720p", "2.2-t2v-14b"},
    "hidream": {"full", "dev", "fast"},
    "lumina2": {"comfyui-fit"},
}


@pytest.mark.parametrize("name", PUBLISHED, ids="-".join)
def test_published_sizes_have_their_names(name):
    made = PUBLISHED[name]
    assert (describe(made).family, describe(made).variant(made)) == name


def test_presets_spell_variants_as_descriptors_do():
    for preset in builtin_presets():
        variant = preset.variant.removesuffix("-retention")
        if preset.family in BY_NAME and variant not in OUT_OF_REACH.get(preset.family, ()):
            assert variant == "any" or (preset.family, variant) in PUBLISHED, preset


def test_one_block_more_or_another_branch_is_nobodys():
    assert describe(flux()).variant(flux(single_blocks=39)) == ""
    assert describe(wan()).variant(wan(ref_conv=object())) == ""


def test_flux_counts_channels_per_patch():
    assert FLUX.output_channels(flux(in_channels=96 * 4)) == 16
