"""What caching is, numerically: identities on a flow with an exact velocity, and what calibration gains there."""

from itertools import pairwise

import numpy as np
import pytest

from stretto.acceleration.caching.calibration import (
    interpolate_amplification,
    measured_amplification,
    optimal_masks,
    pair_errors,
    step_weights,
)
from stretto.acceleration.caching.magnitude import flow_sigmas
from stretto.acceleration.caching.masks import parse_mask
from stretto.acceleration.caching.policy import Rails
from stretto.acceleration.caching.profile import Profile

from .toy_flow import GaussianMixtureFlow, euler

STEPS = 30
SIGMAS = flow_sigmas(STEPS, 3.0)
FLOW = GaussianMixtureFlow()


def noise(seed, batch=64):
    return np.random.default_rng(seed).normal(size=(batch, 64))


def decibels(x, reference):
    """PSNR of each sample, with four standard deviations as the peak."""
    return 10 * np.log10(16 * reference.var() / ((x - reference) ** 2).mean(1))


def evenly(count):
    chosen = set(np.linspace(0, STEPS - 1, count).round().astype(int).tolist())
    return tuple(step in chosen for step in range(STEPS))


@pytest.mark.parametrize("drawn", ["##.#..#...#....#", "#..............#", "#.#.#.#.#.#.#.#."])
def test_reuse_of_the_output_under_euler_is_step_reduction(drawn):
    """I1: a velocity held over several Euler steps is one Euler step over their union, exactly."""
    mask, sigmas = parse_mask(drawn), flow_sigmas(16, 3.0)
    shorter = [sigma for sigma, computed in zip(sigmas, mask) if computed] + [0.0]
    np.testing.assert_allclose(euler(FLOW, noise(0), sigmas, mask), euler(FLOW, noise(0), shorter), atol=1e-12)


def test_a_line_through_the_output_under_euler_is_a_two_step_method():
    """I3: computing every second step and forecasting the other is a step of width 2h with weights 1.25 and -0.25,
    where Adams-Bashforth has 1.5 and -0.5: the first half of the step does not see the slope."""
    sigmas = flow_sigmas(8, 1.0)
    x = euler(FLOW, noise(0), sigmas, parse_mask("##.#.#.#"), "line")
    y, previous, h = noise(0), None, sigmas[1] - sigmas[0]
    velocity = FLOW.velocity(y, sigmas[0])
    y, previous = y + h * velocity, velocity
    for step, gap in ((1, 1), (3, 2), (5, 2)):
        velocity = FLOW.velocity(y, sigmas[step])
        y = y + 2 * h * ((1 + 0.5 / gap) * velocity - 0.5 / gap * previous)
        previous = velocity
    y = y + h * FLOW.velocity(y, sigmas[7])
    np.testing.assert_allclose(x, y, atol=1e-12)


def test_heun_with_a_reused_corrector_is_euler():
    """I4: skipping only the second evaluation of a Heun step wastes nothing and gains nothing."""
    x = noise(3)
    for high, low in pairwise(SIGMAS):
        first = FLOW.velocity(x, high)
        corrector = first  # what a cache keyed by step would hand back
        x = x + (low - high) * (first + corrector) / 2
    np.testing.assert_allclose(x, euler(FLOW, noise(3), SIGMAS), atol=1e-12)


@pytest.fixture(scope="module")
def profile():
    """A profile of eight other starting points, with amplifications from one perturbed run per step."""
    start, velocities = noise(1, 8), []
    final = euler(FLOW, start, SIGMAS, velocities=velocities)
    features = np.stack([velocity.ravel() for velocity in velocities])
    changes = [0.0, *np.linalg.norm(np.diff(features, axis=0), axis=1)]
    perturbed = {
        step: np.linalg.norm(euler(FLOW, start, SIGMAS, tuple(i != step for i in range(STEPS))) - final)
        for step in range(1, STEPS)
    }
    factors = interpolate_amplification(measured_amplification(perturbed, SIGMAS, changes), STEPS)
    norms = np.log(np.linalg.norm(features, axis=1))
    return Profile(SIGMAS, range(STEPS), features, norms, 1.0, amplification=factors)


def test_one_reused_step_costs_what_the_amplification_says(profile):
    """By its definition, amplification times local error is the change of the final latent."""
    start = noise(1, 8)
    final = euler(FLOW, start, SIGMAS)
    errors, weights = pair_errors(profile), step_weights(profile)
    for step in (3, 12, 25):
        mask = tuple(i != step for i in range(STEPS))
        change = np.linalg.norm(euler(FLOW, start, SIGMAS, mask) - final)
        assert weights[step] * errors[step - 1, step] == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("computed", [10, 12, 15])
def test_calibrated_masks_beat_even_spacing_on_other_starting_points(profile, computed):
    reference = euler(FLOW, noise(2), SIGMAS)
    found = {}
    for forecaster in ("reuse", "line"):
        candidate = optimal_masks(pair_errors(profile, forecaster), step_weights(profile), Rails(1, 1), [computed])[computed]
        calibrated = np.median(decibels(euler(FLOW, noise(2), SIGMAS, candidate.mask, forecaster), reference))
        even = np.median(decibels(euler(FLOW, noise(2), SIGMAS, evenly(computed), forecaster), reference))
        assert candidate.computed == computed == sum(evenly(computed))
        assert calibrated > even + 4.0
        found[forecaster] = calibrated
    # On a deterministic sampler the forecaster is worth more than the schedule.
    assert found["line"] > found["reuse"] + 5.0


def test_forecasting_beats_reuse_at_the_same_mask():
    reference = euler(FLOW, noise(2), SIGMAS)
    mask = tuple(step < 5 or step == STEPS - 1 or step % 2 == 0 for step in range(STEPS))
    quality = {
        name: np.median(decibels(euler(FLOW, noise(2), SIGMAS, mask, name, **settings), reference))
        for name, settings in (("reuse", {}), ("line", {}), ("hermite", {}), ("chebyshev", {}))
    }
    assert quality["line"] > quality["reuse"] + 4 and quality["chebyshev"] > quality["reuse"] + 4
    assert quality["reuse"] < quality["hermite"] < quality["line"]


