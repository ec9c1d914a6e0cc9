"""Profile and calibrate through the nodes, on tiny networks: what the preset promises was measured, and holds."""

import comfy.model_management
import comfy.utils
import folder_paths
import jsonschema
import pytest
import torch

from stretto.acceleration.caching.masks import parse_mask
from stretto.acceleration.caching.presets import load_preset
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request
from stretto.acceleration.quality import psnr
from stretto.acceleration.schemas import schema

from .tiny_models import LATENTS, conditioning, sample

STEPS = 10


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """ComfyUI's user and temporary folders, for this test alone."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "user" / "stretto" / "presets"


@pytest.fixture(scope="module")
def nodes():
    import asyncio

    import stretto

    extension = asyncio.run(stretto.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def profile(nodes, tiny, family="wan", **changes):
    inputs = {
        "model": tiny(family),
        "positive": conditioning(3, family),
        "negative": conditioning(4, family),
        "latent_image": {"samples": torch.zeros(1, *LATENTS[family])},
        "seed": 1,
        "steps": STEPS,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        **changes,
    }
    return nodes["StrettoProfile"].execute(**inputs).result


def calibrate(nodes, run, **changes):
    inputs = {
        "profile": run,
        "target": "PSNR at least (dB)",
        "value": 20.0,
        "forecaster": "line",
        "extra_seeds": 0,
        "probes": 2,
        "name": "mine",
        **changes,
    }
    return nodes["StrettoCalibrate"].execute(**inputs).result


class Decoder:
    """A VAE that shows the first three channels, eight times as large."""

    def decode(self, latent):
        pictures = torch.sigmoid(latent[:, :3]).movedim(1, -1)
        return pictures.repeat_interleave(8, dim=-3).repeat_interleave(8, dim=-2)


@pytest.fixture(scope="module")
def easy(nodes, tiny, tmp_path_factory):
    """One profile for many tests; its folders are of no interest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "temp_directory", str(tmp_path_factory.mktemp("temp")))
        return profile(nodes, tiny)


def test_the_profile_node_samples_plainly_and_draws(easy, tiny):
    run, picture, text, _ = easy
    assert torch.equal(run.latent, sample(tiny("wan"), "wan", steps=STEPS))
    assert picture.shape[0] == 1 and picture.shape[2:] == (960, 3) and 0 <= picture.min() < picture.max() <= 1
    assert "wan · euler, 10 steps" in text and "a skipped one" in text


@pytest.mark.parametrize("forecaster", ["fitted", "line"])
def test_a_quality_target_is_met_by_the_preset(nodes, easy, tiny, folders, forecaster):
    preset, picture, text = calibrate(nodes, easy[0], value=25.0, forecaster=forecaster)
    assert preset.method == {"fitted": "Fitted", "line": "Schedule"}[forecaster]
    saved = load_preset(folders / "mine.json")
    assert saved.to_json() == preset.to_json()
    jsonschema.validate(saved.to_json(), schema("preset"))
    figures = saved.provenance.measured
    assert figures["psnr"][0] >= 25.0 and figures["steps"] == STEPS and figures["seeds"] == [1]
    mask = parse_mask(saved.settings["mask"])
    assert not all(mask) and mask[:2] == (True, True) and mask[-1]
    # The preset as a cache gives exactly what was measured.
    plain = sample(tiny("wan"), "wan", steps=STEPS)
    settings = {"method": saved.method, **saved.settings}
    result = sample(host.request(tiny("wan"), Request("cache", settings)), "wan", steps=STEPS)
    assert psnr(result, plain) == pytest.approx(figures["psnr"][0], abs=1e-3)
    assert saved.settings["mask"] in text and "mine.json" in text and picture.shape[2:] == (960, 3)


def test_magcache_runs_with_the_recorded_curve(nodes, easy, tiny):
    numbers = ("Taylor", 3, 1, 0.05, 4, 5, True)
    (model,) = nodes["StrettoCache"].execute(tiny("wan"), *numbers, calibrated=easy[3]).result
    sample(model, "wan", steps=STEPS)
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["techniques"][0]["status"] == "active" and trace["techniques"][0]["reason"].startswith("MagCache: ")
    (model,) = nodes["StrettoCache"].execute(tiny("sd3"), *numbers, calibrated=easy[3]).result
    with pytest.raises(StrettoError, match="calibrated for wan, this model is sd3"):
        sample(model, "sd3", steps=STEPS)


def test_names_are_never_taken_twice(nodes, easy, folders):
    for _ in range(2):
        calibrate(nodes, easy[0], probes=0)
    assert sorted(path.name for path in folders.iterdir()) == ["mine-2.json", "mine.json"]
    calibrate(nodes, easy[0], probes=0, name="")
    assert (folders / "wan-wan-euler-10.json").is_file()


@pytest.mark.parametrize("name", ["../mine", "a/b", "con", ".hidden", "x" * 65, "ends."])
def test_a_name_that_is_no_file_name_fails_before_sampling(nodes, easy, name):
    before = len(host.TRACES.of_prompt(None))
    with pytest.raises(StrettoError, match="preset name"):
        calibrate(nodes, easy[0], name=name)
    assert len(host.TRACES.of_prompt(None)) == before


def test_extra_seeds_and_pictures(nodes, easy):
    preset, _, text = calibrate(
        nodes, easy[0], target="SSIM at least", value=0.3, extra_seeds=1, vae=Decoder(), forecaster="reuse"
    )
    figures = preset.provenance.measured
    assert len(figures["ssim"]) == len(figures["psnr"]) == 2 and figures["seeds"] == [1, 2]
    assert min(figures["ssim"]) >= 0.3 and figures["measured_on"] == "pictures" and "SSIM" in text
    assert preset.settings["order"] == 0


def test_a_speed_target(nodes, easy):
    preset, _, _ = calibrate(nodes, easy[0], target="speed at least (x)", value=1.01, probes=0)
    assert preset.provenance.measured["speed"] >= 1.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": 99.0}, "no mask keeps 99 dB: the best is .* dB with 9 of 10 steps computed"),
        ({"target": "speed at least (x)", "value": 19.0}, "no mask reaches 19x: the fastest measured is"),
        ({"target": "SSIM at least", "value": 0.9}, "connect a VAE"),
        ({"target": "SSIM at least", "value": 30.0}, "value for 'SSIM at least' is 30"),
        ({"target": "speed at least (x)", "value": 0.5}, "such as 1.8"),
        ({"profile": "text"}, "profile is a str; connect the output of Stretto Profile"),
    ],
)
def test_what_cannot_be_is_said_plainly(nodes, easy, folders, changes, words):
    with pytest.raises(StrettoError, match=words):
        calibrate(nodes, easy[0], **{"probes": 0, **changes})
    assert not folders.exists()


def test_noise_in_the_sampler_means_reuse(nodes, tiny):
    run, *_ = profile(nodes, tiny, sampler_name="euler_ancestral")
    preset, *_ = calibrate(nodes, run, value=5.0, probes=0)
    assert preset.settings["order"] == 0


def test_too_short_a_run_is_refused(nodes, tiny):
    run, *_ = profile(nodes, tiny, steps=4)
    with pytest.raises(StrettoError, match="4 steps has nothing to skip"):
        calibrate(nodes, run)


def test_progress_rises_to_the_end_and_an_interrupt_passes_through(nodes, easy, folders, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *rest, **named: seen.append((value, total)))
    calibrate(nodes, easy[0])
    assert [value for value, _ in seen] == sorted(value for value, _ in seen) and len({total for _, total in seen}) <= 2
    assert all(0 < value <= total for value, total in seen)

    def stop(value, *rest, **named):
        if value > 25:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    files = sorted(folders.iterdir())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(nodes, easy[0])
    assert sorted(folders.iterdir()) == files


def test_charts_cope_with_one_point_none_and_gaps(nodes):
    from stretto.nodes.charts import Chart, Series, draw_charts, ticks

    assert ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(3.0, 3.0) == [3.0]
    charts = [
        Chart("empty", "x", []),
        Chart("one", "x", [Series("a", [(1.0, 2.0)], "#ffffff", "ring")], x_line=3.0, y_line=2.0),
        Chart("gap", "x", [Series("a", [(0.0, 0.0), None, (2.0, 0.0)], "#ffffff")], zero=True),
    ]
    assert draw_charts("title", charts).size[0] == 960
