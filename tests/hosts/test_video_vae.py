"""VAEs at changing frame rates: tiny random networks through ComfyUI's own VAE class."""

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taehv
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.frame_rate.schedule import CODINGS, FEATURES, PIXELS, FrameRateSchedule
from stretto.acceleration.hosts.comfy_video_vae import DynamicRateVAE, feature_obstacle, stride_of

MIXES = ((2, 2, 2, 2), (4, 4), (1, 1, 2, 4), (4, 2, 1, 1), (2, 1, 1, 4), (1,) * 8)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def randomised(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.ones_like(tensor) if "gamma" in name or ("norm" in name and name.endswith("weight"))
        else torch.randn(tensor.shape, generator=generator) * (0.4 / max(tensor[0].numel(), 1) ** 0.5)
        for name, tensor in network.state_dict().items()
    }  # fmt: skip


def wan():
    network = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True]
    )
    return comfy.sd.VAE(sd=randomised(network), dtype=torch.float32)


def tiny_video():
    network = comfy.taesd.taehv.TAEHV(latent_channels=16, show_progress_bar=False)
    vae = comfy.sd.VAE(sd=randomised(network), dtype=torch.float32)
    vae.first_stage_model.show_progress_bar = False
    return vae


def hunyuan():
    """HunyuanVideo's architecture, narrower than ComfyUI's loader would build it."""
    config = {
        "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "conv3d": True,
        "time_compress": 4,
    }  # fmt: skip
    network = AutoencoderKL(ddconfig=config, embed_dim=16)
    network.load_state_dict(randomised(network))
    vae = tiny_video()
    patcher = type(vae.patcher)(network.eval(), load_device=vae.patcher.load_device, offload_device=vae.patcher.offload_device)
    vae.first_stage_model, vae.patcher = network, patcher
    vae.process_input, vae.process_output = (lambda image: image * 2 - 1), (lambda image: (image + 1) / 2)
    return vae


MAKERS = {"wan": wan, "tiny_video": tiny_video, "hunyuan": hunyuan}


@pytest.fixture(scope="module")
def vaes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKERS[name]()
        return made[name]

    return get


def clip(frames: int, side: int = 16) -> torch.Tensor:
    return torch.rand(frames, side, side, 3, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("name", MAKERS)
def test_t18_rate_one_everywhere_is_the_stock_vae_to_the_bit(vaes, name, coding):
    vae, video = vaes(name), clip(17)
    schedule = FrameRateSchedule.full(17, coding=coding)
    dynamic = DynamicRateVAE(vae, schedule)
    stock = vae.encode(video)
    latents = dynamic.encode(video)
    assert torch.equal(latents, stock)
    assert torch.equal(dynamic.decode(latents), vae.decode(stock))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("rates", MIXES)
@pytest.mark.parametrize("name", MAKERS)
def test_t18_t19_t20_counts_are_exact(vaes, name, rates, coding):
    """T18 (Wan), T19 (Hunyuan), T20 (tiny video VAE): every mixture of rates gives back every frame."""
    dynamic = DynamicRateVAE(vaes(name), FrameRateSchedule(33, rates, coding=coding))
    latents = dynamic.encode(clip(33))
    assert latents.shape[:3] == (1, 16, 1 + len(rates))
    assert dynamic.decode(latents).shape == (1, 33, 16, 16, 3)


@pytest.mark.parametrize("coding", CODINGS)
def test_videos_whose_last_latent_is_not_full_come_back_whole(vaes, coding):
    dynamic = DynamicRateVAE(vaes("wan"), FrameRateSchedule(31, (2, 4, 1, 1), coding=coding))
    assert dynamic.decode(dynamic.encode(clip(31))).shape[1] == 31


def test_t18_later_segments_leave_earlier_frames_to_the_bit(vaes):
    schedule = FrameRateSchedule(33, (2, 1, 1, 4), coding=FEATURES)
    dynamic, video = DynamicRateVAE(vaes("wan"), schedule), clip(33)
    changed = video.clone()
    changed[17:] = 0.5
    first, second = dynamic.encode(video), dynamic.encode(changed)
    assert torch.equal(first[:, :, :4], second[:, :, :4]) and not torch.equal(first[:, :, 4], second[:, :, 4])
    latents = first.clone()
    latents[:, :, 4] += 1.0
    before, after = dynamic.decode(first)[0], dynamic.decode(latents)[0]
    assert torch.equal(before[:17], after[:17]) and not torch.equal(before[17:], after[17:])


@pytest.mark.parametrize("name", MAKERS)
def test_the_stock_vae_is_as_before(vaes, name):
    vae, video = vaes(name), clip(17)
    before = vae.decode(vae.encode(video))
    dynamic = DynamicRateVAE(vae, FrameRateSchedule(17, (4,), coding=FEATURES))
    dynamic.decode(dynamic.encode(video))
    assert torch.equal(vae.decode(vae.encode(video)), before)


@pytest.mark.parametrize("parallel", [False, True])
def test_t20_both_modes_of_the_tiny_vae_agree(vaes, parallel):
    vae, schedule = vaes("tiny_video"), FrameRateSchedule(17, (2, 1, 1), coding=FEATURES)
    dynamic, video = DynamicRateVAE(vae, schedule), clip(17)
    serial = dynamic.decode(dynamic.encode(video))
    vae.first_stage_model.parallel = parallel
    try:
        assert torch.allclose(dynamic.decode(dynamic.encode(video)), serial, atol=1e-5)
    finally:
        vae.first_stage_model.parallel = False


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_a_still_video_is_coded_alike_at_every_rate(vaes, name):
    still = clip(1, 16).expand(33, -1, -1, -1)
    latents = DynamicRateVAE(vaes(name), FrameRateSchedule(33, (1, 1, 2, 4), coding=FEATURES)).encode(still)
    full = vaes(name).encode(still)
    assert torch.allclose(latents[:, :, 4], full[:, :, 8], atol=2e-2)


@pytest.mark.parametrize("coding", CODINGS)
def test_g11_tiles_cut_space_and_never_time(vaes, coding):
    schedule = FrameRateSchedule(17, (2, 1, 1), coding=coding)
    dynamic, video = DynamicRateVAE(vaes("wan"), schedule), clip(17, 64)
    latents = dynamic.encode_tiled(video, tile_x=32, tile_y=32, overlap=8, tile_t=4, overlap_t=4)
    assert latents.shape[2] == 4
    assert dynamic.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1, tile_t=2).shape == (1, 17, 64, 64, 3)
    assert dynamic.legal_cuts() == (0, 1, 9, 13, 17)


def test_sizes_and_memory_follow_the_schedule(vaes):
    schedule = FrameRateSchedule(33, (2, 1, 1, 4), coding=FEATURES)
    vae = vaes("wan")
    dynamic = DynamicRateVAE(vae, schedule)
    assert [dynamic.upscale_ratio[0](n) for n in range(7)] == [0, 1, 9, 13, 17, 33, 37]
    assert [dynamic.downscale_ratio[0](n) for n in (1, 9, 17, 33)] == [1, 2, 4, 5]
    shape = (1, 16, 5, 8, 8)
    assert dynamic.memory_used_decode(shape, torch.float32) == 4 * vae.memory_used_decode(shape, torch.float32)
    assert dynamic.memory_used_encode((1, 3, 33, 64, 64), torch.float32) == 4 * vae.memory_used_encode(
        (1, 3, 33, 64, 64), torch.float32
    )


def test_refusals_name_the_reason(vaes):
    schedule = FrameRateSchedule(33, (4, 4))
    dynamic = DynamicRateVAE(vaes("wan"), schedule)
    with pytest.raises(StrettoError, match="33 frames"):
        dynamic.encode(clip(32))
    with pytest.raises(StrettoError, match="3 latent frames"):
        dynamic.decode(torch.zeros(1, 16, 9, 2, 2))
    with pytest.raises(StrettoError, match="8 frames a latent"):
        DynamicRateVAE(vaes("wan"), FrameRateSchedule(33, (4,), stride=8))

    class Pictures:
        latent_dim, upscale_ratio = 2, 8

    with pytest.raises(StrettoError, match="one by one"):
        stride_of(Pictures())
    assert feature_obstacle(vaes("wan")) is None


def test_networks_without_an_adapter_still_have_frames(vaes):
    class Foreign(torch.nn.Module):
        pass

    class Vae:
        first_stage_model = Foreign()

    assert "no adapter for Foreign" in feature_obstacle(Vae())
    assert PIXELS in CODINGS
