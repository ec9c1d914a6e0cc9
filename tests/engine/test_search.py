"""The search for a mask, on a small flow integrated by hand: targets are met by what was measured."""

import numpy as np
import pytest
import torch

from stretto.acceleration.caching.calibration import mask_error
from stretto.acceleration.caching.fit_search import FitPrediction
from stretto.acceleration.caching.fitting import FittedWeights, FittingSampler, PlainSampler
from stretto.acceleration.caching.magnitude import flow_sigmas
from stretto.acceleration.caching.masks import parse_mask, strip
from stretto.acceleration.caching.preset_files import checked_name, save_new
from stretto.acceleration.caching.presets import Preset, Provenance, load_preset
from stretto.acceleration.caching.profile import Profile
from stretto.acceleration.caching.search import MOST_SKIPS, PSNR, SPEED, SSIM, Run, Search, predicted_quality
from stretto.acceleration.errors import StrettoError

from .toy_flow import GaussianMixtureFlow, euler

STEPS = 16
SIGMAS = flow_sigmas(STEPS, 3.0)


class Toy:
    """Euler's method on an exact flow with a cache over the velocity; seconds are counted, not measured."""

    def __init__(self, rho=0.1, components=6):
        self.rho, self.asked, self.features = rho, [], []
        self.flow = GaussianMixtureFlow(components=components)

    def __call__(self, settings, seed):
        mask = None if settings is None else parse_mask(settings["mask"])
        self.asked.append((settings, seed))
        noise = np.random.default_rng(seed).normal(size=(4, 64))
        self.features = []
        if settings is not None and settings["method"] == "Fitted":
            result = self.with_weights(settings, noise)
        else:
            result = euler(self.flow, noise, SIGMAS, mask, "newton", self.features, order=(settings or {}).get("order", 0))
        computed = STEPS if mask is None else sum(mask)
        return Run(torch.from_numpy(result), computed + self.rho * (STEPS - computed))

    def denoise(self, x, sigma):
        level = float(sigma[0])
        return x - level * torch.from_numpy(self.flow.velocity(x.numpy(), level))

    def with_weights(self, settings, x):
        fitted, history = FittedWeights.from_settings(*(settings[name] for name in ("mask", "weights", "sigmas"))), []
        for step, computed in enumerate(fitted.mask):
            if computed:
                velocity = self.flow.velocity(x, SIGMAS[step])
                history = [(step, velocity), *history][: fitted.depth]
            else:
                weights = fitted([at for at, _ in history], step)
                velocity = sum(weight * snapshot for weight, (_, snapshot) in zip(weights, history))
            x = x + (SIGMAS[step + 1] - SIGMAS[step]) * velocity
        return x


class ToyFitter:
    """Fits to the toy's first seed."""

    def __init__(self, toy):
        self.runs = 0
        self.toy, self.plain, self.noise = toy, PlainSampler(), torch.from_numpy(np.random.default_rng(0).normal(size=(4, 64)))

    def prediction(self):
        self.runs += 1
        self.plain(self.toy.denoise, self.noise, torch.tensor(SIGMAS))
        return FitPrediction.of(self.plain.states, SIGMAS)

    def fit(self, mask):
        self.runs += 1
        sampler = FittingSampler(mask, self.plain.states)
        sampler(self.toy.denoise, self.noise, torch.tensor(SIGMAS))
        return FittedWeights(mask, sampler.weights, SIGMAS)


@pytest.fixture
def toy():
    return Toy()


def velocity_profile(toy):
    toy(None, 0)
    features = np.stack([feature.flatten() for feature in toy.features])
    toy.asked.clear()
    return Profile(SIGMAS, range(STEPS), features, np.log(np.linalg.norm(features, axis=1)), 1.0, toy.rho)


def search(toy, **options):
    return Search(velocity_profile(toy), **{"run": toy, "seeds": 2, "fitter": ToyFitter(toy), **options})


@pytest.mark.parametrize("forecaster", ["fitted", "line", "reuse"])
def test_a_quality_is_met_and_a_bolder_mask_was_tried(toy, forecaster):
    found = search(toy, forecaster=forecaster)
    choice = found.choose(PSNR, 45.0)
    assert choice.measured.judged(PSNR) >= 45.0 and not all(choice.measured.mask)
    assert choice.measured.mask[:2] == (True, True) and choice.measured.mask[-1]
    bolder = [m for m in choice.tried if sum(m.mask) < sum(choice.measured.mask)]
    assert all(m.judged(PSNR) < 45.0 for m in bolder) and bolder
    fits = len(choice.tried) + 1 if forecaster == "fitted" else 0
    assert fits == 0 or found.fitter.runs == fits
    assert choice.runs == len(toy.asked) + fits <= found.expected_runs() + 2
    assert len(choice.measured.psnr) == 2 and {seed for _, seed in toy.asked} == {0, 1}


def test_fitted_forecasts_skip_more_than_lines_at_one_quality():
    """On seeds that nothing was fitted to; of one Gaussian, whose runs are alike. (Modes that seeds fall into differ.)"""
    toy = Toy(components=1)
    fitted, line = (search(toy, forecaster=name, seeds=3).choose(PSNR, 70.0) for name in ("fitted", "line"))
    assert sum(fitted.measured.mask) < sum(line.measured.mask)
    assert fitted.settings["method"] == "Fitted" and line.settings["method"] == "Schedule"


def test_probes_turn_predictions_into_units_of_the_result(toy):
    """With measured amplification the predicted error of a mask bounds the real one, and not by much."""
    found = search(toy, forecaster="reuse", probes=8)
    choice = found.choose(PSNR, 40.0)
    plain = toy(None, 0).picture
    for measured in choice.tried:
        real = float((toy({"method": "Schedule", "mask": strip(measured.mask), "order": 0}, 0).picture - plain).norm())
        predicted = mask_error(choice.profile, measured.mask)
        assert 0.5 * real < predicted < 8 * real
    assert choice.profile.amplification is not None and search(toy).profile.amplification is None


def test_a_speed_is_met_by_the_most_careful_mask(toy):
    choice = search(toy).choose(SPEED, 1.7)
    assert choice.measured.judged(SPEED) >= 1.7
    assert all(m.judged(SPEED) < 1.7 for m in choice.tried if sum(m.mask) > sum(choice.measured.mask))
    assert "." * (MOST_SKIPS + 1) not in "".join("#" if c else "." for c in choice.measured.mask)


def test_what_cannot_be_met_names_the_best(toy):
    with pytest.raises(StrettoError, match=r"no mask keeps 200 dB: the best is .* dB with 15 of 16 steps computed"):
        search(toy).choose(PSNR, 200.0)
    with pytest.raises(StrettoError, match=r"no mask reaches 15x: the fastest measured is .*x with . of 16"):
        search(toy).choose(SPEED, 15.0)
    with pytest.raises(StrettoError, match="connect a VAE"):
        search(toy).choose(SSIM, 0.9)

    def small(settings, seed):
        return Run(toy(settings, seed).picture.reshape(4, 8, 8, 1), 1.0)

    with pytest.raises(StrettoError, match="at least 11 pixels a side"):
        search(toy, pictures=True, run=small).choose(SSIM, 0.9)


def test_without_probes_and_with_one_seed_few_runs_are_made(toy):
    choice = search(toy, seeds=1, probes=0).choose(PSNR, 45.0)
    assert choice.runs <= 7


def test_the_predicted_curve_passes_through_what_was_measured(toy):
    choice = search(toy).choose(PSNR, 45.0)
    points = predicted_quality(choice, PSNR)
    by_speed = sorted(points)
    assert [q for _, q in by_speed] == sorted((q for _, q in by_speed), reverse=True)
    best, worst = by_speed[0][1], by_speed[-1][1]
    assert worst - 10 <= choice.measured.judged(PSNR) <= best + 10


def preset():
    settings = {"mask": "##.#", "order": 1, "warmup": 0, "tail": 0}
    return Preset("wan", "any", "Schedule", settings, (4, 4), Provenance("here", "measured", {"psnr": [30.0]}))


def test_presets_never_overwrite(tmp_path):
    paths = [save_new(tmp_path / "presets", " mine ", preset()) for _ in range(3)]
    assert [path.name for path in paths] == ["mine.json", "mine-2.json", "mine-3.json"]
    assert all(load_preset(path) == preset() for path in paths)
    assert len(list((tmp_path / "presets").iterdir())) == 3


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "CON", "nul.x", "x" * 65, "-x", "x.", "a\nb", "a..b", "café"])
def test_unsafe_names_are_refused(name):
    with pytest.raises(StrettoError, match="preset name"):
        checked_name(name)


@pytest.mark.parametrize("name", ["a", "Wan 14B fast", "flux-dev_28.v2", "x" * 64])
def test_safe_names_pass(name):
    assert checked_name(f" {name} ") == name
