"""Guidance reduction by hand: verdicts over steps, stand-ins, what a cache beside it is told, bytes."""

import math

import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.evaluation import COMPUTED, REUSED, Branch, Call, Evaluation
from stretto.acceleration.guidance.frequency import band_weights, reweighted
from stretto.acceleration.guidance.policy import ALONE, ASK, SAVE, GuidancePolicy, asked_steps
from stretto.acceleration.guidance.session import GuidanceSession, Guided
from stretto.acceleration.guidance.settings import METHODS, GuidanceSettings
from stretto.acceleration.sampling import Schedule


def schedule(steps=10):
    return Schedule(tuple(1.0 - step / steps for step in range(steps + 1)))


def strip(steps=10, **settings):
    settings = {"forecast": "repeat", **settings}
    return "".join("#" if asked else "." for asked in asked_steps(GuidanceSettings(**settings), schedule(steps)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": 1}, "##########"),
        ({"interval": 2, "warmup": 1, "tail": 0}, "#.#.#.#.#."),
        ({"interval": 3, "warmup": 4, "tail": 1}, "####..#..#"),
        ({"interval": 3, "warmup": 4, "tail": 3}, "####..####"),
        ({"interval": 16, "warmup": 0, "tail": 0}, "#........."),
        ({"interval": 4, "warmup": 0, "tail": 0, "forecast": "line"}, "##...#...#"),
        ({"interval": 2, "warmup": 2, "tail": 0, "guide_from": 0.2, "guide_until": 0.8}, "..##.#.#.."),
        ({"method": "Interval", "warmup": 0, "tail": 0, "guide_until": 0.5}, "#####....."),
        ({"method": "Interval", "sigma_from": 0.8, "sigma_until": 0.25}, "..######.."),
        ({"method": "Adaptive"}, "##########"),
    ],
)
def test_which_steps_ask_the_unconditional_branch(settings, expected):
    assert strip(**settings) == expected


def test_there_is_no_guidance_outside_the_window_even_in_warmup_and_tail():
    policy = GuidancePolicy(GuidanceSettings(guide_from=0.3, guide_until=0.7, warmup=5, tail=5), schedule())
    verdicts = [policy.verdict(step, float(step), 1 - step / 10) for step in range(10)]
    assert verdicts == [ALONE] * 3 + [ASK] * 4 + [ALONE] * 3


def test_evaluations_of_one_step_share_a_verdict():
    policy = GuidancePolicy(GuidanceSettings(interval=2, warmup=1, tail=0, forecast="repeat"), schedule())
    seen = []
    for position in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5):
        seen.append(policy.verdict(int(position), position, 1 - position / 10))
        if seen[-1] == ASK:
            policy.asked(int(position))
    assert seen == [ASK, ASK, SAVE, SAVE, ASK, ASK]


def adaptive(cosines, **settings):
    """Return the verdicts of a run whose branches agree as ``cosines`` say where both are asked."""
    settings = {"method": "Adaptive", "warmup": 0, "tail": 0, "agreement": 0.9, **settings}
    policy, verdicts = GuidancePolicy(GuidanceSettings(**settings), schedule(len(cosines))), []
    for step, cosine in enumerate(cosines):
        verdicts.append(policy.verdict(step, float(step), 1 - step / len(cosines)))
        if verdicts[-1] == ASK:
            policy.asked(step)
            policy.agreement(step, cosine)
    return "".join("#" if verdict == ASK else "." for verdict in verdicts)


def test_adaptive_drops_guidance_when_enough_steps_in_a_row_agree():
    assert adaptive([0.8, 0.95, 0.8, 0.95, 0.95, 0.99, 0.99], patience=2) == "#####.."
    assert adaptive([0.95] * 5, patience=1) == "#...."
    assert adaptive([0.5] * 5, patience=1) == "#####"


def test_adaptive_has_hysteresis():
    falls_a_little = [0.95, 0.95, 0.0, 0.85, 0.0, 0.0]
    assert adaptive(falls_a_little, recheck=2, hysteresis=0.1) == "##.#.#"
    assert adaptive(falls_a_little, recheck=2, hysteresis=0.01) == "##.###"


def test_settings_are_refused_by_name_value_and_range():
    for bad in ({"interval": 0}, {"guide_from": 0.5, "guide_until": 0.5}, {"method": "CFG"}, {"stand_in": "x"},
                {"agreement": 2}, {"warmup": True}, {"forecast": "cubic"}, {"sigma_from": 0.2, "sigma_until": 0.3}):  # fmt: skip
        name = next(iter(bad))
        with pytest.raises(StrettoError, match=f"Stretto Guidance Saver: {name} is {bad[name]!r}"):
            GuidanceSettings(**bad)
    with pytest.raises(StrettoError, match="unknown setting 'speed'"):
        GuidanceSettings.from_mapping({"speed": 2})


def test_bands_add_up_and_a_plane_wave_is_in_the_right_one():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(2, 3, 10, 15, generator=generator, dtype=torch.float64).float()
    low, high = reweighted(tensor, 1.0, 0.0), reweighted(tensor, 0.0, 1.0)
    torch.testing.assert_close(low + high, tensor, atol=1e-5, rtol=0)
    torch.testing.assert_close(reweighted(tensor, 1.1, 1.3), 1.1 * low + 1.3 * high, atol=1e-5, rtol=0)
    rows = torch.arange(10).float()[:, None].expand(10, 15)
    for cycles, inside in ((0, True), (2, True), (3, False), (5, False)):  # radius is min(10, 15) // 5 = 2
        wave = torch.cos(2 * math.pi * cycles * rows / 10)[None]
        torch.testing.assert_close(reweighted(wave, 1.0, 0.0), wave * inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (0.95, (1.0, 1.0)),
        (0.9, (1.1, 1.0)),
        (0.5, (1.1, 1.0)),
        (0.3, (1.1, 1.2)),
        (0.09, (1.0, 1.2)),
        (1.0 / 1e-9, (1.0, 1.0)),
    ],
)
def test_fastercache_weights_by_noise_level(sigma, expected):
    assert band_weights(sigma, 1.1, 1.2) == expected


class Model:
    """A flow v = cond value (or uncond value) over noise levels, and a count of what was asked."""

    def __init__(self, cond, uncond, shape=(2, 4, 4, 4)):
        self.of, self.shape, self.asked = {"cond": cond, "uncond": uncond}, shape, []

    def denoised(self, name, sigma):
        self.asked.append(name)
        return torch.full(self.shape, 0.5) - sigma * torch.full(self.shape, float(self.of[name](sigma)))

    def guided(self, sigma, key="k"):
        gain = torch.tensor(-sigma).reshape(1, 1, 1, 1)
        x = torch.full(self.shape, 0.5)
        return Guided(
            key,
            lambda: [self.denoised("cond", sigma), self.denoised("uncond", sigma)],
            lambda: self.denoised("cond", sigma),
            gain,
            lambda denoised: (denoised - x) / gain,
        )


def session(steps=10, snapshots=1, budget=1 << 40, **settings):
    settings = {"forecast": "repeat", **settings}
    return GuidanceSession(GuidancePolicy(GuidanceSettings(**settings), schedule(steps)), snapshots, budget)


def begin(saver, step, steps=10, **fields):
    evaluation = Evaluation(step, 1 - step / steps, float(step), step, torch.zeros(1))
    saver.begin(evaluation)
    for name, value in fields.items():
        setattr(evaluation, name, value)
    return evaluation


def test_a_constant_difference_of_outputs_is_reconstructed_exactly():
    """Kept as a difference of outputs, not of denoised latents, which it multiplies by the noise level."""
    model, saver = (
        Model(lambda s: math.sin(9 * s), lambda s: math.sin(9 * s) - 0.7),
        session(interval=4, warmup=1, tail=0),
    )
    for step in range(10):
        begin(saver, step)
        _, uncond = saver.guide(model.guided(1 - step / 10))
        truth = model.denoised("uncond", 1 - step / 10)
        torch.testing.assert_close(uncond, truth, atol=1e-6, rtol=0)
    assert saver.report()["asked"] == 3 and saver.report()["saved"] == 7


def test_a_line_is_continued_exactly_and_repeated_otherwise():
    def worst(order):
        model, saver = (
            Model(lambda s: 1.0, lambda s: 0.3 * s),
            session(snapshots=order + 1, interval=4, warmup=2, tail=0, forecast=("repeat", "line")[order]),
        )
        errors = []
        for step in range(10):
            begin(saver, step)
            uncond = saver.guide(model.guided(1 - step / 10))[1]
            errors.append(float((uncond - model.denoised("uncond", 1 - step / 10)).abs().max()))
        return max(errors)

    assert worst(1) < 1e-6 < 1e-2 < worst(0)


def test_saved_steps_ask_the_conditional_branch_alone():
    model, saver = Model(lambda s: 1.0, lambda s: 0.0), session(interval=3, warmup=1, tail=0)
    for step in range(4):
        begin(saver, step)
        saver.guide(model.guided(1 - step / 10))
    assert model.asked == ["cond", "uncond", "cond", "cond", "cond", "uncond"]


def test_other_keys_and_other_shapes_ask_again():
    model, saver = Model(lambda s: 1.0, lambda s: 0.0), session(interval=9, warmup=1, tail=0)
    begin(saver, 0)
    saver.guide(model.guided(1.0))
    model.asked.clear()
    begin(saver, 1)
    saver.guide(model.guided(0.9, key="another window"))
    assert model.asked == ["cond", "uncond"]
    model.asked.clear()
    saver.guide(model.guided(0.9))
    assert model.asked == ["cond"]


def test_a_reset_forgets_and_frees():
    model, saver = Model(lambda s: 1.0, lambda s: 0.0), session(interval=9, warmup=1, tail=0)
    begin(saver, 0)
    saver.guide(model.guided(1.0))
    assert saver.bytes == 2 * 64 * 4
    saver.reset()
    assert saver.bytes == 0 and not saver._store and saver.peak_bytes == 2 * 64 * 4
    model.asked.clear()
    begin(saver, 1)
    saver.guide(model.guided(0.9))
    assert model.asked == ["cond", "uncond"]


def test_bytes_are_bounded_and_the_least_recently_used_key_goes():
    one = 2 * 64 * 4
    model, saver = Model(lambda s: 1.0, lambda s: 0.0), session(interval=9, warmup=1, tail=0, budget=2 * one)
    begin(saver, 0)
    for key in "abc":
        saver.guide(model.guided(1.0, key))
    assert saver.bytes == 2 * one == saver.peak_bytes
    model.asked.clear()
    begin(saver, 1)
    for key in "ca":
        saver.guide(model.guided(0.9, key))
    assert model.asked == ["cond", "cond", "uncond"]


def call_of(evaluation, decision):
    call = Call(evaluation, (Branch("cond", 0),), 1, 1, torch.zeros(1), None, None)
    return call, lambda: setattr(call, "decisions", (decision,)) or torch.zeros(1)


def run_beside_a_cache(skipped, pending=(), steps=10, **settings):
    """Return which branches each step asked, where a cache skips the steps ``skipped`` (known late for ``pending``)."""
    model, saver = Model(lambda s: 1.0, lambda s: 0.0), session(steps, tail=0, **settings)
    asked = []
    for step in range(steps):
        late = step in pending
        evaluation = begin(saver, step, steps, skip=step in skipped and not late, pending=late)
        guided = model.guided(1 - step / steps)

        def network(function, evaluation=evaluation, step=step):
            def ask():
                evaluation.pending, evaluation.skip = False, step in skipped
                call, compute = call_of(evaluation, REUSED if step in skipped else COMPUTED)
                saver.network_call(call, compute)
                return function()

            return ask

        model.asked.clear()
        saver.guide(Guided(guided.key, network(guided.both), network(guided.alone), guided.gain, guided.to_prediction))
        asked.append(len(model.asked))
    return asked, saver


def test_a_skipped_step_never_answers_from_older_features_of_one_branch():
    """Skipped steps take the stand-in; computed ones ask, and save where the next one still comes in time."""
    asked, saver = run_beside_a_cache({1, 3, 5, 7, 9}, warmup=1, interval=4)
    assert asked == [2, 1, 1, 1, 2, 1, 1, 1, 2, 1]
    assert saver.report()["asked"] == 3


def test_the_branch_is_asked_before_it_is_due_where_the_cache_skips_the_step_that_it_is_due_at():
    """Every third step at least: at step 2 the next computed one would be the fourth."""
    asked, _ = run_beside_a_cache({1, 3, 5, 7, 9}, warmup=1, interval=3)
    assert asked == [2, 1, 2, 1, 2, 1, 2, 1, 2, 1]


def test_a_branch_that_is_due_at_skipped_steps_waits_for_a_computed_one():
    asked, saver = run_beside_a_cache({2, 3}, warmup=1, interval=2, steps=6)
    assert asked == [2, 1, 1, 1, 2, 1]  # not asked in vain at 2 and 3
    assert saver.report()["saved"] == 4


def test_asking_at_every_step_leaves_a_cache_as_it_is():
    asked, _ = run_beside_a_cache({2, 4, 6}, warmup=1, interval=1)
    assert asked == [2] * 10


def test_a_probe_that_skips_late_gives_way_to_the_stand_in():
    asked, saver = run_beside_a_cache({3}, pending=range(10), warmup=1, interval=3, steps=6)
    assert asked == [2, 1, 1, 2, 2, 1]  # both took part at step 3, but its answer was not used
    assert saver.report()["asked"] == 2


def test_methods_name_their_sources():
    assert all("arXiv" in method.source for method in METHODS.values())
