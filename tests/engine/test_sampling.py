"""Steps come from noise levels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.sampling import SAMPLERS, schedule_of, traits_of

levels = st.lists(st.floats(0.01, 50), min_size=2, max_size=30, unique=True).map(lambda xs: [*sorted(xs, reverse=True), 0.0])


@given(levels)
def test_scheduled_levels_have_integer_positions(sigmas):
    schedule = schedule_of(sigmas)
    for index, sigma in enumerate(sigmas):
        expected = next(i for i, other in enumerate(sigmas) if abs(other - sigma) <= 1e-4 * max(other, 1e-6))
        assert abs(schedule.position(sigma) - index) <= index - expected


@given(levels, st.floats(0, 1), st.integers(0, 100))
def test_positions_fall_with_noise_and_stay_inside(sigmas, share, where):
    schedule = schedule_of(sigmas)
    index = where % (len(sigmas) - 1)
    sigma = sigmas[index] + share * (sigmas[index + 1] - sigmas[index])
    position = schedule.position(sigma)
    assert 0 <= position <= schedule.steps
    assert index - 1 <= position <= index + 2
    assert 0 <= schedule.step(position) < schedule.steps


def test_midpoint_of_an_interval():
    assert schedule_of([1.0, 0.5, 0.0]).position(0.75) == pytest.approx(0.5)
    assert schedule_of([1.0, 0.5, 0.0]).position(2.0) == 0.0


def test_unknown_samplers_fail_closed():
    assert not traits_of("somebody_elses").known
    assert SAMPLERS["heun"].single_call is False and SAMPLERS["euler_ancestral"].stochastic


def test_every_sampler_of_comfyui_is_known(comfy_samplers):
    assert {name for name in comfy_samplers if not traits_of(name).known} == set()
