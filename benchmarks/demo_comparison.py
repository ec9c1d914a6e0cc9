"""What the benchmarks of the demo models share: a comparison and a table per batch size, and numbers worth keeping."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Benchmark:
    """A demo model's benchmark. `name` names its script and files, `prompts` is the file of held-out prompts."""

    name: str
    description: str
    workflows: tuple[str, ...]
    prompts: Path
    count: int
    batches: tuple[int, ...]

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return self.name.replace("_", "-")


def load_pack() -> None:
    """Make the pack importable as `stretto` without putting its folder on the import path."""
    spec = importlib.util.spec_from_file_location("load_pack", ROOT / "load_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_pack()


def parse(benchmark: Benchmark) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=benchmark.description)
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    parser.add_argument("--count", type=int, default=benchmark.count, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of every prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds per prompt (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="discarded rounds (default: %(default)s)")
    sizes = " ".join(map(str, benchmark.batches))
    parser.add_argument(
        "--batch", type=int, nargs="+", default=list(benchmark.batches), help=f"batch sizes (default: {sizes})"
    )
    parser.add_argument(
        "--reference-steps", type=int, default=200, help="steps of the reference (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "benchmark", help="folder of the full reports")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the numbers")
    return parser.parse_args()


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report@1 without pictures and traces, small enough to be kept in the repository."""
    arms = [{**arm, "traces": [], "workflow": {}} for arm in report["arms"]]
    return {**report, "arms": arms, "cells": []}


def advantage(report: dict[str, Any]) -> list[str]:
    """How many dB each accelerated arm is nearer to the plain result than the sampler with fewer steps."""
    worst = "frame" if report["settings"].get("frames") else "picture"
    fewer = next((arm for arm in report["arms"] if arm["role"] == "fewer-steps"), None)
    lines = []
    for arm in report["arms"] if fewer is not None else []:
        gains = _gains(arm["quality"]["psnr"], fewer["quality"]["psnr"])
        if arm["role"] != "accelerated" or gains is None:
            continue
        mean, low = gains
        line = f"{arm['label']}: {mean:+.1f} dB (worst {worst} {low:+.1f} dB) over the sampler with fewer steps"
        changes = _gains(arm["quality"].get("change_psnr"), fewer["quality"].get("change_psnr"))
        lines.append(line + (f", {changes[0]:+.1f} dB for the changes from frame to frame." if changes else "."))
    return lines


def _gains(own: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[float, float] | None:
    """Differences in dB of two qualities, of the mean and of the worst; None where one is unknown or infinite."""
    from stretto.web.panel.measure.metrics import from_json_number

    if own is None or other is None:
        return None
    pairs = [(from_json_number(own[key]), from_json_number(other[key])) for key in ("mean", "worst")]
    if any(math.isinf(value) for pair in pairs for value in pair):
        return None
    mean, worst = (first - second for first, second in pairs)
    return mean, worst


def run(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Measure every batch size in turn."""
    from stretto.web.panel.measure.client import ComfyClient
    from stretto.web.panel.measure.compare import arms_of, compare, read_prompts, read_workflow
    from stretto.web.panel.measure.report import write_json
    from stretto.web.panel.terminal import output_console, print_paths, print_report, show_progress

    console = output_console()
    prompts = read_prompts([str(benchmark.prompts)])[: args.count]
    command = shlex.join(["python", f"benchmarks/{benchmark.name}.py", *sys.argv[1:]])
    with ComfyClient(args.server) as client:
        named = [(name, read_workflow(ROOT / "workflows" / f"{name}.json", client)) for name in benchmark.workflows]
        plain, arms = arms_of(named)
        for batch in args.batch:
            console.rule(f"batch {batch}")
            folder = args.out / f"{benchmark.stem}-batch-{batch}"
            with show_progress(console) as progress:
                report = compare(
                    client, plain, arms, prompts, [args.seed], args.repeats, args.warmup, folder, args.reference_steps,
                    progress, batch=batch, resume=args.resume, command=command,
                )  # fmt: skip
            print_report(report, console)
            for line in advantage(report):
                console.print(line, highlight=False)
            print_paths(folder, console)
            write_json(numbers(report), args.results / f"{benchmark.stem}-batch-{batch}.json")


def main(benchmark: Benchmark) -> int:
    """Run the benchmark; mistakes end with one sentence and status 2."""
    args = parse(benchmark)
    load_pack()
    from stretto.web.panel.measure.errors import MeasureError

    try:
        run(benchmark, args)
    except MeasureError as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{benchmark.name}: cancelled; --resume continues.", file=sys.stderr)
        return 130
    return 0
