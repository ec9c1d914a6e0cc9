"""From a profile to masks and targets: dynamic programming against brute force, replays against the policies."""

import itertools
import json
import math

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from stretto.acceleration.caching.calibration import (
    Candidate,
    accumulate_masks,
    amplification_prior,
    bisect_quality,
    choose_for_speed,
    computed_for_speed,
    distinct_masks,
    fit_damping,
    fit_rescaling,
    frontier,
    gate_masks,
    interpolate_amplification,
    mask_error,
    measured_amplification,
    optimal_masks,
    pair_errors,
    speed,
    step_weights,
)
from stretto.acceleration.caching.forecast import chebyshev_weights
from stretto.acceleration.caching.magnitude import flow_sigmas
from stretto.acceleration.caching.masks import parse_mask, strip
from stretto.acceleration.caching.policy import Accumulator, Rails
from stretto.acceleration.caching.profile import Profile
from stretto.acceleration.caching.sketch import CountSketch, distance
from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.schemas import schema

NO_RAILS = Rails(0, 0)


def profile_of(features, **fields):
    """A profile whose sketches are the features themselves: then every distance is exact."""
    features = np.asarray(features, dtype=np.float64)
    steps = len(features)
    values = {
        "sigmas": flow_sigmas(steps, 3.0),
        "positions": range(steps),
        "sketches": features,
        "log_norms": np.log(np.linalg.norm(features, axis=1) + 1e-9),
        "seconds_computed": 1.0,
    }
    return Profile(**{**values, **fields})


def walk(steps, seed, size=6):
    """Features that wander and turn, so that no two masks cost the same."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(steps, size)) * rng.uniform(0.1, 2.0, (steps, 1)), axis=0)


def brute_force(profile, forecaster, rails, max_skips, **settings):
    best = {}
    steps = profile.steps
    for tail in itertools.product((True, False), repeat=steps - 1):
        mask = (True, *tail)
        if any(rails.reason(step, steps) and not mask[step] for step in range(steps)):
            continue
        if max_skips is not None and "." * (max_skips + 1) in strip(mask):
            continue
        error = mask_error(profile, mask, forecaster, **settings)
        if error < best.get(sum(mask), math.inf):
            best[sum(mask)] = error
    return best


@given(
    st.integers(2, 10),
    st.integers(0, 10_000),
    st.sampled_from([NO_RAILS, Rails(2, 1), Rails(1, 2), Rails(0, 0, forced=frozenset({3}))]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([("reuse", {}), ("line", {"damping": 1.0}), ("line", {"damping": 0.6})]),
)
@limits(max_examples=25, deadline=None)
def test_optimal_masks_equal_brute_force(steps, seed, rails, max_skips, forecaster):
    name, settings = forecaster
    profile = profile_of(walk(steps, seed))
    errors = pair_errors(profile, name, **settings)
    found = optimal_masks(errors, step_weights(profile), rails, max_skips=max_skips)
    expected = brute_force(profile, name, rails, max_skips, **settings)
    assert set(found) == set(expected)
    for count, candidate in found.items():
        assert candidate.computed == count and candidate.mask[0]
        assert candidate.error == pytest.approx(expected[count], rel=1e-6, abs=1e-6)
        assert mask_error(profile, candidate.mask, name, **settings) == pytest.approx(candidate.error, rel=1e-6, abs=1e-6)


def test_optimal_masks_equal_brute_force_at_twelve_steps():
    profile = profile_of(walk(12, 1))
    for name in ("reuse", "line"):
        found = optimal_masks(pair_errors(profile, name), step_weights(profile), Rails(1, 1))
        expected = brute_force(profile, name, Rails(1, 1), None)
        assert {count: c.error for count, c in found.items()} == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_only_wanted_counts_come_back():
    profile = profile_of(walk(20, 2))
    found = optimal_masks(pair_errors(profile), step_weights(profile), Rails(3, 1), counts=(2, 8, 20, 99))
    assert sorted(found) == [8, 20]  # two cannot hold four rails
    assert found[20].error == 0.0 and strip(found[8].mask).startswith("###") and found[8].mask[-1]


def test_pair_errors_by_hand():
    profile = profile_of([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [6.0, 8.0]])
    reuse = pair_errors(profile)
    assert reuse[0, 1] == pytest.approx(5) and reuse[1, 2] == pytest.approx(0, abs=1e-6) and reuse[1, 3] == pytest.approx(5)
    assert np.isinf(reuse[2, 1]) and np.isinf(reuse[1, 1])
    line = pair_errors(profile, "line")
    assert line[0, 1, 2] == pytest.approx(5) and line[0, 1, 3] == pytest.approx(5) and line[0, 2, 3] == pytest.approx(2.5)
    assert line[1, 1, 3] == pytest.approx(5) and np.isinf(line[2, 1, 3])
    assert pair_errors(profile, "line", 0.0)[0, 1, 2] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="reuse and line, not for 'hermite'"):
        pair_errors(profile, "hermite")


def test_mask_error_knows_every_forecaster():
    """Features (t, t^2): the line through h and i misses m by (m - i)(m - h), a quadratic by nothing."""
    t = np.arange(12, dtype=np.float64)
    profile = profile_of(np.stack([t, t * t], axis=1))
    mask = parse_mask("###.#.##.#.#")
    weights = step_weights(profile)
    skipped = [(1, 2, 3), (2, 4, 5), (6, 7, 8), (7, 9, 10)]
    reuse = sum(weights[m] * math.hypot(m - i, m * m - i * i) for _, i, m in skipped)
    line = sum(weights[m] * (m - i) * (m - h) for h, i, m in skipped)
    assert mask_error(profile, mask) == pytest.approx(reuse, rel=1e-6)
    assert mask_error(profile, mask, "line") == pytest.approx(line, rel=1e-5)
    assert mask_error(profile, mask, "line", damping=0.0) == pytest.approx(reuse, rel=1e-6)
    assert mask_error(profile, mask, "newton", order=2) < 1e-5 * line
    assert mask_error(profile, mask, "chebyshev", ridge=1e-12, blend=1.0) < 1e-3 * line
    assert mask_error(profile, (True,) * 12) == 0.0 and mask_error(profile, (False,) * 12) == math.inf


def test_forecasts_that_shrink_features_pay_for_it():
    """The published Chebyshev weights do not sum to 1: the error holds what is lost of the mean as well."""
    features = walk(10, 6) + 50.0
    profile = profile_of(features)
    mask, weights = parse_mask("######..##"), step_weights(profile)
    expected = 0.0
    for step in (6, 7):
        shares = chebyshev_weights([5, 4, 3, 2, 1, 0], step, 10, anchored=False)
        assert sum(shares) < 0.99
        expected += weights[step] * np.linalg.norm(np.dot(shares, features[5::-1]) - features[step])
    assert mask_error(profile, mask, "chebyshev", anchored=False) == pytest.approx(expected, rel=1e-5)


def test_a_common_offset_costs_no_precision():
    base = walk(10, 4)
    near, far = profile_of(base), profile_of(base + 1000.0)
    np.testing.assert_allclose(pair_errors(near), pair_errors(far), rtol=1e-3)


def test_sketched_errors_follow_the_features():
    rng = torch.Generator().manual_seed(0)
    features = torch.cumsum(torch.randn(8, 100_000, generator=rng), dim=0)
    sketch = CountSketch(4096, 1)
    profile = profile_of(torch.stack([sketch(feature) for feature in features]).numpy())
    errors = pair_errors(profile)
    for i, j in itertools.combinations(range(8), 2):
        truth = (features[i] - features[j]).norm().item()
        assert errors[i, j] == pytest.approx(truth, rel=0.08)
        assert errors[i, j] == pytest.approx(distance(profile.sketches[i], profile.sketches[j]), rel=1e-4)


def test_amplification_prior():
    prior = amplification_prior(30)
    assert prior[0] == 10.0 and prior[-1] == 1.0 and list(prior) == sorted(prior, reverse=True)
    assert prior[4] == pytest.approx(10 * math.exp(-3.5 * 4 / 30))
    profile = profile_of(walk(30, 0))
    assert step_weights(profile) == pytest.approx(np.asarray(prior) * -np.diff(profile.sigmas))
    flat = profile_of(walk(30, 0), amplification=[1.0] * 30)
    assert step_weights(flat).sum() == pytest.approx(1.0)


def test_amplification_moves_computed_steps_to_the_front():
    """The same features everywhere: with the prior the optimum is denser early, without it follows the widths alone."""
    features = np.arange(24.0)[:, None]
    sigmas = np.linspace(1, 0, 25)
    weighted, plain = (profile_of(features, sigmas=sigmas, amplification=a) for a in (None, [1.0] * 24))
    half = {}
    for name, profile in (("weighted", weighted), ("plain", plain)):
        mask = optimal_masks(pair_errors(profile), step_weights(profile), NO_RAILS, counts=[8])[8].mask
        half[name] = sum(mask[:12])
    assert half["weighted"] >= half["plain"] + 1


def test_measured_and_interpolated_amplification():
    sigmas, changes = flow_sigmas(10, 1.0), [0.0] + [2.0] * 9
    measured = measured_amplification({1: 1.0, 5: 0.4, 0: 7.0}, sigmas, changes)
    assert measured == pytest.approx({1: 5.0, 5: 2.0})
    prior = np.asarray(amplification_prior(10))
    assert interpolate_amplification({}, 10) == pytest.approx(prior)
    doubled = interpolate_amplification({2: 2 * prior[2], 7: 2 * prior[7]}, 10)
    assert doubled == pytest.approx(2 * prior)
    bent = np.asarray(interpolate_amplification({0: prior[0], 8: 4 * prior[8]}, 10)) / prior
    assert bent[4] == pytest.approx(2.0) and bent[9] == pytest.approx(4.0)


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=14),
    st.sampled_from([NO_RAILS, Rails(2, 1)]),
    st.sampled_from([None, 1, 3]),
    st.floats(0, 3),
)
@example([0.0, 5e-324], NO_RAILS, None, 0.0)
@limits(max_examples=60, deadline=None)
def test_replayed_masks_are_exactly_those_the_policy_can_draw(values, rails, max_skips, threshold):
    """A reference interpreter around the run-time accumulator: each candidate's own threshold draws it, and any
    other threshold draws one of them."""
    values = [None, *values]
    steps = len(values)
    profile = profile_of(walk(steps, 3), signals={"change": values})

    def interpret(limit):
        accumulator, run, mask = Accumulator(limit), 0, []
        for step, change in enumerate(values):
            wanted = accumulator.skip(change)
            rail = rails.reason(step, steps) is not None or (max_skips is not None and run >= max_skips)
            skip = wanted and not rail and step > 0
            run = run + 1 if skip else 0
            if not skip:
                accumulator.reset()
            mask.append(not skip)
        return tuple(mask)

    candidates = accumulate_masks(profile, "change", rails, max_skips)
    masks = [candidate.mask for candidate in candidates]
    assert len(set(masks)) == len(masks) and masks[0] == (True,) * steps
    for candidate in candidates:
        assert interpret(candidate.threshold) == candidate.mask
        assert candidate.error == pytest.approx(mask_error(profile, candidate.mask))
    assert interpret(threshold) in masks and interpret(1e9) in masks


def test_masks_that_lie_close_together_are_all_found():
    """Each change differs from the next by a tenth of a per cent: every one of them parts two masks."""
    signals = {"change": [None, *(0.1 + 0.0001 * step for step in range(10))]}
    candidates = accumulate_masks(profile_of(walk(11, 0), signals=signals), "change", NO_RAILS, max_skips=1)
    counts = [candidate.computed for candidate in candidates]
    assert counts == [11, 10, 9, 8, 7, 6] and strip(candidates[-1].mask) == "#.#.#.#.#.#"


def test_replay_through_a_shape():
    profile = profile_of(walk(5, 0), signals={"x": [None, 0.1, 0.2, 0.3, 0.4]})
    plain = accumulate_masks(profile, "x", NO_RAILS)
    doubled = accumulate_masks(profile, "x", NO_RAILS, shape=lambda x: 2 * x)
    assert [c.mask for c in plain] == [c.mask for c in doubled]
    assert doubled[1].threshold == pytest.approx(2 * plain[1].threshold)


def test_gate_compares_with_the_last_computed_step():
    x = np.array([0.0, 1.0, 1.5, 3.0, 3.2, 6.0])
    profile = profile_of(walk(6, 0))
    masks = {strip(c.mask): c.threshold for c in gate_masks(profile, np.abs(x[:, None] - x[None, :]), NO_RAILS)}
    drawn = list(masks)
    assert drawn[0] == "######" and drawn[-1] == "#....."
    assert "####.#" in masks and "##.#.#" in masks
    assert 0.2 < masks["####.#"] <= 0.5 < masks["##.#.#"] <= 1.0


def test_candidates_are_distinct_sorted_and_respect_the_rails():
    rails = Rails(3, 2)
    profile = profile_of(walk(20, 5), signals={"change": [None, *np.linspace(0.1, 0.3, 19)]})
    extra = accumulate_masks(profile, "change", rails)
    for forecaster in ("reuse", "line", "chebyshev"):
        candidates = distinct_masks(profile, rails, forecaster, max_skips=4, extra=extra if forecaster == "reuse" else ())
        assert len({c.mask for c in candidates}) == len(candidates) > 15
        errors = [c.error for c in candidates]
        assert errors == sorted(errors) and errors[0] == 0.0 and candidates[0].computed == 20
        for candidate in candidates:
            assert all(candidate.mask[:3]) and all(candidate.mask[-2:])
            assert candidate in extra or "....." not in strip(candidate.mask)
            assert candidate.error == pytest.approx(mask_error(profile, candidate.mask, forecaster))
    for candidate in distinct_masks(profile, rails):
        optimal = optimal_masks(pair_errors(profile), step_weights(profile), rails, [candidate.computed])
        assert candidate.error >= optimal[candidate.computed].error - 1e-6


@pytest.mark.parametrize(
    ("target", "cost", "expected"), [(1.0, 0.0, 28), (2.0, 0.0, 14), (2.0, 0.1, 12), (4.0, 0.05, 5), (20.0, 0.05, None)]
)
def test_speed_targets(target, cost, expected):
    assert computed_for_speed(target, 28, cost) == expected
    if expected is not None:
        assert speed(expected, 28, cost) >= target > speed(expected + 1, 28, cost)


def test_the_best_mask_that_is_fast_enough():
    candidates = [Candidate(parse_mask(m), e, "") for m, e in (("####", 0.0), ("##.#", 3.0), ("#..#", 2.0), ("#...", 9.0))]
    assert choose_for_speed(candidates, 1.3).error == 2.0  # two computed steps, predicted better than three
    assert choose_for_speed(candidates, 2.0).error == 2.0 and choose_for_speed(candidates, 2.1).error == 9.0
    assert choose_for_speed(candidates, 4.1) is None and choose_for_speed(candidates, 1.6, 0.5).error == 9.0


def test_frontier_drops_what_is_slower_and_worse():
    errors = {"####": 0.0, "##.#": 3.0, "#..#": 2.0, "#.#.": 4.0, "#...": 9.0, "###.": 2.0}
    candidates = [Candidate(parse_mask(drawn), error, drawn) for drawn, error in errors.items()]
    assert [c.source for c in frontier(candidates)] == ["####", "#..#", "#..."]


@given(st.integers(0, 70), st.integers(0, 71))
def test_bisection_finds_the_boldest_that_meets_the_target(count, passing):
    candidates = [Candidate(tuple(i < count - k for i in range(count)), float(k), str(k)) for k in range(count)]
    runs = []

    def measure(mask):
        runs.append(mask)
        return 100.0 - (count - sum(mask))

    found = bisect_quality(candidates, measure, 100.0 - passing + 1)
    expected = min(passing, count) - 1
    assert (found is None) == (expected < 0) and (found is None or found.source == str(expected))
    assert len(runs) <= (math.ceil(math.log2(count)) + 1 if count else 0)


@given(st.lists(st.floats(0, 60), min_size=1, max_size=20))
def test_bisection_never_returns_what_was_not_measured_to_pass(qualities):
    count = len(qualities)
    candidates = [Candidate(tuple(i < count - k for i in range(count)), float(k), str(k)) for k in range(count)]
    measured = {}

    def measure(mask):
        measured[mask] = qualities[count - sum(mask)]
        return measured[mask]

    found = bisect_quality(candidates, measure, 30.0)
    assert found is None or measured[found.mask] >= 30.0


def test_damping_fits_how_far_features_go_on():
    t = np.arange(16.0)
    straight, random = profile_of(t[:, None]), profile_of(np.random.default_rng(0).normal(size=(16, 4000)))
    assert fit_damping(straight) == pytest.approx(1.0) and fit_damping(straight, 3) == pytest.approx(1.0)
    assert fit_damping(random) == 0.0  # a line through noise points the wrong way
    halving = profile_of(np.cumsum(0.5 ** t)[:, None] * 100)
    assert fit_damping(halving) == pytest.approx(0.5, abs=1e-3)


def test_damping_is_the_least_squares_optimum():
    profile = profile_of(walk(20, 8), amplification=[1.0] * 20, sigmas=np.linspace(1, 0, 21))
    best = fit_damping(profile)
    errors = pair_errors(profile)

    def loss(damping):
        line = pair_errors(profile, "line", damping)
        return sum(line[m - 2, m - 1, m] ** 2 for m in range(2, 20))

    grid = np.linspace(0, 1, 41)
    assert abs(grid[np.argmin([loss(d) for d in grid])] - best) <= 0.026
    assert loss(0.0) == pytest.approx(sum(errors[m - 1, m] ** 2 for m in range(2, 20)))


def test_rescaling_is_non_negative_monotone_and_exact_where_it_can_be():
    x = [None, 0.1, 0.2, 0.4, 0.5]
    exact = fit_rescaling(x, [None, *(0.05 + 0.5 * v + 2 * v * v for v in x[1:])])
    assert exact.coefficients == pytest.approx((2.0, 0.5, 0.05)) and (exact.low, exact.high) == (0.1, 0.5)
    falling = fit_rescaling([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1])
    assert falling.coefficients == pytest.approx((0.0, 0.0, 0.25))
    with pytest.raises(ValueError, match="two or more steps"):
        fit_rescaling([0.1, None], [0.1, 0.2])


@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 1)), min_size=2, max_size=20, unique_by=lambda pair: pair[0]))
def test_rescaling_beats_every_other_non_negative_fit(pairs):
    x, y = map(np.asarray, zip(*pairs))
    fitted = fit_rescaling(x, y)
    assert min(fitted.coefficients) >= 0
    loss = lambda c: float(np.sum((np.polyval(c, x) - y) ** 2))  # noqa: E731
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-2, 0.1):
        for nudge in rng.normal(size=(8, 3)) * scale:
            other = np.maximum(np.asarray(fitted.coefficients) + nudge, 0)
            assert loss(fitted.coefficients) <= loss(other) + 1e-9


FIELDS = {
    "signals": {"change": [None, 0.25, 0.5], "probe": [0.1, 0.2, 0.3]},
    "seconds_skipped": 0.125,
    "amplification": [3.0, 2.0, 1.0],
    "about": {"family": "sd3", "steps": 3},
}


def test_profile_round_trip_and_schema():
    profile = profile_of(walk(3, 0), **FIELDS)
    document = json.loads(json.dumps(profile.to_json()))
    jsonschema.validate(document, schema("profile"))
    again = Profile.from_json(document)
    assert again.to_json() == profile.to_json() and np.array_equal(again.sketches, profile.sketches)
    assert again.signals["change"] == (None, 0.25, 0.5) and again.skipped_cost == 0.125
    assert again.sketches.dtype == np.float32


def test_profile_shows_its_magnitude_curve():
    profile = profile_of([[1.0], [2.0], [1.0], [0.5]])
    curve = profile.curve()
    assert curve.ratios == pytest.approx((1.0, 2.0, 0.5, 0.5))
    assert curve.ratio(profile.sigmas[0], profile.sigmas[3]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": [1.0, 0.5]}, "sigmas has 2 entries; expected 4 for 3 steps"),
        ({"sigmas": [1.0, 0.5, 0.6, 0.0]}, "sigmas must fall"),
        ({"positions": [0, 1, 1]}, "positions rise"),
        ({"positions": []}, "positions has 0 entries"),
        ({"log_norms": [0.0, None, 0.0]}, r"log_norms\[1\] is None; expected a finite number"),
        ({"log_norms": "abc"}, "log_norms is 'abc'; expected a list"),
        ({"signals": {"change": [1.0]}}, "signals.change has 1 entries; expected 3"),
        ({"signals": {"change": [None, True, 0.1]}}, r"signals.change\[1\] is True"),
        ({"signals": 3}, "signals is 3; expected an object"),
        ({"amplification": [1.0]}, "amplification has 1 entries"),
        ({"seconds_computed": -1.0}, "seconds_computed is -1.0"),
        ({"seconds_computed": None}, "seconds_computed is None"),
        ({"seconds_skipped": "slow"}, "seconds_skipped is 'slow'"),
        ({"sketches": {"shape": [3, 6], "fp32": "AAAA"}}, "fp32 holds 3 bytes; expected 72"),
        ({"sketches": {"shape": [3, 6], "fp32": "?"}}, "expected base64"),
        ({"sketches": {"shape": [3, 10**9], "fp32": ""}}, "sketches.shape is"),
        ({"sketches": {"shape": [2, 1], "fp32": "AACAPwAAgD8="}}, r"sketches has the shape \(2, 1\)"),
        ({"surprise": 1}, "field 'surprise' is missing or unknown"),
    ],
)
def test_bad_profiles_name_file_and_field(change, message):
    document = {**profile_of(walk(3, 0), **FIELDS).to_json(), **change}
    with pytest.raises(StrettoError, match=message) as caught:
        Profile.from_json(document, "run.json")
    assert str(caught.value).startswith("run.json: ")


def test_foreign_profiles_are_refused():
    with pytest.raises(SchemaError, match="run.json.*profile@2"):
        Profile.from_json({"schema": "profile@2"}, "run.json")
