"""Our DBCache, its forecasting form and static masks against cache-dit, step by step on one network.

Same weights, same latents; decisions must be equal and outputs within :data:`CLOSE`. cache-dit wraps every list of
blocks by itself, so the network with one list (Wan) stands for all. What differs has a test of its own:

====================  ==========================================  ===========================================
what                  cache-dit                                   this pack
====================  ==========================================  ===========================================
several block lists   one cache per list, each with Fn and Bn     one range over all blocks
static masks          the first block runs on skipped steps too   "SCM" skips the whole stack
masks for 28 steps    published bins                              the same bins
forecast of residual  differences from the fourth step on         differences from the second snapshot on
====================  ==========================================  ===========================================
"""

from dataclasses import replace

import pytest
import torch

from stretto.acceleration.caching.decision import MaskPolicy
from stretto.acceleration.caching.forecast import newton_weights, taylor_weights
from stretto.acceleration.caching.masks import parse_mask, scm_mask, strip
from stretto.acceleration.caching.store import SnapshotStore
from stretto.acceleration.caching.tap import BLOCKS, Tap

from .drive import farthest, run_ours, run_theirs, session_of
from .networks import SUBJECTS, smooth_sequence
from .packages import required

required("diffusers")
cache_dit = required("cache_dit")

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
STEPS = 20
WAN, FLUX = SUBJECTS
#: What the four blocks of Wan add after the first.
BEHIND_FIRST = Tap(BLOCKS, 1, 4, residual=True)


def theirs(sequence, order=None, subject=WAN, lists=None, **settings):
    """Run under cache-dit's DBCache of all block lists or of the first ``lists``; ``order`` adds its TaylorSeer."""
    network = subject.make()
    lists = [getattr(network, name) for _, name in subject.descriptor.block_lists[:lists]]
    pattern = {"wan": cache_dit.ForwardPattern.Pattern_2, "flux": cache_dit.ForwardPattern.Pattern_1}[subject.name]
    adapter = cache_dit.BlockAdapter(
        transformer=network,
        blocks=lists if len(lists) > 1 else lists[0],
        forward_pattern=[pattern] * len(lists) if len(lists) > 1 else pattern,
    )
    config = cache_dit.DBCacheConfig(
        **{
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "max_warmup_steps": 4,
            "num_inference_steps": sequence.steps,
            **settings,
        }
    )
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    try:
        return run_theirs(subject, network, sequence, context=False)
    finally:
        cache_dit.disable_cache(adapter)


def ours(sequence, weights=None, policy=None, tap=None, depth=1, subject=WAN, **settings):
    """Run a named method; what else is given replaces that part of its session."""
    network = subject.make()
    session = session_of(subject, network, sequence, **{"warmup": 4, "tail": 0, **settings})
    if weights is not None:
        session.weights, session.store = weights, SnapshotStore(depth, 1 << 30)
    if policy is not None:
        session.decision.policy = policy
    if tap is not None:
        session.tap = tap
    return run_ours(subject, network, sequence, session)


def assert_same(first, second):
    assert first.strip == second.strip
    assert 2 < first.strip.count(".") < STEPS - 3 and "#" in first.strip.lstrip("#")
    for step, (a, b) in enumerate(zip(first.outputs, second.outputs, strict=True)):
        assert torch.allclose(a, b, **CLOSE), f"step {step}: {(a - b).abs().max():.2e}"


@pytest.fixture
def sequence():
    return smooth_sequence(WAN.latent_shape, STEPS)


@pytest.mark.parametrize("threshold", [0.06, 0.1])
def test_one_block_in_front_is_first_block_cache(sequence, threshold):
    run = ours(sequence, method="FBCache", threshold=threshold)
    assert_same(run, theirs(sequence, residual_diff_threshold=threshold))


@pytest.mark.parametrize(("front", "behind"), [(1, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("most", [0, 2])
def test_double_block_cache(sequence, front, behind, most):
    """Blocks that always run on both ends, and the limit of skips in a row (theirs: -1 for none)."""
    run = ours(
        sequence, method="DBCache", threshold=0.12, first_blocks=front, last_blocks=behind, max_skips=most
    )
    settings = {"Fn_compute_blocks": front, "Bn_compute_blocks": behind, "max_continuous_cached_steps": most or -1}
    assert_same(run, theirs(sequence, residual_diff_threshold=0.12, **settings))


def test_at_the_threshold_itself_both_compute(sequence):
    loose = ours(sequence, method="FBCache", threshold=0.1)
    step = loose.strip.index("#", 4)
    run = ours(sequence, method="FBCache", threshold=loose.signals[step])
    assert run.strip[step] == "#"
    assert_same(run, theirs(sequence, residual_diff_threshold=loose.signals[step]))


@pytest.mark.parametrize("order", [1, 2])
def test_forecast_residual(sequence, order):
    """DBCache with TaylorSeer: our threshold policy and our recursion over snapshots of the residual."""
    run = ours(
        sequence,
        lambda at, target: taylor_weights(at, target, order),
        depth=order + 1,
        method="FBCache",
        threshold=0.08,
        warmup=6,
    )
    assert_same(run, theirs(sequence, order, residual_diff_threshold=0.08, max_warmup_steps=6))
    if order == 2:
        newton = ours(
            sequence,
            lambda at, target: newton_weights(at, target, order),
            depth=order + 1,
            method="FBCache",
            threshold=0.08,
            warmup=6,
        )
        assert newton.strip == run.strip and max(farthest(newton, run)) > 1e-3


@pytest.mark.parametrize(("warmup", "late"), [(2, True), (3, True), (4, False)])
def test_their_forecast_starts_later(sequence, warmup, late):
    """Differences begin with their fourth step. After fewer we have a line, and they still reuse; later all agree."""
    mask = tuple(step < warmup or (step - warmup) % 3 == 2 for step in range(STEPS))
    settings = {"steps_computation_mask": [int(c) for c in mask], "steps_computation_policy": "static"}
    other = theirs(sequence, 1, max_warmup_steps=warmup, **settings)
    session = {"method": "SCM", "warmup": warmup, "tap": BEHIND_FIRST, "policy": MaskPolicy(mask)}
    line = ours(sequence, lambda at, target: newton_weights(at, target, 1), depth=2, **session)
    reuse = ours(sequence, **session)
    assert other.strip == line.strip == reuse.strip == strip(mask)
    first = line.strip.index(".")
    expected = reuse if late else line
    assert torch.allclose(other.outputs[first], expected.outputs[first], **CLOSE)
    assert (line.outputs[first] - reuse.outputs[first]).abs().max() > 1e-3
    for step in range(7, STEPS):
        assert torch.allclose(other.outputs[step], line.outputs[step], **CLOSE)


def test_static_masks_run_the_first_block(sequence):
    """Theirs equals our residual cache behind the first block; "SCM" skips that block too, and so differs."""
    mask = parse_mask("######.#...#....#...")
    policy = MaskPolicy(mask)
    settings = {"steps_computation_mask": [int(c) for c in mask], "steps_computation_policy": "static"}
    other = theirs(sequence, **settings)
    assert_same(ours(sequence, policy=policy, tap=BEHIND_FIRST, method="SCM"), other)
    whole = ours(sequence, policy=replace(policy), method="SCM")
    assert whole.strip == other.strip
    distances = farthest(whole, other)
    assert all((distance > 1e-4) == (c == ".") for c, distance in zip(other.strip, distances))


@pytest.mark.parametrize("level", ["slow", "medium", "fast", "ultra"])
def test_static_mask_bins(level):
    assert list(map(int, scm_mask(level, 28))) == cache_dit.steps_mask(total_steps=28, mask_policy=level)


@pytest.mark.parametrize("threshold", [0.4, 0.5])
def test_both_streams_of_a_range_that_other_blocks_follow(threshold):
    """FLUX with its double blocks cached and its single blocks always run: they read the text's residual too."""
    flux = smooth_sequence(FLUX.latent_shape, STEPS)
    second = replace(FLUX, probe=lambda network: network.transformer_blocks[1].attn.to_q)
    other = theirs(flux, subject=second, lists=1, residual_diff_threshold=threshold)
    run = ours(flux, subject=FLUX, method="DBCache", threshold=threshold, first_blocks=1, last_blocks=2)
    assert_same(run, other)


def test_several_lists_have_a_cache_each():
    """FLUX's double and single blocks: on a skipped step theirs runs the first of each list, ours the first of all."""
    flux = smooth_sequence(FLUX.latent_shape, STEPS)
    network = FLUX.make()
    places = {
        "first double": lambda network: network.transformer_blocks[0].attn.to_q,
        "second double": lambda network: network.transformer_blocks[1].attn.to_q,
        "first single": lambda network: network.single_transformer_blocks[0].proj_mlp,
        "second single": lambda network: network.single_transformer_blocks[1].proj_mlp,
    }
    counts = dict.fromkeys(places, 0)
    for name, place in places.items():

        def count(*_, name=name):
            counts[name] += 1

        place(network).register_forward_hook(count)
    session = session_of(FLUX, network, flux, method="FBCache", threshold=0.45, warmup=4, tail=0)
    computed = run_ours(FLUX, network, flux, session).strip.count("#")
    assert 4 < computed < STEPS
    assert list(counts.values()) == [STEPS, computed, computed, computed]
    strips = {
        name: theirs(flux, subject=replace(FLUX, probe=place), residual_diff_threshold=0.45).strip
        for name, place in places.items()
    }
    assert strips["first double"] == strips["first single"] == "#" * STEPS
    # The double blocks decide as ours do; the single blocks decide for themselves, and differently.
    assert strips["second double"].count("#") < STEPS > strips["second single"].count("#")
    assert strips["second double"] != strips["second single"]
