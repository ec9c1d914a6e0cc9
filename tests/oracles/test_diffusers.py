"""Our First-Block-Cache, TaylorSeer and MagCache against the hooks of diffusers, step by step on one network.

Both engines get the same weights and the same latents. Decisions must be equal, and outputs within :data:`CLOSE`
(fp32, |output| about 1; reused residuals come out equal to the bit, a forecast's sums are in another order). Where a
definition differs, a test of its own shows where, and by how much:

===================  ===================================  ================================================
what                 diffusers                            this pack
===================  ===================================  ================================================
FBCache threshold    change == threshold skips            change == threshold computes (as ParaAttention)
TaylorSeer schedule  the first gap has one skipped step   every gap has ``interval - 1`` skipped steps
TaylorSeer lite      forecasts the network's output       forecasts the last block; the head runs at the step
TaylorSeer factors   stored in bf16 unless told           snapshots in the network's type, sums in fp32
order 2 and up       the paper's recursion                the same under "TaylorSeer"; Newton's form in "Taylor"
MagCache threshold   error == threshold skips             error == threshold computes
MagCache retention   ``int(ratio * steps + 0.5)`` steps   ``int(ratio * steps)`` steps, as published
MagCache curve       nearest index                        nearest index below, as published
MagCache first step  computed, and starts the sum over    part of the sum where nothing is retained
===================  ===================================  ================================================
"""

import ast
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from stretto.acceleration.caching import technique
from stretto.acceleration.caching.decision import MaskPolicy
from stretto.acceleration.caching.magnitude import MagnitudeCurve, magnitude_mask, retained_steps, stretch_ratios
from stretto.acceleration.caching.masks import parse_mask, strip
from stretto.acceleration.caching.profile import Profile

from .drive import farthest, run_ours, run_theirs, session_of
from .networks import SUBJECTS, smooth_sequence
from .packages import required

required("diffusers")
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig  # noqa: E402
from diffusers.hooks import MagCacheConfig  # noqa: E402
from diffusers.hooks.mag_cache import nearest_interp  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
STEPS = 20
WAN = SUBJECTS[0]

both = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def theirs(subject, sequence, config):
    network = subject.make()
    network.enable_cache(config)
    return run_theirs(subject, network, sequence)


def ours(subject, sequence, mask=None, **settings):
    """Run a named method; ``mask`` replaces its schedule and nothing else."""
    network = subject.make()
    session = session_of(subject, network, sequence, **{"warmup": 0, "tail": 0, **settings})
    if mask is not None:
        session.decision.policy = MaskPolicy(mask)
    return run_ours(subject, network, sequence, session)


def assert_same(first, second):
    assert first.strip == second.strip
    for step, (a, b) in enumerate(zip(first.outputs, second.outputs, strict=True)):
        assert torch.allclose(a, b, **CLOSE), f"step {step}: {(a - b).abs().max():.2e}"


def assert_lively(run):
    """A comparison says something only where some steps were skipped and some computed after that."""
    assert 2 < run.strip.count(".") < STEPS - 3 and "#" in run.strip.lstrip("#")


@both
def test_the_adapter_changes_nothing_by_itself(subject):
    """Engaged but computing every step, the network gives the bits it gives alone."""
    sequence = smooth_sequence(subject.latent_shape, STEPS)
    plain = run_theirs(subject, subject.make(), sequence, context=False)
    engaged = ours(subject, sequence, method="FBCache", threshold=1e-9)
    assert plain.strip == engaged.strip == "#" * STEPS
    assert all(map(torch.equal, plain.outputs, engaged.outputs))


# First-Block-Cache


@pytest.mark.parametrize(
    ("subject", "threshold"), [(SUBJECTS[0], 0.06), (SUBJECTS[0], 0.1), (SUBJECTS[1], 0.35), (SUBJECTS[1], 0.45)]
)
def test_first_block_cache(subject, threshold):
    """Reference, residuals of both streams and the change itself agree; neither side has a warm-up here."""
    sequence = smooth_sequence(subject.latent_shape, STEPS)
    run = ours(subject, sequence, method="FBCache", threshold=threshold)
    assert_lively(run)
    assert_same(run, theirs(subject, sequence, FirstBlockCacheConfig(threshold)))


def test_first_block_cache_at_the_threshold_itself():
    """Their comparison is ``>``, ours ``>=``: a change of exactly the threshold parts them, one ulp joins them."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    loose = ours(WAN, sequence, method="FBCache", threshold=0.1)
    step = loose.strip.index("#", 1)
    exact = loose.signals[step]
    run = ours(WAN, sequence, method="FBCache", threshold=exact)
    parted = theirs(WAN, sequence, FirstBlockCacheConfig(exact))
    assert run.signals[step] == exact
    assert run.strip[:step] == parted.strip[:step]
    assert (run.strip[step], parted.strip[step]) == ("#", ".")
    assert_same(run, theirs(WAN, sequence, FirstBlockCacheConfig(math.nextafter(exact, 0.0))))


# TaylorSeer


def last_block_config(subject, **settings):
    """TaylorSeer of diffusers where ours has it: the last block is forecast, the head runs."""
    count = [len(getattr(subject.make(), name)) for _, name in subject.descriptor.block_lists]
    names = [f"{name}.{i}" for (_, name), n in zip(subject.descriptor.block_lists, count) for i in range(n)]
    patterns = [name.replace(".", r"\.") for name in names]
    return TaylorSeerCacheConfig(
        skip_predict_identifiers=patterns[:-1],
        cache_identifiers=patterns[-1:],
        **{"taylor_factors_dtype": torch.float32, **settings},
    )


@both
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_of_the_last_block(subject, order):
    """At every second step the schedules are one, cool-down is our tail, and all orders run the same recursion."""
    sequence = smooth_sequence(subject.latent_shape, STEPS)
    run = ours(subject, sequence, method="TaylorSeer", interval=2, order=order, warmup=4, tail=3)
    assert run.strip == "####.#.#.#.#.#.#.###"
    settings = {"cache_interval": 2, "disable_cache_before_step": 4, "disable_cache_after_step": 17, "max_order": order}
    assert_same(run, theirs(subject, sequence, last_block_config(subject, **settings)))


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("warmup", [1, 3])
def test_taylorseer_schedule(interval, warmup):
    """Theirs computes at ``warmup + 1`` again, whatever the interval; from there on both have one period."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    gap = "." * (interval - 1)
    run = ours(WAN, sequence, method="TaylorSeer", interval=interval, warmup=warmup)
    settings = {"cache_interval": interval, "disable_cache_before_step": warmup}
    other = theirs(WAN, sequence, last_block_config(WAN, **settings))
    assert run.strip == ("#" * warmup + (gap + "#") * STEPS)[:STEPS]
    assert other.strip == ("#" * warmup + "." + ("#" + gap) * STEPS)[:STEPS]
    assert (run.strip == other.strip) == (interval == 2)


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_under_their_schedule(order):
    """Unequal gaps (1 during the warm-up, 2, then 5): the recursion divides by the newest gap on both sides."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    settings = {"cache_interval": 5, "disable_cache_before_step": 3, "max_order": order}
    other = theirs(WAN, sequence, last_block_config(WAN, **settings))
    assert other.strip == "###.#....#....#....#"
    assert_same(ours(WAN, sequence, parse_mask(other.strip), method="TaylorSeer", order=order), other)


LITE = {
    "use_lite_mode": True,
    "cache_interval": 2,
    "disable_cache_before_step": 4,
    "taylor_factors_dtype": torch.float32,
}


@both
def test_taylorseer_lite_is_our_output_method(subject):
    """Lite forecasts what the head yields. Ours forecasts what it is given, and so follows the step's modulation."""
    sequence = smooth_sequence(subject.latent_shape, STEPS)
    lite = theirs(subject, sequence, TaylorSeerCacheConfig(**LITE))
    assert_same(ours(subject, sequence, method="Output", interval=2, warmup=4), lite)
    blocks = ours(subject, sequence, method="TaylorSeer", interval=2, warmup=4)
    assert blocks.strip == lite.strip
    for computed, distance in zip(blocks.strip, farthest(blocks, lite)):
        assert distance == 0 if computed == "#" else distance > 1e-4


def test_newton_differs_from_the_recursion_by_half_a_second_difference():
    """Order 2, equal gaps h, k steps ahead: Newton's form adds ``k h / 2`` times the second divided difference."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    lite = theirs(WAN, sequence, TaylorSeerCacheConfig(**LITE, max_order=2))
    newton = ours(WAN, sequence, method="Output", interval=2, warmup=4, order=2)
    assert newton.strip == lite.strip == "####.#.#.#.#.#.#.#.#"
    for step in range(8, STEPS, 2):
        newest, before, oldest = (lite.outputs[step - back] for back in (1, 3, 5))
        second = (newest - 2 * before + oldest) / 2**2
        assert torch.allclose(newton.outputs[step] - lite.outputs[step], second * 1 * 2 / 2, rtol=1e-4, atol=2e-6)
        assert second.abs().max() > 1e-3


def test_their_default_factors_are_rounded_to_bf16():
    """With order 1, one step ahead and gap 2: F_0, D_1 and the older F_1 in D_1 are rounded, each by 2^-8 at most."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    rounded = theirs(WAN, sequence, TaylorSeerCacheConfig(**{**LITE, "taylor_factors_dtype": torch.bfloat16}))
    run = ours(WAN, sequence, method="Output", interval=2, warmup=4)
    for step in range(6, STEPS, 2):
        newest, before = run.outputs[step - 1], run.outputs[step - 3]
        bound = 2**-8 * (newest.abs() + (newest - before).abs() / 2 + before.abs()) * (1 + 2**-7)
        error = (rounded.outputs[step] - run.outputs[step]).abs()
        assert (error <= bound + 1e-6).all()
        assert error.max() > 100 * CLOSE["atol"]


# MagCache

#: A residual that first grows and then shrinks, as FLUX's does; no partial sum of errors meets a threshold used here.
RATIOS = [1.0, 1.21, 1.117, 1.078, 1.0625, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.98, 1.016, 1.008, 1.0]
RATIOS += [0.996, 0.98, 0.965, 0.934, 0.891]


def magcache(**settings):
    return MagCacheConfig(**{"num_inference_steps": STEPS, "mag_ratios": RATIOS, "retention_ratio": 0.2, **settings})


@both
@pytest.mark.parametrize(("threshold", "most"), [(0.06, 3), (0.12, 2), (0.24, 5)])
def test_magcache(subject, threshold, most):
    """Accumulation, limit, retention and the residual of the whole stack agree."""
    sequence = smooth_sequence(subject.latent_shape, STEPS)
    mask = magnitude_mask(RATIOS, threshold, most, 0.2, STEPS)
    run = ours(subject, sequence, mask, method="FORA")
    assert_lively(run)
    assert_same(run, theirs(subject, sequence, magcache(threshold=threshold, max_skip_steps=most)))


@pytest.fixture
def known_curve(monkeypatch):
    """The random network has no published curve: let the technique find RATIOS."""
    sigmas = smooth_sequence(WAN.latent_shape, STEPS).sigmas
    curve = MagnitudeCurve.from_ratios(RATIOS, sigmas)
    monkeypatch.setattr(technique, "magnitude_curve", lambda *model: curve)


@pytest.mark.parametrize(("threshold", "most"), [(0.06, 3), (0.12, 2), (0.24, 5)])
def test_magcache_as_the_technique_runs_it(known_curve, threshold, most):
    """Our warm-up is their retention: no error is added up during it."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    run = ours(WAN, sequence, method="MagCache", threshold=threshold, max_skips=most, warmup=4)
    assert_same(run, theirs(WAN, sequence, magcache(threshold=threshold, max_skip_steps=most)))


def test_magcache_at_the_threshold_itself():
    """A quarter is exact in binary: their error of 0.25 still skips at a threshold of 0.25, ours computes."""
    sequence, ratios = smooth_sequence(WAN.latent_shape, STEPS), [1.0] * 8 + [1.25] + [1.0] * 11
    other = theirs(WAN, sequence, magcache(threshold=0.25, max_skip_steps=9, mag_ratios=ratios))
    mask = strip(magnitude_mask(ratios, 0.25, 9, 0.2, STEPS))
    assert other.strip == "####.....#.........#"
    assert mask == "####....#.........#."
    assert strip(magnitude_mask(ratios, math.nextafter(0.25, 1.0), 9, 0.2, STEPS)) == other.strip


@pytest.mark.parametrize(("ratio", "ours_keep", "theirs_keep"), [(0.25, 5, 5), (0.28, 5, 6), (0.1, 2, 2), (0.13, 2, 3)])
def test_magcache_retention(ratio, ours_keep, theirs_keep):
    sequence, ratios = smooth_sequence(WAN.latent_shape, STEPS), [1.0] * STEPS
    other = theirs(WAN, sequence, magcache(mag_ratios=ratios, retention_ratio=ratio, max_skip_steps=STEPS))
    assert strip(magnitude_mask(ratios, 0.06, STEPS, ratio, STEPS)) == "#" * ours_keep + "." * (STEPS - ours_keep)
    assert other.strip == "#" * theirs_keep + "." * (STEPS - theirs_keep)
    assert retained_steps(ratio, STEPS) == ours_keep


def test_magcache_without_retention():
    """Their first step finds nothing stored, computes and starts over; our mask has it as the first of K skips."""
    sequence, ratios = smooth_sequence(WAN.latent_shape, STEPS), [1.0] * STEPS
    other = theirs(WAN, sequence, magcache(mag_ratios=ratios, retention_ratio=0.0, max_skip_steps=4))
    assert other.strip == "#....#....#....#...."
    mask = magnitude_mask(ratios, 0.06, 4, 0.0, STEPS)
    assert strip(mask) == "....#....#....#....#"
    # Nothing is stored at the first step, so the session computes it all the same.
    assert ours(WAN, sequence, mask, method="FORA").strip == "#...#....#....#....#"


@pytest.mark.parametrize(("calibrated", "steps"), [(28, 20), (28, 50), (20, 20), (10, 19)])
def test_magcache_curves_at_another_number_of_steps(calibrated, steps):
    """Nearest index against nearest index below; the published code has ``int``, which is ours."""
    places = np.arange(steps) * (calibrated - 1) / (steps - 1)
    index = [float(i) for i in range(calibrated)]
    assert stretch_ratios(index, steps) == np.floor(places + 1e-9).tolist()
    nearest = nearest_interp(torch.tensor(index), steps).tolist()
    assert np.abs(np.asarray(nearest) - places).max() <= 0.5
    assert (nearest == stretch_ratios(index, steps)) == (calibrated == steps)


def test_magcache_calibration(capsys):
    """Their calibration averages the quotients of channel norms per token; a profile takes the norm of the whole."""
    sequence = smooth_sequence(WAN.latent_shape, STEPS)
    theirs(WAN, sequence, magcache(mag_ratios=None, calibrate=True))
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0"))
    network, entries, exits = WAN.make(), [], []
    network.blocks[0].register_forward_pre_hook(lambda module, args: entries.append(args[0].clone()))
    network.blocks[-1].register_forward_hook(lambda module, args, out: exits.append(out.clone()))
    run_theirs(WAN, network, sequence, context=False)
    residuals = [out - entry for entry, out in zip(entries, exits, strict=True)]
    logs = [float(torch.linalg.vector_norm(residual).log()) for residual in residuals]
    levels = tuple(1.0 - step / STEPS for step in range(STEPS + 1))
    measured = Profile(levels, tuple(range(STEPS)), np.zeros((STEPS, 1)), tuple(logs), 0.0).curve().ratios
    assert ast.literal_eval(printed) == pytest.approx(measured, rel=0.01)
    per_token = [(now.norm(dim=-1) / before.norm(dim=-1)).mean().item() for before, now in pairwise(residuals)]
    assert ast.literal_eval(printed)[1:] == pytest.approx(per_token, rel=1e-5)
    assert max(per_token) - min(per_token) > 0.005
