"""The speed-up that a report predicts beside the one that is measured, per technique and shape.

    .venv/bin/python benchmarks/prediction.py [--shapes image batch wide video] [--rounds 3] [--clock processor] [--out FILE]

The prediction is made from the accelerated run alone (acceleration/savings.py); the plain run that it foretells is run right
before, in every round, and "measured" is the ratio of both samplers' seconds. Medians over the rounds, with the quartiles of what
was measured. "Counted" is the same without the run's own clock: rows x tokens, and skipped steps at their measured share.

image, batch: the demo image model at its own size, one picture and eight. wide: the same at 256 x 256 pixels. video: the demo
video model. Sampling alone, 28 Euler steps, CFG 5, one thread. Its processor time stands for the clock, in the pack's own
stopwatches too: a busy machine disturbs the clock (`--clock wall` takes it all the same). Prints a table and writes
benchmarks/results/prediction.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from guidance_resolution import Arm, patched, progressive, sample
from overhead import ROOT, prepare

RESULT = ROOT / "benchmarks" / "results" / "prediction.json"
#: Demo model, pictures at once, latent pixels a side (None: its own).
SHAPES = {"image": ("image", 1, None), "batch": ("image", 8, None), "wide": ("image", 1, 32), "video": ("video", 1, None)}
#: Off by more than this, a prediction misses the goal.
GOAL = 0.10


def arms() -> dict[str, tuple]:
    """Return the requests of each arm by its name."""
    taylor = ("cache", {"method": "Taylor", "interval": 3, "warmup": 4, "tail": 5})
    saver = ("guidance", {"method": "Periodic"})
    return {
        "Taylor every 3": (taylor,),
        "EasyCache 0.1": (("cache", {"method": "EasyCache", "threshold": 0.1, "tail": 1}),),
        "FBCache 0.1": (("cache", {"method": "FBCache", "threshold": 0.1, "warmup": 2, "tail": 1}),),
        "Guidance Saver": (saver,),
        "half size to 40 %": (progressive(0.4),),
        "corrected, half size to 57 %": (progressive(0.57, "Corrected", refresh=4),),
        "Guidance Saver, Taylor every 3": (saver, taylor),
        "half size to 40 %, Taylor every 3": (progressive(0.4), taylor),
        "half size to 40 %, Guidance Saver, Taylor every 3": (progressive(0.4), saver, taylor),
    }


def measure(shape: str, rounds: int) -> dict:
    """Return the figures of every arm at one shape."""
    import torch
    from caching import MODELS, Bench

    from stretto.acceleration.hosts.comfy import TRACES
    from stretto.acceleration.savings import expected, savings

    which, batch, side = SHAPES[shape]
    bench = Bench(which)
    size = (batch, *bench.spec["latent"][1:])
    size = size if side is None else (*size[:-2], side, side)
    prompts = json.loads((ROOT / "demo" / MODELS[which]["prompts"]).read_text(encoding="utf-8"))
    models = {name: patched(bench.model, Arm(name, requests)) for name, requests in {"plain": (), **arms()}.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"predicted": [], "counted": [], "measured": []} for name in arms()}

    def seconds(name: str, number: int) -> tuple[float, dict]:
        pair = bench.conditioning(prompts[number % len(prompts)]), bench.conditioning("")
        sample(models[name], Arm(name), pair, size, 1000 + number)
        trace = TRACES.of_prompt(None)[-1]
        return trace["seconds"]["sampler"], trace

    with torch.inference_mode():
        for name in models:
            seconds(name, 0)  # discarded
        for number in range(rounds):
            for name, figures in found.items():
                plain, _ = seconds("plain", number)
                taken, trace = seconds(name, number)
                counted = savings(trace, by_clock=False)
                figures["predicted"].append(expected(trace) or 1.0)
                figures["counted"].append(counted_product(counted))
                figures["measured"].append(plain / taken)
            print(f"  {shape}: {number + 1} of {rounds} rounds", flush=True)
    lines = {name: row(figures) for name, figures in found.items()}
    return {"model": f"demo {which}", "latent": list(size), "rounds": rounds, "arms": lines}


def counted_product(factors: dict[str, float]) -> float:
    """Return the product of the factors."""
    total = 1.0
    for factor in factors.values():
        total *= factor
    return total


def row(figures: dict[str, list[float]]) -> dict:
    """Return medians, the quartiles of what was measured, and the median of the rounds' errors."""
    measured = sorted(figures["measured"])
    quartiles = statistics.quantiles(measured, n=4)[::2] if len(measured) > 1 else [measured[0]] * 2
    middle = {name: statistics.median(values) for name, values in figures.items()}
    error = middle["predicted"] / middle["measured"] - 1
    return {**middle, "spread": quartiles, "error": error, "goal_reached": abs(error) < GOAL}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["image", "batch", "video"], help="wide takes longest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("processor", "wall"), default="processor")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.clock == "processor":
        time.perf_counter = time.process_time
    prepare(args.comfyui)
    import torch

    torch.set_num_threads(1)
    document = {"steps": 28, "cfg": 5.0, "rounds": args.rounds, "threads": 1, "clock": args.clock, "goal": GOAL, "shapes": {}}
    for shape in args.shapes:
        document["shapes"][shape] = found = measure(shape, args.rounds)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"\n{shape}\n{'arm':52}{'counted':>9}{'predicted':>11}{'measured':>10}{'error':>8}")
        for name, line in found["arms"].items():
            print(f"{name:52}{line['counted']:8.2f}x{line['predicted']:10.2f}x{line['measured']:9.2f}x{line['error']:+8.1%}"
                  f"{'' if line['goal_reached'] else '  above the goal'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
