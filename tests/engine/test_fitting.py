"""Fitted forecasts: the least squares, the sampler that fits as it goes, and what is predicted of masks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stretto.acceleration.caching.fit_search import (
    FIRST,
    LAST,
    LATENESS,
    FitPrediction,
    balanced_decibels,
    climb,
    even_mask,
    moves,
)
from stretto.acceleration.caching.fitting import FittedWeights, FittingSampler, PlainSampler, fit_weights
from stretto.acceleration.caching.forecast import newton_weights
from stretto.acceleration.caching.magnitude import flow_sigmas
from stretto.acceleration.caching.masks import parse_mask, strip
from stretto.acceleration.errors import StrettoError

from .toy_flow import GaussianMixtureFlow

STEPS = 20
SIGMAS = torch.tensor(flow_sigmas(STEPS, 3.0), dtype=torch.float64)
MASK = parse_mask("####.#..#..#..#..#.##")[:STEPS]
#: Of one Gaussian the slope is linear in the state, whatever the seed: what holds for one run holds for all.
FLOW = GaussianMixtureFlow(components=1)


def model(x, sigma, **_):
    """The flow as samplers call a network: x and a noise level per row -> denoised."""
    level = float(sigma[0])
    return x - level * torch.from_numpy(FLOW.velocity(x.numpy(), level))


def noise(seed, batch=6):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, 64)))


def with_line(mask, x):
    """Euler with the straight line for skipped steps."""
    known = []
    for step, computed in enumerate(mask):
        if computed:
            slope = (x - model(x, SIGMAS[step].repeat(len(x)))) / SIGMAS[step]
            known = [(step, slope), *known][:2]
        else:
            weights = newton_weights([at for at, _ in known], step, 1)
            slope = sum(weight * tensor for weight, (_, tensor) in zip(weights, known))
        x = x + slope * (SIGMAS[step + 1] - SIGMAS[step])
    return x


def with_weights(fitted, x):
    """Euler with fitted weights, as the cache applies them."""
    known = []
    for step, computed in enumerate(fitted.mask):
        if computed:
            slope = (x - model(x, SIGMAS[step].repeat(len(x)))) / SIGMAS[step]
            known = [(step, slope), *known][: fitted.depth]
        else:
            weights = fitted([at for at, _ in known], step)
            slope = sum(weight * tensor for weight, (_, tensor) in zip(weights, known))
        x = x + slope * (SIGMAS[step + 1] - SIGMAS[step])
    return x


def plain(seed):
    sampler = PlainSampler()
    sampler(model, noise(seed), SIGMAS)
    return sampler.states


def fitted(mask=MASK, seed=1, **options):
    sampler = FittingSampler(mask, plain(seed), **options)
    result = sampler(model, noise(seed), SIGMAS)
    return FittedWeights(mask, sampler.weights, tuple(SIGMAS.tolist())), result


def decibels(result, reference):
    return -10 * float((result - reference).square().mean().log10())


def test_least_squares_finds_what_made_the_target():
    tensors = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    known = list(zip((7, 5, 2), tensors, strict=True))
    wanted = 2.0 * tensors[0] - 1.5 * tensors[1] + 0.25 * tensors[2]
    assert fit_weights(known, wanted, 8, ridge=1e-12) == pytest.approx([2.0, -1.5, 0.25], abs=1e-5)


def test_what_nothing_determines_is_the_straight_line():
    tensor = torch.randn(4, 4)
    line = newton_weights([7, 5], 8, 1)
    # Equal snapshots: any weights of the same sum give the same forecast. A huge pull: the target does not matter.
    assert fit_weights([(7, tensor), (5, tensor)], tensor, 8) == pytest.approx(line, abs=1e-6)
    known = [(7, torch.randn(9)), (5, torch.randn(9)), (1, torch.randn(9))]
    assert fit_weights(known, torch.randn(9), 8, ridge=1e9) == pytest.approx([*line, 0.0], abs=1e-6)
    assert fit_weights([(3, torch.zeros(4))], torch.zeros(4), 4) == [1.0]


def test_without_skips_the_fitting_sampler_is_euler_to_the_bit():
    states = plain(3)
    result = FittingSampler((True,) * STEPS, states)(model, noise(3), SIGMAS)
    assert torch.equal(result, states[-1]) and len(states) == STEPS + 1 and torch.equal(states[0], noise(3))


def test_a_single_skip_lands_as_near_as_its_snapshots_allow():
    mask = tuple(step != 9 for step in range(STEPS))
    states, weights = plain(1), fitted(mask)[0]
    slopes = [(states[step] - model(states[step], SIGMAS[step].repeat(6))) / SIGMAS[step] for step in range(9)]
    width = SIGMAS[10] - SIGMAS[9]

    def landed(values):
        slope = sum(weight * slopes[8 - index] for index, weight in enumerate(values))
        return float((states[9] + slope * width - states[10]).norm())

    best = landed(weights.weights[9])
    rng = np.random.default_rng(0)
    assert all(landed(np.add(weights.weights[9], 1e-2 * rng.normal(size=3))) > best for _ in range(20))
    assert best < landed(newton_weights([8, 7], 9, 1))


@pytest.mark.parametrize("batch", [1, 6])
def test_weights_fitted_to_one_seed_serve_others_better_than_the_line(batch):
    sampler = PlainSampler()
    sampler(model, noise(1, batch), SIGMAS)
    fitting = FittingSampler(MASK, sampler.states)
    fitting(model, noise(1, batch), SIGMAS)
    weights = FittedWeights(MASK, fitting.weights, tuple(SIGMAS.tolist()))
    for seed in (2, 3, 4):
        reference = plain(seed)[-1]
        gain = decibels(with_weights(weights, noise(seed)), reference) - decibels(with_line(MASK, noise(seed)), reference)
        assert gain > 10.0


def test_the_sampler_applies_what_it_fits():
    weights, result = fitted()
    assert torch.allclose(with_weights(weights, noise(1)), result, rtol=0, atol=1e-9)


def test_settings_round_trip():
    weights, _ = fitted()
    settings = weights.to_settings()
    assert settings["mask"] == strip(MASK) and all(isinstance(value, str) for value in settings.values())
    again = FittedWeights.from_settings(**settings)
    assert again.mask == weights.mask and again.weights.keys() == weights.weights.keys()
    for step, values in weights.weights.items():
        assert again.weights[step] == pytest.approx(values, rel=1e-6)
    assert again.belong_to(SIGMAS.tolist()) and again.to_settings() == settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "4 1.0"}, "'4 1.0' is not of the form"),
        ({"weights": "2: 1 x"}, "not a list of numbers"),
        ({"weights": "2: nan"}, "expected finite numbers"),
        ({"weights": "3: 1"}, "step 2 is skipped and has 0"),
        ({"weights": "2: 1 1 1"}, "step 2 is skipped and has 3 of them; expected 1 to 2"),
        ({"sigmas": "1 0.5"}, "2 noise levels for 4 steps; expected one more"),
        ({"sigmas": ""}, "expected finite numbers"),
        ({"mask": "##,#"}, "character 3 is ','"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes, words):
    good = {"mask": "##.#", "weights": "2: 2 -1", "sigmas": "1 0.7 0.5 0.2 0"}
    FittedWeights.from_settings(**good)
    with pytest.raises(StrettoError, match=words):
        FittedWeights.from_settings(**{**good, **changes})


def test_another_history_gets_the_line():
    weights = FittedWeights.from_settings("###.#", "3: 3 -3 1", "1 0.8 0.6 0.4 0.2 0")
    assert weights([2.0, 1.0, 0.0], 3.0) == [3.0, -3.0, 1.0]
    assert weights([2.00001, 1.0, 0.0], 3.0) == [3.0, -3.0, 1.0]
    assert weights([2.0, 0.0], 3.0) == newton_weights([2.0, 0.0], 3.0, 1)
    assert weights([2.0, 1.0, 0.0], 3.5) == newton_weights([2.0, 1.0], 3.5, 1)
    assert weights([1.0, 0.0], 2.0) == newton_weights([1.0, 0.0], 2.0, 1)


def test_other_noise_levels_are_told_apart():
    weights, _ = fitted()
    assert weights.belong_to([level + 5e-4 for level in SIGMAS.tolist()])
    assert not weights.belong_to(flow_sigmas(STEPS, 5.0)) and not weights.belong_to(SIGMAS.tolist()[1:])


def test_predictions_are_the_misses_of_least_squares():
    states = plain(1)
    prediction = replace(FitPrediction.of(states, SIGMAS.tolist()), lateness=2.0)
    slopes = [(states[i + 1] - states[i]) / (SIGMAS[i + 1] - SIGMAS[i]) for i in range(STEPS)]
    mask = tuple(step not in (6, 7, 12) for step in range(STEPS))
    total = torch.zeros(6, dtype=torch.float64)
    for step in (6, 7, 12):
        before = [index for index in range(step - 1, -1, -1) if mask[index]][:3]
        weights = fit_weights([(index, slopes[index]) for index in before], slopes[step], step)
        missed = slopes[step] - sum(w * slopes[index] for w, index in zip(weights, before))
        total += (math.exp(2.0 * step / STEPS) * float(SIGMAS[step] - SIGMAS[step + 1])) ** 2 * missed.square().sum(1)
    assert prediction.errors(mask) == pytest.approx(total.numpy(), rel=1e-6)
    assert not prediction.errors((True,) * STEPS).any()


def test_balanced_decibels():
    assert balanced_decibels([1e-2, 1e-4]) == pytest.approx(0.5 * 30 + 0.5 * 20)


@pytest.mark.parametrize("steps", [6, 20, 28])
def test_even_masks(steps):
    for computed in range(FIRST + LAST, steps + 1):
        mask = even_mask(steps, computed)
        assert sum(mask) == computed and all(mask[:FIRST]) and all(mask[-LAST:])
    with pytest.raises(ValueError, match="cannot be computed"):
        even_mask(steps, 2)
    assert strip(even_mask(7, 4)) == "##..#.#"


def test_climbing_ends_where_no_move_helps():
    prediction = FitPrediction.of(plain(1), SIGMAS.tolist())
    start = even_mask(STEPS, 9)
    mask = prediction.best_mask(9)
    assert sum(mask) == 9 and prediction.score(mask) > prediction.score(start)
    assert all(prediction.score(move) <= prediction.score(mask) + 1e-9 for move in moves(mask))
    assert climb(start, lambda _: 0.0) == start


def test_masks_of_falling_sizes():
    prediction = FitPrediction.of(plain(1), SIGMAS.tolist())
    sizes = range(STEPS - 1, 4, -1)
    masks = prediction.best_masks(sizes)
    assert [sum(mask) for mask in masks] == list(sizes)
    scores = [prediction.score(mask) for mask in masks]
    assert scores == sorted(scores, reverse=True)
    assert all(prediction.score(mask) >= prediction.score(even_mask(STEPS, sum(mask))) - 0.5 for mask in masks)


def test_lateness_is_what_real_runs_like_best():
    slopes = np.random.default_rng(0).normal(size=(STEPS, 30))
    prediction, tried = FitPrediction((slopes @ slopes.T)[None], tuple(SIGMAS.tolist())), {}

    def quality(mask):
        tried[mask] = -sum(step for step in range(STEPS) if mask[step])  # likes early steps
        return tried[mask]

    chosen = prediction.suited(quality)
    assert 1 < len(tried) <= len(LATENESS) and all(sum(mask) == STEPS // 2 for mask in tried)
    assert chosen.best_mask(STEPS // 2) == max(tried, key=tried.get) and chosen.lateness == min(LATENESS)


def test_a_predicted_mask_is_better_in_a_real_run_than_an_even_one():
    states = plain(1)
    prediction = FitPrediction.of(states, SIGMAS.tolist())
    for computed in (8, 10):
        results = [fitted(mask)[1] for mask in (prediction.best_mask(computed), even_mask(STEPS, computed))]
        assert decibels(results[0], states[-1]) > decibels(results[1], states[-1]) + 1.0
