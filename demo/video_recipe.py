"""The commands of `train.py --video`: the same six steps for the video autoencoder and transformer."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import clips, data, video_autoencoder, video_transformer
from .text_encoder import TextEncoder
from .training import Budget

Emit = Callable[[str], None]
MODELS = {
    "vae": "vae/stretto-demo-video-vae.safetensors",
    "transformer": "diffusion_models/stretto-demo-video.safetensors",
}
TEXT = "text_encoders/stretto-demo-text.safetensors"  # of the image model; read, never trained here


def checkpoint(args: argparse.Namespace, name: str) -> Path:
    """Where the training called `name` keeps its state."""
    return args.cache / f"video_{name}_{args.size}.pt"


def held_out_prompts(found: clips.Clips) -> list[str]:
    """Captions of the held-out clips, in a seeded order that mixes subjects."""
    names = sorted(name for name, held in zip(found.name, found.held_out) if held)
    random.Random(data.SPLIT_SEED + 1).shuffle(names)
    return [f"{video_transformer.STYLE} {name}" for name in names]


def run_data(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Decode and cache clips, render stills; write the held-out prompts."""
    stills = data.prepare(args.cache, args.size)
    found = clips.prepare(args.cache, args.size, emit)
    prompts = held_out_prompts(found)
    (folder / "heldout_video_prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    emit(f"{len(found.name)} clips, {len(prompts)} held out, {len(found.pixels)} frames; {len(stills.name)} stills")


def run_vae(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Train the autoencoder and report its round trip."""
    found, stills = clips.prepare(args.cache, args.size, emit), data.prepare(args.cache, args.size)
    start = video_autoencoder.load_exported(args.models / MODELS["vae"])[0] if args.warm_start else None
    video_autoencoder.train(
        found,
        stills,
        checkpoint(args, "vae"),
        budget,
        args.device,
        emit,
        lr=args.lr,
        batch=args.batch or 1,
        still_taps=args.device == "cpu",
        resume=args.resume,
        start=start,
    )
    vae = video_autoencoder.load_average(checkpoint(args, "vae"))
    white = np.array(data.BACKGROUNDS["white"])
    values = []
    for clip in np.flatnonzero(found.held_out):
        frames = data.composite(found.window(int(clip), 0, clips.FRAMES), white)
        values.append(-10 * np.log10(((video_autoencoder.round_trip(vae, frames) - frames) ** 2).mean()))
    emit(f"round trip, held-out clips: mean {np.mean(values):.2f} dB, worst {np.min(values):.2f} dB")


def run_latents(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Encode windows of the training clips and the stills."""
    found, stills = clips.prepare(args.cache, args.size, emit), data.prepare(args.cache, args.size)
    statistics = None
    if args.warm_start:
        vae, *statistics = video_autoencoder.load_exported(args.models / MODELS["vae"])
    else:
        vae = video_autoencoder.load_average(checkpoint(args, "vae"))
    path = checkpoint(args, "latents")
    video_transformer.prepare_latents(found, stills, vae, path, args.device, emit, statistics)
    rows, _, std = video_transformer.load_latents(path)
    shapes = ", ".join(f"{kind} {list(r.values.shape)}" for kind, r in rows.items())
    emit(f"latents: {shapes}; raw spread per channel {std.min():.2f} to {std.max():.2f}")


def run_transformer(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Train the transformer; the text encoder is the image model's, frozen."""
    rows, _, _ = video_transformer.load_latents(checkpoint(args, "latents"))
    start = video_transformer.load_exported(args.models / MODELS["transformer"]) if args.warm_start else None
    video_transformer.train(
        rows,
        TextEncoder.load(args.models / TEXT),
        checkpoint(args, "transformer"),
        budget,
        args.device,
        emit,
        lr=args.lr,
        batch=args.batch or 24,
        resume=args.resume,
        start=start,
    )


def run_export(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Write the safetensors files from the newest checkpoints' averages."""
    note = {
        "licence": "Apache-2.0",
        "data": "Fluent Emoji (MIT), Noto Emoji (Apache-2.0); see LICENSES.md",
        "picture_size": str(args.size),
        "frames": str(clips.FRAMES),
        "frame_rate": str(clips.RATE),
    }
    wanted = args.only or list(MODELS)
    if "vae" in wanted:
        _, mean, std = video_transformer.load_latents(checkpoint(args, "latents"))
        vae = video_autoencoder.load_average(checkpoint(args, "vae"))
        video_autoencoder.export(vae, mean, std, args.models / MODELS["vae"], note)
    if "transformer" in wanted:
        model = video_transformer.load_average(checkpoint(args, "transformer"))
        video_transformer.export(model, args.models / MODELS["transformer"], note)
    for name in MODELS.values():
        if (args.models / name).exists():
            emit(f"{name}: {(args.models / name).stat().st_size / 1e6:.2f} MB")


def run_samples(args: argparse.Namespace, budget: Budget, folder: Path, emit: Emit) -> None:
    """Draw the sheets from the exported files."""
    from . import video_samples

    video_samples.draw_all(args, folder, {**MODELS, "text": TEXT}, emit)


COMMANDS = {
    "data": run_data,
    "vae": run_vae,
    "latents": run_latents,
    "transformer": run_transformer,
    "export": run_export,
    "samples": run_samples,
}
