"""What a method's name means: where its decisions part from those of its nearest neighbour.

Every method is resolved from the table as a user's request is, and its decision is fed scripted signals.
"""

from types import SimpleNamespace

import pytest
import torch

from stretto.acceleration.caching import technique as technique_module
from stretto.acceleration.caching.magnitude import MagnitudeCurve
from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.evaluation import Branch, Call, Evaluation
from stretto.acceleration.facts import Facts
from stretto.acceleration.models import ModelDescriptor
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import schedule_of, traits_of

TOY = ModelDescriptor(
    family="toy",
    networks=("Toy",),
    block_lists=(("double_block", "blocks"),),
    hidden_size=lambda network: 1,
    tea_input=lambda network, args: args["img"],
)
NETWORK = SimpleNamespace(blocks=[None] * 6, patch_size=1, out_channels=1)
SHAPE = (1, 1, 2, 2)


def session_of(method, steps, **settings):
    """The session of a request for ``steps`` steps; no tail and the shortest warm-up unless told."""
    schedule = schedule_of([1.0 - i / steps for i in range(steps + 1)])
    facts = Facts(NETWORK, TOY, traits_of("euler"), schedule, SHAPE, branches=1)
    request = Request("cache", {"warmup": 1, "tail": 0, "method": method, **settings})
    outcome = CacheTechnique().resolve(request, facts)
    assert outcome.session is not None, outcome.reason
    return outcome.session


def tokens(value):
    """Four tokens of one channel: one value for all, or one each."""
    return torch.as_tensor(value, dtype=torch.float32).expand(4).reshape(1, 4, 1).clone()


def decide(session, probed=None, inputs=None, network=lambda x: x, stored=None, start=0.0):
    """Run the decision over scripted values and return the strip.

    The values are those of the probed tensor (``start`` went into its first block), of the network's input, or of what a
    computed step stores.
    """
    decision, strip, newest = session.decision, "", None
    for step in range(decision.steps):
        latent = torch.full(SHAPE, 1.0 if inputs is None else inputs[step])
        evaluation = Evaluation(step, 1.0 - step / decision.steps, float(step), step, latent)
        call = Call(evaluation, (Branch("cond", "a"),), 1, 4, latent, lambda out: out, lambda out: out)
        decision.begin(evaluation)
        if evaluation.pending:
            seen = tokens(probed[step]), float(step), None if decision.probe.raw else tokens(start)
            decision.settle(evaluation, decision.probe.measure("a", *seen))
            if not evaluation.skip:
                decision.probe.computed("a", *seen)
        if not evaluation.skip:
            if stored is not None:
                before, newest = newest, tokens(stored[step])
                decision.stored(call, newest, before)
            decision.computed(call, lambda latent=latent: network(latent))
        strip += "." if evaluation.skip else "#"
    return strip


def weights_of(session, snapshots, target):
    """The forecast's weights over snapshots (newest first)."""
    return session.weights([float(at) for at in snapshots[: session.store.depth]], float(target))


# Thresholds


def test_teacache_adds_up_what_first_block_cache_compares_with_its_reference():
    """A signal that swings 16, 17, 16, ... is never far from the last computed one, but travels 1/16 a step."""
    swinging = [16.0, 17.0] * 4
    assert decide(session_of("FBCache", 8, threshold=0.1), swinging) == "#......."
    assert decide(session_of("TeaCache", 8, threshold=0.1), swinging) == "#.#.#.#."


def test_teacache_and_first_block_cache_agree_on_a_drift():
    """One way, path and distance are the same but for what they are relative to."""
    drifting = [64.0 + step for step in range(8)]
    for method in ("FBCache", "TeaCache"):
        assert decide(session_of(method, 8, threshold=0.04), drifting) == "#..#..#."


def test_teacache_asks_the_input_and_easycache_what_it_does_to_the_output():
    """The input moves by 1/16 a step; the network's output hardly follows (gain 1/8 on top of 8)."""
    moving = [16.0 + step for step in range(10)]
    assert decide(session_of("TeaCache", 10, threshold=0.1), moving) == "#.#.#..#.."
    deaf = session_of("EasyCache", 10, threshold=0.1)
    assert decide(deaf, inputs=moving, network=lambda x: x / 8 + 8) == "##........"


def test_easycache_measures_from_the_previous_evaluation_not_from_the_last_computed_one():
    """ComfyUI's own EasyCache keeps the last computed input: on a steady walk its sum grows with the skips' square.

    Kappa is 2 and |v| 6 after two computed steps: 1/3 a step here, and 1/3 + 2/3 + 3/3 there.
    """
    inputs = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert decide(session_of("EasyCache", 6, threshold=0.95), inputs=inputs, network=lambda x: 2 * x + 4) == "##..#."
    from_last_computed = [sum(2 * distance / 6 for distance in range(1, n + 1)) for n in (1, 2)]
    assert from_last_computed == pytest.approx([1 / 3, 1.0])  # so core's computes at step 3, where ours still skips
    assert from_last_computed[1] >= 0.95


def test_adaptive_decides_like_easycache_and_forecasts():
    inputs, network = [float(step) for step in range(10)], lambda x: 2 * x + 4
    easy, adaptive = (session_of(method, 10, threshold=0.5, order=1) for method in ("EasyCache", "Adaptive"))
    assert decide(easy, inputs=inputs, network=network) == decide(adaptive, inputs=inputs, network=network)
    assert weights_of(easy, (2, 1), 3) == [1.0]
    assert weights_of(adaptive, (2, 1), 3) == [2.0, -1.0]


def test_confidence_gated_taylor_lets_a_straight_line_pass_that_first_block_cache_stops():
    """The line's forecast is exact, so the gate stays shut for ever; its distance from the last computed one grows."""
    line = [8.0 + step for step in range(10)]
    gated = decide(session_of("CG-Taylor", 10, threshold=0.15, order=1, warmup=2), line)
    assert gated == "##........"
    assert decide(session_of("FBCache", 10, threshold=0.15, warmup=2), line) == "##.#.#.#.."


def test_confidence_gated_taylor_computes_where_a_feature_jumps_and_taylor_where_the_clock_says():
    """A bend at step 5: the gate opens there, and until its snapshots know the new slope; an interval does not look."""
    bent = [8.0 + step for step in range(5)] + [32.0 + step for step in range(7)]
    gated = decide(session_of("CG-Taylor", 12, threshold=0.15, order=1, warmup=2), bent)
    assert gated == "##...#.#...."
    assert decide(session_of("Taylor", 12, interval=4, warmup=2)) == "##...#...#.."
    still = [8.0] * 12
    assert decide(session_of("CG-Taylor", 12, threshold=0.15, order=1, warmup=2), still) == "##.........."
    assert decide(session_of("Taylor", 12, interval=4, warmup=2), still) == "##...#...#.."


def test_speca_gets_stricter_along_the_run_where_confidence_gated_taylor_stays_as_it_is():
    """Ten percent more each step: reuse is wrong by 1/11 one step on. The threshold falls below that after a quarter."""
    growing = [1.1**step for step in range(8)]
    assert decide(session_of("CG-Taylor", 8, threshold=0.1, order=0), growing) == "#.#.#.#."
    assert decide(session_of("SpeCa", 8, threshold=0.1, order=0, decay=0.5), growing) == "#.######"
    assert decide(session_of("SpeCa", 8, threshold=0.1, order=0, decay=1.0), growing) == "#.#.#.#."
    assert decide(session_of("SpeCa", 8, threshold=0.1, order=0, decay=0.5, floor=0.095), growing) == "#.#.#.#."


def test_speca_counts_every_element_alike_where_confidence_gated_taylor_sees_the_large_ones():
    """Three tokens stand still, a tiny one doubles and halves: a thousandth of the mean, and a quarter of the elements."""
    flickering = [[8.0, 8.0, 8.0, 0.01 * (1 + step % 2)] for step in range(6)]
    assert decide(session_of("CG-Taylor", 6, threshold=0.1, order=0), flickering) == "#....."
    assert decide(session_of("SpeCa", 6, threshold=0.1, order=0, decay=1.0), flickering) == "######"


def test_speca_verifies_as_deep_as_it_is_told_and_drafts_by_taylors_recursion():
    gated, speca = session_of("CG-Taylor", 8, first_blocks=3), session_of("SpeCa", 8, first_blocks=3, order=2)
    assert (gated.decision.probe.blocks, gated.tap.first) == (1, 1)
    assert (speca.decision.probe.blocks, speca.tap.first, speca.tap.last) == (3, 3, 6)
    taylor = session_of("TaylorSeer", 8, order=2)
    assert weights_of(speca, (8, 6, 4), 11) == weights_of(taylor, (8, 6, 4), 11)


def test_a_gate_may_look_with_another_order_than_the_forecast():
    line = [8.0 + step for step in range(10)]
    session = session_of("CG-Taylor", 10, threshold=0.15, order=1, probe_order=0, warmup=2)
    assert decide(session, line) == "##.#.#..#." and session.store.depth == 2


def test_dicache_asks_what_the_blocks_yield_where_first_block_cache_asks_what_they_add():
    """On an input of 31 the block adds 1, 2, 3, ...: that grows by all of itself, and its output by a thirtieth."""
    yielded = [32.0 + step for step in range(8)]
    assert decide(session_of("FBCache", 8, threshold=0.1), yielded, start=31.0) == "########"
    assert decide(session_of("DiCache", 8, threshold=0.1), yielded, start=31.0) == "#...#..."


def test_dicache_adds_up_as_teacache_and_looks_behind_the_blocks_instead_of_before_them():
    swinging = [16.0, 17.0] * 4
    dicache, teacache = (session_of(method, 8, threshold=0.1, first_blocks=2) for method in ("DiCache", "TeaCache"))
    assert decide(dicache, swinging) == decide(teacache, swinging) == "#.#.#.#."
    assert (dicache.decision.probe.blocks, teacache.decision.probe.blocks) == (2, 0)
    assert dicache.tap == teacache.tap  # both put in what the whole stack added


@pytest.mark.parametrize(("now", "gain"), [(12.6, 1.3), (11.0, 1.0), (99.0, 1.5), (7.4, 1.3)])
def test_dicache_lets_the_probe_say_how_far_the_stack_has_come(now, gain):
    """The blocks added 10, then 12, and add ``now``: as far from the 10 as that, between once and one and a half times."""
    session = session_of("DiCache", 3, threshold=10.0, warmup=2)
    assert decide(session, [15.0, 17.0, now + 5.0], start=5.0) == "##."
    assert session.decision.weights == pytest.approx((gain, 1.0 - gain))
    teacache = session_of("TeaCache", 3, threshold=10.0, warmup=2)
    assert decide(teacache, [15.0, 17.0, now + 5.0]) == "##." and teacache.decision.weights is None


def test_dicache_reuses_until_two_evaluations_were_computed():
    session = session_of("DiCache", 3, threshold=10.0, warmup=1)
    assert decide(session, [4.0, 5.0, 6.0]) == "#.." and session.decision.weights is None
    assert weights_of(session, (0,), 1) == [1.0]


def test_adacache_sets_its_pace_by_what_it_stored_and_fora_by_the_clock():
    """A percent a step at first, a seventh of all a step after 9: the gaps of four steps end there."""
    stored = [100.0 + step for step in range(9)] + [160.0 * 1.15**step for step in range(7)]
    adaptive = session_of("AdaCache", 16, threshold=0.02, interval=4)
    assert decide(adaptive, stored=stored) == "##...#...#######"
    assert decide(session_of("FORA", 16, interval=4, warmup=2), stored=stored) == "##...#...#...#.."


def test_adacache_looks_at_nothing_between_computed_steps():
    """EasyCache would stop where the input jumps; here the gap was settled when the step before it was computed."""
    inputs = [0.0, 1.0, 2.0, 50.0, 90.0, 91.0, 92.0]
    stored = [100.0 + step for step in range(7)]
    assert decide(session_of("AdaCache", 7, threshold=0.02, interval=4), stored=stored, inputs=inputs) == "##...#."
    easy = decide(session_of("EasyCache", 7, threshold=0.5), inputs=inputs, network=lambda x: 2 * x + 4)
    assert easy == "##.##.."


def test_adacache_takes_a_codebook_of_ones_own():
    stored = [100.0 + step for step in range(12)]
    session = session_of("AdaCache", 12, codebook="0.03:6 1:2", threshold=0.0, interval=1)
    assert decide(session, stored=stored) == "##.....#...."
    assert decide(session_of("AdaCache", 12, codebook="0.001:6 1:3"), stored=stored) == "##..#..#..#."
    for method in ("AdaCache", "SpeCa", "DiCache"):
        assert session_of(method, 8, max_skips=2).decision.max_skips == 2


@pytest.mark.parametrize("method", ["FBCache", "TeaCache", "CG-Taylor", "DiCache", "SpeCa"])
def test_an_unknown_signal_computes_and_a_limit_is_a_limit(method):
    """Without a reference no method guesses; a constant signal is skipped up to the most in a row."""
    session = session_of(method, 8, threshold=0.1, max_skips=2, warmup=0)  # SpeCa's may fall: nothing changes here
    assert decide(session, [4.0] * 8) == "#..#..#."


def test_double_block_cache_of_one_block_is_first_block_cache():
    first, double = session_of("FBCache", 8, threshold=0.1), session_of("DBCache", 8, threshold=0.1)
    assert (first.tap, first.decision.probe, first.decision.policy) == (
        double.tap,
        double.decision.probe,
        double.decision.policy,
    )


def test_double_block_cache_looks_deeper_and_leaves_the_end_running():
    session = session_of("DBCache", 8, threshold=0.1, first_blocks=2, last_blocks=1)
    assert (session.tap.first, session.tap.last, session.decision.probe.blocks) == (2, 5, 2)
    first = session_of("FBCache", 8, threshold=0.1, first_blocks=2, last_blocks=1)
    assert (first.tap.first, first.tap.last, first.decision.probe.blocks) == (1, 6, 1)


# Schedules known beforehand


def test_magcache_spends_its_skips_where_magnitudes_stand_still(monkeypatch):
    """FORA computes every third step whatever happens; MagCache skips through the plateau and computes on the slope."""
    ratios = [1.0] * 8 + [0.9] * 8
    sigmas = [1.0 - i / 16 for i in range(16)]
    curve = MagnitudeCurve.from_ratios(ratios, sigmas)
    monkeypatch.setattr(technique_module, "magnitude_curve", lambda *model: curve)
    assert decide(session_of("FORA", 16, interval=3, warmup=2)) == "##..#..#..#..#.."
    magnitude = decide(session_of("MagCache", 16, threshold=0.15, max_skips=4, warmup=2))
    assert magnitude == "##....#.." + "#.#.#.#"
    assert decide(session_of("MagCache", 16, threshold=0.09, max_skips=4, warmup=2))[9:] == "#" * 7


def test_spectrum_widens_its_windows_and_taylor_does_not():
    assert decide(session_of("Taylor", 20, interval=2, warmup=5)) == "#####.#.#.#.#.#.#.#."
    assert decide(session_of("Spectrum", 20, growth=0.75, warmup=5)) == "#####.#.#..#...#...."
    assert decide(session_of("Spectrum", 20, growth=0.0, warmup=5)) == "#####.#.#.#.#.#.#.#."


def test_spectrum_fits_more_snapshots_than_taylor_draws_a_line_through():
    spectrum, taylor = session_of("Spectrum", 20, warmup=5), session_of("Taylor", 20, interval=2, warmup=5)
    at = (8, 6, 4, 3, 2, 1, 0)
    assert len(weights_of(spectrum, at, 9)) == len(at) and len(weights_of(taylor, at, 9)) == 2
    assert sum(weights_of(spectrum, at, 9)) == pytest.approx(1.0)


def test_a_mask_of_yours_overrules_what_an_interval_would_do():
    assert decide(session_of("Schedule", 8, mask="###.#..#")) == "###.#..#"
    assert decide(session_of("Taylor", 8, interval=2, warmup=3)) == "###.#.#."


def test_static_masks_thin_out_where_fora_keeps_its_beat():
    assert decide(session_of("SCM", 28, level="ultra")) == "####..#.....#......#.......#"
    assert decide(session_of("FORA", 28, interval=3, warmup=4)) == "####" + "..#" * 8


# One schedule, another forecast


@pytest.mark.parametrize(
    ("method", "order", "expected"),
    [
        ("FORA", 1, [1.0]),
        ("Taylor", 1, [2.5, -1.5]),
        ("TaylorSeer", 1, [2.5, -1.5]),
        ("HiCache", 1, [1.75, -0.75]),  # half the slope
        # Snapshots at 8, 6, 4, wanted 11: Newton's second order is (3 * 5 / 8) (F_0 - 2 F_1 + F_2),
        ("Taylor", 2, [2.5 + 15 / 8, -1.5 - 15 / 4, 15 / 8]),
        # the published recursion's 3^2 / 8 of it.
        ("TaylorSeer", 2, [2.5 + 9 / 8, -1.5 - 9 / 4, 9 / 8]),
    ],
)
def test_one_interval_and_five_forecasts(method, order, expected):
    session = session_of(method, 20, interval=4, order=order, warmup=3)
    assert decide(session) == "###" + "...#" * 4 + "."
    assert weights_of(session, (8, 6, 4), 11) == pytest.approx(expected)


def test_output_is_taylor_behind_the_head():
    taylor, output = (session_of(method, 20, interval=4, warmup=3) for method in ("Taylor", "Output"))
    assert decide(taylor) == decide(output)
    assert (taylor.tap.kind, output.tap.kind) == ("blocks", "output")
    assert weights_of(taylor, (8, 6), 11) == weights_of(output, (8, 6), 11)


# One decision, another space


def flow_call(step, sigma, latent):
    """A network call of a flow model: denoised = x - sigma v."""
    evaluation, branches = Evaluation(step, sigma, float(step), step, latent), (Branch("cond", "a"),)
    return Call(evaluation, branches, 1, 4, latent, lambda d: (latent - d) / sigma, lambda v: latent - sigma * v)


def denoise(session, latents, sigmas, velocities):
    """Compute all evaluations but the last, which is skipped; returns its denoised latent."""
    for step, (latent, sigma, velocity) in enumerate(zip(latents, sigmas, velocities, strict=True)):
        call, last = flow_call(step, sigma, latent), step == len(latents) - 1
        session.begin(call.evaluation)
        call.evaluation.skip = last
        denoised = session.network_call(call, lambda call=call, velocity=velocity: call.to_denoised(velocity))
        assert call.decisions == (("reused",) if last else ("computed",))
    return denoised


def random_run(seed):
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    return latents, (0.9, 0.7, 0.4), [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def test_lazycache_keeps_what_was_denoised_and_easycache_what_the_network_said():
    """A skip under EasyCache says v + x' - x; under LazyCache it says v sigma / sigma', which takes off as much as before."""
    latents, sigmas, velocities = run = random_run(1)
    easy, lazy = (session_of(method, 8) for method in ("EasyCache", "LazyCache"))
    said = velocities[1] + latents[2] - latents[1]
    assert torch.allclose(denoise(easy, *run), latents[2] - sigmas[2] * said, atol=1e-6)
    assert torch.allclose(denoise(lazy, *run), latents[2] - sigmas[1] * velocities[1], atol=1e-6)


def test_lazycache_learns_its_rate_from_the_denoised_latent():
    latents, _, velocities = run = random_run(2)
    easy, lazy = (session_of(method, 8) for method in ("EasyCache", "LazyCache"))
    denoise(easy, *run)
    denoise(lazy, *run)

    def distance(tensors):
        return float((tensors[1] - tensors[0]).abs().mean())

    denoised = [x - sigma * v for x, sigma, v in zip(*run)]
    assert easy.decision.rate.kappa == pytest.approx(distance(velocities) / distance(latents), rel=1e-5)
    assert lazy.decision.rate.kappa == pytest.approx(distance(denoised) / distance(latents), rel=1e-5)


def test_lazycache_before_guidance_is_lazycache_after_it_as_long_as_guidance_is_linear():
    """Core keeps the guided difference. Weights that sum to one commute with it; a rescaled standard deviation does not."""
    cond, uncond = random_run(3), random_run(4)
    latents, (_, before, _), scale = cond[0], cond[1], 5.0

    def guided(pair):
        return pair[1] + scale * (pair[0] - pair[1])

    def rescaled(pair):
        return guided(pair) * (pair[0].std() / guided(pair).std())

    skipped = [denoise(session_of("LazyCache", 8), latents, run[1], run[2]) for run in (cond, uncond)]
    computed = [latents[1] - before * run[2][1] for run in (cond, uncond)]
    assert torch.allclose(guided(skipped), latents[2] + guided(computed) - latents[1], atol=1e-5)
    assert not torch.allclose(rescaled(skipped), latents[2] + rescaled(computed) - latents[1], atol=0.1)
