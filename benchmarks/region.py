"""Region-adaptive sampling on the demo video model: quality for work, guards compared, and wall time.

    .venv/bin/python benchmarks/region.py [quality] [guard] [speed] [--count 16] [--arms REGEX]
                                          [--rounds 2] [--threads 1]

In process, batch 1, CFG 5, 28 Euler steps, the arms of a prompt one after the other after a discarded warm-up. Work is the share
of all tokens that ran through the blocks.

quality: clips of the size the model was trained for (5 x 4 x 4 = 80 tokens), held-out prompts. PSNR of all frames to the plain
    run, over ratios, beside fewer plain steps; "beyond" is the distance to fewer steps at equal work, between the two nearest.
guard: the corrected choice of tokens beside the one of the published code, everything else as that has it (repeated velocities
    and keys, all tokens every fifth step).
speed: the same weights on 1,280 tokens (5 x 16 x 16), whose pictures show nothing sensible: seconds of interleaved runs, on the
    clock and of processor time, over the plain run's.

Prints a table a part and writes benchmarks/results/region.json after every prompt; what was not asked for stays in the file.
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from caching import MODELS, RESULTS, Bench, psnr
from module_table import sample
from overhead import ROOT, prepare

STEPS, SPEED_LATENT = 28, (1, 16, 5, 32, 32)
FEWER = (25, 24, 23, 22, 21, 20, 18)
#: What the published code does beside choosing tokens.
PUBLISHED = {"start": 4, "tail": 0, "refresh_every": 5, "stale": "repeat", "keys": "repeat"}


@dataclass
class Row:
    """What one arm gave."""

    work: float = 1.0
    psnr: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def to_json(self) -> dict:
        """Means, the worst, medians and the spread."""
        found = {"work": self.work}
        if self.psnr:
            found |= {"psnr_mean": statistics.mean(self.psnr), "psnr_worst": min(self.psnr), "prompts": len(self.psnr)}
        for name in ("clock", "processor"):
            values = getattr(self, name)
            if values:
                found[name] = {"median": statistics.median(values), "spread": [min(values), max(values)]}
        return found


def arms_of(part: str) -> dict[str, dict | int]:
    """Settings, or plain steps, by the name of the arm."""
    if part == "guard":
        return {
            f"{guard}, ratio {ratio:g}": {**PUBLISHED, "guard": guard, "ratio": ratio}
            for ratio in (0.5, 0.25)
            for guard in ("corrected", "published")
        }
    arms: dict[str, dict | int] = {f"ratio {ratio:g}": {"ratio": ratio} for ratio in (0.25, 0.5, 0.75)}
    if part == "speed":
        return arms | {"ratio 0.5, every fifth step complete, no tail": {"ratio": 0.5, "refresh_every": 5, "tail": 0}}
    arms["ratio 0.5, velocities and keys repeated"] = {"ratio": 0.5, "stale": "repeat", "keys": "repeat"}
    arms["ratio 0.5, hidden states kept"] = {"ratio": 0.5, "stale": "hidden state"}
    arms["ratio 0.5, every fifth step complete"] = {"ratio": 0.5, "refresh_every": 5}
    return arms | {f"{count} steps": count for count in FEWER}


def run(bench: Bench, arm: dict | int, prompt: str, seed: int) -> tuple:
    """The latent, the work, and the seconds on the clock and of the processor."""
    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.plan import Request

    steps, model = (arm, bench.model) if isinstance(arm, int) else (STEPS, bench.model)
    if isinstance(arm, dict):
        model = host.request(model, Request("region", {"min_tokens": 0, **arm}, required=True))
    clock, processor = time.perf_counter(), time.process_time()
    latent = sample(bench, model, prompt, steps, seed)
    seconds = time.perf_counter() - clock, time.process_time() - processor
    if isinstance(arm, int):
        return latent, steps / STEPS, *seconds
    entries = host.TRACES.of_prompt(None)[-1]["evaluations"]
    return latent, statistics.mean(1.0 if e["active_share"] is None else e["active_share"] for e in entries), *seconds


def quality(bench: Bench, arms: dict, prompts: list[str], save: Callable[[dict[str, Row]], None]) -> dict[str, Row]:
    """PSNR of every arm to the plain run; saved after every prompt."""
    rows = {name: Row() for name in arms}
    run(bench, STEPS, prompts[0], 1)
    for index, prompt in enumerate(prompts):
        plain = bench.vae.decode(run(bench, STEPS, prompt, 1000 + index)[0]).float()
        for name, arm in arms.items():
            latent, rows[name].work, *_ = run(bench, arm, prompt, 1000 + index)
            rows[name].psnr.append(min(psnr(bench.vae.decode(latent).float(), plain), 120.0))
        print(f"  {index + 1} of {len(prompts)}: {prompt}", flush=True)
        save(rows)
    return rows


def speed(bench: Bench, arms: dict, prompt: str, rounds: int) -> dict[str, Row]:
    """Seconds of every arm and of the plain run at 1,280 tokens, in turn; the first round is discarded."""
    bench.spec = {**bench.spec, "latent": SPEED_LATENT}
    rows = {name: Row() for name in ("plain", *arms)}
    run(bench, 2, prompt, 1)
    for turn in range(rounds):
        for name, row in rows.items():
            _, row.work, clock, processor = run(bench, arms.get(name, STEPS), prompt, 1000)
            row.clock.append(clock)
            row.processor.append(processor)
            print(f"  round {turn + 1} of {rounds}: {name} {clock:.1f} s, {processor:.1f} s of the processor", flush=True)
    return rows


def beyond(rows: dict[str, dict], name: str) -> float | None:
    """How far an arm's PSNR lies above fewer steps of equal work; None outside of what was measured."""
    points = sorted((row["work"], row["psnr_mean"]) for other, row in rows.items() if other.endswith(" steps"))
    work = rows[name]["work"]
    pairs = [(a, b) for a, b in pairwise(points) if a[0] <= work <= b[0]]
    if not pairs:
        return None
    (low, below), (high, above) = pairs[0]
    return rows[name]["psnr_mean"] - below - (above - below) * (work - low) / (high - low)


def table(part: str, rows: dict[str, dict]) -> str:
    """The figures of one part as text."""
    if part == "speed":
        plain = rows["plain"]
        lines = [f"1,280 tokens, {STEPS} steps", f"{'arm':46}{'work':>7}{'seconds':>9}{'gain':>8}{'processor':>11}{'gain':>8}"]
        for name, row in rows.items():
            gains = [plain[kind]["median"] / row[kind]["median"] for kind in ("clock", "processor")]
            lines.append(
                f"{name:46}{row['work']:7.1%}{row['clock']['median']:9.1f}{gains[0]:7.2f}x"
                f"{row['processor']['median']:11.1f}{gains[1]:7.2f}x"
            )
        return "\n".join(lines)
    lines = [f"80 tokens, {STEPS} steps", f"{'arm':46}{'work':>7}{'PSNR':>8}{'worst':>8}{'beyond':>9}"]
    for name, row in rows.items():
        gap = beyond(rows, name) if part == "quality" and not name.endswith(" steps") else None
        words = "" if gap is None else f"{gap:+9.1f}"
        lines.append(f"{name:46}{row['work']:7.1%}{row['psnr_mean']:8.2f}{row['psnr_worst']:8.2f}{words}")
    return "\n".join(lines)


def main() -> None:
    """Run the parts asked for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["quality", "guard", "speed", []], default=[])
    parser.add_argument("--count", type=int, default=16, help="held-out prompts")
    parser.add_argument("--arms", default="", help="only arms whose name matches; others stay in the file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "region.json")
    args = parser.parse_args()
    prepare(ROOT / ".comfyui")
    import torch

    torch.set_num_threads(args.threads)
    prompts = json.loads((ROOT / "demo" / MODELS["video"]["prompts"]).read_text(encoding="utf-8"))[: args.count]
    path = args.out
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document["machine"] = f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads"
    with torch.inference_mode():
        for part in args.parts or ["quality", "guard", "speed"]:
            bench, arms = Bench("video"), {name: arm for name, arm in arms_of(part).items() if re.search(args.arms, name)}

            def save(rows: dict[str, Row], part: str = part) -> None:
                document.setdefault(part, {}).update({name: row.to_json() for name, row in rows.items()})
                path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

            if part == "speed":
                save(speed(bench, arms, prompts[0], args.rounds))
            else:
                quality(bench, arms, prompts, save)
            print(table(part, document[part]), flush=True)


if __name__ == "__main__":
    main()
