"""The demo video recipe trains the function that ComfyUI runs, and its export keeps it."""

import pytest
import torch

from stretto.demo import video_autoencoder as va


def perturbed(seed: int = 0):
    """A tiny autoencoder in which every weight matters."""
    model = va.build(8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_clips_equal_comfyuis_chunks(frames):
    model, generator = perturbed(), torch.Generator().manual_seed(1)
    forward = va.ClipForward(model)
    clip = torch.rand(2, 3, frames, 16, 24, generator=generator) * 2 - 1
    with torch.no_grad():
        chunked = model.encode(clip)
        assert torch.allclose(forward.encode(clip), chunked, atol=2e-5)
        assert torch.allclose(forward.decode(chunked), model.decode(chunked), atol=2e-5)


def test_outer_levels_without_past_taps_are_the_same_function():
    """What a CPU trains skips multiplications by taps that are zero, and by no others."""
    model = perturbed()
    outer = va.spatial_taps(model)
    with torch.no_grad():
        for weight in outer:
            weight[:, :, :-1] = 0
        clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
        whole, cheap = va.ClipForward(model), va.ClipForward(model, still_taps=True)
        latent = whole.encode(clip)
        assert torch.allclose(cheap.encode(clip), latent, atol=2e-5)
        assert torch.allclose(cheap.decode(latent), whole.decode(latent), atol=2e-5)
        # Every picture-sized and half-sized convolution is in the list, nothing smaller is.
        assert {tuple(w.shape[:2]) for w in outer} == {(8, 3), (8, 8), (16, 8), (16, 16), (3, 8)}


def test_folding_keeps_pictures_and_gives_the_formats_statistics():
    model = perturbed()
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    folded = va.fold(model, mean, std)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    fixed_mean, fixed_std = va._format_statistics()
    shape = (1, 16, 1, 1, 1)
    with torch.no_grad():
        z, z_folded = model.encode(clip), folded.encode(clip)
        inside = (z_folded - fixed_mean.view(shape)) / fixed_std.view(shape)
        assert torch.allclose(inside, (z - mean.view(shape)) / std.view(shape), atol=1e-4)
        assert torch.allclose(folded.decode(z_folded), model.decode(z), atol=1e-4)
