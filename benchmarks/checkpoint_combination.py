"""LCSC on the demo image model's own training: is a searched combination of checkpoints better than their moving average?

Trains on from the committed weights at a constant rate, keeps a checkpoint every few steps and the recipe's own moving average,
searches signed coefficients on one half of the held-out pictures, and tests on the other half.

    python benchmarks/checkpoint_combination.py                  about 6 minutes on one core
    python benchmarks/checkpoint_combination.py --resume         goes on with an interrupted search
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "checkpoint-combination.json"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "demo", help="folder of the rendered pictures")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "combination", help="checkpoints and search")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, default=1500, help="training pictures")
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--population", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def recipe():
    """Return demo/train.py as a module, without putting the project root on sys.path."""
    spec = importlib.util.spec_from_file_location("stretto_recipe", ROOT / "demo" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def prepare(args, train):
    """Return training latents, held-out halves as (latents, captions), and the committed modules."""
    import numpy as np
    import torch

    data, autoencoder, transformer = (train.load_part(name) for name in ("data", "autoencoder", "transformer"))
    emoji = data.prepare(args.cache, 64)
    models = ROOT / "demo" / "models"
    vae, mean, std = autoencoder.load_exported(models / train.MODELS["vae"])
    model, text = transformer.load_exported(models / train.MODELS["transformer"], models / train.MODELS["text"])
    white = np.array(data.BACKGROUNDS["white"])
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(~emoji.held_out)
    rows = np.sort(rng.permutation(rows)[: args.rows])
    held = rng.permutation(np.flatnonzero(emoji.held_out))[:96]

    def encode(chosen):
        images = data.composite(emoji.pixels[chosen], white)
        return (autoencoder.encode_images(vae, images, "cpu") - mean) / std

    values = encode(rows)
    names = [emoji.name[i] for i in rows]
    # The recipe draws among backgrounds; here both are white.
    latents = transformer.Latents(
        values.half().expand(2, *values.shape), torch.zeros(2, len(rows), dtype=torch.int64), names,
        [emoji.style[i] for i in rows], mean, std,
    )  # fmt: skip
    captions = emoji.captions()
    halves = [(encode(part), [captions[i] for i in part]) for part in (held[::2], held[1::2])]
    return transformer, latents, halves, model, text


def train_on(args, train, transformer, latents, model, text):
    """Continue training at a constant rate; write checkpoints as safetensors, return their paths and the average."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    training = train.load_part("training")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    text.requires_grad_(False)
    average = training.Average(model, 0.998)
    optimizers = training.Optimizers(
        model.train().named_parameters(), args.lr, lambda name, p: p.ndim == 2 and transformer.is_hidden_matrix(name), 0.01
    )
    sampler = transformer.CaptionSampler(text, latents)
    paths, started = [], time.monotonic()
    for step in range(1, args.checkpoints * args.every + 1):
        size = min(args.batch, len(latents.names))
        x, ids = sampler.batch(size, rng)
        loss = transformer.flow_loss(model, text, x, ids)["loss"]
        loss.backward()
        optimizers.step(min(1.0, step / 10))
        average.update(model, step)
        if step % args.every == 0:
            path = args.work / f"step-{step:04d}.safetensors"
            save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, path)
            paths.append(path)
            left = (time.monotonic() - started) / step * (args.checkpoints * args.every - step)
            say(f"step {step}: loss {loss.item():.4f}, {left:.0f} s of training left")
    return paths, average.values, time.monotonic() - started


def main() -> None:
    """Entry point."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    from load_pack import load_pack

    sys.path.remove(str(ROOT))
    import torch
    from safetensors.torch import load_file

    train = recipe()
    train.load_part("comfy_setup").start_comfy(args.comfyui, "cpu")
    load_pack()
    from stretto.acceleration.weights.combining import open_combination, weighted, write_combination
    from stretto.acceleration.weights.search import Search, SearchSettings, usual_starts

    transformer, latents, (one, other), model, text = prepare(args, train)
    before = transformer.evaluate(model.eval(), text, *other)
    paths = sorted(args.work.glob("step-*.safetensors")) if args.resume else []
    if len(paths) == args.checkpoints:
        average, seconds = torch.load(args.work / "average.pt", weights_only=True), None
    else:
        for old in args.work.glob("*"):
            old.unlink()
        paths, average, seconds = train_on(args, train, transformer, latents, model, text)
        torch.save(average, args.work / "average.pt")
    with open_combination(paths, [1.0] + [0.0] * (len(paths) - 1)) as group:
        states = [{name: tensor.read() for name, tensor in found.tensors.items()} for found in group.checkpoints]
    model.eval().requires_grad_(False)

    def loss_of(state, part):
        model.load_state_dict(state)
        return transformer.evaluate(model, text, *part)

    def combined(point):
        return {
            name: weighted(point, [state[name] for state in states], tensor.dtype, name)
            for name, tensor in states[0].items()
        }

    count = len(paths)
    start = usual_starts(count)
    search = Search.open(
        count, SearchSettings(args.generations, args.population, spread=0.15), args.work / "search.json"
    )
    total, clock = search.total(start), time.monotonic()

    def metric(point):
        found = loss_of(combined(point), one)
        seen = len(search.points) + 1
        if seen % 10 == 0:
            best = min(found, search.best[1]) if search.points else found
            say(f"evaluation {seen} of {total}: best {best:.5f}, {(time.monotonic() - clock) / seen * (total - seen):.0f} s left")
        return found

    point, _ = search.run(metric, start)
    searched = time.monotonic() - clock
    with open_combination(paths, point) as group:
        write_combination(group, args.work / "combined.safetensors", replace=True)
    written = loss_of(load_file(args.work / "combined.safetensors"), other)
    rows = {
        "last checkpoint": states[-1],
        "best single checkpoint": states[min(range(count), key=lambda index: search.points[index][1])],
        "mean of all": combined([1 / count] * count),
        "moving average (EMA 0.998, the recipe's)": average,
        "searched combination (LCSC)": combined(point),
    }
    table = {name: {"search": loss_of(state, one), "test": loss_of(state, other)} for name, state in rows.items()}
    for name, losses in table.items():
        say(f"{name:44s} search half {losses['search']:.5f}   test half {losses['test']:.5f}")
    say(f"before this training: test half {before:.5f}; the file written by `combine`: {written:.5f}")
    say(f"coefficients {[round(value, 3) for value in point]}; {len(search.points)} evaluations, {searched:.0f} s")
    document = {
        "settings": {
            name: value for name, value in vars(args).items() if isinstance(value, int | float) and name != "resume"
        },
        "losses": table, "before": before, "written_file": written, "coefficients": point, "curve": search.curve,
        "evaluations": len(search.points), "search_seconds": searched, "training_seconds": seconds,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
