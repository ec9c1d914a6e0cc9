"""The demo image transformer: an SD3-family MMDiT (ComfyUI's own class) of depth 4, trained together with the text encoder.

Architecture: Esser et al., 2024 (arXiv:2403.03206), as in `comfy/ldm/modules/diffusionmodules/mmdit.py`.
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

from .data import BACKGROUNDS, Emoji, composite
from .text_encoder import SPECIAL, UNKNOWN, TextEncoder, split_words
from .training import Average, Budget, Optimizers, Progress, load_checkpoint, save_checkpoint, write_atomically

DEPTH, WIDTH, TEXT_WIDTH, PATCH, CHANNELS = 4, 256, 384, 2, 16
TABLE = 64  # positions per side: 64 patches of 2 latents of 8 pixels = 1024 pixels


def build(seed: int = 0) -> nn.Module:
    """The MMDiT, fully initialised: Xavier elsewhere, zero modulation and head, fixed sin-cos positions."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper, get_2d_sincos_pos_embed

    model = OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        depth=DEPTH,
        adm_in_channels=TEXT_WIDTH,
        pos_embed_max_size=TABLE,
        num_patches=TABLE * TABLE,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT_WIDTH, "out_features": WIDTH},
        },
        qk_norm="rms",
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("ln_q.weight", "ln_k.weight")):
                p.fill_(1.0)
            elif p.ndim == 1 or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                p.zero_()
            elif "qkv" in name:
                # Three square matrices side by side: Xavier counts each on its own.
                p.uniform_(-math.sqrt(3 / WIDTH), math.sqrt(3 / WIDTH), generator=generator)
            else:
                bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
                p.uniform_(-bound, bound, generator=generator)
        table = get_2d_sincos_pos_embed(WIDTH, TABLE, offset=(TABLE - 1) / 2)
        model.pos_embed.copy_(torch.from_numpy(table).float().unsqueeze(0))
    return model


def build_text(vocabulary: list[str], seed: int = 0) -> TextEncoder:
    """A fresh text encoder with unit-scale embeddings."""
    torch.manual_seed(seed)
    text = TextEncoder(vocabulary)
    with torch.no_grad():
        text.words.weight.normal_(0, 0.5)
        text.positions.normal_(0, 0.1)
        for layer in text.layers:
            layer.out.weight.mul_(0.3)
            layer.down.weight.mul_(0.3)
    return text


def vocabulary_of(emoji: Emoji) -> list[str]:
    """Special tokens, then every word of the training captions, sorted."""
    words = {"on", *BACKGROUNDS}
    for caption, held in zip(emoji.captions(), emoji.held_out):
        if not held:
            words.update(split_words(caption))
    return SPECIAL + sorted(words)


@dataclass(frozen=True)
class Latents:
    """Normalised latents fp16 [1 + k, N, 16, h, w] of the training rows: on white, then on k colours.

    `grounds` int64 [1 + k, N] says which background each is on; `mean` and `std` are those of the raw white ones.
    """

    values: torch.Tensor
    grounds: torch.Tensor
    names: list[str]
    styles: list[str]
    mean: float
    std: float


def prepare_latents(
    emoji: Emoji,
    vae: nn.Module,
    path: Path,
    device: str,
    encode: Callable[[nn.Module, np.ndarray, str], torch.Tensor],
    statistics: tuple[float, float] | None = None,
    coloured: int = 2,
    seed: int = 0,
) -> None:
    """Encode the training rows on white and on `coloured` other grounds each, normalise and cache.

    `statistics` are the mean and spread that an exported autoencoder carries; by default those of the white pictures.

    Which colours a row gets is drawn at random: the ground is a compositional word, so few examples per row suffice.
    """
    rows = np.flatnonzero(~emoji.held_out)
    rng = np.random.default_rng(seed)
    colours = np.array(list(BACKGROUNDS.values()))
    drawn = np.stack([rng.permutation(len(colours) - 1)[:coloured] + 1 for _ in rows], axis=1)
    grounds = np.concatenate([np.zeros((1, len(rows)), np.int64), drawn])
    raw = torch.stack([encode(vae, composite(emoji.pixels[rows], colours[ground]), device) for ground in grounds])
    mean, std = statistics or (float(raw[0].mean()), float(raw[0].std()))
    state = {
        "values": ((raw - mean) / std).half(),
        "grounds": torch.from_numpy(grounds),
        "mean": mean,
        "std": std,
        "names": [emoji.name[i] for i in rows],
        "styles": [emoji.style[i] for i in rows],
    }
    write_atomically(path, lambda p: torch.save(state, p))


def load_latents(path: Path) -> Latents:
    """Inverse of `prepare_latents`."""
    return Latents(**torch.load(path, map_location="cpu", weights_only=True))


class CaptionSampler:
    """Word ids of a row's caption, with the small variations that make the encoder robust."""

    def __init__(self, text: TextEncoder, latents: Latents):
        self.text, self.latents = text, latents
        self.colours = list(BACKGROUNDS)

    def caption(self, row: int, ground: int, rng: np.random.Generator) -> str:
        """Caption of `row` on background `ground`; 1 in 10 is empty, some lose the style word or one name word."""
        if rng.random() < 0.1:
            return ""
        words = self.latents.names[row].split()
        if len(words) > 1 and rng.random() < 0.05:
            words.pop(rng.integers(len(words)))
        if rng.random() > 0.05:
            words.insert(0, self.latents.styles[row])
        if ground or rng.random() < 0.1:
            words += ["on", self.colours[ground]]
        # A word outside the vocabulary teaches the unknown token to mean "anything".
        return " ".join(UNKNOWN if rng.random() < 0.01 else w for w in words)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [B, 16, h, w] and word ids [B, T]; seven of ten backgrounds are white."""
        rows = rng.integers(0, len(self.latents.names), size)
        versions = np.where(rng.random(size) < 0.7, 0, rng.integers(1, len(self.latents.values), size))
        grounds = self.latents.grounds[versions, rows].tolist()
        ids, _ = self.text.tokenize([self.caption(int(r), g, rng) for r, g in zip(rows, grounds)])
        return self.latents.values[versions, rows].float(), ids


def sample_sigma(size: int, shift: float = 1.5, spread: float = 1.2, device: str = "cpu") -> torch.Tensor:
    """Noise levels [B] in 0..1: logit-normal, then shifted as ComfyUI's flow sampling does (there with 3.0)."""
    t = torch.sigmoid(spread * torch.randn(size, device=device))
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(model: nn.Module, text: TextEncoder, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rectified-flow loss of latents x [B, 16, h, w] and ids [B, T]: velocity = noise - x, timestep = 1000 sigma."""
    sigma = sample_sigma(len(x), device=x.device.type)
    noise = torch.randn_like(x)
    s = sigma.view(-1, 1, 1, 1)
    states, pooled = text(ids)
    v = model(s * noise + (1 - s) * x, sigma * 1000, context=states.to(x.dtype), y=pooled.to(x.dtype))
    per_sample = F.mse_loss(v.float(), noise - x, reduction="none").mean((1, 2, 3))
    high = (sigma > 0.7).float()
    return {"loss": per_sample.mean(), "high": (per_sample * high).sum() / high.sum().clamp(min=1)}


@torch.no_grad()
def evaluate(model: nn.Module, text: TextEncoder, x: torch.Tensor, captions: list[str], seed: int = 0) -> float:
    """Flow loss of latents x [N, 16, h, w], averaged over nine noise levels from 0.1 to 0.9 with fixed noise."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    states, pooled, _ = text.encode(captions)
    total = 0.0
    for sigma in torch.linspace(0.1, 0.9, 9).tolist():
        v = model(sigma * noise + (1 - sigma) * x, torch.full((len(x),), 1000 * sigma), context=states, y=pooled)
        total += F.mse_loss(v, noise - x).item() / 9
    return total


def is_hidden_matrix(name: str) -> bool:
    """Weights that Muon trains: attention and MLP matrices. Modulation, embeddings and heads stay with AdamW."""
    return ("joint_blocks" in name or "text.layers" in name) and "adaLN" not in name


def train(
    latents: Latents,
    vocabulary: list[str],
    checkpoint: Path,
    budget: Budget,
    device: str,
    emit: Callable[[str], None],
    *,
    lr: float = 1e-3,
    batch: int = 128,
    muon: bool = True,
    resume: bool = False,
    start: tuple[nn.Module, TextEncoder] | None = None,
    save_every_s: float = 180.0,
    seed: int = 0,
) -> None:
    """Train both modules until the budget is spent; `start` continues from given weights (a warm start)."""
    model, text = start or (build(seed), build_text(vocabulary, seed))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    modules = {"transformer": model.to(device).train(), "text": text.to(device).train()}
    averages = {k: Average(m, 0.998) for k, m in modules.items()}
    named = [(f"{k}.{n}", p) for k, m in modules.items() for n, p in m.named_parameters()]
    optimizers = Optimizers(named, lr, lambda n, p: muon and p.ndim == 2 and is_hidden_matrix(n), weight_decay=0.01)
    progress = Progress(budget, batch, emit)
    if resume:
        progress.history = load_checkpoint(checkpoint, modules, averages, optimizers, budget)
        rng = np.random.default_rng(seed + budget.step)
    sampler = CaptionSampler(text, latents)
    saved = budget.elapsed_s()
    while budget.progress() < 1:
        x, ids = sampler.batch(batch, rng)
        with torch.autocast(device, torch.bfloat16):
            parts = flow_loss(model, text, x.to(device), ids.to(device))
        parts["loss"].backward()
        parts["norm"] = torch.tensor(optimizers.step(budget.factor()))
        budget.step += 1
        for key, module in modules.items():
            averages[key].update(module, budget.step)
        progress.add(parts)
        if budget.elapsed_s() - saved > save_every_s or budget.progress() >= 1:
            save_checkpoint(checkpoint, modules, averages, optimizers, budget, progress.history)
            saved = budget.elapsed_s()


def load_average(checkpoint: Path, vocabulary: list[str]) -> tuple[nn.Module, TextEncoder]:
    """The averaged transformer and text encoder of a checkpoint, float32."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model, text = build(), build_text(vocabulary)
    model.load_state_dict(state["averages"]["transformer"])
    text.load_state_dict(state["averages"]["text"])
    return model.eval(), text.eval()


def export(model: nn.Module, text: TextEncoder, model_path: Path, text_path: Path, metadata: dict[str, str]) -> None:
    """Write fp16 safetensors: the transformer for "Load Diffusion Model", the text encoder for `TextEncoder.load`."""
    from safetensors.torch import save_file

    half = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    write_atomically(model_path, lambda p: save_file(half, str(p), metadata=metadata))
    words = {k: v.detach().half().contiguous() for k, v in text.state_dict().items()}
    write_atomically(text_path, lambda p: save_file(words, str(p), metadata={**metadata, **text.file_metadata()}))


def load_exported(model_path: Path, text_path: Path) -> tuple[nn.Module, TextEncoder]:
    """The exported files as float32 modules for a warm start."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict({k: v.float() for k, v in load_file(str(model_path)).items()})
    return model, TextEncoder.load(text_path).requires_grad_(True)
