"""Sheets of the video models, drawn from the exported files through ComfyUI's own loaders and sampler."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import clips, video_autoencoder, video_transformer
from .data import BACKGROUNDS, composite
from .samples import CFG, SEED, STEPS, wrap
from .text_encoder import TextEncoder

SAMPLING_SHIFT = 3.0  # of the workflows' "ModelSamplingSD3"
SHOWN = (0, 4, 8, 12, 16)  # frames of a contact sheet


class Pipeline:
    """The exported files, loaded as ComfyUI's nodes load them."""

    def __init__(self, folder: Path, names: dict[str, str]):
        import comfy.sd
        import comfy.utils
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        model = comfy.sd.load_diffusion_model(str(folder / names["transformer"]))
        (self.model,) = ModelSamplingSD3().patch(model, SAMPLING_SHIFT)
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / names["vae"])))
        self.text = TextEncoder.load(folder / names["text"])
        self.files = {kind: folder / name for kind, name in names.items()}

    def conditioning(self, prompts: list[str]) -> list:
        """Prompts -> ComfyUI CONDITIONING with one batch entry per prompt, as wide as Wan's."""
        states, pooled, _ = self.text.encode(prompts)
        wide = torch.nn.functional.pad(states, (0, video_transformer.FILE_TEXT_WIDTH - states.shape[-1]))
        return [[wide, {"pooled_output": pooled}]]

    @torch.inference_mode()
    def sample(self, prompts: list[str], size: int, seed: int = SEED) -> np.ndarray:
        """Euler sampling: RGB float32 [N, 17, size, size, 3] in 0..1."""
        import comfy.sample

        length = 1 + (clips.FRAMES - 1) // 4
        empty = torch.zeros(len(prompts), video_autoencoder.CHANNELS, length, size // 8, size // 8)
        noise = comfy.sample.prepare_noise(empty, seed)
        pair = self.conditioning(prompts), self.conditioning([""] * len(prompts))
        latents = comfy.sample.sample(
            self.model, noise, STEPS, CFG, "euler", "simple", *pair, empty, disable_pbar=True, seed=seed
        )
        return self.vae.decode(latents).float().numpy()


def strips(rows: list[list[np.ndarray]], captions: list[str], columns: int, scale: int = 1):
    """Rows of frames [17, S, S, 3] per caption -> one PIL picture: a caption over strips of five frames each."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0][0].shape[1] * scale
    width, height = len(SHOWN) * side + 12, len(rows[0]) * side + 20
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * width, lines * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (row, caption) in enumerate(zip(rows, captions)):
        x, y = (i % columns) * width + 6, (i // columns) * height
        draw.text((x, y + 3), wrap(caption, width // 6)[0], fill=(40, 40, 40), font=font)
        for line, frames in enumerate(row):
            picture = np.concatenate([frames[t] for t in SHOWN], axis=1)
            strip = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
            page.paste(strip.resize((len(SHOWN) * side, side), Image.Resampling.NEAREST), (x, y + 18 + line * side))
    return page


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays in 0..1."""
    return float(-10 * np.log10(max(((a - b) ** 2).mean(), 1e-12)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of frames [T, H, W, 3] in 0..1."""
    from skimage.metrics import structural_similarity

    return float(np.mean([structural_similarity(x, y, data_range=1.0, channel_axis=2) for x, y in zip(a, b)]))


@torch.inference_mode()
def round_trips(pipeline: Pipeline, found: clips.Clips, path: Path, emit: Callable[[str], None]) -> None:
    """Held-out clips above their round trips; prints PSNR and SSIM by thirds of motion."""
    white = np.array(BACKGROUNDS["white"])
    rows = []
    for clip in np.flatnonzero(found.held_out):
        frames = composite(found.window(int(clip), 0, clips.FRAMES), white)
        back = pipeline.vae.decode(pipeline.vae.encode(torch.from_numpy(frames)))[0].float().numpy()
        worst = min(psnr(x, y) for x, y in zip(frames, back))
        rows.append((found.motion[clip], psnr(frames, back), ssim(frames, back), worst, found.name[clip], frames, back))
    rows.sort(key=lambda row: row[0])
    third = -(-len(rows) // 3)
    for label, part in (
        ("calm", rows[:third]),
        ("lively", rows[third : 2 * third]),
        ("wild", rows[2 * third :]),
        ("all", rows),
    ):
        emit(
            f"round trip, {label} (change per frame {part[0][0]:.4f} to {part[-1][0]:.4f}, {len(part)} clips): "
            f"PSNR {np.mean([r[1] for r in part]):.2f} dB, worst clip {min(r[1] for r in part):.2f}, "
            f"worst frame {min(r[3] for r in part):.2f}, SSIM {np.mean([r[2] for r in part]):.4f}"
        )
    shown = [rows[i] for i in np.linspace(0, len(rows) - 1, 10).astype(int)]
    strips([[r[5], r[6]] for r in shown], [f"{r[4]}, {r[1]:.1f} dB" for r in shown], 2).save(path, quality=90)


def flow_losses(pipeline: Pipeline, cache: Path, size: int) -> dict[str, float]:
    """Flow loss of the exported transformer on held-out clips and on as many training clips."""
    latents, _, _ = video_transformer.load_latents(cache / f"video_latents_{size}.pt")
    model = video_transformer.load_exported(pipeline.files["transformer"])
    held = latents["held_out"]
    pick = np.random.default_rng(0).choice(len(latents["clips"].names), len(held.names), replace=False)
    known = video_transformer.Rows(
        latents["clips"].values[pick],
        [latents["clips"].names[i] for i in pick],
        [latents["clips"].grounds[i] for i in pick],
    )
    return {
        "held-out": video_transformer.evaluate(model, pipeline.text, held),
        "training": video_transformer.evaluate(model, pipeline.text, known),
    }


def draw_loss(cache: Path, size: int, path: Path) -> None:
    """Loss curves of both trainings from their checkpoints' histories."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, name, column, label in (
        (axes[0], "vae", 3, "video autoencoder: MSE on -1..1 / 4 (stills, then 5, 9 and 17 frames)"),
        (axes[1], "transformer", 2, "video transformer: flow loss of clips"),
    ):
        file = cache / f"video_{name}_{size}.pt"
        if not file.exists():
            continue
        history = np.array(torch.load(file, map_location="cpu", weights_only=True)["history"])
        axis.plot(history[:, 1] / 60, history[:, column], linewidth=1)
        axis.set(title=label, xlabel="minutes", yscale="log")
        axis.title.set_fontsize(9)
        axis.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_all(args: argparse.Namespace, folder: Path, names: dict[str, str], emit: Callable[[str], None]) -> None:
    """video_samples.jpg (held-out and training captions), video_roundtrip.jpg and video_loss.png beside the recipe."""
    pipeline = Pipeline(args.models, names)
    found = clips.prepare(args.cache, args.size, emit)
    round_trips(pipeline, found, folder / "video_roundtrip.jpg", emit)
    prompts = json.loads((folder / "heldout_video_prompts.json").read_text(encoding="utf-8"))[:20]
    known = [f"{video_transformer.STYLE} {n}" for n, held in zip(found.name, found.held_out) if not held]
    picks = np.random.default_rng(SEED).choice(len(known), 10, replace=False)
    captions = prompts + [f"{known[i]} (training)" for i in picks]
    pictures = pipeline.sample([c.removesuffix(" (training)") for c in captions], args.size)
    strips([[p] for p in pictures], captions, 3).save(folder / "video_samples.jpg", quality=90)
    for label, value in flow_losses(pipeline, args.cache, args.size).items():
        emit(f"flow loss, {label}: {value:.4f}")
    draw_loss(args.cache, args.size, folder / "video_loss.png")
