"""Every sparse attention method on the demo video model: what it keeps, how far off it is, and what it saves.

    .venv/bin/python benchmarks/sparse_attention.py [quality] [speed] [--count 8] [--steps 28] [--arms REGEX]

Two parts, in process, batch 1, the arms of a prompt one after the other after a discarded warm-up:

quality: clips of the size the model was trained for (5 x 4 x 4 = 80 tokens, blocks of 16), held-out prompts. PSNR of all frames
    to the plain run beside that of fewer plain steps. Blocks of 16 are coarse on 80 tokens: compare methods, not keeps.
speed: the same weights on 17 frames of 512 x 512 (5 x 32 x 32 = 5,120 tokens, blocks of 64), whose pictures show nothing
    sensible but whose attention is that of a trained model: seconds of a step with sparse attention against one with full
    attention (medians over the steps of interleaved runs), and the relative L2 distance of sampled blocks.

The kernel alone, at 4k and 16k tokens and on GPUs, is benchmarks/sparse_kernel.py. Prints a table a part and writes
benchmarks/results/sparse-attention.json.
"""

import argparse
import json
import platform
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from caching import MODELS, RESULTS, Bench, psnr
from module_table import sample
from overhead import ROOT, prepare

QUALITY_BLOCK, SPEED_LATENT = 16, (1, 16, 5, 64, 64)
DENSE_UNTIL = 0.2


@dataclass
class Row:
    """What one arm gave."""

    psnr: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    def to_json(self) -> dict:
        """Means, worst, medians; None where there is nothing."""
        mean = lambda values: statistics.mean(values) if values else None  # noqa: E731
        middle = lambda values: statistics.median(values) if values else None  # noqa: E731
        return {
            "psnr_mean": mean(self.psnr),
            "psnr_worst": min(self.psnr, default=None),
            "kept": mean(self.kept),
            "relative_l2": mean(self.error),
            "full_step": middle(self.full),
            "sparse_step": middle(self.sparse),
            "sparse_step_spread": [min(self.sparse), max(self.sparse)] if self.sparse else None,
            "seconds": middle(self.seconds),
            "reason": self.reason,
        }


def arms_for(block: int) -> dict[str, dict]:
    """Settings of every method, by the name of the arm."""
    from stretto.acceleration.attention.geometry import Geometry
    from stretto.acceleration.attention.methods import METHODS

    arms = {}
    clip = Geometry((5, 4, 4), 0, 80)
    for method in METHODS.values():
        if method.fits(clip):
            continue  # CLEAR is for pictures
        for keep in (0.5, 0.25):
            arms[f"{method.name} {keep:.0%}"] = {
                "method": method.name,
                "keep": keep,
                "dense_until": DENSE_UNTIL,
                "min_tokens": 0,
                "block": block,
                "probe": True,
            }
    return arms


def run(bench: Bench, model, prompt: str, steps: int, seed: int) -> tuple:
    """The latent, the trace (None without a Stretto node) and the seconds of one run."""
    from stretto.acceleration.hosts.comfy import TRACES

    before = time.perf_counter()
    latent = sample(bench, model, prompt, steps, seed)
    seconds = time.perf_counter() - before
    traces = TRACES.of_prompt(None)
    return latent, traces[-1] if traces else None, seconds


def note(row: Row, trace: dict, seconds: float, timed: bool = True) -> None:
    """Add a run's figures; of one that is not timed only what was kept and how far off it was."""
    from stretto.acceleration.figures import kept_by_layer, sparse_seconds, worst_layers

    if timed:
        row.seconds.append(seconds)
    row.reason = next(item["reason"] for item in trace["techniques"] if item["technique"] == "attention")
    found = trace.get("attention")
    if not found or not found["layers"]:
        return
    row.kept.append(statistics.mean(kept_by_layer(found).values()))
    row.error += [error for _, error in worst_layers(trace)]
    pair = sparse_seconds(trace)
    if pair and timed:
        row.full.append(pair[0])
        row.sparse.append(pair[1])


def quality(bench: Bench, arms: dict, prompts: list[str], steps: int) -> dict[str, Row]:
    """PSNR of every arm, and of fewer plain steps."""
    models = {name: model_of(bench, settings) for name, settings in arms.items()}
    rows = {name: Row() for name in ("plain", *(f"{count} steps" for count in fewer(steps)), *arms)}
    sample(bench, bench.model, prompts[0], steps, 1)
    for index, prompt in enumerate(prompts):
        plain, seconds = None, 0.0
        for name, row in rows.items():
            count = int(name.split()[0]) if name.endswith(" steps") else steps
            latent, trace, seconds = run(bench, models.get(name, bench.model), prompt, count, 1000 + index)
            frames = bench.vae.decode(latent).float()
            plain = frames if plain is None else plain
            row.psnr.append(min(psnr(frames, plain), 120.0))
            if name in models:
                note(row, trace, seconds)
            else:
                row.seconds.append(seconds)
        print(f"  {index + 1} of {len(prompts)}: {prompt}", flush=True)
    return rows


def speed(bench: Bench, arms: dict, prompt: str, steps: int, rounds: int) -> dict[str, Row]:
    """Seconds a step of every arm at 5,120 tokens, in turn. The first, discarded round compares with full attention."""
    bench.spec = {**bench.spec, "latent": SPEED_LATENT}
    rows = {name: Row() for name in arms}
    for turn in range(rounds + 1):
        for name, row in rows.items():
            model = model_of(bench, {**arms[name], "dense_until": 0.5, "probe": turn == 0})
            _, trace, seconds = run(bench, model, prompt, steps, 1000)
            note(row, trace, seconds, timed=turn > 0)
            print(f"  round {turn} of {rounds}: {name} {seconds:.1f} s", flush=True)
    return rows


def model_of(bench: Bench, settings: dict):
    """The demo model with sparse attention on it."""
    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.plan import Request

    return host.request(bench.model, Request("attention", settings, required=True))


def fewer(steps: int) -> list[int]:
    """Plain step counts that cost as much as runs with cheaper attention might."""
    return [round(steps * share) for share in (0.9, 0.75, 0.6)]


def table(rows: dict[str, Row], title: str) -> str:
    """The figures of one part as text."""
    lines = [title, f"{'arm':34}{'kept':>7}{'rel-L2':>9}{'PSNR':>8}{'worst':>8}{'full step':>11}{'sparse':>9}{'gain':>7}"]
    for name, row in rows.items():
        found = row.to_json()
        pair = found["full_step"], found["sparse_step"]
        cells = [
            f"{found['kept']:7.1%}" if found["kept"] is not None else " " * 7,
            f"{found['relative_l2']:9.3f}" if found["relative_l2"] is not None else " " * 9,
            f"{found['psnr_mean']:8.2f}{found['psnr_worst']:8.2f}" if row.psnr else " " * 16,
            f"{pair[0]:10.3f}s{pair[1]:8.3f}s{pair[0] / pair[1]:6.2f}x" if all(pair) else "",
        ]
        lines.append(f"{name:34}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Run the parts asked for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["quality", "speed", []], default=[])
    parser.add_argument("--count", type=int, default=8, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds; 0 only compares with full attention")
    parser.add_argument("--arms", default="", help="only arms whose name matches")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse-attention.json")
    args = parser.parse_args()
    parts = args.parts or ["quality", "speed"]
    prepare(ROOT / ".comfyui")
    import torch

    bench = Bench("video")
    prompts = json.loads((ROOT / "demo" / MODELS["video"]["prompts"]).read_text(encoding="utf-8"))[: args.count]
    path = args.out
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    with torch.inference_mode():
        for part in parts:
            arms = arms_for(QUALITY_BLOCK if part == "quality" else 64)
            arms = {name: settings for name, settings in arms.items() if re.search(args.arms, name)}
            if part == "quality":
                rows = quality(bench, arms, prompts, args.steps)
                title = f"80 tokens, {len(prompts)} held-out prompts, {args.steps} steps, dense until {DENSE_UNTIL:.0%}"
            else:
                rows = speed(bench, arms, prompts[0], 6, args.rounds)
                title = f"5,120 tokens, seconds a step, {args.rounds} rounds"
            print(table(rows, title))
            known = document.setdefault(part, {})
            for name, row in rows.items():  # a part of the figures may be measured anew
                known[name] = {**known.get(name, {}), **{key: v for key, v in row.to_json().items() if v is not None}}
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
