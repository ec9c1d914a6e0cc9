"""Recipe of the demo models; with `--video` of the video models. Run the commands in this order:

    python demo/train.py data          render the emoji, write held-out prompts
    python demo/train.py vae           train the autoencoder
    python demo/train.py latents       encode the training pictures
    python demo/train.py transformer   train transformer and text encoder
    python demo/train.py export        write demo/models/*/*.safetensors (also while a training runs)
    python demo/train.py samples       draw samples.jpg, vae_roundtrip.jpg and loss.png through ComfyUI's own sampler

`--resume` continues a training from its checkpoint; `--warm-start` begins at the committed weights (for `vae` and
`transformer`), or encodes with the committed autoencoder (for `latents`). The video transformer reads the text encoder
that was trained with the image model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Folders named as ComfyUI names them: the pack offers each to the loader of that kind.
MODELS = {
    "vae": "vae/stretto-demo-image-vae.safetensors",
    "transformer": "diffusion_models/stretto-demo-image.safetensors",
    "text": "text_encoders/stretto-demo-text.safetensors",
}


def load_part(name: str) -> types.ModuleType:
    """Import a sibling module as part of one package without putting the project root on sys.path.

    The root holds a `nodes` package; on the path it would hide ComfyUI's module of that name.
    """
    package = "stretto_demo"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(HERE)]
        sys.modules[package] = module
    return importlib.import_module(f"{package}.{name}")


def emit(line: str) -> None:
    """A progress line, at once, so that a log file can be followed."""
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "vae", "latents", "transformer", "export", "samples"])
    parser.add_argument("--video", action="store_true", help="the video models instead of the image models")
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="picture side in pixels, a multiple of 16 (64 on a CPU, 128 or 256 on a GPU)",
    )
    parser.add_argument("--minutes", type=float, help="training time; 45 when neither this nor --steps is given")
    parser.add_argument("--steps", type=int, help="training steps, instead of --minutes")
    parser.add_argument("--batch", type=int, help="batch size (8 for vae, 128 for transformer; --video: a factor, 24)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the cache")
    parser.add_argument("--warm-start", action="store_true", help="begin at, or encode with, the committed weights")
    parser.add_argument("--only", choices=sorted(MODELS), nargs="*", help="export: only these files")
    parser.add_argument("--untrained", action="store_true", help="export: random weights where no checkpoint exists")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "demo", help="renders, latents, checkpoints")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="folder of the exported files")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui", help="a ComfyUI source tree")
    return parser.parse_args()


def budget_of(args: argparse.Namespace):
    """Time or steps that this training may spend."""
    minutes = args.minutes if args.minutes or args.steps else 45.0
    return load_part("training").Budget(None if args.steps else minutes, args.steps)


def run_data(args: argparse.Namespace) -> None:
    """Render and cache the pictures; write the held-out prompts."""
    data = load_part("data")
    emoji = data.prepare(args.cache, args.size)
    prompts = data.held_out_prompts(emoji)
    (HERE / "heldout_prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    emit(f"{len(emoji.name)} pictures of {args.size} px, {int(emoji.held_out.sum())} held out, {len(prompts)} prompts")


def run_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder and report its round trip."""
    import numpy as np

    data, autoencoder = load_part("data"), load_part("autoencoder")
    emoji = data.prepare(args.cache, args.size)
    checkpoint = args.cache / f"vae_{args.size}.pt"
    start = autoencoder.load_exported(args.models / MODELS["vae"])[0] if args.warm_start else None
    autoencoder.train(
        emoji,
        checkpoint,
        budget_of(args),
        args.device,
        emit,
        lr=args.lr,
        batch=args.batch or 8,
        resume=args.resume,
        start=start,
    )
    for label, rows in (
        ("held-out", np.flatnonzero(emoji.held_out)),
        ("training", np.flatnonzero(~emoji.held_out)[::25]),
    ):
        images = data.composite(emoji.pixels[rows], np.array(data.BACKGROUNDS["white"]))
        values = autoencoder.psnr(images, autoencoder.round_trip(autoencoder.load_average(checkpoint), images))
        emit(
            f"round trip, {label}: mean {values.mean():.2f} dB, worst {values.min():.2f} dB over {len(values)} pictures"
        )


def run_latents(args: argparse.Namespace) -> None:
    """Encode the training pictures on every background."""
    data, autoencoder, transformer = load_part("data"), load_part("autoencoder"), load_part("transformer")
    emoji = data.prepare(args.cache, args.size)
    statistics = None
    if args.warm_start:
        vae, *statistics = autoencoder.load_exported(args.models / MODELS["vae"])
    else:
        vae = autoencoder.load_average(args.cache / f"vae_{args.size}.pt")
    path = args.cache / f"latents_{args.size}.pt"
    transformer.prepare_latents(emoji, vae, path, args.device, autoencoder.encode_images, statistics)
    latents = transformer.load_latents(path)
    emit(f"latents {list(latents.values.shape)}, raw mean {latents.mean:.4f}, raw std {latents.std:.4f}")


def run_transformer(args: argparse.Namespace) -> None:
    """Train the transformer with its text encoder."""
    data, transformer = load_part("data"), load_part("transformer")
    vocabulary = transformer.vocabulary_of(data.prepare(args.cache, args.size))
    start = None
    if args.warm_start:
        start = transformer.load_exported(args.models / MODELS["transformer"], args.models / MODELS["text"])
        vocabulary = start[1].vocabulary
    transformer.train(
        transformer.load_latents(args.cache / f"latents_{args.size}.pt"),
        vocabulary,
        args.cache / f"transformer_{args.size}.pt",
        budget_of(args),
        args.device,
        emit,
        lr=args.lr,
        batch=args.batch or 128,
        resume=args.resume,
        start=start,
    )


def run_export(args: argparse.Namespace) -> None:
    """Write the safetensors files from the newest checkpoints' averages."""
    data, autoencoder, transformer = load_part("data"), load_part("autoencoder"), load_part("transformer")
    wanted = args.only or list(MODELS)
    note = {
        "licence": "Apache-2.0",
        "data": "Fluent Emoji (MIT), Noto Emoji (Apache-2.0); see LICENSES.md",
        "picture_size": str(args.size),
    }
    vae_checkpoint, checkpoint = args.cache / f"vae_{args.size}.pt", args.cache / f"transformer_{args.size}.pt"
    latents_path = args.cache / f"latents_{args.size}.pt"
    for name in MODELS.values():
        (args.models / name).parent.mkdir(parents=True, exist_ok=True)
    if "vae" in wanted and not (vae_checkpoint.exists() or args.untrained):
        emit("no checkpoint of an autoencoder: its file stays as it is")
    elif "vae" in wanted:
        vae = autoencoder.load_average(vae_checkpoint) if vae_checkpoint.exists() else autoencoder.build()
        mean, std = 0.0, 1.0
        if latents_path.exists():
            latents = transformer.load_latents(latents_path)
            mean, std = latents.mean, latents.std
        autoencoder.export(vae, mean, std, args.models / MODELS["vae"], note)
    if "transformer" in wanted or "text" in wanted:
        vocabulary = transformer.vocabulary_of(data.prepare(args.cache, args.size))
        if args.untrained and not checkpoint.exists():
            model, text = transformer.build(), transformer.build_text(vocabulary)
        else:
            model, text = transformer.load_average(checkpoint, vocabulary)
        transformer.export(model, text, args.models / MODELS["transformer"], args.models / MODELS["text"], note)
    for name in MODELS.values():
        path = args.models / name
        if path.exists():
            emit(f"{name}: {path.stat().st_size / 1e6:.2f} MB")


def run_samples(args: argparse.Namespace) -> None:
    """Draw the sheets from the exported files."""
    load_part("samples").draw_all(args, HERE, MODELS, emit)


def main() -> None:
    """Entry point."""
    args = arguments()
    import torch

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command != "data":
        load_part("comfy_setup").start_comfy(args.comfyui, args.device)
    if args.video:
        load_part("video_recipe").COMMANDS[args.command](args, budget_of(args), HERE, emit)
        return
    commands = {
        "data": run_data,
        "vae": run_vae,
        "latents": run_latents,
        "transformer": run_transformer,
        "export": run_export,
        "samples": run_samples,
    }
    commands[args.command](args)


if __name__ == "__main__":
    main()
