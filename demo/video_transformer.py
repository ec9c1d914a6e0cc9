"""The demo video transformer: a small Wan 2.1 text-to-video model (ComfyUI's own class), trained on clips and stills.

Architecture: Wan team, 2025 (arXiv:2503.20314, section 4.2), as in `comfy/ldm/wan/model.py`. The text comes from the demo text
encoder, as it is: trained with the image model, frozen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .clips import FRAMES, Clips
from .data import BACKGROUNDS, Emoji, composite
from .text_encoder import TextEncoder
from .training import Average, Budget, Optimizers, Progress, load_checkpoint, save_checkpoint, write_atomically
from .transformer import CaptionSampler, sample_sigma
from .video_autoencoder import CHANNELS, ClipForward

WIDTH, LAYERS, HEADS, FFN = 256, 8, 2, 1024
TEXT_WIDTH = 384  # of the demo text encoder
FILE_TEXT_WIDTH = 4096  # ComfyUI reads every Wan file with this width: the file's extra columns are zero
STYLE = "fluent"
# Velocity targets at moderate noise carry the motion; the sampler's own shift (3) would leave few samples there.
SHIFT = 2.0


def build(seed: int = 0) -> nn.Module:
    """The Wan model, fully initialised: Xavier elsewhere, zero modulation and head."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v",
        in_dim=CHANNELS,
        out_dim=CHANNELS,
        dim=WIDTH,
        ffn_dim=FFN,
        num_heads=HEADS,
        num_layers=LAYERS,
        text_dim=TEXT_WIDTH,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif p.ndim == 1 or "modulation" in name or name.startswith(("head.head", "time_projection")):
                p.zero_()
            else:
                bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
                p.uniform_(-bound, bound, generator=generator)
                if name.endswith((".o.weight", "ffn.2.weight")):
                    p.mul_(0.3)
    return model


@dataclass(frozen=True)
class Rows:
    """Normalised latents fp16 [N, 16, T, h, w] with the name and the ground (index into BACKGROUNDS) of each row."""

    values: torch.Tensor
    names: list[str]
    grounds: list[int]

    @property
    def styles(self) -> list[str]:
        """The style word of every row's caption: the animated set has one."""
        return [STYLE] * len(self.names)


def _grounds(count: int, rng: np.random.Generator) -> np.ndarray:
    """Background per row: seven of ten white."""
    return np.where(rng.random(count) < 0.7, 0, rng.integers(1, len(BACKGROUNDS), count))


@torch.no_grad()
def encode(vae: nn.Module, pictures: list[np.ndarray], device: str, batch: int = 8) -> torch.Tensor:
    """RGB float32 [T, H, W, 3] in 0..1, all alike -> encoder means float32 [N, 16, (T + 3) / 4, H/8, W/8]."""
    forward, out = ClipForward(vae.to(device), fuse=True), []
    for first in range(0, len(pictures), batch):
        x = torch.from_numpy(np.stack(pictures[first : first + batch])).permute(0, 4, 1, 2, 3) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            out.append(forward.encode(x.to(device)).float().cpu())
    return torch.cat(out)


def clip_rows(clips: Clips, held_out: bool, windows: int, seed: int) -> tuple[list[np.ndarray], list[str], list[int]]:
    """`windows` random windows per clip on random grounds: pictures [17, S, S, 3] in 0..1, names, grounds."""
    rng = np.random.default_rng(seed)
    colours = np.array(list(BACKGROUNDS.values()))
    pictures, names, grounds = [], [], []
    for clip in np.flatnonzero(clips.held_out == held_out):
        for ground in _grounds(windows, rng):
            window = clips.window(int(clip), int(rng.integers(0, 48)), FRAMES)
            pictures.append(composite(window, colours[ground]))
            names.append(clips.name[clip])
            grounds.append(int(ground))
    return pictures, names, grounds


def prepare_latents(
    clips: Clips,
    stills: Emoji,
    vae: nn.Module,
    path: Path,
    device: str,
    emit: Callable[[str], None],
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    windows: int = 8,
    seed: int = 0,
) -> None:
    """Encode training clips and stills, held-out clips too (for `evaluate`), normalise per channel and cache.

    `statistics` are the mean and spread [16] of an exported autoencoder; by default those of the training clips.
    """
    rng = np.random.default_rng(seed)
    pictures, names, grounds = clip_rows(clips, False, windows, seed)
    raw = {"clips": encode(vae, pictures, device)}
    emit(f"{len(pictures)} training windows encoded")
    rows = {"clips": (names, grounds)}
    colours = np.array(list(BACKGROUNDS.values()))
    picks = [i for i in np.flatnonzero(~stills.held_out) if stills.style[i] == STYLE for _ in range(3)]
    ground = _grounds(len(picks), rng)
    images = composite(stills.pixels[picks], colours[ground])
    raw["stills"] = encode(vae, list(images[:, None]), device, batch=64)
    rows["stills"] = ([stills.name[i] for i in picks], ground.tolist())
    pictures, names, grounds = clip_rows(clips, True, 1, seed + 1)
    raw["held_out"] = encode(vae, pictures, device)
    rows["held_out"] = (names, grounds)
    mean, std = statistics or (raw["clips"].mean((0, 2, 3, 4)), raw["clips"].std((0, 2, 3, 4)))
    shape = (1, CHANNELS, 1, 1, 1)
    state = {
        kind: {
            "values": ((x - mean.view(shape)) / std.view(shape)).half(),
            "names": rows[kind][0],
            "grounds": rows[kind][1],
        }
        for kind, x in raw.items()
    }
    write_atomically(path, lambda p: torch.save({**state, "mean": mean, "std": std}, p))


def load_latents(path: Path) -> tuple[dict[str, Rows], torch.Tensor, torch.Tensor]:
    """Inverse of `prepare_latents`: rows by kind, then mean and spread [16] of the raw latents."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    mean, std = state.pop("mean"), state.pop("std")
    return {kind: Rows(**rows) for kind, rows in state.items()}, mean, std


class Source:
    """Random batches of one kind of rows: latents float32 [B, 16, T, h, w] and word ids [B, 12]."""

    def __init__(self, text: TextEncoder, rows: Rows):
        self.text, self.rows = text, rows
        self.captions = CaptionSampler(text, rows)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one batch."""
        picks = rng.integers(0, len(self.rows.names), size)
        captions = [self.captions.caption(int(i), self.rows.grounds[i], rng) for i in picks]
        return self.rows.values[picks].float(), self.text.tokenize(captions)[0]


def flow_loss(model: nn.Module, states: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rectified-flow loss of latents x [B, 16, T, h, w] under text states [B, L, 384]; "motion" is that of frame changes."""
    sigma = sample_sigma(len(x), shift=SHIFT, device=x.device.type)
    noise = torch.randn_like(x)
    s = sigma.view(-1, 1, 1, 1, 1)
    v = model(s * noise + (1 - s) * x, sigma * 1000, context=states)
    error = v.float() - (noise - x)
    high = (sigma > 0.7).float()
    per_sample = error.square().mean((1, 2, 3, 4))
    return {"loss": per_sample.mean(), "high": (per_sample * high).sum() / high.sum().clamp(min=1)}


@torch.no_grad()
def evaluate(model: nn.Module, text: TextEncoder, rows: Rows, seed: int = 0) -> float:
    """Flow loss of `rows`, averaged over nine noise levels from 0.1 to 0.9 with fixed noise."""
    x = rows.values.float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    colours = list(BACKGROUNDS)
    captions = [f"{STYLE} {n}" + (f" on {colours[g]}" if g else "") for n, g in zip(rows.names, rows.grounds)]
    states = text.encode(captions)[0]
    total = 0.0
    for sigma in torch.linspace(0.1, 0.9, 9).tolist():
        v = model(sigma * noise + (1 - sigma) * x, torch.full((len(x),), 1000 * sigma), context=states)
        total += F.mse_loss(v, noise - x).item() / 9
    return total


def is_hidden_matrix(name: str) -> bool:
    """Weights that Muon trains: attention and MLP matrices of the blocks."""
    return "blocks." in name and ("attn" in name or "ffn" in name) and "norm" not in name


def train(
    latents: dict[str, Rows],
    text: TextEncoder,
    checkpoint: Path,
    budget: Budget,
    device: str,
    emit: Callable[[str], None],
    *,
    lr: float = 1e-3,
    batch: int = 24,
    resume: bool = False,
    start: nn.Module | None = None,
    save_every_s: float = 180.0,
    seed: int = 0,
) -> None:
    """Train until the budget is spent: three batches of clips, then one of stills, thrice as large."""
    model = (start or build(seed)).to(device).train()
    text = text.to(device).eval().requires_grad_(False)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    average = Average(model, 0.998)
    optimizers = Optimizers(
        model.named_parameters(), lr, lambda n, p: p.ndim == 2 and is_hidden_matrix(n), weight_decay=0.01
    )
    progress = Progress(budget, batch, emit)
    if resume:
        progress.history = load_checkpoint(checkpoint, {"video": model}, {"video": average}, optimizers, budget)
        rng = np.random.default_rng(seed + budget.step)
    clips, stills = Source(text, latents["clips"]), Source(text, latents["stills"])
    saved = budget.elapsed_s()
    while budget.progress() < 1:
        still = budget.step % 4 == 3
        x, ids = stills.batch(3 * batch, rng) if still else clips.batch(batch, rng)
        with torch.no_grad():
            states = text(ids.to(device))[0]
        with torch.autocast(device, torch.bfloat16):
            parts = flow_loss(model, states, x.to(device))
        parts["loss"].backward()
        parts["norm"] = torch.tensor(optimizers.step(budget.factor()))
        budget.step += 1
        average.update(model, budget.step)
        if not still:
            progress.add(parts)
        if budget.elapsed_s() - saved > save_every_s or budget.progress() >= 1:
            save_checkpoint(checkpoint, {"video": model}, {"video": average}, optimizers, budget, progress.history)
            saved = budget.elapsed_s()


def load_average(checkpoint: Path) -> nn.Module:
    """The averaged model of a checkpoint, float32."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = build()
    model.load_state_dict(state["averages"]["video"])
    return model.eval()


def export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write fp16 safetensors for "Load Diffusion Model"; the text projection is padded to the width ComfyUI expects."""
    from safetensors.torch import save_file

    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    narrow = state["text_embedding.0.weight"]
    state["text_embedding.0.weight"] = F.pad(narrow, (0, FILE_TEXT_WIDTH - narrow.shape[1])).contiguous()
    write_atomically(path, lambda p: save_file(state, str(p), metadata=metadata))


def load_exported(path: Path) -> nn.Module:
    """An exported file as a float32 module for a warm start."""
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(str(path)).items()}
    state["text_embedding.0.weight"] = state["text_embedding.0.weight"][:, :TEXT_WIDTH]
    model = build()
    model.load_state_dict(state)
    return model
