"""VGDFR through ComfyUI: two passes, gathered noise and conditioning, original positions. Tiny random networks."""

from dataclasses import replace

import comfy.sample
import comfy.samplers
import pytest
import torch

from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.frame_rate.positions import global_table, ids_of
from stretto.acceleration.frame_rate.schedule import FrameRateSchedule, schedule_of_latent, with_schedule
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_frame_rate import (
    DynamicSettings,
    GatheredNoise,
    prepare_second_pass,
    run_obstacle,
    sample_dynamic,
)
from stretto.acceleration.hosts.comfy_frame_rate_probe import probe_layers
from stretto.acceleration.hosts.comfy_sampling import SamplingJob
from stretto.acceleration.hosts.comfy_video_vae import DynamicRateVAE
from stretto.acceleration.plan import Request

from .test_video_vae import wan as wan_vae
from .tiny_models import conditioning

SCHEDULE = FrameRateSchedule(33, (2, 1, 1, 4))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae():
    return wan_vae()


@pytest.fixture(scope="module")
def calm_vae(vae):
    """A VAE that always decodes a video which is still but for its last four frames."""
    pixels = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(1)).expand(33, -1, -1, -1).clone()
    pixels[29:] = torch.rand(4, 16, 16, 3, generator=torch.Generator().manual_seed(2))

    class Calm:
        def __getattr__(self, name):
            return getattr(vae, name)

        def decode(self, samples):
            return pixels[None]

    return Calm()


def job(tiny, family="wan", sampler="euler", latents=9, cfg=5.0, steps=6, **latent):
    samples = latent.pop("samples", torch.zeros(1, 16, latents, 2, 2))
    return SamplingJob(
        tiny(family), conditioning(3, family), conditioning(4, family), {"samples": samples, **latent}, 1, steps, cfg,
        sampler, "simple",
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_all_frames_kept_is_plain_sampling_to_the_bit(tiny, vae, sampler):
    wanted = job(tiny, sampler=sampler)
    latent, seconds = sample_dynamic(wanted, vae, DynamicSettings(1.0))
    assert torch.equal(latent["samples"], wanted()) and seconds == {}
    assert schedule_of_latent(latent).trivial


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_a_video_that_is_wild_everywhere_goes_on_to_the_bit(tiny, vae, family):
    """Engaged: two passes and a middle, but nothing to drop."""
    wanted = job(tiny, family)
    latent, seconds = sample_dynamic(wanted, vae, DynamicSettings(0.999, after=0.5))
    assert torch.equal(latent["samples"], wanted())
    assert set(seconds) == {"first", "decode", "choose", "second"}


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_the_short_video_decodes_to_every_frame(tiny, vae, family):
    latent, seconds = sample_dynamic(job(tiny, family), vae, DynamicSettings(0.6))
    schedule = schedule_of_latent(latent)
    assert latent["samples"].shape == (1, 16, 5, 2, 2) and schedule.frames == 33
    assert DynamicRateVAE(vae, schedule).decode(latent["samples"]).shape[1] == 33
    assert set(seconds) == {"first", "decode", "choose", "encode", "second"}


def test_latents_go_where_the_coming_video_moves(tiny, calm_vae):
    latent, _ = sample_dynamic(job(tiny), calm_vae, DynamicSettings(0.5))
    schedule = schedule_of_latent(latent)
    assert schedule.rates[-1] == 1 and max(schedule.rates) > 1


def starts_of(tiny, vae, monkeypatch, fresh):
    """Where the two passes start: [(x, sigmas)], and the schedule."""
    euler, found = comfy.samplers.sampler_object("euler").sampler_function, []

    def sample_euler(model, x, sigmas, **kwargs):
        found.append((x.clone(), sigmas))
        return euler(model, x, sigmas, **kwargs)

    sampler = comfy.samplers.KSAMPLER(sample_euler)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers, "sampler_object", lambda name: sampler)
        latent, _ = sample_dynamic(job(tiny), vae, DynamicSettings(0.5, fresh=fresh))
    return found, schedule_of_latent(latent)


def test_untouched_latents_go_on_from_where_they_are(tiny, calm_vae, monkeypatch):
    (_, (on, _)), schedule = starts_of(tiny, calm_vae, monkeypatch, False)
    (_, (anew, _)), _ = starts_of(tiny, calm_vae, monkeypatch, True)
    kept = [i for i, rate in enumerate((1, *schedule.rates)) if rate == 1]
    merged = [i for i in range(schedule.latents) if i not in kept]
    assert merged and torch.equal(on[:, :, merged], anew[:, :, merged])
    assert not torch.equal(on[:, :, kept], anew[:, :, kept])


def test_t21_noise_is_the_full_seeds_rows(tiny, calm_vae):
    class Noise:
        seed = 5

        def generate_noise(self, latent):
            return comfy.sample.prepare_noise(latent["samples"], self.seed)

    short = with_schedule({"samples": torch.zeros(1, 16, 5, 2, 2)}, SCHEDULE)
    full = Noise().generate_noise({"samples": torch.zeros(1, 16, 9, 2, 2)})
    assert torch.equal(GatheredNoise(Noise(), SCHEDULE).generate_noise(short), full[:, :, list(SCHEDULE.kept)])
    with pytest.raises(StrettoError, match="5 latent frames"):
        GatheredNoise(Noise(), SCHEDULE).generate_noise({"samples": torch.zeros(1, 16, 9, 2, 2)})


def test_t21_the_second_pass_starts_from_noise_and_the_short_video(tiny, calm_vae, monkeypatch):
    """As published: sigma * noise + (1 - sigma) * latent."""
    (_, (x, sigmas)), schedule = starts_of(tiny, calm_vae, monkeypatch, True)
    short = DynamicRateVAE(calm_vae, schedule).encode(calm_vae.decode(None)[0])
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 9, 2, 2), 1)[:, :, list(schedule.kept)]
    clean = tiny("wan").model.process_latent_in(short)
    assert torch.allclose(x, sigmas[0] * noise + (1 - sigmas[0]) * clean, atol=1e-5)


def test_t23_all_kept_is_the_stock_table(tiny):
    network = tiny("wan").model.diffusion_model
    stock = network.rope_encode(5, 4, 6, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(global_table(network, stock, (5, 2, 3), (0, 1, 2, 3, 4)), stock)


def test_t23_kept_rows_are_those_of_the_full_table(tiny):
    network = tiny("wan").model.diffusion_model
    full = network.rope_encode(9, 4, 6, device=torch.device("cpu"), dtype=torch.float32)
    short = network.rope_encode(5, 4, 6, device=torch.device("cpu"), dtype=torch.float32)
    found = global_table(network, short, (5, 2, 3), SCHEDULE.kept)
    wanted = full.unflatten(1, (9, 6))[:, list(SCHEDULE.kept)].flatten(1, 2)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_t23_a_table_that_somebody_changed_is_left_alone(tiny):
    network = tiny("wan").model.diffusion_model
    table = network.rope_encode(5, 4, 6, device=torch.device("cpu"), dtype=torch.float32) + 0.1
    assert global_table(network, table, (5, 2, 3), SCHEDULE.kept) is None
    assert ids_of(torch.arange(5.0), (5, 2, 3)).shape == (1, 30, 3)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_positions_reach_the_layers_that_are_named(tiny, family):
    def run(layers):
        model = host.request(tiny(family), Request("frame_rate", {"schedule": SCHEDULE.to_json(), "layers": layers}))
        noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 5, 4, 4), 1)
        return comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", conditioning(3, family), conditioning(4, family),
            torch.zeros_like(noise), disable_pbar=True, seed=1,
        )  # fmt: skip

    near, first, every = run([]), run([0]), run([0, 1, 2])
    assert not torch.equal(near, first) and not torch.equal(first, every)


def test_all_layers_at_the_positions_of_a_full_video_change_nothing(tiny):
    schedule = FrameRateSchedule.full(17)
    model = host.request(tiny("wan"), Request("frame_rate", {"schedule": schedule.to_json(), "layers": [0, 1, 2]}))
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 5, 4, 4), 1)
    runs = [
        comfy.sample.sample(
            m, noise, 2, 1.0, "euler", "simple", conditioning(3), conditioning(4), torch.zeros_like(noise),
            disable_pbar=True, seed=1,
        )
        for m in (model, tiny("wan"))
    ]  # fmt: skip
    assert torch.equal(*runs)


def test_a_model_for_another_length_is_refused(tiny):
    model = host.request(tiny("wan"), Request("frame_rate", {"schedule": SCHEDULE.to_json(), "layers": "auto"}))
    noise = torch.zeros(1, 16, 9, 4, 4)
    with pytest.raises(StrettoError, match="prepared for 5 latent frames"):
        comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", conditioning(3), conditioning(4), noise, seed=1)


def test_two_schedules_on_one_model_are_refused(tiny):
    wanted = Request("frame_rate", {"schedule": SCHEDULE.to_json(), "layers": "auto"})
    with pytest.raises(ConflictError):
        host.request(host.request(tiny("wan"), wanted), wanted)


def test_it_composes_with_a_cache(tiny, vae):
    wanted = job(tiny, steps=10)
    cached = host.request(wanted.model, Request("cache", {"method": "EasyCache"}))
    latent, _ = sample_dynamic(replace(wanted, model=cached), vae, DynamicSettings(0.6, layers=[0, 2]))
    assert latent["samples"].shape[2] == 5


def image_to_video(given):
    (tokens, options), = conditioning(3, "wan_i2v")
    mask = torch.ones(1, 4, 9, 2, 2)
    mask[:, :, list(given)] = 0
    return [[tokens, {**options, "concat_latent_image": torch.zeros(1, 16, 9, 2, 2), "concat_mask": mask}]]


@pytest.mark.parametrize("given", [(0,), (0, 8)])
def test_g12_image_to_video_keeps_what_is_given(tiny, calm_vae, given):
    wanted = replace(job(tiny, "wan2.2_i2v"), positive=image_to_video(given), negative=image_to_video(given))
    latent, _ = sample_dynamic(wanted, calm_vae, DynamicSettings(0.5))
    schedule = schedule_of_latent(latent)
    rates = (1, *schedule.rates)
    assert all(rates[schedule.owner[place]] == 1 for place in given) and not schedule.trivial


def test_g12_refusals_name_the_reason(tiny, vae):
    wanted = job(tiny)
    model = wanted.model.clone()
    model.model_options["context_handler"] = object()
    assert "context windows" in run_obstacle(model, wanted.positive, wanted.negative, wanted.latent)
    batch = {"samples": torch.zeros(2, 16, 9, 2, 2)}
    assert "2 videos" in run_obstacle(wanted.model, wanted.positive, wanted.negative, batch)
    picture = {"samples": torch.zeros(1, 16, 2, 2)}
    assert "not a video" in run_obstacle(wanted.model, wanted.positive, wanted.negative, picture)
    with pytest.raises(StrettoError, match="euler"):
        sample_dynamic(job(tiny, sampler="ddim"), vae, DynamicSettings(0.6))
    with pytest.raises(StrettoError, match="dpm_adaptive picks its own noise levels; use euler"):
        sample_dynamic(job(tiny, sampler="dpm_adaptive"), vae, DynamicSettings(0.6))
    with pytest.raises(StrettoError, match="two"):
        sample_dynamic(job(tiny, steps=1), vae, DynamicSettings(0.6))


def test_g12_old_lengths_are_refused_and_never_filled_up(tiny, vae):
    positive = image_to_video((0,))
    positive[0][1]["concat_latent_image"] = torch.zeros(1, 16, 7, 2, 2)
    latent = {"samples": torch.zeros(1, 16, 9, 2, 2)}
    with pytest.raises(StrettoError, match="7 latent frames and the video has 9"):
        prepare_second_pass(tiny("wan2.2_i2v"), vae, positive, positive, latent, DynamicSettings(0.6))


def test_inpainting_masks_are_gathered(tiny, calm_vae):
    mask = torch.ones(1, 1, 9, 2, 2)
    mask[:, :, 3] = 0
    latent, _ = sample_dynamic(job(tiny, noise_mask=mask), calm_vae, DynamicSettings(0.6))
    schedule = schedule_of_latent(latent)
    assert latent["noise_mask"].shape[2] == schedule.latents
    assert (1, *schedule.rates)[schedule.owner[3]] == 1


@pytest.mark.parametrize("name, value", [("ratio", 0.0), ("ratio", 1.5), ("after", 1.0), ("after", -0.1)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(StrettoError, match=name):
        DynamicSettings(**{name: value})


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_the_probe_asks_every_layer(tiny, family):
    layers, helps = probe_layers(job(tiny, family, steps=4))
    assert len(helps) == (3 if family == "wan" else 4)
    assert all(helps[layer] == max(helps) > 0 for layer in layers) and len(layers) <= 1


def test_the_probe_refuses_what_it_cannot_shorten(tiny):
    with pytest.raises(StrettoError, match="5 latent frames"):
        probe_layers(job(tiny, latents=3))
