"""The demo video autoencoder: the Wan 2.1 VAE's architecture (ComfyUI's own classes), narrow, trained from scratch.

Architecture: Wan team, 2025 (arXiv:2503.20314, section 4.1), as in `comfy/ldm/wan/vae.py`: causal in time, the first frame
alone, then 4 frames per latent frame; 8 x 8 pixels per latent. Only the architecture is used, no weights.

ComfyUI's forward walks over chunks of 1, 4, 4, ... frames with a cache per convolution. Training needs whole clips, so
`encode` and `decode` here compute the same function on all frames at once (a test holds them equal).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .clips import FRAMES, Clips
from .data import Emoji, composite
from .training import Average, Budget, Optimizers, Progress, load_checkpoint, save_checkpoint, write_atomically

CHANNELS = 16
DIM = 16
# Parts of a training: until which progress, frames per clip, clips per batch. Stills are exact and cheap, so they come first.
CURRICULUM = ((0.35, 1, 16), (0.45, 5, 4), (0.72, 9, 3), (1.01, FRAMES, 2))


def build(dim: int = DIM, seed: int = 0) -> nn.Module:
    """A Wan VAE of width `dim`, every layer initialised (ComfyUI's layers come uninitialised).

    In time it starts as a per-frame autoencoder that halves the rate by averaging neighbours and doubles it by repeating.
    """
    from comfy.ldm.wan.vae import AttentionBlock, Resample, ResidualBlock, WanVAE

    model = WanVAE(
        dim=dim,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                taps = module.weight[:, :, -1]
                module.weight.zero_()
                taps.normal_(0, math.sqrt(1 / taps[0].numel()), generator=generator)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(0, math.sqrt(1 / module.weight[0].numel()), generator=generator)
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                module.bias.zero_()
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                module.residual[-1].weight.mul_(0.3)
            elif isinstance(module, AttentionBlock):
                module.proj.weight.mul_(0.1)
            elif isinstance(module, Resample) and module.mode in ("downsample3d", "upsample3d"):
                weight = module.time_conv.weight
                weight.zero_()
                eye = torch.eye(weight.shape[1])
                if module.mode == "downsample3d":
                    weight[:, :, 1, 0, 0], weight[:, :, 2, 0, 0] = eye / 2, eye / 2
                else:
                    weight[:, :, 2, 0, 0] = torch.cat([eye, eye])
        for conv in (model.conv1, model.conv2):
            weight = conv.weight[:, :, 0, 0, 0]
            weight.copy_(torch.eye(len(weight)))
        model.decoder.head[-1].weight.mul_(0.3)
    return model


def spatial_taps(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions that work at full and half picture size.

    Trained on a CPU they keep a single tap in time: those levels are nearly all of the cost, and time is mixed where it is
    compressed, further inside. The file has all taps, those are zero.
    """
    outer = []
    for part in (model.encoder.downsamples[:5], model.decoder.upsamples[8:], [model.encoder.conv1, model.decoder.head]):
        for module in part:
            outer += [m.weight for m in module.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    return outer


class ClipForward:
    """The autoencoder's function on whole clips; pictures lie as [B * T, C, H, W], channels last."""

    def __init__(self, model: nn.Module, still_taps: bool = False, fuse: bool = False):
        self.model = model
        # Fused by the compiler, normalisation and activation make a CPU training 1.6 times as fast.
        self.norm_silu = torch.compile(norm_silu, dynamic=True) if fuse else norm_silu
        self.single = {id(p) for p in spatial_taps(model)} if still_taps else set()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """RGB [B, 3, T, H, W] in -1..1, T = 4k + 1 -> means [B, 16, k + 1, H/8, W/8]."""
        b, t = x.shape[0], x.shape[2]
        h, encoder = self._flat(x), self.model.encoder
        h = self._conv(encoder.conv1, h, t)
        for layer in [*encoder.downsamples, *encoder.middle]:
            h, t = self._layer(layer, h, t)
        h = self._conv(encoder.head[2], self.norm_silu(h, encoder.head[0].gamma), t)
        h = self._conv(self.model.conv1, h, t)
        return h.reshape(b, t, *h.shape[1:]).transpose(1, 2)[:, :CHANNELS]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, 16, k + 1, h, w] -> RGB [B, 3, 4k + 1, 8h, 8w], about -1..1."""
        b, t = z.shape[0], z.shape[2]
        decoder = self.model.decoder
        h = self._conv(self.model.conv2, self._flat(z), t)
        h = self._conv(decoder.conv1, h, t)
        for layer in [*decoder.middle, *decoder.upsamples]:
            h, t = self._layer(layer, h, t)
        h = self._conv(decoder.head[2], self.norm_silu(h, decoder.head[0].gamma), t)
        return h.reshape(b, t, *h.shape[1:]).transpose(1, 2)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        return x.transpose(1, 2).reshape(b * t, c, h, w).contiguous(memory_format=torch.channels_last)

    def _layer(self, layer: nn.Module, h: torch.Tensor, t: int) -> tuple[torch.Tensor, int]:
        kind = type(layer).__name__
        if kind == "ResidualBlock":
            first, second = layer.residual[2], layer.residual[6]
            y = self._conv(first, self.norm_silu(h, layer.residual[0].gamma), t)
            y = self._conv(second, self.norm_silu(y, layer.residual[3].gamma), t)
            short = h if isinstance(layer.shortcut, nn.Identity) else self._conv(layer.shortcut, h, t)
            return short + y, t
        if kind == "AttentionBlock":
            q, k, v = layer.to_qkv(rms_norm(h, layer.norm.gamma)).flatten(2).transpose(1, 2).chunk(3, dim=2)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
            return h + layer.proj(y), t
        return self._resample(layer, h, t)

    def _resample(self, layer: nn.Module, h: torch.Tensor, t: int) -> tuple[torch.Tensor, int]:
        if layer.mode == "upsample3d" and t > 1:
            h, t = self._double(layer, h, t)
        h = layer.resample(h)
        if layer.mode == "downsample3d" and t > 1:
            h, t = self._halve(layer, h, t)
        return h, t

    def _halve(self, layer: nn.Module, h: torch.Tensor, t: int) -> tuple[torch.Tensor, int]:
        """Frame 0 stays; the others come in windows of three with stride two, frame 0 opening the first."""
        clip = h.reshape(-1, t, *h.shape[1:])
        frames = torch.cat([clip[:, 0:-2:2], clip[:, 1:-1:2], clip[:, 2::2]], dim=2)
        weight = layer.time_conv.weight[..., 0, 0].transpose(1, 2).flatten(1)[..., None, None]
        rest = F.conv2d(self._images(frames), weight, layer.time_conv.bias)
        rest = rest.reshape(len(clip), -1, *rest.shape[1:])
        return self._images(torch.cat([clip[:, :1], rest], dim=1)), 1 + rest.shape[1]

    def _double(self, layer: nn.Module, h: torch.Tensor, t: int) -> tuple[torch.Tensor, int]:
        """Frame 0 stays; each other one becomes two, from itself and two before it that are not frame 0."""
        clip = h.reshape(-1, t, *h.shape[1:])
        rest = self._images(clip[:, 1:])
        pairs = self._conv(layer.time_conv, rest, t - 1)
        b, c = len(clip), h.shape[1]
        pairs = pairs.reshape(b, (t - 1) * 2, c, *h.shape[2:])
        return self._images(torch.cat([clip[:, :1], pairs], dim=1)), 2 * t - 1

    @staticmethod
    def _images(clip: torch.Tensor) -> torch.Tensor:
        return clip.reshape(-1, *clip.shape[2:]).contiguous(memory_format=torch.channels_last)

    def _conv(self, conv: nn.Module, h: torch.Tensor, t: int) -> torch.Tensor:
        """A causal convolution over [B * T, C, H, W]: past frames become extra input channels of a 2D convolution."""
        taps, weight = conv.weight.shape[2], conv.weight
        pad = weight.shape[-1] // 2
        if taps > 1 and t > 1 and id(weight) not in self.single:
            clip = h.reshape(-1, t, *h.shape[1:])
            shifted = F.pad(clip, (0, 0) * 3 + (taps - 1, 0))
            h = self._images(torch.cat([shifted[:, i : i + t] for i in range(taps)], dim=2))
            weight = weight.transpose(1, 2).flatten(1, 2)
        else:
            weight = weight[:, :, -1]
        return F.conv2d(h, weight.contiguous(memory_format=torch.channels_last), conv.bias, padding=pad)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Root-mean-square normalisation over channels of [N, C, H, W], as ComfyUI's RMS_norm."""
    return x * (torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12) * gamma.reshape(1, -1, 1, 1)).to(x.dtype)


def norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Normalisation and activation in one function, so that they can be fused."""
    return F.silu(rms_norm(x, gamma))


class Batches:
    """Random training clips on random grounds, shifted, flipped and cropped: float32 RGB [B, 3, T, crop, crop] in -1..1.

    Half of the single frames come from the stills, in all their styles.
    """

    def __init__(self, clips: Clips, stills: Emoji):
        self.clips, self.stills = clips, stills
        self.clip_rows = np.flatnonzero(~clips.held_out)
        self.still_rows = np.flatnonzero(~stills.held_out)

    def draw(self, batch: int, frames: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
        """One batch; about half of the grounds are white, as in the captions' default."""
        out = np.empty((batch, frames, crop, crop, 3), np.float32)
        for i in range(batch):
            if frames == 1 and rng.random() < 0.5:
                pick = self.stills.pixels[rng.choice(self.still_rows)][None]
            else:
                clip = rng.choice(self.clip_rows)
                pick = self.clips.window(clip, int(rng.integers(0, 48)), frames)
            ground = np.full(3, 255) if rng.random() < 0.5 else rng.integers(0, 256, 3)
            picture = composite(pick, ground)
            size = picture.shape[1]
            if crop < size:
                y, x = rng.integers(0, size - crop + 1, 2)
                picture = picture[:, y : y + crop, x : x + crop]
            else:
                picture = np.roll(picture, tuple(rng.integers(-3, 4, 2)), (1, 2))
            out[i] = picture[:, :, ::-1] if rng.random() < 0.5 else picture
        return torch.from_numpy(out).permute(0, 4, 1, 2, 3) * 2 - 1


def losses(forward: ClipForward, x: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """Loss parts for clips x [B, 3, T, H, W] in -1..1; "loss" is their sum.

    The image autoencoder's L1, gradient, MSE, pooled colour and latent spread terms (differences on the 0..1 scale), and L1
    of the change from frame to frame, so that motion is not averaged away.
    """
    z = forward.encode(x)
    sigma = noise * torch.rand(len(z), 1, 1, 1, 1, device=z.device, dtype=z.dtype)
    y = forward.decode(z + sigma * torch.randn_like(z)).float()
    error = (y - x) / 2
    mse = error.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colour = F.avg_pool2d(error.transpose(1, 2).flatten(0, 1), 8).abs().mean()
    change = error.diff(dim=2).abs().mean() if x.shape[2] > 1 else torch.zeros((), device=x.device)
    z = z.float()
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    spread = mean.square().mean() + (std - 1).square().mean()
    total = error.abs().mean() + 0.5 * gradient + 2 * mse + colour + 0.5 * change + 0.02 * spread
    return {"loss": total, "mse": mse, "colour": colour, "change": change, "spread": spread}


def stage(progress: float) -> tuple[int, int]:
    """Frames per clip and clips per batch at this point of a training."""
    return next((frames, batch) for until, frames, batch in CURRICULUM if progress < until)


def train(
    clips: Clips,
    stills: Emoji,
    checkpoint: Path,
    budget: Budget,
    device: str,
    emit: Callable[[str], None],
    *,
    dim: int = DIM,
    lr: float = 1e-3,
    batch: int = 1,
    still_taps: bool = True,
    resume: bool = False,
    start: nn.Module | None = None,
    save_every_s: float = 240.0,
    seed: int = 0,
) -> None:
    """Train from scratch, from `start` or from the checkpoint until the budget is spent.

    `batch` multiplies the curriculum's batch sizes. A warm start has seen stills and goes on with whole clips.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = (start or build(dim, seed)).train().to(device)
    forward = ClipForward(model, still_taps, fuse=True)
    torch._dynamo.config.recompile_limit = 64  # one graph per width and precision
    average = Average(model, 0.998)
    optimizers = Optimizers(
        model.named_parameters(), lr, lambda n, p: p.ndim >= 4 and min(p.shape[0], p[0].numel()) >= 16
    )
    progress = Progress(budget, 1, emit, unit="batches")
    if resume:
        progress.history = load_checkpoint(checkpoint, {"vae": model}, {"vae": average}, optimizers, budget)
        rng = np.random.default_rng(seed + budget.step)
    batches = Batches(clips, stills)
    size = clips.pixels.shape[1]
    saved = budget.elapsed_s()
    while budget.progress() < 1:
        done = budget.progress()
        frames, count = stage(max(done, 0.5) if start is not None else done)
        # Crops cost less than whole pictures and hold less empty ground; the last part learns the real borders.
        crop = size * 3 // 4 if done < 0.55 else size
        x = batches.draw(count * batch, frames, crop, rng).to(device)
        with torch.autocast(device, torch.bfloat16):
            parts = losses(forward, x, noise=0.08)
        parts["loss"].backward()
        parts["norm"] = torch.tensor(optimizers.step(budget.factor(warmup=60)))
        budget.step += 1
        average.update(model, budget.step)
        progress.add(parts)
        if budget.elapsed_s() - saved > save_every_s or budget.progress() >= 1:
            save_checkpoint(checkpoint, {"vae": model}, {"vae": average}, optimizers, budget, progress.history)
            saved = budget.elapsed_s()


def load_average(checkpoint: Path, dim: int = DIM) -> nn.Module:
    """The averaged model of a checkpoint, float32, ready for inference."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = build(dim)
    model.load_state_dict(state["averages"]["vae"])
    return model.eval()


def _format_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread [16] that ComfyUI's Wan 2.1 latent format takes for granted."""
    from comfy.latent_formats import Wan21

    fixed = Wan21()
    return fixed.latents_mean.flatten(), fixed.latents_std.flatten()


@torch.no_grad()
def fold(model: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> nn.Module:
    """A copy whose latents have the statistics that ComfyUI's Wan format expects, exactly the same autoencoder otherwise.

    `mean`, `std` [16] are those of this model's latents over the training clips. The two 1 x 1 x 1 convolutions at the
    latent take up the change of scale, so the sampler works on unit variance.
    """
    import copy

    model = copy.deepcopy(model)
    fixed_mean, fixed_std = _format_statistics()
    gain = fixed_std / std
    out, into = model.conv1, model.conv2
    out.weight[:CHANNELS] *= gain.view(-1, 1, 1, 1, 1)
    out.bias[:CHANNELS] = (out.bias[:CHANNELS] - mean) * gain + fixed_mean
    offset = mean - fixed_mean / gain
    into.bias += into.weight[:, :, 0, 0, 0] @ offset
    into.weight /= gain.view(1, -1, 1, 1, 1)
    return model


def export(model: nn.Module, mean: torch.Tensor, std: torch.Tensor, path: Path, metadata: dict[str, str]) -> None:
    """Write fp16 safetensors for "Load VAE", scaled by :func:`fold`."""
    from safetensors.torch import save_file

    state = {k: v.detach().half().contiguous() for k, v in fold(model, mean, std).state_dict().items()}
    write_atomically(path, lambda p: save_file(state, str(p), metadata=metadata))


def load_exported(path: Path) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An exported file as a float32 module, with the mean and spread [16] of its latents."""
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(str(path)).items()}
    model = build(state["decoder.head.0.gamma"].shape[0])
    model.load_state_dict(state)
    return model.eval(), *_format_statistics()


@torch.no_grad()
def round_trip(model: nn.Module, clip: np.ndarray) -> np.ndarray:
    """RGB float32 [T, H, W, 3] in 0..1 -> the same after encoding and decoding by ComfyUI's own chunked forward."""
    x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
    y = model.decode(model.encode(x))[0].permute(1, 2, 3, 0)
    return ((y + 1) / 2).clamp(0, 1).numpy()
