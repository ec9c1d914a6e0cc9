"""PSNR and SSIM against values computed with scikit-image 0.26.0."""

import math

import numpy as np
import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.quality import psnr, ssim

#: (height, width, channels, disturbance) -> structural_similarity(gaussian_weights=True, sigma=1.5,
#: use_sample_covariance=False, data_range=1, channel_axis=-1) and peak_signal_noise_ratio(data_range=1).
REFERENCE = [
    ((11, 11, 1, 0.10), 0.9483868397412604, 23.882826164076096),
    ((24, 32, 3, 0.05), 0.9874567298012963, 29.547337670559934),
    ((40, 19, 3, 0.30), 0.7375405072350567, 14.794674334752798),
    ((33, 33, 1, 0.01), 0.9989447790109888, 43.23996264227817),
]


def pair(height, width, channels, disturbance):
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([0.5 + 0.5 * np.sin(0.3 * (k + 1) * x + 0.2 * y + k) for k in range(channels)], -1)
    other = np.clip(picture + disturbance * np.sin(12.9898 * x + 78.233 * y)[..., None], 0, 1)
    return torch.from_numpy(other)[None], torch.from_numpy(picture)[None]


@pytest.mark.parametrize(("case", "similarity", "decibels"), REFERENCE)
def test_against_scikit_image(case, similarity, decibels):
    picture, reference = pair(*case)
    assert ssim(picture, reference) == pytest.approx(similarity, abs=1e-5)
    assert psnr(picture, reference, 1.0) == pytest.approx(decibels, abs=1e-9)


def test_equal_pictures_and_batches():
    picture, reference = pair(24, 32, 3, 0.05)
    assert ssim(reference, reference) == pytest.approx(1.0) and psnr(reference, reference) == math.inf
    both = ssim(torch.cat((picture, reference)), torch.cat((reference, reference)))
    assert both == pytest.approx((1.0 + REFERENCE[1][1]) / 2, abs=1e-5)


def test_latents_are_measured_by_their_range():
    picture, reference = pair(24, 32, 3, 0.05)
    assert psnr(picture * 8 - 4, reference * 8 - 4) == pytest.approx(
        psnr(picture, reference, float(reference.max() - reference.min()))
    )


def test_a_picture_smaller_than_the_window_is_named():
    with pytest.raises(StrettoError, match="the picture has 19 x 8 pixels; it needs at least 11 x 11"):
        ssim(torch.zeros(1, 8, 19, 3), torch.zeros(1, 8, 19, 3))
