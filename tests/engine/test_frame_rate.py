"""Frame-rate schedules: invariants, fits against exhaustive search, restoration on videos whose answer is known."""

import itertools
import random

import jsonschema
import pytest
import torch

from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.frame_rate.fitting import (
    fit_ratio,
    fit_threshold,
    pinned_rates,
    published_rates,
    uniform_rates,
)
from stretto.acceleration.frame_rate.gather import gather_conditioning, gather_mask, obstacle_in, pinned_latents
from stretto.acceleration.frame_rate.restoration import from_interpolated, keep_frames, restore_frames
from stretto.acceleration.frame_rate.schedule import (
    LATENT_KEY,
    RATES,
    RESTORES,
    FrameRateSchedule,
    schedule_of_latent,
    with_schedule,
)
from stretto.acceleration.frame_rate.similarity import Loss, block_ssim, loss_of, small_luma
from stretto.acceleration.schemas import schema


def moving_square(frames: int, speeds: list[float], side: int = 64) -> torch.Tensor:
    """A bright square on a textured ground, at ``speeds[t]`` pixels a frame."""
    ground = torch.rand(side, side, 1, generator=torch.Generator().manual_seed(3)).expand(-1, -1, 3) * 0.3
    video, x = [], 8.0
    for t in range(frames):
        frame = ground.clone()
        at = round(x) % (side - 16)
        frame[20:36, at : at + 16] = 0.9
        video.append(frame)
        x += speeds[t]
    return torch.stack(video)


def random_loss(count: int, seed: int) -> Loss:
    values = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).double()
    zero = torch.zeros(count).double()
    return Loss({1: zero, 2: values[0], 4: values.sum(0)}, {1: zero, 2: values[0] / 2, 4: values.sum(0) / 2}, zero)


def compositions(count: int):
    """Every way to cover ``count`` latents with rates."""
    if count == 0:
        yield ()
    for rate in RATES:
        if rate <= count:
            yield from ((rate, *rest) for rest in compositions(count - rate))


def cost(loss: Loss, rates) -> float:
    at, total = 0, 0.0
    for rate in rates:
        total += float(loss.total[rate][at : at + rate].sum())
        at += rate
    return total


# T17: schedule mathematics


def test_t17_every_schedule_covers_the_video_exactly():
    for count in range(8):
        for rates in compositions(count):
            for frames in {1 + 4 * count, max(1 + 4 * count - 2, 1 if count == 0 else 4 * count - 2)}:
                schedule = FrameRateSchedule(frames, rates)
                assert schedule.padded_frames == 1 + 4 * sum(rates) == schedule.until(schedule.latents)
                assert schedule.latents == 1 + len(rates) == len(schedule.kept)
                covered = [t for start, length in schedule.groups for t in range(start, start + length)]
                assert covered == list(range(schedule.padded_frames))
                assert len(schedule.groups) == schedule.short_frames == 1 + 4 * len(rates)
                assert schedule.kept_frames[-1] == schedule.padded_frames - 1
                assert [schedule.owner[i] for i in schedule.kept] == list(range(schedule.latents))
                starts = {start for start, _ in schedule.groups}
                assert set(schedule.legal_cuts()[:-1]) <= starts


def test_t17_json_round_trip_and_schema():
    schedule = FrameRateSchedule(33, (2, 1, 1, 4), coding="features", restore="motion", fps=24.0)
    document = schedule.to_json()
    jsonschema.validate(document, schema("frame_rate_schedule"))
    assert FrameRateSchedule.from_json(document) == schedule
    by_hand = {"schema": "frame-rate-schedule@1", "frames": 33, "rates": [2, 1, 1, 4]}
    assert FrameRateSchedule.from_json(by_hand).kept == (0, 1, 3, 4, 5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rates": [2, 1, 1]}, "8 in sum"),
        ({"rates": [3, 1, 4]}, "one of 1, 2, 4"),
        ({"frames": 0}, "whole number"),
        ({"frames": True}, "whole number"),
        ({"kept_latents": [0, 1]}, "was changed"),
        ({"check": "33:5:00000000"}, "was changed"),
        ({"restore": "magic"}, "repeat, linear, motion"),
        ({"first_alone": False}, "first frame alone"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"rates": "2114"}, "list of rates"),
        ({"fps": 0}, "fps"),
    ],
)
def test_t17_broken_schedules_are_refused_by_name(change, words):
    document = FrameRateSchedule(33, (2, 1, 1, 4)).to_json() | change
    with pytest.raises(StrettoError, match=words):
        FrameRateSchedule.from_json(document)


def test_t17_unknown_majors_are_refused():
    with pytest.raises(SchemaError, match="frame-rate-schedule@1"):
        FrameRateSchedule.from_json({"schema": "frame-rate-schedule@2"})


def test_t17_g10_stale_schedules_are_recognised():
    schedule = FrameRateSchedule(33, (2, 1, 1, 4))
    latent = with_schedule({"samples": torch.zeros(1, 16, 5, 4, 4), "kept": 1}, schedule)
    assert schedule_of_latent(latent) == schedule and latent["kept"] == 1
    for stale in (torch.zeros(1, 16, 4, 4, 4), torch.zeros(1, 16, 9, 4, 4), torch.zeros(1, 16, 4, 4)):
        with pytest.raises(StrettoError, match="stale"):
            schedule_of_latent({**latent, "samples": stale})
    assert schedule_of_latent({"samples": latent["samples"]}) is None
    assert LATENT_KEY not in with_schedule(latent, None)


def test_t17_published_golden_schedules():
    frames = 33
    same, other = [0.9] * 49, [0.1] * 49
    assert published_rates((same, same, same), frames, 0.5, False) == (2, 2, 2, 1, 1)
    assert published_rates((same, same, same), frames, 0.5, True) == (4, 2, 1, 1)
    assert published_rates((same, same, same), 49, 0.5, True) == (4, 4, 2, 1, 1)
    assert published_rates((other, other, other), frames, 0.5, True) == (1,) * 8
    one = [0.9 if j < 9 else 0.1 for j in range(frames)]
    assert published_rates((one, one, one), frames, 0.5, False) == (2, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("frames", range(17, 130, 4))
def test_t17_published_schedules_always_tile(frames):
    generator = random.Random(frames)
    for threshold in (0.1, 0.4, 0.7):
        lags = [[generator.random() for _ in range(frames)] for _ in range(3)]
        for quads in (False, True):
            rates = published_rates(lags, frames, threshold, quads)
            schedule = FrameRateSchedule(frames, rates)
            assert schedule.padded_frames == frames
            assert rates[-1] == 1, "the last frame is never merged"


# Fitting


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_for_a_share_is_the_best_of_all(seed):
    loss = random_loss(9, seed)
    for ratio in (0.4, 0.6, 0.8):
        rates = fit_ratio(loss, ratio)
        same_length = [other for other in compositions(9) if len(other) == len(rates)]
        assert cost(loss, rates) == pytest.approx(min(cost(loss, other) for other in same_length))
        assert abs(1 + len(rates) - ratio * 10) <= 0.5


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_for_thresholds_keeps_fewest(seed):
    loss = random_loss(8, seed)
    half, quarter = 0.3, 0.5

    def allowed(rates):
        at = 0
        for rate in rates:
            if rate > 1 and float(loss.worst[rate][at : at + rate].max()) > {2: half, 4: quarter}[rate]:
                return False
            at += rate
        return True

    rates = fit_threshold(loss, half, quarter)
    good = [other for other in compositions(8) if allowed(other)]
    assert allowed(rates) and len(rates) == min(map(len, good))


def test_pinned_latents_keep_their_rate():
    loss = random_loss(8, 1)
    pinned = {1, 8}
    schedule = FrameRateSchedule(33, fit_ratio(loss, 0.5, pinned=pinned))
    rates = (1, *schedule.rates)
    assert all(rates[schedule.owner[place]] == 1 for place in pinned)
    assert pinned_rates((2, 4, 2), {3}) == (2, 1, 1, 1, 1, 2)


def test_uniform_rates_are_even_and_exact():
    for count, kept in itertools.product(range(1, 25), repeat=2):
        if kept > count or count > 4 * kept:
            continue
        try:
            rates = uniform_rates(count, kept)
        except StrettoError:
            assert (count == 3 and kept == 1) or 4 * kept - count in (1,)
            continue
        assert sum(rates) == count and len(rates) == kept
    assert uniform_rates(8, 4) == (2, 2, 2, 2)


def test_ratio_out_of_range_is_refused():
    for ratio in (0, 1.5, float("nan")):
        with pytest.raises(StrettoError, match="ratio"):
            fit_ratio(random_loss(4, 0), ratio)


# Similarity


def test_block_ssim_is_one_for_equal_and_less_for_other_pictures():
    pictures = torch.rand(3, 32, 48)
    assert torch.allclose(block_ssim(pictures, pictures), torch.ones(3))
    assert (block_ssim(pictures, 1 - pictures) < 0.5).all()


def test_small_luma_is_the_mean_of_whole_pixels():
    frames = torch.rand(2, 200, 300, 3)
    small = small_luma(frames, 96)
    assert small.shape == (2, 100, 150)
    grey = frames @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert torch.allclose(small[0, 0, 0], grey[0, :2, :2].mean(), atol=1e-6)


def test_still_saves_most_and_wild_saves_nothing():
    still = moving_square(33, [0.0] * 33)
    wild = torch.rand(33, 64, 64, 3)
    assert fit_threshold(loss_of(still), 0.02, 0.01) == (4, 4)
    assert fit_threshold(loss_of(wild), 0.02, 0.01) == (1,) * 8


def test_latents_go_where_something_moves():
    speeds = [0.0] * 17 + [7.0] * 16
    rates = fit_ratio(loss_of(moving_square(33, speeds)), 0.67)
    assert rates == (4, 1, 1, 1, 1)


# Restoration


@pytest.mark.parametrize("method", RESTORES)
def test_counts_order_and_kept_frames_are_exact(method):
    video = torch.rand(31, 16, 16, 3)  # the last latent is not full
    schedule = FrameRateSchedule(31, (2, 1, 4, 1), restore=method)
    short = keep_frames(video, schedule)
    whole = restore_frames(short, schedule)
    assert whole.shape == video.shape
    for place in (t for t in schedule.kept_frames if t < 31):
        assert torch.equal(whole[place], video[place])


def test_linear_restores_what_is_linear_in_time():
    ramp = torch.arange(33.0).reshape(-1, 1, 1, 1).expand(-1, 8, 8, 3) / 33
    schedule = FrameRateSchedule(33, (4, 2, 1, 1))
    assert torch.allclose(restore_frames(keep_frames(ramp, schedule), schedule), ramp, atol=1e-6)


def test_repeat_restores_what_is_constant():
    video = torch.rand(1, 8, 8, 3).expand(33, -1, -1, -1)
    schedule = FrameRateSchedule(33, (4, 4), restore="repeat")
    assert torch.equal(restore_frames(keep_frames(video, schedule), schedule), video)


def test_motion_follows_what_moves_evenly():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    video = torch.stack(
        [torch.exp(-((x - 15 - 1.5 * t) ** 2 + (y - 32) ** 2) / 40)[..., None].expand(-1, -1, 3) for t in range(17)]
    )
    schedule = FrameRateSchedule(17, (4,))
    short = keep_frames(video, schedule)
    error = {m: float((restore_frames(short, schedule, m) - video).square().mean()) for m in ("linear", "motion")}
    assert error["motion"] < error["linear"] / 4


def test_frames_of_another_interpolator_are_picked_by_time():
    schedule = FrameRateSchedule(25, (2, 4))
    times = torch.tensor(schedule.kept_frames, dtype=torch.float32)
    steps = [torch.lerp(times[i], times[i + 1], k / 4) for i in range(len(times) - 1) for k in range(4)]
    dense = torch.stack([*steps, times[-1]]).reshape(-1, 1, 1, 1)
    assert torch.equal(from_interpolated(dense, schedule).flatten(), torch.arange(25.0))
    with pytest.raises(StrettoError, match="33"):
        from_interpolated(dense[:-1], schedule)


def test_wrong_lengths_are_refused():
    schedule = FrameRateSchedule(33, (4, 4))
    with pytest.raises(StrettoError, match="33 frames"):
        keep_frames(torch.rand(32, 8, 8, 3), schedule)
    with pytest.raises(StrettoError, match="9 frames"):
        restore_frames(torch.rand(10, 8, 8, 3), schedule)


# T22: conditioning


def image_to_video(latents: int, given: tuple[int, ...]):
    mask = torch.ones(1, 4, latents, 2, 2)
    mask[:, :, list(given)] = 0.0
    pictures = torch.arange(float(latents)).reshape(1, 1, -1, 1, 1).expand(1, 16, -1, 2, 2).clone()
    return [[torch.zeros(1, 5, 8), {"concat_latent_image": pictures, "concat_mask": mask, "pooled_output": torch.ones(1, 4)}]]


def test_t22_conditioning_is_gathered_and_its_owner_kept():
    schedule = FrameRateSchedule(33, (2, 1, 1, 4))
    before = image_to_video(9, (0,))
    (_, entry), = gather_conditioning(before, schedule)
    assert entry["concat_latent_image"][0, 0, :, 0, 0].tolist() == [0, 1, 3, 4, 5]
    assert entry["concat_mask"][0, 0, :, 0, 0].tolist() == [0, 1, 1, 1, 1]
    assert entry["pooled_output"] is before[0][1]["pooled_output"]
    assert before[0][1]["concat_latent_image"].shape[2] == 9


def test_t22_masks_ask_for_what_any_of_their_latents_asks_for():
    mask = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0, 0]).reshape(1, 1, -1, 1, 1)
    assert gather_mask(mask, FrameRateSchedule(33, (2, 1, 1, 4))).flatten().tolist() == [0, 1, 0, 0, 0]


def test_t22_control_videos_and_lists_are_gathered():
    frames = torch.arange(9.0).reshape(1, 1, -1, 1, 1)
    options = {"vace_frames": [frames], "vace_mask": [torch.ones_like(frames)], "vace_strength": [1.0]}
    conditioning = [[torch.zeros(1, 5, 8), options]]
    (_, entry), = gather_conditioning(conditioning, FrameRateSchedule(33, (4, 4)))
    assert entry["vace_frames"][0].flatten().tolist() == [0, 1, 5]
    assert entry["vace_strength"] == [1.0]


def test_t22_references_stand_beside_the_video():
    reference = torch.rand(1, 16, 2, 2, 2)
    conditioning = [[torch.zeros(1, 5, 8), {"reference_latents": [reference], "time_dim_concat": reference}]]
    (_, entry), = gather_conditioning(conditioning, FrameRateSchedule(33, (4, 4)))
    assert entry["reference_latents"][0] is reference and entry["time_dim_concat"] is reference


def test_t22_wrong_lengths_are_refused_and_never_filled_up():
    with pytest.raises(StrettoError, match="concat_latent_image of 7 latent frames and the video has 9"):
        gather_conditioning(image_to_video(7, (0,)), FrameRateSchedule(33, (4, 4)))


def test_g12_given_latents_are_pinned():
    assert pinned_latents(image_to_video(9, (0, 8)), None, 9) == {0, 8}
    assert pinned_latents(image_to_video(9, ()), None, 9) == set()
    mask = torch.ones(1, 1, 9, 1, 1)
    mask[:, :, 4] = 0
    assert pinned_latents([], mask, 9) == {4}


def test_g12_what_cannot_be_gathered_is_refused_by_name():
    assert "ControlNet" in obstacle_in([[None, {"control": object()}]])
    assert "area" in obstacle_in([[None, {"area": (2, 4, 4, 0, 0, 0)}]])
    assert obstacle_in(image_to_video(9, (0,))) is None
