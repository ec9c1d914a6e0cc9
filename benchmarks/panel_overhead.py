"""What measuring costs the machine it measures: processor time of the client while ComfyUI samples.

    .venv-panel/bin/python benchmarks/panel_overhead.py [--seconds 5] [--runs 5] [--out benchmarks/results/panel-overhead.json]

A server in miniature, in a process of its own, takes some seconds for every run and sends what ComfyUI sends: a step's progress
and a preview of 20 kB, 28 times. Counted is this process' processor time, all threads, from queueing a run to its end, as a share
of the run. What the pack adds inside the sampler is in benchmarks/overhead.py (rows "Measure alone"). Goal: both below 1 %.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, PREVIEW, GOAL = 28, 20_000, 0.01
WORKFLOW = {
    "1": {"class_type": "UNETLoader", "inputs": {}},
    "3": {"class_type": "StrettoDemoText", "inputs": {"text": "a"}},
    "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["3", 0], "seed": 1, "steps": STEPS}},
    "6": {"class_type": "EmptySD3LatentImage", "inputs": {"batch_size": 1}},
    "9": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}


def serve(seconds: float) -> None:
    """Print the address and serve until the process is ended."""
    sys.path.insert(0, str(ROOT / "tests" / "panel"))
    import fake_comfy

    class Sampling(fake_comfy.FakeComfy):
        async def _run(self, key: str, api: dict, client: str) -> None:
            for step in range(STEPS):
                await asyncio.sleep(seconds / STEPS)
                data = {"value": step + 1, "max": STEPS, "node": "5", "prompt_id": key}
                await self.sockets[client].send_text(json.dumps({"type": "progress", "data": data}))
                await self.sockets[client].send_bytes(bytes(PREVIEW))
            await super()._run(key, api, client)

    print(Sampling().start(), flush=True)
    while True:
        time.sleep(60)


def main() -> int:
    """Measure, print and write; exit status 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "panel-overhead.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.seconds)
    sys.path.insert(0, str(ROOT))
    from load_pack import load_pack

    load_pack()
    from stretto.web.panel.measure.arms import ensure_measure
    from stretto.web.panel.measure.client import ComfyClient

    command = [sys.executable, __file__, "--serve", "--seconds", str(args.seconds)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        with ComfyClient(server.stdout.readline().strip()) as client:
            shares = []
            for number in range(args.runs):
                began, used = time.perf_counter(), time.process_time()
                client.run(ensure_measure(WORKFLOW, number), on_step=lambda step, steps: None)
                shares.append((time.process_time() - used) / (time.perf_counter() - began))
                print(f"run {number + 1} of {args.runs}: {shares[-1]:.3%} of one core", flush=True)
    finally:
        server.terminate()
    result = {"seconds": args.seconds, "runs": args.runs, "steps": STEPS, "preview_bytes": PREVIEW,
              "median_share": statistics.median(shares), "max_share": max(shares), "goal": GOAL}  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(result["median_share"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())
