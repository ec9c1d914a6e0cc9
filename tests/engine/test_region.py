"""Region-adaptive sampling without ComfyUI: importance by hand, nobody starves, schedules, memory, what is kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.region.importance import (
    change_per_token,
    importance,
    mask_tokens,
    published_importance,
    spread_over_latent,
)
from stretto.acceleration.region.maps import often, step_map
from stretto.acceleration.region.schedule import RegionSchedule
from stretto.acceleration.region.selection import Selector, friendly_count
from stretto.acceleration.region.settings import RegionSettings, steps_from_text
from stretto.acceleration.region.store import Kept, KeyStore, Velocity
from stretto.acceleration.sampling import Schedule


def test_change_of_a_hand_made_latent():
    """Two channels that move apart by 2a have a standard deviation of a; a patch is the mean of its pixels."""
    update = torch.zeros(1, 2, 3, 4)
    update[0, 0, 0, 0] = 8.0  # one of four pixels: 4 / 4
    update[0, :, 0, 2] = 5.0  # both channels alike: no spread
    update[0, 0, 2, 3] = 6.0  # the last row is half a patch: one of two pixels, 3 / 2
    assert change_per_token(update, (1, 2, 2), (1, 2, 2)).tolist() == [1.0, 0.0, 0.0, 1.5]


def test_a_batch_shares_its_most_changed_item():
    update = torch.zeros(2, 2, 1, 2)
    update[0, 0, 0, 0] = update[1, 0, 0, 1] = 2.0
    assert change_per_token(update, (1, 1, 2), (1, 1, 1)).tolist() == [1.0, 1.0]


def test_tokens_of_a_clip_run_frame_by_frame():
    update = torch.zeros(1, 2, 2, 2, 4)
    update[0, 0, 1, 0, 2] = 8.0
    assert change_per_token(update, (2, 1, 2), (1, 2, 2)).tolist() == [0, 0, 0, 1.0]


def test_the_corrected_guard_favours_the_starved_and_the_published_one_starves_them():
    change, drops = torch.ones(3), torch.tensor([0, 1, 5])
    assert importance(change, drops, 0.1).argmax() == 2
    assert published_importance(change, drops, 0.1).argmin() == 2
    assert importance(change, drops, 0.0).unique().numel() == 1


@given(
    tokens=st.integers(2, 60),
    ratio=st.floats(0.05, 1.0),
    most=st.integers(1, 6),
    starvation=st.floats(0.0, 2.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_every_token_becomes_active_within_its_bound(tokens, ratio, most, starvation, seed):
    generator = torch.Generator().manual_seed(seed)
    selector = Selector(torch.zeros(tokens, dtype=torch.int64), most)
    fixed = torch.rand(tokens, generator=generator) * 100.0  # the same ones would win for ever
    since = torch.zeros(tokens, dtype=torch.int64)
    for _ in range(3 * (most + 1)):
        count = friendly_count(tokens, ratio)
        active = selector.choose(importance(fixed, selector.drops, starvation), count)
        assert active.tolist() == sorted(set(active.tolist())) and len(active) >= min(count, tokens)
        selector.note(active)
        since += 1
        since[active] = 0
        assert int(since.max()) <= most


def test_masks_are_always_or_never_worked_on():
    always, never = torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    always[5], never[0] = True, True
    selector = Selector(torch.zeros(6, dtype=torch.int64), 2, always, never)
    for _ in range(8):
        active = selector.choose(torch.tensor([9.0, 5, 4, 3, 2, 1]), 2).tolist()
        assert 5 in active and 0 not in active
        selector.note(torch.tensor(active))
    assert selector.drops[0] == 0
    assert selector.choose(torch.ones(6), 6).tolist() == [1, 2, 3, 4, 5]


def test_all_tokens_come_in_their_own_order_and_numbers_that_are_none_are_kept():
    selector = Selector(torch.zeros(4, dtype=torch.int64), 3)
    assert selector.choose(torch.tensor([1.0, 2, 3, 4]), 4).tolist() == [0, 1, 2, 3]
    assert 1 in selector.choose(torch.tensor([1.0, math.nan, 3, 4]), 1).tolist()


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"),
    [(4096, 0.5, 2048), (4096, 0.3, 1216), (80, 0.5, 40), (12, 0.5, 6), (16, 0.01, 1), (7, 1.0, 7)],
)
def test_friendly_counts(tokens, ratio, count):
    assert friendly_count(tokens, ratio) == count


def strip(schedule):
    return "".join("." if partial else "#" for partial in schedule.planned())


def test_schedules():
    levels = Schedule(tuple(1.0 - step / 12 for step in range(13)))
    assert strip(RegionSchedule(RegionSettings(start=4, tail=0, refresh_every=4), levels)) == "####...#...#"
    assert (
        strip(RegionSchedule(RegionSettings(start=2, refresh_every=0, tail=3, resets=(5,)), levels)) == "##...#...###"
    )
    assert (
        strip(RegionSchedule(RegionSettings(start=1, tail=0, refresh_every=2), levels, (0.5, 0.75))) == "######.#.###"
    )
    assert strip(RegionSchedule(RegionSettings(start=1, refresh_every=1), levels)) == "#" * 12
    falling = RegionSchedule(RegionSettings(start=2, tail=0, refresh_every=0, schedule="linear"), levels)
    assert [falling.ratio(step) for step in (2, 11)] == [1.0, 0.5]
    by_sigma = RegionSchedule(RegionSettings(start=2, tail=0, refresh_every=0, schedule="by noise level"), levels)
    assert by_sigma.ratio(2) == 1.0 and 0.5 < by_sigma.ratio(11) < by_sigma.ratio(6) < 1.0
    constant = RegionSchedule(RegionSettings(start=4, tail=0, refresh_every=4), levels)
    assert constant.work() == pytest.approx((6 + 6 * 0.5) / 12)


def test_spread_and_masks_follow_odd_sizes():
    flags = torch.tensor([True, False, False, True])
    assert spread_over_latent(flags, (1, 2, 2), (1, 2, 2), (1, 16, 3, 3)).long().tolist() == [
        [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]
    ]
    assert spread_over_latent(flags, (2, 1, 2), (1, 2, 2), (1, 16, 2, 2, 3)).shape == (1, 1, 2, 2, 3)
    mask = torch.zeros(1, 64, 96)
    mask[0, 40, 90] = 1.0
    assert mask_tokens(mask, (2, 2, 3)).tolist() == [False] * 5 + [True] + [False] * 5 + [True]
    frames = torch.zeros(1, 1, 4, 8, 8)
    frames[0, 0, 3, 0, 0] = 1.0
    assert mask_tokens(frames, (2, 1, 1)).tolist() == [False, True]
    assert mask_tokens(torch.ones(2, 2), (1, 5, 7)).all()


def test_stale_velocity_is_repeated_or_continued_along_a_line():
    def of(value):
        return torch.full((1, 2, 1, 2), value)

    active = torch.tensor([[[[True, False]]]])
    repeat = Velocity.of(of(1.0), 0.9, 0)
    repeat.renew(of(2.0), 0.8)
    assert repeat.patched(of(9.0), active, 0.7)[0, 0, 0].tolist() == [9.0, 2.0]
    assert repeat.patched(of(7.0), ~active, 0.6)[0, 0, 0].tolist() == [9.0, 7.0]
    line = Velocity.of(of(1.0), 0.9, 1)
    line.renew(of(2.0), 0.8)
    assert line.patched(of(9.0), active, 0.7)[0, 0, 0].tolist() == pytest.approx([9.0, 3.0])
    assert line.patched(of(5.0), active, 0.6)[0, 0, 0].tolist() == pytest.approx([5.0, 4.0])
    # the slope is that of whole passes, from where the token was last computed
    assert line.patched(of(7.0), ~active, 0.5)[0, 0, 0].tolist() == pytest.approx([6.0, 7.0])


@pytest.mark.parametrize(("dtype", "error"), [(None, 0.0), (torch.bfloat16, 0.004), (torch.float8_e4m3fn, 0.07)])
def test_kept_keys_by_branch_merged_and_split(dtype, error):
    generator = torch.Generator().manual_seed(3)
    store = KeyStore(dtype)

    def make(rows, tokens):
        return torch.randn(rows, tokens, 4, generator=generator)

    def close(a, b):
        assert float((a - b).abs().max()) <= error * float(b.abs().max())

    keys, values = make(4, 6), make(4, 6)
    store.keep(["cond", "uncond"], 0, 1, 0.5, keys, values)
    assert store.bytes == store.peak_bytes > 0
    rows, fresh = torch.tensor([4, 1]), make(4, 2)
    merged, _ = store.merged(["cond", "uncond"], 0, rows, 0.4, fresh, fresh)
    expected = keys.clone()
    expected[:, rows] = fresh
    close(merged, expected)
    alone, _ = store.merged(["uncond"], 0, rows, 0.4, 1.2 * fresh[2:], fresh[2:])
    expected[2:, rows] = 1.2 * fresh[2:]
    close(alone, expected[2:])
    swapped, _ = store.merged(["uncond", "cond"], 0, rows[:1], 0.4, expected[[2, 3, 0, 1]][:, rows[:1]], fresh[:, :1])
    close(swapped, expected[[2, 3, 0, 1]])
    store.clear()
    assert store.bytes == 0 and not store.has("cond", 0)


def test_one_head_that_is_nothing_stays_nothing_in_eight_bits():
    kept = Kept(torch.zeros(1, 2, 2), 1, torch.float8_e4m3fn)
    kept.fill(torch.zeros(1, 2, 2), 0.5)
    assert torch.equal(kept.read(0, 1, 0.4), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 1, 3, 2)])
def test_keys_of_inactive_tokens_continue_along_a_line(shape):
    """Each token from its own last two noise levels; what was just computed is read as it is."""
    axis = len(shape) - 2

    def of(value, tokens=3):
        return torch.full((*shape[:axis], tokens, shape[-1]), value)

    kept = Kept(of(0.0), axis, order=1)
    kept.fill(of(1.0), 0.9)
    assert torch.equal(kept.read(0, 2, 0.8), of(1.0))  # one point is no line
    kept.fill(of(2.0), 0.8)
    kept.put(of(5.0, 1), torch.tensor([1]), 0.7)
    found = kept.read(0, 2, 0.7).flatten(0, axis - 1)[0, :, 0]
    assert found.tolist() == pytest.approx([3.0, 5.0, 3.0])
    found = kept.read(1, 1, 0.65).flatten(0, axis - 1)[0, :, 0]
    assert found.tolist() == pytest.approx([3.5, 6.5, 3.5])


def test_maps():
    assert step_map(None, (2, 2, 3)) == ["999", "999"]
    assert step_map(torch.tensor([0, 6, 1]), (2, 2, 3)) == ["940", "000"]
    assert often([torch.tensor([0]), torch.tensor([0, 3])], (1, 2, 2)) == ["90", "04"]
    assert often([], (1, 2, 2)) == []
    assert len(step_map(torch.arange(9), (1, 200, 90))) == 64


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"ratio": 0.0}, "ratio is 0.0; it must be a number in"),
        ({"start": 0}, "start is 0"),
        ({"guard": "none"}, "corrected, published"),
        ({"mask": ["01", "0"]}, "equally long"),
        ({"mask": ["0a"]}, "made of 0 and 1"),
        ({"resets": [-1]}, "counted from 0"),
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
    ],
)
def test_bad_settings_are_told_by_name(bad, words):
    with pytest.raises(StrettoError, match=words):
        RegionSettings.from_mapping(bad)


def test_steps_from_text():
    assert steps_from_text(" 12, 22 3 ") == [12, 22, 3] and steps_from_text("") == []
    with pytest.raises(StrettoError, match="resets is '1;2'"):
        steps_from_text("1;2")
