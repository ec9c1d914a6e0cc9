"""Sheets to look at, drawn from the exported files through ComfyUI's own loaders and sampler."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import autoencoder, transformer
from .data import BACKGROUNDS, composite, prepare
from .text_encoder import TextEncoder

STEPS, CFG, SEED = 28, 5.0, 7


class Pipeline:
    """The three exported files, loaded as ComfyUI's nodes load them."""

    def __init__(self, folder: Path, names: dict[str, str]):
        import comfy.sd
        import comfy.utils

        self.model = comfy.sd.load_diffusion_model(str(folder / names["transformer"]))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / names["vae"])))
        self.text = TextEncoder.load(folder / names["text"])
        self.files = {kind: folder / name for kind, name in names.items()}

    def conditioning(self, prompts: list[str]) -> list:
        """Prompts -> ComfyUI CONDITIONING with one batch entry per prompt."""
        states, pooled, _ = self.text.encode(prompts)
        return [[states, {"pooled_output": pooled}]]

    @torch.inference_mode()
    def sample(
        self, prompts: list[str], size: int, steps: int = STEPS, cfg: float = CFG, seed: int = SEED
    ) -> np.ndarray:
        """Euler sampling with the model's own schedule: RGB float32 [N, size, size, 3] in 0..1."""
        import comfy.sample

        empty = torch.zeros(len(prompts), autoencoder.CHANNELS, size // 8, size // 8)
        noise = comfy.sample.prepare_noise(empty, seed)
        latents = comfy.sample.sample(
            self.model,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            self.conditioning(prompts),
            self.conditioning([""] * len(prompts)),
            empty,
            disable_pbar=True,
            seed=seed,
        )
        return self.vae.decode(latents).float().numpy()


def sheet(images: np.ndarray, captions: list[str], columns: int, scale: int):
    """RGB float32 [N, S, S, 3] and captions -> one PIL picture, enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    side, line = images.shape[1] * scale, 14
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 6) + 6, rows * (side + 2 * line + 8) + 6), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 6 + (i % columns) * (side + 6), 6 + (i // columns) * (side + 2 * line + 8)
        picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for row, text in enumerate(wrap(caption, side // 6)[:2]):
            draw.text((x, y + side + 1 + row * line), text, fill=(40, 40, 40), font=font)
    return page


def wrap(text: str, width: int) -> list[str]:
    """Greedy word wrap."""
    import textwrap

    return textwrap.wrap(text, max(width, 8)) or [""]


def draw_samples(
    pipeline: Pipeline, prompts: list[str], size: int, path: Path, scale: int = 2, columns: int = 6
) -> None:
    """Sample `prompts` and save the sheet."""
    sheet(pipeline.sample(prompts, size), prompts, columns, scale).save(path, quality=90)


@torch.inference_mode()
def draw_round_trip(pipeline: Pipeline, cache: Path, size: int, path: Path, columns: int = 12) -> tuple[float, float]:
    """Held-out pictures above their round trips; returns mean and worst PSNR in dB over all held-out pictures."""
    emoji = prepare(cache, size)
    rows = np.flatnonzero(emoji.held_out)
    images = composite(emoji.pixels[rows], np.array(BACKGROUNDS["white"]))
    back = np.concatenate(
        [
            pipeline.vae.decode(pipeline.vae.encode(torch.from_numpy(images[i : i + 16]))).float().numpy()
            for i in range(0, len(images), 16)
        ]
    )
    values = autoencoder.psnr(images, back)
    shown = np.linspace(0, len(rows) - 1, 2 * columns).astype(int)
    captions = [f"{emoji.style[rows[i]]} {emoji.name[rows[i]]}" for i in shown]
    pairs, labels = [], []
    for half in (slice(0, columns), slice(columns, None)):
        pairs += [*images[shown[half]], *back[shown[half]]]
        labels += [*captions[half], *(f"{values[i]:.1f} dB" for i in shown[half])]
    sheet(np.stack(pairs), labels, columns, 2).save(path, quality=90)
    return float(values.mean()), float(values.min())


@torch.inference_mode()
def flow_losses(pipeline: Pipeline, cache: Path, size: int) -> dict[str, float]:
    """Flow loss of the exported transformer on held-out pictures and on as many training pictures."""
    emoji = prepare(cache, size)
    held = np.flatnonzero(emoji.held_out)
    known = np.random.default_rng(0).choice(np.flatnonzero(~emoji.held_out), len(held), replace=False)
    # A float32 copy on the CPU: the one that ComfyUI holds may be half precision and on another device.
    model, text = transformer.load_exported(pipeline.files["transformer"], pipeline.files["text"])
    result = {}
    for label, rows in (("held-out", held), ("training", known)):
        images = torch.from_numpy(composite(emoji.pixels[rows], np.array(BACKGROUNDS["white"])))
        x = pipeline.model.model.process_latent_in(pipeline.vae.encode(images))
        captions = [f"{emoji.style[i]} {emoji.name[i]}" for i in rows]
        result[label] = transformer.evaluate(model, text, x.float().cpu(), captions)
    return result


def draw_loss(cache: Path, size: int, path: Path) -> None:
    """Loss curves of both trainings from their checkpoints' histories."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, name, column, label in (
        (axes[0], "vae", 3, "autoencoder: MSE"),
        (axes[1], "transformer", 2, "transformer: flow loss"),
    ):
        file = cache / f"{name}_{size}.pt"
        if not file.exists():
            continue
        history = np.array(torch.load(file, map_location="cpu", weights_only=True)["history"])
        axis.plot(history[:, 1] / 60, history[:, column], linewidth=1)
        axis.set(title=label, xlabel="minutes", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_all(args: argparse.Namespace, folder: Path, names: dict[str, str], emit: Callable[[str], None]) -> None:
    """samples.jpg (held-out captions), vae_roundtrip.jpg and loss.png beside the recipe."""
    pipeline = Pipeline(args.models, names)
    prompts = json.loads((folder / "heldout_prompts.json").read_text(encoding="utf-8"))[:24]
    draw_samples(pipeline, prompts, args.size, folder / "samples.jpg")
    mean, worst = draw_round_trip(pipeline, args.cache, args.size, folder / "vae_roundtrip.jpg")
    emit(f"round trip through the exported file, held-out: mean {mean:.2f} dB, worst {worst:.2f} dB")
    for label, value in flow_losses(pipeline, args.cache, args.size).items():
        emit(f"flow loss, {label}: {value:.4f}")
    draw_loss(args.cache, args.size, folder / "loss.png")
