"""Stacks of techniques on the demo models: what each gives alone, what they give together, and how close that stays.

    .venv/bin/python benchmarks/stacks.py [--parts image batch video wide large] [--count 6] [--arms REGEX] [--threads 1]
                                          [--comfyui .comfyui] [--out FILE]

In process, 28 Euler steps at CFG 5. The arms of a prompt run one after the other, small ones in several rounds, and every
round begins with another arm, so that drifts of the machine hit all alike; what loads and warms up is discarded. A speed-up
is the plain run's seconds in the sampler over the arm's on the same prompt and seed, as median and range over the prompts,
on the clock and in seconds of processor time. PSNR of the decoded pictures is to the plain run, mean and worst. "Product" is
that of the factors of a stack's parts, each measured alone in the same run; a stack below it has parts that save the same
work twice. The competitor that costs nothing, the same sampler with fewer steps, stands beside them.

image, batch: the demo image model, one and eight pictures at once. video: the demo video model, 80 tokens. wide, large: the same
weights on 1,280 and 4,205 tokens, sizes it was not trained for: closeness to the plain run is what counts. large takes ten
minutes a prompt on one core. Prints tables and writes benchmarks/results/stacks.json; parts that were not asked for stay.
"""

import argparse
import json
import math
import platform
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from caching import MODELS, RESULTS, Bench, psnr
from overhead import ROOT, prepare

STEPS, CFG, SEED = 28, 5.0, 1000
#: What a stack is to reach on a CPU.
GOAL_SPEED, GOAL_DECIBELS = 3.0, 30.0
IDENTICAL = 120.0

#: Every 4: with every 3 the saver would leave out what a cache that computes every second step has left out already.
FITTED, TAYLOR, SAVER, INT8 = "cache: Fitted", "cache: Taylor every 2", "guidance: every 4", "int8 weights"
CORRECTED, REGION, PLAN, SPARSE = "corrected stages", "region 0.25", "attention plan", "block mass 50 %"
#: How the parts of a stack are joined in its name, by which it finds their own factors.
JOIN = " + "


@dataclass(frozen=True)
class Part:
    """A model, a size, and the arms that make sense there: names of techniques, each alone or in a stack."""

    model: str
    latent: tuple[int, ...]
    arms: tuple[tuple[str, ...], ...]
    fewer: tuple[int, ...] = (14, 12, 11, 10, 9, 8)
    prompts: int = 0  # at most; 0 for as many as asked for
    rounds: int = 1  # of every arm per prompt; their median counts


def _fitted(*computed: int) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{FITTED} {number}",) for number in computed)


_IMAGE = (
    *_fitted(14, 10, 9, 8),
    (TAYLOR,),
    (SAVER,),
    (INT8,),
    (TAYLOR, SAVER),
    (f"{FITTED} 14", SAVER),
    (f"{FITTED} 10", INT8),
    (f"{FITTED} 9", INT8),
    (f"{FITTED} 8", INT8),
    (TAYLOR, SAVER, INT8),
)
PARTS = {
    "image": Part("image", (1, 16, 8, 8), _IMAGE, rounds=5),
    "batch": Part("image", (8, 16, 8, 8), _IMAGE),
    "video": Part(
        "video",
        (1, 16, 5, 8, 8),
        (
            *_fitted(14, 10, 9, 8),
            (TAYLOR,),
            (SAVER,),
            (REGION,),
            (TAYLOR, SAVER),
            (f"{FITTED} 14", SAVER),
            (f"{FITTED} 14", REGION),
        ),
        rounds=3,
    ),
    "wide": Part(
        "video",
        (1, 16, 5, 32, 32),
        (
            *_fitted(14, 10, 8),
            (SAVER,),
            (REGION,),
            (PLAN,),
            (f"{FITTED} 14", REGION),
            (f"{FITTED} 14", PLAN),
            (f"{FITTED} 10", PLAN),
        ),
        fewer=(14, 10, 8),
        prompts=2,
    ),
    "large": Part(
        "video",
        (1, 16, 5, 58, 58),
        (*_fitted(10), (SPARSE,), (PLAN,), (f"{FITTED} 10", SPARSE), (f"{FITTED} 10", PLAN)),
        fewer=(10, 8),
        prompts=1,
    ),
}


@dataclass
class Row:
    """What one arm gave, per prompt."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def to_json(self, plain: "Row", product: dict[str, float] | None) -> dict:
        """Medians, ranges, means, the worst."""
        found: dict = {"seconds": statistics.median(self.clock), "psnr_mean": statistics.mean(self.psnr)}
        found |= {"psnr_worst": min(self.psnr), "psnr": [round(value, 2) for value in self.psnr]}
        for name in ("clock", "processor"):
            gains = [p / a for p, a in zip(getattr(plain, name), getattr(self, name), strict=True)]
            found[f"speedup_{name}"] = statistics.median(gains)
            found[f"speedup_{name}_range"] = [min(gains), max(gains)]
        return found | ({"product": product} if product else {})


class Studio:
    """The models of one part, and how an arm runs on them."""

    def __init__(self, part: Part, folder: Path):
        self.part, self.bench = part, Bench(part.model)
        self.bench.spec = {**self.bench.spec, "latent": part.latent}
        self._folder, self._int8 = folder, None
        found = json.loads((RESULTS / f"fitted-{part.model}.json").read_text(encoding="utf-8"))
        self.fitted = found["steps"][str(STEPS)]

    def request(self, technique: str):
        """Technique and settings behind a name."""
        if technique.startswith(FITTED):
            row = self.fitted[technique.rpartition(" ")[2]]
            weights = {name: row[name] for name in ("mask", "weights", "sigmas")}
            return "cache", {"method": "Fitted", **weights, "warmup": 0, "tail": 0}
        return {
            TAYLOR: ("cache", {"method": "Taylor", "interval": 2, "warmup": 4, "tail": 5}),
            SAVER: ("guidance", {"method": "Periodic", "interval": 4}),
            REGION: ("region", {"ratio": 0.25, "min_tokens": 0}),
            PLAN: (
                "attention_plan",
                {
                    "file": str(ROOT / "presets" / "attention" / "demo-video-sparse-vdit.safetensors"),
                    "min_tokens": 0,
                    "compare": False,
                },
            ),
            SPARSE: ("attention", {"keep": 0.5, "dense_until": 0.5, "min_tokens": 0, "block": 64, "probe": False}),
        }[technique]

    def model(self, techniques: tuple[str, ...]):
        """MODEL with the requests of an arm."""
        from stretto.acceleration.hosts import comfy as host
        from stretto.acceleration.plan import Request

        model = self._quantized() if INT8 in techniques else self.bench.model
        for technique in techniques:
            if technique != INT8:
                name, settings = self.request(technique)
                model = host.request(model, Request(name, settings, required=True))
        return host.request(model, Request("measure", {"nonce": 1}))

    def _quantized(self):
        if self._int8 is None:
            from quantization import load, write

            write(self._folder / "int8.safetensors", form="int8")
            self._int8 = load(self._folder / "int8.safetensors")
        return self._int8

    def sample(self, model, prompt: str, seed: int, steps: int):
        """The latent, and seconds in the sampler on the clock and of processor time."""
        import comfy.sample
        import torch

        pair = self.bench.conditioning(prompt), self.bench.conditioning("")
        empty = torch.zeros(self.part.latent)
        noise = comfy.sample.prepare_noise(empty, seed)
        clock, processor = time.perf_counter(), time.process_time()
        latent = comfy.sample.sample(
            model, noise, steps, CFG, "euler", "simple", *pair, empty, disable_pbar=True, seed=seed
        )
        return latent, time.perf_counter() - clock, time.process_time() - processor

    def pictures(self, latent):
        """Decoded, in 0..1."""
        return self.bench.vae.decode(latent).float()


def arms_of(part: Part, wanted: str) -> dict[str, tuple[tuple[str, ...], int]]:
    """Techniques and steps of every arm by its name; parts of a wanted stack come along."""
    named = {JOIN.join(arm): arm for arm in part.arms}
    chosen = {name for name in named if re.search(wanted, name)}
    alone = {technique for name in chosen for technique in named[name]}
    fewer = {f"{count} steps": ((), count) for count in part.fewer}
    return {"plain": ((), STEPS), **fewer} | {
        name: (arm, STEPS) for name, arm in named.items() if name in chosen or name in alone
    }


def measure(name: str, part: Part, prompts: list[str], wanted: str) -> dict[str, dict]:
    """Run every arm on every prompt; rows by name of the arm."""
    import torch

    arms = arms_of(part, wanted)
    names, rows = list(arms), {arm: Row() for arm in arms}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        studio = Studio(part, Path(folder))
        models = {arm: studio.model(techniques) for arm, (techniques, _) in arms.items()}
        for techniques in ((), (INT8,)) if any(INT8 in arm for arm, _ in arms.values()) else ((),):
            studio.sample(studio.model(techniques), prompts[0], SEED - 1, 2)  # loads, warms up
        for index, prompt in enumerate(prompts):
            latents, seconds = {}, {arm: [] for arm in names}
            for turn in range(part.rounds):
                first = (index + turn) * 5 % len(names)
                for arm in names[first:] + names[:first]:
                    latents[arm], *taken = studio.sample(models[arm], prompt, SEED + index, arms[arm][1])
                    seconds[arm].append(taken)
                    if part.prompts:
                        print(f"    {arm}: {taken[0]:.1f} s", flush=True)
            for arm in names:
                clock, processor = (statistics.median(values) for values in zip(*seconds[arm], strict=True))
                rows[arm].clock.append(clock)
                rows[arm].processor.append(processor)
            plain = studio.pictures(latents["plain"])
            for arm in names:
                decibels = psnr(studio.pictures(latents[arm]), plain)
                rows[arm].psnr.append(min(decibels, IDENTICAL))
            print(f"  {name}: {index + 1} of {len(prompts)} prompts", flush=True)
    found: dict[str, dict] = {}
    for arm, (techniques, _) in arms.items():
        stacked = len(techniques) > 1
        product = {
            kind: math.prod(found[single][f"speedup_{kind}"] for single in techniques)
            for kind in ("clock", "processor")
            if stacked
        }
        found[arm] = rows[arm].to_json(rows["plain"], product)
    return found


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown, and the best below them."""
    lines = [
        "| arm | speed-up (clock) | range | (processor) | product | PSNR mean | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["speedup_clock_range"]
        product = f"{row['product']['processor']:.2f}x" if "product" in row else ""
        lines.append(
            f"| {name} | {row['speedup_clock']:.2f}x | {low:.2f} to {high:.2f} | {row['speedup_processor']:.2f}x | {product} | "
            f"{row['psnr_mean']:.1f} | {row['psnr_worst']:.1f} |"
        )
    return "\n".join([*lines, "", *best(rows)])


def best(rows: dict[str, dict]) -> list[str]:
    """A sentence about the fastest arm that stays good enough with every prompt: of ours, and of fewer plain steps."""
    sentences = []
    for what, ours in (("Fastest", True), ("Fewer steps", False)):
        good = [
            name
            for name, row in rows.items()
            if name != "plain" and row["psnr_worst"] >= GOAL_DECIBELS and ours != name.endswith(" steps")
        ]
        if not good:
            sentences.append(f"{what}: none stays at {GOAL_DECIBELS:g} dB with every prompt")
            continue
        name = max(good, key=lambda arm: rows[arm]["speedup_processor"])
        row = rows[name]
        sentences.append(
            f"{what} that stays at {GOAL_DECIBELS:g} dB with every prompt: {name}, {row['speedup_clock']:.2f}x on the clock, "
            f"{row['speedup_processor']:.2f}x of processor time, {row['psnr_mean']:.1f} dB (worst {row['psnr_worst']:.1f})"
        )
    return sentences


def main() -> None:
    """Measure, print, write after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["image", "batch", "video", "wide"])
    parser.add_argument("--count", type=int, default=6, help="held-out prompts")
    parser.add_argument("--arms", default="", help="only arms whose name matches this expression; plain runs stay")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULTS / "stacks.json")
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    torch.set_num_threads(args.threads)
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result["machine"] = {"processor": platform.machine(), "torch": torch.__version__, "threads": args.threads}
    result["goal"] = {"speedup": GOAL_SPEED, "psnr": GOAL_DECIBELS}
    for name in args.parts:
        part = PARTS[name]
        prompts = json.loads((ROOT / "demo" / MODELS[part.model]["prompts"]).read_text(encoding="utf-8"))
        prompts = prompts[: min(args.count, part.prompts or args.count)]
        rows = measure(name, part, prompts, args.arms)
        title = f"demo {part.model} model, latent {'x'.join(map(str, part.latent))}, {STEPS} Euler steps, CFG {CFG:g}"
        result.setdefault("parts", {})[name] = {
            "title": f"{title}, {len(prompts)} held-out prompts",
            "prompts": prompts,
            "rounds": part.rounds,
            "seeds": [SEED + index for index in range(len(prompts))],
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\n{title}, {len(prompts)} held-out prompts\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
