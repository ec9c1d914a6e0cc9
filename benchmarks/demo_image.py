"""The README's numbers for the demo image model: Taylor and EasyCache at their defaults, and fewer steps, batch 1 and 8.

Needs a running ComfyUI with this pack, and the panel's environment; starts nothing itself:

    python benchmarks/demo_image.py --server http://127.0.0.1:8188

Prints a table per batch size, writes the reports to report/benchmark/ and their numbers to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORKFLOWS = ("demo-image-taylor", "demo-image-easycache")
PROMPTS = ROOT / "demo" / "heldout_prompts.json"


def load_pack() -> None:
    """Make the pack importable as `stretto` without putting its folder on the import path."""
    spec = importlib.util.spec_from_file_location("load_pack", ROOT / "load_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_pack()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    parser.add_argument("--count", type=int, default=16, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of every prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds per prompt (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="discarded rounds (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
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
    """How many dB each accelerated arm is nearer to the plain pictures than the sampler with fewer steps."""
    from stretto.web.panel.measure.metrics import from_json_number

    quality = {arm["name"]: arm["quality"]["psnr"] for arm in report["arms"]}
    fewer = quality.get("fewer-steps")
    lines = []
    for arm in report["arms"]:
        own = quality[arm["name"]]
        if fewer is None or own is None or arm["role"] != "accelerated":
            continue
        values = [from_json_number(entry[key]) for entry in (own, fewer) for key in ("mean", "worst")]
        if any(math.isinf(value) for value in values):
            continue
        mean, worst = values[0] - values[2], values[1] - values[3]
        lines.append(
            f"{arm['label']}: {mean:+.1f} dB (worst picture {worst:+.1f} dB) over the sampler with fewer steps."
        )
    return lines


def run(args: argparse.Namespace) -> None:
    """Measure every batch size in turn."""
    from stretto.web.panel.measure.client import ComfyClient
    from stretto.web.panel.measure.compare import arms_of, compare, read_prompts, read_workflow
    from stretto.web.panel.measure.report import write_json
    from stretto.web.panel.terminal import output_console, print_paths, print_report, show_progress

    console = output_console()
    prompts = read_prompts([str(PROMPTS)])[: args.count]
    command = shlex.join(["python", "benchmarks/demo_image.py", *sys.argv[1:]])
    with ComfyClient(args.server) as client:
        named = [(name, read_workflow(ROOT / "workflows" / f"{name}.json", client)) for name in WORKFLOWS]
        plain, arms = arms_of(named)
        for batch in args.batch:
            console.rule(f"batch {batch}")
            folder = args.out / f"demo-image-batch-{batch}"
            with show_progress(console) as progress:
                report = compare(
                    client, plain, arms, prompts, [args.seed], args.repeats, args.warmup, folder, args.reference_steps,
                    progress, batch=batch, resume=args.resume, command=command,
                )  # fmt: skip
            print_report(report, console)
            for line in advantage(report):
                console.print(line, highlight=False)
            print_paths(folder, console)
            write_json(numbers(report), args.results / f"demo-image-batch-{batch}.json")


def main() -> int:
    """Run the benchmark; mistakes end with one sentence and status 2."""
    args = parse()
    load_pack()
    from stretto.web.panel.measure.errors import MeasureError

    try:
        run(args)
    except MeasureError as error:
        print(f"demo_image: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo_image: cancelled; --resume continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
