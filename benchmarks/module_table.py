"""Tables of modules found for the demo models, beside as many plain steps: quality for computed cost.

    .venv/bin/python benchmarks/module_table.py image [--steps 28] [--share 0.8 0.65 0.5] [--count 8] [--save FOLDER]
    .venv/bin/python benchmarks/module_table.py video

Records runs of captions that are not held out (per module: change per step, seconds), chooses a table for each share of the
modules' cost, and runs it on held-out prompts: reusing, and forecasting along a line. Beside it: the method "FORA modules"
at the interval that computes about as much, and plain sampling in as many steps, rounded up. In process, batch 1, the arms
of a prompt one after the other, after a discarded warm-up; PSNR of the decoded pictures to the plain run. Prints a table.
With --save the tables are written as files for Stretto Cache Schedule.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from caching import MODELS, Bench, psnr
from overhead import ROOT, prepare
from search_schedule import captions

RECORDED, SEED = 3, 5000


@dataclass(frozen=True)
class Arm:
    """One way of sampling: a request, or fewer steps."""

    name: str
    request: object = None
    steps: int | None = None


def sample(bench: Bench, model, prompt: str, steps: int, seed: int):
    """The latent of a prompt."""
    import comfy.sample
    import torch

    empty = torch.zeros(bench.spec["latent"])
    noise = comfy.sample.prepare_noise(empty, seed)
    pair = bench.conditioning(prompt), bench.conditioning("")
    return comfy.sample.sample(
        model, noise, steps, 5.0, "euler", "simple", *pair, empty, disable_pbar=True, seed=seed
    )


def record(bench: Bench, which: str, steps: int) -> list:
    """Modules with their mean change per step and median seconds over the recorded captions."""
    from stretto.acceleration.caching.table_search import Unit
    from stretto.acceleration.hosts.comfy_module_profile import profile_modules

    def job(caption: str, seed: int):
        return lambda model: sample(bench, model, caption, steps, seed)

    runs = [
        profile_modules(bench.model, job(caption, SEED + index))[0]
        for index, caption in enumerate(captions(which)[:RECORDED])
    ]
    return [
        Unit(
            same[0].block,
            same[0].names,
            statistics.median(unit.cost for unit in same),
            tuple(statistics.mean(changes) for changes in zip(*(unit.changes for unit in same))),
        )
        for same in zip(*runs)
    ]


def arms_for(units: list, shares: list[float], steps: int, save: Path | None, which: str) -> list[Arm]:
    """Plain, and per share the table found, FORA of about the same cost, and as many plain steps."""
    from stretto.acceleration.caching.table import table_settings
    from stretto.acceleration.caching.table_search import RAILS, choose_table
    from stretto.acceleration.plan import Request

    arms = [Arm("plain")]
    for share in shares:
        choice = choose_table(units, share)
        print(f"share {share:g}: predicted error {choice.error:.3f}, computed cost {choice.share:.1%}")
        for module in choice.table.modules:
            for block in range(choice.table.blocks):
                drawn = "".join("#" if choice.table.computed(step, block, module) else "." for step in range(steps))
                print(f"  block {block} {module:10} {drawn}")
        settings = table_settings(choice.table)
        line = {"forecaster": "newton", "order": 1}
        arms.append(Arm(f"table {share:g}, reuse", Request("table", settings, required=True)))
        arms.append(Arm(f"table {share:g}, line", Request("table", {**settings, **line}, required=True)))
        every = max(round((steps - RAILS.warmup - RAILS.tail) / max(share * steps - RAILS.warmup - RAILS.tail, 1)), 2)
        fora = {"method": "FORA modules", "interval": every, "warmup": RAILS.warmup, "tail": RAILS.tail}
        if not any(arm.name == f"FORA every {every}" for arm in arms):
            arms.append(Arm(f"FORA every {every}", Request("cache", fora, required=True)))
        fewer = math.ceil(choice.share * steps)
        arms.append(Arm(f"{fewer} steps", steps=fewer))
        if save:
            save.mkdir(parents=True, exist_ok=True)
            path = save / f"{which}-{steps}-{share:g}.json"
            path.write_text(json.dumps(choice.table.to_json(), indent=1) + "\n", encoding="utf-8")
            print(f"  written to {path}")
    return arms


def measure(bench: Bench, arms: list[Arm], prompts: list[str], steps: int) -> dict[str, tuple[list, list]]:
    """PSNR and seconds per prompt of every arm."""
    from stretto.acceleration.hosts import comfy as host

    models = {arm.name: host.request(bench.model, arm.request) if arm.request else bench.model for arm in arms}
    figures = {arm.name: ([], []) for arm in arms}
    sample(bench, bench.model, prompts[0], steps, 1)
    for index, prompt in enumerate(prompts):
        plain = None
        for arm in arms:
            started = time.perf_counter()
            latent = sample(bench, models[arm.name], prompt, arm.steps or steps, 1000 + index)
            seconds = time.perf_counter() - started
            pictures = bench.vae.decode(latent).float()
            plain = pictures if plain is None else plain
            figures[arm.name][0].append(min(psnr(pictures, plain), 120.0))
            figures[arm.name][1].append(seconds)
    return figures


def main() -> None:
    """Record, search, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--share", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--count", type=int, default=8, help="held-out prompts")
    parser.add_argument("--save", type=Path, help="folder for the tables")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    bench = Bench(args.model)
    prompts = json.loads((ROOT / "demo" / MODELS[args.model]["prompts"]).read_text(encoding="utf-8"))[: args.count]
    with torch.inference_mode():
        units = record(bench, args.model, args.steps)
        arms = arms_for(units, args.share, args.steps, args.save, args.model)
        figures = measure(bench, arms, prompts, args.steps)
    base = statistics.median(figures["plain"][1])
    print(f"\n{args.model}, {args.steps} steps, {len(prompts)} held-out prompts, CFG 5\n")
    print("| arm | speed-up | PSNR mean | worst |\n|---|---|---|---|")
    for name, (quality, seconds) in figures.items():
        print(f"| {name} | {base / statistics.median(seconds):.2f}x | {statistics.mean(quality):.1f} | {min(quality):.1f} |")


if __name__ == "__main__":
    main()
