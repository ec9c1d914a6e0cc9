"""The demo image autoencoder: TAESD's architecture (ComfyUI's own classes) with 16 latent channels, trained from scratch.

Architecture: `comfy/taesd/taesd.py`, after github.com/madebyollin/taesd (MIT). Only the architecture is used, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data import Emoji, composite
from .training import Average, Budget, Optimizers, Progress, load_checkpoint, save_checkpoint, write_atomically

CHANNELS = 16
# ComfyUI's SD3 latent format maps a latent z to (z - SHIFT) * SCALE before the model sees it (comfy/latent_formats.py).
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609


def build(seed: int = 0) -> nn.Module:
    """A TAESD with 16 latent channels, every layer initialised (ComfyUI's layers come uninitialised)."""
    from comfy.taesd.taesd import TAESD, Block

    model = TAESD(latent_channels=CHANNELS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for module in model.modules():
            if isinstance(module, Block):
                # Ten residual blocks in a row grow the activations tenfold unless their branches start small.
                module.conv[-1].weight.mul_(0.2)
        model.taesd_encoder[-1].weight.mul_(0.5)
        model.taesd_decoder[-1].weight.mul_(0.2)
        model.taesd_decoder[-1].bias.fill_(0.7)
    for p in (model.vae_scale, model.vae_shift):
        p.requires_grad_(False)
    return model


def sample_batch(emoji: Emoji, rows: np.ndarray, batch: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
    """Random emoji on random grounds, flipped and cropped: float32 RGB [B, 3, crop, crop] in 0..1.

    Half of the grounds are white, as in the captions' default; the others are any colour.
    """
    pick = emoji.pixels[rng.choice(rows, batch)]
    colours = rng.integers(0, 256, (batch, 3))
    colours[rng.random(batch) < 0.5] = 255
    images = composite(pick, colours)
    size = images.shape[1]
    out = np.empty((batch, crop, crop, 3), np.float32)
    for i, image in enumerate(images):
        # A shift by a few pixels changes how edges fall on the 8-pixel latent grid.
        y, x = rng.integers(0, size - crop + 1, 2) if crop < size else (0, 0)
        piece = image[y : y + crop, x : x + crop]
        if crop == size:
            piece = np.roll(piece, tuple(rng.integers(-3, 4, 2)), (0, 1))
        out[i] = piece[:, ::-1] if rng.random() < 0.5 else piece
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def losses(model: nn.Module, x: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """Loss parts for images x [B, 3, H, W] in 0..1; "loss" is their sum.

    L1 + 0.5 gradient + 2 MSE + colour after 8x pooling + a small term that holds the latents near zero mean and unit
    spread per channel. Latents get noise of up to `noise` (unit latents), so that the decoder forgives a sampler's error.
    """
    z = model.taesd_encoder(x)
    sigma = noise * torch.rand(len(z), 1, 1, 1, device=z.device, dtype=z.dtype)
    y = model.taesd_decoder(z + sigma * torch.randn_like(z)).float()
    error = y - x
    mse = error.square().mean()
    l1 = error.abs().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colour = F.avg_pool2d(error, 8).abs().mean()
    z = z.float()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    spread = mean.square().mean() + (std - 1).square().mean()
    total = l1 + 0.5 * gradient + 2 * mse + colour + 0.02 * spread
    return {"loss": total, "mse": mse, "colour": colour, "spread": spread}


def train(
    emoji: Emoji,
    checkpoint: Path,
    budget: Budget,
    device: str,
    emit: Callable[[str], None],
    *,
    lr: float = 1e-3,
    batch: int = 8,
    muon: bool = True,
    resume: bool = False,
    start: nn.Module | None = None,
    save_every_s: float = 240.0,
    seed: int = 0,
) -> None:
    """Train from scratch, from `start` or from the checkpoint until the budget is spent.

    Checkpoints hold weights, averages and optimizer.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = (start or build(seed)).train().to(device, memory_format=torch.channels_last)
    average = Average(model, 0.998)
    optimizers = Optimizers(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        lr,
        lambda n, p: muon and p.ndim == 4 and min(p.shape[0], p[0].numel()) >= 32,
    )
    progress = Progress(budget, batch, emit)
    if resume:
        progress.history = load_checkpoint(checkpoint, {"vae": model}, {"vae": average}, optimizers, budget)
        rng = np.random.default_rng(seed + budget.step)
    rows = np.flatnonzero(~emoji.held_out)
    size = emoji.pixels.shape[1]
    saved = budget.elapsed_s()
    while budget.progress() < 1:
        # Crops cost less than whole pictures and hold less empty ground; the last part learns the real borders.
        crop = size * 3 // 4 if budget.progress() < 0.6 else size
        x = sample_batch(emoji, rows, batch, crop, rng).to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            parts = losses(model, x, noise=0.08)
        parts["loss"].backward()
        parts["norm"] = torch.tensor(optimizers.step(budget.factor(warmup=60)))
        budget.step += 1
        average.update(model, budget.step)
        progress.add(parts)
        if budget.elapsed_s() - saved > save_every_s or budget.progress() >= 1:
            save_checkpoint(checkpoint, {"vae": model}, {"vae": average}, optimizers, budget, progress.history)
            saved = budget.elapsed_s()


def load_average(checkpoint: Path) -> nn.Module:
    """The averaged model of a checkpoint, float32, ready for inference."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = build()
    model.load_state_dict(state["averages"]["vae"])
    return model.eval()


def load_exported(path: Path) -> tuple[nn.Module, float, float]:
    """An exported file as a float32 module, with the mean and spread of its latents (the inverse of `export`)."""
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(str(path)).items()}
    std = float(state["vae_scale"]) / SD3_SCALE
    mean = (SD3_SHIFT - float(state["vae_shift"])) * SD3_SCALE * std
    model = build()
    model.load_state_dict(state)
    return model.eval(), mean, std


@torch.no_grad()
def encode_images(model: nn.Module, images: np.ndarray, device: str = "cpu", batch: int = 64) -> torch.Tensor:
    """RGB float32 [N, H, W, 3] in 0..1 -> raw encoder output float32 [N, 16, H/8, W/8]."""
    out = []
    model = model.to(device, memory_format=torch.channels_last)
    for start in range(0, len(images), batch):
        x = (
            torch.from_numpy(images[start : start + batch])
            .permute(0, 3, 1, 2)
            .to(device, memory_format=torch.channels_last)
        )
        with torch.autocast(device, torch.bfloat16):
            out.append(model.taesd_encoder(x).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def round_trip(model: nn.Module, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """RGB float32 [N, H, W, 3] in 0..1 -> the same after encoding and decoding, clamped to 0..1, in float32."""
    out = []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)
        y = model.taesd_decoder(model.taesd_encoder(x)).clamp(0, 1)
        out.append(y.permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per picture in dB; a, b float32 [N, H, W, 3] in 0..1."""
    return -10 * np.log10(np.maximum(((a - b) ** 2).mean((1, 2, 3)), 1e-12))


def export(model: nn.Module, mean: float, std: float, path: Path, metadata: dict[str, str]) -> None:
    """Write fp16 safetensors for "Load VAE".

    `mean` and `std` are those of the raw encoder output over the training data. TAESD encodes to enc / vae_scale +
    vae_shift and the SD3 format then subtracts SHIFT and multiplies by SCALE; the two stored numbers make the product
    exactly (enc - mean) / std, the space the transformer is trained in.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    state["vae_scale"] = torch.tensor(SD3_SCALE * std)
    state["vae_shift"] = torch.tensor(SD3_SHIFT - mean / (SD3_SCALE * std))
    write_atomically(path, lambda p: save_file(state, str(p), metadata=metadata))
