"""Progressive resolution by hand: transforms, noise levels, stages, and the path of a Gaussian flow, to rounding."""

import itertools
import math
from functools import partial

import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.facts import Facts
from stretto.acceleration.plan import Request
from stretto.acceleration.resolution.corrected import Correction
from stretto.acceleration.resolution.noise_level import band_power, gain, switch_level, to_full, to_small
from stretto.acceleration.resolution.settings import CORRECTED, COUPLED, FRESH, SPEED, ResolutionSettings, parse_numbers
from stretto.acceleration.resolution.spectral import dct, expand, idct, ratio, shrink
from stretto.acceleration.resolution.spectrum import SPECTRA, fit_spectrum
from stretto.acceleration.resolution.stages import Path, StagePlan, plan_stages, stage_size, switch_step
from stretto.acceleration.resolution.technique import ResolutionTechnique, run_stages
from stretto.acceleration.sampling import Schedule, traits_of

EXACT = 1e-12


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted(steps, shift=3.0):
    """Return the noise levels of a flow with a timestep shift."""
    return tuple(shift * t / (1 + (shift - 1) * t) for t in (1 - step / steps for step in range(steps + 1)))


def settings(**changes):
    return ResolutionSettings(**{"min_side": 2, "multiple": 1, **changes})


# Transforms


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6), (32, 18)])
def test_the_transform_is_orthonormal_and_inverts(size):
    x = noise(2, 3, *size)
    torch.testing.assert_close(idct(dct(x)), x, atol=EXACT, rtol=0)
    torch.testing.assert_close(dct(x).square().sum(), x.square().sum(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("full", "small"), [((16, 16), (8, 8)), ((15, 9), (8, 5)), ((6, 10), (6, 4))])
def test_shrinking_takes_the_low_band_and_expanding_puts_it_back(full, small):
    x, other = noise(1, 2, *full), noise(1, 2, *full, seed=1)
    low = shrink(x, small)
    assert low.shape[-2:] == small
    torch.testing.assert_close(expand(low, x), x, atol=EXACT, rtol=0)
    mixed = dct(expand(low, other))
    torch.testing.assert_close(
        mixed[..., : small[0], : small[1]], dct(x)[..., : small[0], : small[1]], atol=EXACT, rtol=0
    )
    outside = torch.ones(full, dtype=torch.bool)
    outside[: small[0], : small[1]] = False
    torch.testing.assert_close(mixed[..., outside], dct(other)[..., outside], atol=EXACT, rtol=0)


@pytest.mark.parametrize(("full", "small"), [((32, 32), (16, 16)), ((15, 9), (8, 5)), ((30, 52), (16, 26))])
def test_a_constant_picture_keeps_its_value_at_every_size(full, small):
    ones = torch.ones(1, 1, *full, dtype=torch.float64)
    r = ratio(full, small)
    torch.testing.assert_close(
        shrink(ones, small) / r, torch.ones(1, 1, *small, dtype=torch.float64), atol=EXACT, rtol=0
    )
    back = expand(torch.ones(1, 1, *small, dtype=torch.float64), torch.zeros_like(ones))
    torch.testing.assert_close(back, ones / r, atol=EXACT, rtol=0)  # amplitude 1 / r before the gain


def test_videos_are_treated_frame_by_frame():
    clip = noise(1, 4, 3, 8, 12)
    for frame in range(3):
        torch.testing.assert_close(
            shrink(clip, (4, 6))[:, :, frame], shrink(clip[:, :, frame], (4, 6)), atol=EXACT, rtol=0
        )


def test_noise_stays_white_when_shrunk_and_when_expanded_with_new_noise():
    """Covariance of neighbours, not of variance alone: bilinear enlargement would fail here."""
    draws = noise(40000, 6, 6)
    for name, tensor in {
        "shrunk": shrink(draws, (4, 4)),
        "expanded": expand(shrink(draws, (4, 4)), noise(40000, 6, 6, seed=1)),
        "its own band back": expand(shrink(draws, (4, 4)), draws),
    }.items():
        flat = tensor.flatten(1)
        covariance = flat.T @ flat / flat.shape[0]
        off = (covariance - torch.eye(flat.shape[1], dtype=torch.float64)).abs().max()
        assert off < 6 / math.sqrt(40000), name


# Noise levels


@pytest.mark.parametrize("r", [1.0, 4 / 3, 2.0, 4.0])
def test_noise_levels_map_there_and_back(r):
    for level in (1.0, 0.999, 0.7, 0.3, 1e-4, 0.0):
        assert math.isclose(to_small(to_full(level, r), r), level, abs_tol=1e-14)
        assert 0.0 <= to_small(level, r) <= level
    assert to_full(0.5, 2.0) == pytest.approx(2 / 3)
    assert gain(0.5, 2.0) * 0.5 == pytest.approx(to_full(0.5, 2.0))  # noise
    assert gain(0.5, 2.0) * 0.5 / 2.0 == pytest.approx(1 - to_full(0.5, 2.0))  # and signal, 1 / r of the full one


@pytest.mark.parametrize(
    ("name", "rows", "scale", "expected"),
    [
        ("FLUX", 128, 1 / 2, {0.01: 0.853, 0.05: 0.718, 0.1: 0.638}),
        ("FLUX", 128, 1 / 4, {0.01: 0.934, 0.05: 0.862, 0.1: 0.814}),
        ("FLUX", 128, 2 / 3, {0.01: 0.807, 0.05: 0.648}),
        ("Wan", 60, 1 / 2, {0.01: 0.864, 0.05: 0.737}),
        ("Wan", 60, 2 / 3, {0.01: 0.808, 0.05: 0.649}),
        ("Wan", 90, 1 / 2, {0.01: 0.782, 0.05: 0.612}),
        ("Wan", 90, 2 / 3, {0.01: 0.711, 0.05: 0.519}),
    ],
)
def test_switch_levels_are_the_published_ones_to_three_decimals(name, rows, scale, expected):
    law = SPECTRA[name]
    power = band_power(law.amplitude, law.exponent, scale * rows / 2)
    assert {delta: round(switch_level(power, delta), 3) for delta in expected} == expected


def test_flux_at_a_megapixel_has_the_published_number_of_coarse_steps():
    """50 steps, shift 3.16: 18 coarse steps for delta .01, 28 for .05."""
    sigmas = shifted(50, 3.16)
    for delta, coarse in ((0.01, 18), (0.05, 28)):
        assert switch_step(settings(delta=delta), (128, 128), (64, 64), sigmas) == coarse


def test_a_power_law_is_found_again():
    rows = torch.arange(32, dtype=torch.float64) / 2
    frequency = (rows[:, None] ** 2 + rows**2).sqrt().clamp(min=0.25)
    coefficients = noise(400, 1, 32, 32) * (50.0 * frequency**-2.0).sqrt()
    found = fit_spectrum(idct(coefficients))
    assert found.exponent == pytest.approx(2.0, abs=0.05) and found.amplitude == pytest.approx(50.0, rel=0.1)
    with pytest.raises(StrettoError, match="constant or not finite"):
        fit_spectrum(torch.ones(1, 4, 8, 8))
    with pytest.raises(StrettoError, match="at least 4x4"):
        fit_spectrum(torch.ones(1, 4, 2, 8))
    with pytest.raises(StrettoError, match="grows with frequency"):
        fit_spectrum(idct(noise(50, 1, 16, 16) * torch.arange(1, 17, dtype=torch.float64)))


# Stages


def test_sizes_are_multiples_of_the_patch_and_never_larger():
    assert stage_size((128, 128), 0.5, 2) == (64, 64)
    assert stage_size((15, 9), 0.5, 2) == (8, 4)
    assert stage_size((15, 9), 1.0, 2) == (15, 9)
    assert stage_size((3, 3), 0.9, 4) == (3, 3)


def test_stages_cover_every_step_once_and_meet_at_one_noise_level():
    sigmas = shifted(20)
    plan = plan_stages(settings(stages=(0.25, 0.5, 1.0), switches=(0.2, 0.4)), sigmas, (32, 32))
    assert [(s.first, s.last) for s in plan.stages] == [(0, 4), (4, 8), (8, 20)]
    for stage in plan.stages:
        assert len(stage.sigmas) == stage.last - stage.first + 1
        for level, step in zip(stage.sigmas, range(stage.first, stage.last + 1)):
            assert stage.at_full_size(level) == pytest.approx(sigmas[step], abs=1e-14)
    assert plan.stages[-1].sigmas == sigmas[8:]
    assert plan.cost == pytest.approx((4 / 16 + 4 / 4 + 12) / 20)


@pytest.mark.parametrize(
    ("changes", "sigmas", "full", "why"),
    [
        ({"stages": (1.0,)}, shifted(10), (32, 32), "every stage has the full size"),
        ({"stages": (1.0, 1.0), "switches": (0.5,)}, shifted(10), (32, 32), "every stage has the full size"),
        ({"min_side": 20}, shifted(10), (32, 32), "below min_side = 20"),
        ({"delta": 0.01}, shifted(10)[6:], (128, 128), "starts at noise level"),
    ],
)
def test_nothing_to_gain_is_said_with_its_reason(changes, sigmas, full, why):
    assert why in plan_stages(settings(**changes), sigmas, full)


def test_the_picture_is_always_finished_at_full_size():
    plan = plan_stages(settings(delta=0.5, spectrum="custom", amplitude=1e-6, exponent=1.0), shifted(10), (32, 32))
    assert plan.stages[-1].r == 1.0 and plan.stages[-1].last - plan.stages[-1].first == 1


def test_settings_are_refused_by_name_value_and_range():
    for bad in (
        {"stages": ()}, {"stages": (0.5,)}, {"stages": (0.05, 1)}, {"stages": "0.5"}, {"switches": (0.5, 0.4)},
        {"switches": (0.0,)}, {"delta": 0}, {"method": "bilinear"}, {"min_side": 1}, {"spectrum": "SD3"},
    ):  # fmt: skip
        with pytest.raises(StrettoError, match=f"Stretto Progressive Resolution: {next(iter(bad))} is "):
            ResolutionSettings(**bad)
    with pytest.raises(StrettoError, match="say at which shares"):
        ResolutionSettings(stages=(1.0, 0.5, 1.0))
    with pytest.raises(StrettoError, match="which Coupled and Corrected can"):
        ResolutionSettings(stages=(1.0, 0.5, 1.0), switches=(0.2, 0.6), method=SPEED)
    with pytest.raises(StrettoError, match="stages is 'half'"):
        parse_numbers("stages", "half")
    assert parse_numbers("stages", "0.5, 0.75;1") == [0.5, 0.75, 1.0]


def test_the_technique_is_off_with_a_reason_and_forced_runs_stay_whole():
    technique = ResolutionTechnique()
    sigmas = shifted(10)

    def outcome(sampler="euler", obstacle=None, force=False, **changes):
        facts = Facts(None, None, traits_of(sampler), Schedule(sigmas), (1, 16, 32, 32), stage_obstacle=obstacle)
        facts = type("F", (), {**facts.__dict__, "obstacle": lambda self=None: None})()
        return technique.resolve(Request("resolution", {"min_side": 2, **changes}, force=force), facts)

    assert outcome().status == "active" and "steps 1 to" in outcome().reason
    assert outcome(obstacle="not a flow").reason == "not a flow"
    assert outcome(stages=[1.0]).status == "off"
    assert [s.r for s in outcome(stages=[1.0], force=True).session.plan.stages] == [1.0]
    assert "needs 3 steps in a stage" in outcome("unipc", switches=[0.2]).reason
    assert "begins anew at every switch" in outcome("dpmpp_2m").reason
    assert "the first noise level is 14" in run_stages(settings(), traits_of("euler"), (14.0, 0.0), (1, 4, 32, 32))


# The path


class GaussianFlow:
    """Exact velocity of a flow whose data is Gaussian with independent DCT coefficients, at any size."""

    def __init__(self, full, seed=3):
        rows, columns = torch.arange(full[0], dtype=torch.float64), torch.arange(full[1], dtype=torch.float64)
        self.full = full
        self.power = 40.0 * (1.0 + rows[:, None] ** 2 + columns**2) ** -0.9
        self.mean = noise(*full, seed=seed) * self.power.sqrt()

    def denoised(self, x, sigma):
        r = ratio(self.full, x.shape[-2:])
        power = self.power[: x.shape[-2], : x.shape[-1]] / r**2
        mean = self.mean[: x.shape[-2], : x.shape[-1]] / r
        keep = 1.0 - sigma
        return idct(mean + keep * power / (keep**2 * power + sigma**2) * (dct(x) - keep * mean))


def euler(flow, x, sigmas, seen=None):
    """Sample; the last prediction of the picture is left in ``seen``."""
    for now, then in itertools.pairwise(sigmas):
        denoised = flow.denoised(x, now)
        if seen is not None:
            seen["denoised"] = denoised
        x = x + (then - now) * (x - denoised) / now
    return x


def in_stages(flow, plan, start, clean=None, starts=None):
    """Run the stages of ``plan``; returns the result and what each stage ended with."""
    path = Path(plan, start, torch.zeros_like(start) if clean is None else clean, seed=5)
    x, ends, seen = path.start(), [], {}
    for place, stage in enumerate(plan.stages):
        x = euler(flow, x, stage.sigmas, seen)
        ends.append(x)
        if place + 1 < len(plan.stages):
            x = path.switch(place, x, seen["denoised"])
            if starts is not None:
                starts.append(x)
    return x, ends


@pytest.mark.parametrize(("full", "stages", "switches"), [
    ((16, 16), (0.5, 1.0), (0.4,)),
    ((15, 9), (0.6, 1.0), (0.5,)),
    ((24, 16), (0.25, 0.5, 1.0), (0.2, 0.4)),
])  # fmt: skip
def test_the_low_band_of_a_gaussian_flow_is_that_of_the_full_run(full, stages, switches):
    flow, sigmas, start = GaussianFlow(full), shifted(30), noise(1, 2, *full)
    plan = plan_stages(settings(stages=stages, switches=switches), sigmas, full)
    _, ends = in_stages(flow, plan, start)
    height, width = plan.stages[0].size
    for stage, end in zip(plan.stages[:-1], ends):
        truth = dct(euler(flow, start, sigmas[: stage.last + 1]))
        low = dct(end * gain(stage.sigmas[-1], stage.r))[..., :height, :width]
        torch.testing.assert_close(low, truth[..., :height, :width], atol=EXACT, rtol=0)
    truth, result = euler(flow, start, sigmas), ends[-1]
    torch.testing.assert_close(dct(result)[..., :height, :width], dct(truth)[..., :height, :width], atol=1e-11, rtol=0)


def test_starting_from_a_picture_keeps_its_detail():
    """Denoise below 1: both bands start on the full run's path."""
    sigmas, start, picture = (
        shifted(30)[6:],
        noise(1, 2, 16, 16),
        noise(1, 2, 16, 16, seed=9),
    )
    plan = plan_stages(settings(switches=(0.01,)), sigmas, (16, 16))
    assert isinstance(plan, str)  # rounds to no step at all
    plan = plan_stages(settings(switches=(0.2,)), sigmas, (16, 16))
    begun = sigmas[0] * start + (1 - sigmas[0]) * picture
    path = Path(plan, start, picture)
    small = path.start()
    torch.testing.assert_close(small * gain(plan.stages[0].sigmas[0], 2.0), shrink(begun, (8, 8)), atol=EXACT, rtol=0)
    x = path.switch(0, small)  # no step taken: only the noise level of the label differs in the high band
    expected = sigmas[plan.stages[0].last] * start + (1 - sigmas[plan.stages[0].last]) * picture
    high = torch.ones(16, 16, dtype=torch.bool)
    high[:8, :8] = False
    torch.testing.assert_close(dct(x)[..., high], dct(expected)[..., high], atol=EXACT, rtol=0)


def test_going_down_and_up_again_keeps_noise_and_found_detail():
    """On a straight path the detail found before a down-switch is exactly there after the up-switch."""
    full, sigmas = (16, 16), shifted(20)
    plan = plan_stages(settings(stages=(1.0, 0.5, 1.0), switches=(0.2, 0.5)), sigmas, full)
    assert [s.r for s in plan.stages] == [1.0, 2.0, 1.0]
    start, picture = noise(1, 2, *full), noise(1, 2, *full, seed=4)

    class Straight:
        def denoised(self, x, sigma):
            return picture if x.shape[-1] == 16 else shrink(picture, (8, 8)) / 2.0

    starts = []
    result, ends = in_stages(Straight(), plan, start, starts=starts)
    up_again = sigmas[plan.stages[1].last]
    torch.testing.assert_close(starts[1], up_again * start + (1 - up_again) * picture, atol=EXACT, rtol=0)
    torch.testing.assert_close(result, picture, atol=EXACT, rtol=0)
    for stage, end in zip(plan.stages, ends):
        sigma = sigmas[stage.last]
        expected = sigma * start + (1 - sigma) * picture
        torch.testing.assert_close(
            end * gain(stage.sigmas[-1], stage.r), shrink(expected, stage.size), atol=EXACT, rtol=0
        )


def test_equal_sizes_pass_through_and_one_stage_is_the_plain_run():
    flow, sigmas, start = GaussianFlow((12, 12)), shifted(12), noise(1, 1, 12, 12)
    plan = plan_stages(settings(stages=(0.5, 1.0, 1.0), switches=(0.25, 0.5)), sigmas, (12, 12))
    path = Path(plan, start, torch.zeros_like(start))
    assert path.switch(1, start) is start
    from stretto.acceleration.resolution.stages import whole_run

    result, _ = in_stages(flow, whole_run(sigmas, (12, 12)), start)
    assert torch.equal(result, euler(flow, start, sigmas))


class MixtureFlow:
    """Exact velocity of a flow of a Gaussian mixture over DCT coefficients with a power-law spectrum, at any size."""

    def __init__(self, full=(32, 32), components=8, seed=0):
        rows = torch.arange(full[0], dtype=torch.float64)
        self.full = full
        square = 1.0 + rows[:, None] ** 2 + rows**2
        self.means = (
            noise(components, *full, seed=seed) * (200.0 * square**-1.5).sqrt()
        )  # coarse structure tells them apart
        self.variance = 50.0 * square**-1.0

    def denoised(self, x, sigma):
        height, width = x.shape[-2:]
        r, keep = ratio(self.full, (height, width)), 1.0 - sigma
        means, variance = self.means[:, :height, :width] / r, self.variance[:height, :width] / r**2
        state = dct(x)[:, None]
        total = keep**2 * variance + sigma**2
        share = torch.softmax((-0.5 * (state - keep * means) ** 2 / total).sum((-1, -2)), 1)
        clean = means + keep * variance / total * (state - keep * means)
        return idct((share[..., None, None] * clean).sum(1))


def decibels(a, b):
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


@pytest.mark.parametrize("switch", [0.2, 0.4])
def test_the_coupled_form_beats_the_published_ones_on_a_mixture(switch):
    """At equal cost, in dB to the full run, by a wide margin."""
    flow, sigmas, start = MixtureFlow(), shifted(30), noise(6, 32, 32, seed=2)
    truth = euler(flow, start, sigmas)
    found = {}
    for method in (COUPLED, SPEED, FRESH):
        plan = plan_stages(settings(method=method, switches=(switch,)), sigmas, (32, 32))
        assert plan.cost == pytest.approx(1 - 0.75 * switch)
        found[method] = decibels(in_stages(flow, plan, start)[0], truth)
    assert found[COUPLED] > max(found[SPEED], found[FRESH]) + 3.0


def test_plans_are_written_as_json():
    plan = plan_stages(settings(switches=(0.3,)), shifted(10), (32, 32))
    assert isinstance(plan, StagePlan)
    document = plan.to_json()
    assert [stage["steps"] for stage in document["stages"]] == [[0, 3], [3, 10]]
    assert document["stages"][0]["size"] == [16, 16] and document["cost"] == pytest.approx(0.775)


# Corrected runs


def corrected(flow, plan, start):
    """Sample with Euler at full size, predictions corrected; returns the result and the sizes that were predicted at."""
    correction, x, sizes = Correction(plan), start, []

    def predict(latent, sigma, place=None):
        sizes.append(latent.shape[-1])
        return flow.denoised(latent, sigma)

    for now, then in itertools.pairwise(plan.sigmas):
        denoised = correction.predict(x, now, partial(predict, x, now), predict)
        x = x + (then - now) * (x - denoised) / now
    return x, sizes


def test_corrected_plans_have_anchors_and_their_work_counts():
    plan = plan_stages(settings(method=CORRECTED, switches=(0.8,), refresh=4), shifted(10), (32, 32))
    assert [plan.small_stage(step) for step in range(10)] == [None, 0, 0, 0, None, 0, 0, 0, None, None]
    assert plan.small_after(0) == (0,) and plan.small_after(8) == ()
    assert plan.cost == pytest.approx((4 * 1 + 6 * 0.25 + 2 * 0.25) / 10)
    assert "2 of the small ones also at full size" in plan.words()
    assert plan_stages(settings(switches=(0.8,)), shifted(10), (32, 32)).refresh == 0
    result, sizes = corrected(GaussianFlow((32, 32)), plan, noise(1, 1, 32, 32))
    assert sizes == [32, 16, 16, 16, 16, 32, 16, 16, 16, 16, 32, 32] and torch.isfinite(result).all()


@pytest.mark.parametrize(("full", "stages", "switches"), [
    ((16, 16), (0.5, 1.0), (0.6,)), ((15, 9), (0.6, 1.0), (0.5,)), ((24, 16), (0.25, 0.5, 1.0), (0.2, 0.6)),
])  # fmt: skip
def test_the_low_band_of_a_corrected_gaussian_flow_is_that_of_the_full_run(full, stages, switches):
    flow, sigmas, start = GaussianFlow(full), shifted(30), noise(1, 2, *full)
    plan = plan_stages(settings(method=CORRECTED, stages=stages, switches=switches), sigmas, full)
    height, width = plan.stages[0].size
    truth, (result, _) = euler(flow, start, sigmas), corrected(flow, plan, start)
    torch.testing.assert_close(dct(result)[..., :height, :width], dct(truth)[..., :height, :width], atol=EXACT, rtol=0)


def test_what_small_predictions_always_miss_is_put_back_exactly():
    """An error of the small network's output that does not change over the run leaves no trace; coupled stages keep it."""
    full, sigmas, start = (16, 16), shifted(20), noise(1, 1, 16, 16)
    bias = noise(1, 1, 8, 8, seed=8)

    class Biased(GaussianFlow):
        def denoised(self, x, sigma):
            return super().denoised(x, sigma) - (sigma * bias if x.shape[-1] == 8 else 0.0)

    flow, found = Biased(full), {}
    truth = euler(flow, start, sigmas)
    for method, run in ((CORRECTED, corrected), (COUPLED, in_stages)):
        plan = plan_stages(settings(method=method, switches=(0.5,)), sigmas, full)
        found[method] = float((dct(run(flow, plan, start)[0]) - dct(truth))[..., :8, :8].abs().max())
    assert found[CORRECTED] < EXACT < 0.1 < found[COUPLED]


@pytest.mark.parametrize("switch", [0.4, 0.6])
def test_the_corrected_form_beats_coupled_stages_and_fewer_steps_of_as_much_work_on_a_mixture(switch):
    flow, sigmas, start = MixtureFlow(), shifted(30), noise(6, 32, 32, seed=2)
    truth = euler(flow, start, sigmas)
    plan = plan_stages(settings(method=CORRECTED, switches=(switch,)), sigmas, (32, 32))
    found = decibels(corrected(flow, plan, start)[0], truth)
    coupled = plan_stages(settings(switches=((1 - plan.cost) / 0.75,)), sigmas, (32, 32))
    fewer = euler(flow, start, shifted(math.ceil(plan.cost * 30)))
    assert found > max(decibels(in_stages(flow, coupled, start)[0], truth), decibels(fewer, truth)) + 10.0
