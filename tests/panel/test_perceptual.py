"""MS-SSIM, FLIP, ST-LPIPS and VMAF against their definitions, and the sentences where they cannot be had."""

import math

import numpy as np
import pytest

from stretto.web.panel.measure import perceptual as module
from stretto.web.panel.measure.errors import MeasureError
from stretto.web.panel.measure.perceptual import METRICS, NotMeasured, Perceptual, flip, flip_error, ms_ssim
from stretto.web.panel.measure.pictures import flip_map, png_bytes
from stretto.web.panel.measure.scores import SAMPLED_FRAMES, sampled, score_pictures


@pytest.fixture
def pair():
    """Two smooth grey pictures that differ by noise."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:192, 0:224] / 32
    clean = 128 + 60 * np.sin(x * 2) * np.cos(y * 3)
    return tuple(
        np.repeat(np.clip(clean + rng.normal(size=clean.shape) * s, 0, 255).astype(np.uint8)[..., None], 3, 2) for s in (0, 12)
    )


# MS-SSIM


def waves(grey):
    """A fixed pair of 224 x 192 pictures without any drawing of lots."""
    y, x = np.mgrid[0:192, 0:224]
    first = np.stack([128 + 60 * np.sin(x / (9 + k)) * np.cos(y / (7 + 2 * k)) for k in range(3)], -1)
    second = first + 20 * np.sin(x * y / 50)[..., None] * np.array([1, 0.5, 0.2])
    if grey:
        first, second = (pixels[..., :1].repeat(3, -1) for pixels in (first, second))
    return tuple(np.clip(np.floor(pixels), 0, 255).astype(np.uint8) for pixels in (first, second))


@pytest.mark.parametrize("grey,expected", [(True, 0.9512438291077397), (False, 0.9757253691409103)])
def test_ms_ssim_agrees_with_pytorch_msssim(grey, expected):
    """Values of pytorch-msssim 1.0.0 in double precision; its window is single, hence the tolerance."""
    pair = waves(grey)
    assert ms_ssim(*pair) == pytest.approx(expected, abs=1e-6)
    assert ms_ssim(pair[0], pair[0]) == 1.0


def test_ms_ssim_falls_with_the_error(pair):
    first = pair[0]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=first.shape)
    values = [ms_ssim(first, np.clip(first + noise * s, 0, 255).astype(np.uint8)) for s in (2, 8, 32)]
    assert values == sorted(values, reverse=True) and values[0] > 0.95


# FLIP


def lab(rgb):
    """CIELAB of an sRGB colour with FLIP's white (D65 of the sRGB matrix), and the Hunt adjustment of its chroma."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb])
    matrix = np.array(
        [[10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
         [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
         [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382]]
    )  # fmt: skip
    x, y, z = matrix @ linear / (matrix @ np.ones(3))
    f = [t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z)]
    light = 116 * f[1] - 16
    return np.array([light, 0.01 * light * 500 * (f[0] - f[1]), 0.01 * light * 200 * (f[1] - f[2])])


def hyab(first, second):
    a, b = lab(first), lab(second)
    return abs(a[0] - b[0]) + math.hypot(a[1] - b[1], a[2] - b[2])


def flip_of_colours(first, second):
    """FLIP of two even areas: without edges only the colour pipeline is left (Andersson et al. 2020, section 4.1)."""
    power, low, turn = 0.7, 0.4, 0.95
    most = hyab((0, 1, 0), (0, 0, 1)) ** power
    error = hyab(first, second) ** power
    if error < low * most:
        return turn / (low * most) * error
    return turn + (error - low * most) / (most - low * most) * (1 - turn)


@pytest.mark.parametrize(
    "first,second", [((0, 0, 0), (255, 255, 255)), ((255, 0, 0), (0, 0, 255)), ((120, 130, 140), (125, 128, 150))]
)
def test_flip_of_even_areas_agrees_with_the_paper(first, second):
    areas = [np.full((32, 32, 3), colour, np.uint8) for colour in (first, second)]
    expected = flip_of_colours(*([channel / 255 for channel in colour] for colour in (first, second)))
    assert flip(*areas) == pytest.approx(expected, abs=1e-3)


def test_flip_of_identical_pictures_is_nothing(pair):
    assert flip(pair[0], pair[0]) == 0.0
    assert 0 < flip(*pair) < 1 and flip(*pair) == pytest.approx(float(flip_error(*pair).mean()))


def test_the_heat_map_is_dark_where_nothing_differs(pair):
    second = pair[0].copy()
    second[:40, :40] = 255
    colours = flip_map(pair[0], second)
    assert colours.shape == pair[0].shape and colours.dtype == np.uint8
    assert colours[:30, :30].mean() > 60 and colours[100:].max() <= 4


# Scores of a report


def saved(folder, name, frames):
    (folder / "pictures").mkdir(exist_ok=True)
    files = [f"pictures/{name}-000-0-{index:03d}.png" for index in range(len(frames))]
    for file, pixels in zip(files, frames):
        (folder / file).write_bytes(png_bytes(pixels))
    return files


def test_identical_pictures_are_perfect_in_every_metric(pair, tmp_path):
    files = saved(tmp_path, "a", [pair[0]])
    others = saved(tmp_path, "b", [pair[0]])
    scores = score_pictures(tmp_path, files, others, None, perceptual=Perceptual())
    assert (scores["psnr"], scores["ssim"], scores["ms_ssim"], scores["flip"]) == (["inf"], [1.0], [1.0], [0.0])


def test_pictures_that_differ_by_one_value_are_not_called_identical(pair, tmp_path):
    second = pair[0].copy()
    second[5, 5, 0] ^= 1
    files, others = saved(tmp_path, "a", [second]), saved(tmp_path, "b", [pair[0]])
    scores = score_pictures(tmp_path, files, others, None, perceptual=Perceptual())
    for name in ("ssim", "ms_ssim", "flip"):
        assert scores[name][0] != METRICS[name].perfect and abs(scores[name][0] - METRICS[name].perfect) < 1e-3


def test_small_pictures_have_no_ms_ssim_and_the_report_says_why(tmp_path, pair):
    small = [pixels[:64, :64] for pixels in pair]
    perceptual = Perceptual()
    scores = score_pictures(
        tmp_path, saved(tmp_path, "a", small[:1]), saved(tmp_path, "b", small[1:]), None, perceptual=perceptual
    )
    assert "ms_ssim" not in scores and scores["flip"][0] > 0
    facts = perceptual.facts()
    assert not facts["ms_ssim"]["available"] and "176 x 176 pixels, these have 64 x 64" in facts["ms_ssim"]["reason"]
    assert facts["flip"]["available"] and "flip-evaluator" in facts["flip"]["source"]
    assert set(facts) == {"psnr", "ssim", "ms_ssim", "flip", "st_lpips", "vmaf"}


def test_what_is_not_installed_is_left_out_with_the_reason(monkeypatch, pair, tmp_path):
    monkeypatch.setattr(module, "_has", lambda *names: False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    perceptual = Perceptual()
    for name in ("flip", "st_lpips"):
        assert perceptual.measure(name, *pair) is None
    assert perceptual.vmaf(tmp_path, ["a-000.png"], ["b-000.png"], 8.0) is None
    reasons = {name: fact["reason"] for name, fact in perceptual.facts().items()}
    assert "torch and stlpips_pytorch not installed; pip install -r requirements-panel-metrics.txt" in reasons["st_lpips"]
    assert "no ffmpeg with libvmaf" in reasons["vmaf"] and "flip-evaluator is not installed" in reasons["flip"]
    with pytest.raises(MeasureError, match="no FLIP heat map"):
        flip_map(*pair)


def test_long_clips_are_sampled_evenly():
    assert sampled(1) == [0] and sampled(5) == [0, 1, 2, 3, 4]
    assert sampled(200)[0] == 0 and sampled(200)[-1] == 199 and len(sampled(200)) == SAMPLED_FRAMES


@pytest.fixture
def clip(pair):
    """Ten frames of 96 x 96 that move, and the same with noise."""
    rng = np.random.default_rng(1)
    frames = [np.roll(pair[0][:96, :96], 3 * n, axis=1) for n in range(10)]
    return frames, [np.clip(f + rng.normal(size=f.shape) * 10, 0, 255).astype(np.uint8) for f in frames]


def test_vmaf_of_clips(clip, tmp_path):
    perceptual = Perceptual()
    files, others = saved(tmp_path, "a", clip[0]), saved(tmp_path, "b", clip[1])
    worse = saved(tmp_path, "c", [np.clip(f.astype(int) // 4 + 90, 0, 255).astype(np.uint8) for f in clip[1]])
    value = perceptual.vmaf(tmp_path, others, files, 8.0)
    if value is None:
        pytest.skip(perceptual.facts()["vmaf"]["reason"])
    assert 0 <= perceptual.vmaf(tmp_path, worse, files, 8.0) < value <= 100
    scores = score_pictures(tmp_path, files, files, None, 10, 8.0, perceptual)
    assert scores["vmaf"] == [100.0] and len(scores["flip"]) == 9 and len(scores["psnr"]) == 10
    second = perceptual.vmaf(tmp_path, others[5:], files[5:], 8.0)
    assert second is not None and second != value, "a later clip of a batch begins at its own number"


def test_st_lpips(pair):
    perceptual = Perceptual()
    value = perceptual.measure("st_lpips", *pair)
    if value is None:
        pytest.skip(perceptual.facts()["st_lpips"]["reason"])
    assert perceptual.measure("st_lpips", pair[0], pair[0]) == 0.0 and 0 < value < 1.5


def test_frames_without_numbers_in_a_row_are_no_clip_for_vmaf():
    with pytest.raises(NotMeasured, match="numbers in a row"):
        module._pattern(["pictures/a-000-0-000.png", "pictures/a-000-0-002.png"])
    assert module._pattern(["pictures/a-000-1-005.png", "pictures/a-000-1-006.png"]) == ("a-000-1-%03d.png", 5)
