"""Plain against plain: no verdict, whatever the noise; and a true difference is still found."""

import itertools

import numpy as np
import pytest

from stretto.web.panel.measure.arms import Arm
from stretto.web.panel.measure.client import ComfyClient
from stretto.web.panel.measure.compare import arms_of, compare
from stretto.web.panel.measure.interleave import cells_of, schedule
from stretto.web.panel.measure.metrics import paired_ratios, spread
from stretto.web.panel.measure.summary import verdict_of

SEEDS = 2000


def rounds(rng, count, noise, drift, factor=1.0):
    """Ratios of `count` interleaved rounds of two arms on a machine with noise, drift and now and then a pause."""
    arms = [Arm("plain", "Plain", {}, "plain"), Arm("again", "Again", {})]
    seconds = {}
    for clock, slot in enumerate(schedule(arms, cells_of(["a"], [1]), count, 0)):
        pause = 1.5 if rng.random() < 0.05 else 1.0
        cost = (1 + drift * clock) * float(np.exp(rng.normal() * noise)) * pause
        seconds[slot.round, slot.arm.name] = cost / (factor if slot.arm.name == "again" else 1.0)
    return paired_ratios(*([seconds[number, name] for number in range(count)] for name in ("plain", "again")))


@pytest.mark.parametrize("count,most", [(3, 0.015), (4, 0.015), (5, 0.015), (6, 0.05), (9, 0.05), (12, 0.05)])
@pytest.mark.parametrize("noise,drift", [(0.01, 0.0), (0.03, 0.01), (0.1, 0.0)])
def test_false_verdicts_are_rarer_than_the_interval_says(count, most, noise, drift):
    """5 % is what a 95 % interval promises; below six rounds, where there is none, it is 1 %, up to the luck of the draw."""
    rng = np.random.default_rng([2026, count])
    false, covered = 0, 0
    for _ in range(SEEDS):
        ratios = rounds(rng, count, noise, drift)
        false += verdict_of(ratios) in ("faster", "slower")
        interval = spread(ratios)
        covered += interval.low <= 1.0 <= interval.high
    assert false / SEEDS <= most
    assert count < 6 or covered / SEEDS >= 0.93, "1 lies in the printed interval"


@pytest.mark.parametrize("count,factor,least", [(3, 1.7, 0.65), (6, 1.3, 0.65), (9, 1.1, 0.75), (12, 1.1, 0.9)])
def test_true_differences_are_found(count, factor, least):
    rng = np.random.default_rng(1)
    found = sum(verdict_of(rounds(rng, count, 0.02, 0.002, factor)) == "faster" for _ in range(300))
    assert found / 300 >= least


def test_drift_is_no_difference():
    for drift in (0.02, -0.004, 0.1):
        ratios = rounds(np.random.default_rng(0), 24, 0.0, drift)
        assert spread(ratios).median == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_server_with_noise(fake, workflow, tmp_path, seed):
    """The whole way, pictures and words included."""
    noise = np.exp(np.random.default_rng(seed).normal(size=100) * 0.05)
    clock = itertools.count()
    _, url = fake(drift=lambda number: float(noise[next(clock)]) * (1 + 0.003 * number))
    plain, _ = arms_of([("x", workflow)])
    with ComfyClient(url) as client:
        report = compare(
            client, plain, [Arm("again", "Again", plain)], ["a"], [7], 4, 1, tmp_path, 0, competitor=False
        )
    again = report["arms"][1]
    assert again["verdict"] in ("no measurable difference", "too few rounds for a verdict")
    assert again["ratio"]["sampler"]["minimum"] <= again["ratio"]["sampler"]["median"] <= again["ratio"]["sampler"]["maximum"]
    assert again["likeness"] == "identical" and "identical pictures" in report["headline"][0]
    assert again["quality"]["psnr"]["mean"] == "inf" and again["quality"]["ssim"]["worst"] == 1.0
    assert again["quality"]["flip"] == {"mean": 0.0, "worst": 0.0, "count": 1, "identical": 1}
