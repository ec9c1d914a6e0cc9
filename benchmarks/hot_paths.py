"""The pack's hottest paths on a processor, before and after: two revisions loaded side by side and run in turns.

    python benchmarks/hot_paths.py --before REVISION [--rounds 15] [--only indicator]

The other revision is taken out of git into a temporary folder and imported under a name of its own, so both run in one process,
on the same tensors, one after the other in every round; the first round does not count. Times are of processor time, one thread,
and by the wall clock for whole runs (indicators): median and range. Every path says whether both yield the same bits. Without
--before there is one column, for looking.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import overhead
from overhead import ROOT

AFTER, BEFORE = "stretto", "stretto_before"
#: Runs of a path in one measurement: long enough for the clock.
LEAST = 0.004
#: Goals in microseconds an evaluation, where there are any.
GOALS = {"indicator: TeaCache": 500.0, "indicator: FBCache": 500.0, "indicator: DBCache": 500.0, "indicator: EasyCache": 500.0}


def part(pack: str, name: str) -> Any:
    """Return a module of one of the two."""
    return importlib.import_module(f"{pack}.{name}")


def decoding(form: str) -> Callable[[str], Callable[[], Any]]:
    """A weight of 1,024 x 1,024 from its packed codes to the int8 grid."""

    def build(pack: str) -> Callable[[], Any]:
        import torch

        layout = part(pack, "acceleration.quantization.layouts").fitting(form, 1024, 1024)
        weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
        parts = layout.quantize(weight).parts
        return lambda: layout.int8(parts)

    return build


def forecast(pack: str) -> Callable[[], Any]:
    """A forecast from three features of 1,024 tokens, 16 bit."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1024, 1536, generator=generator).bfloat16() for _ in range(3)]
    kernel = part(pack, "kernels.weighted_sum").weighted_sum
    return lambda: kernel(tensors, [3.0, -3.0, 1.0])


def probe(pack: str) -> Callable[[], Any]:
    """What the first block added against the last time, 1,024 tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    before, start, now = (torch.randn(1, 1024, 512, generator=generator) for _ in range(3))
    watch = part(pack, "acceleration.caching.probe").RelativeChange(1)
    watch.measure("cond", before, 0.0, start)
    watch.computed("cond", before, 0.0, start)
    return lambda: torch.tensor(watch.measure("cond", now, 1.0, start))


def prediction(pack: str) -> Callable[[], Any]:
    """The network's raw output from a denoised clip of 21 frames."""
    import comfy.model_sampling
    import torch

    sampling = comfy.model_sampling.CONST()
    x, denoised = (torch.randn(2, 16, 21, 60, 104, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    sigma, invert = torch.tensor([0.7, 0.7]), part(pack, "acceleration.hosts.comfy")._prediction
    return lambda: invert(sampling, sigma, denoised, x)


def sparse_list(pack: str) -> Callable[[], Any]:
    """Which blocks of 4,096 tokens are kept, by mean-pooled scores."""
    import torch

    kernel = part(pack, "kernels.block_sparse_attention")
    q, k = (torch.randn(1, 4, 4096, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def build() -> Any:
        scores = kernel.pool_blocks(q, 64)[0] @ kernel.pool_blocks(k, 64)[0].mT
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(16, -1).indices, True)
        return kernel.BlockList.from_mask(best, 64, 64).index

    return build


def sparse_kernel(pack: str) -> Callable[[], Any]:
    """Attention of 2,048 tokens to a quarter of the blocks."""
    import torch

    kernel = part(pack, "kernels.block_sparse_attention")
    q, k, v = (torch.randn(1, 4, 2048, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    mask = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(9)) < 0.25
    blocks = kernel.BlockList.from_mask(mask | torch.eye(32, dtype=torch.bool), 64, 64)
    return lambda: kernel.block_sparse_attention(q, k, v, blocks)[0]


def token_rows(pack: str) -> Callable[[], Any]:
    """Half of 4,096 tokens taken out and put back."""
    import torch

    kernel = part(pack, "kernels.token_rows")
    x = torch.randn(1, 4096, 512, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:2048].sort().values
    kept = torch.zeros_like(x)
    return lambda: kernel.put_rows(kept, rows, kernel.take_rows(x, rows))


PATHS = {
    "decode w4a8, 1,024 x 1,024": decoding("w4a8"),
    "decode w6a8, 1,024 x 1,024": decoding("w6a8"),
    "forecast of three features": forecast,
    "first block's change": probe,
    "raw output of a clip": prediction,
    "list of kept blocks, 4,096 tokens": sparse_list,
    "sparse attention, 2,048 tokens": sparse_kernel,
    "token rows out and back": token_rows,
}
#: Methods whose whole cost in a run is measured, as benchmarks/overhead.py does.
INDICATORS = ("TeaCache", "FBCache", "DBCache", "EasyCache", "Taylor")


def take_out(revision: str, folder: Path) -> None:
    """Put a revision of this repository into ``folder`` and import it as :data:`BEFORE`."""
    made = subprocess.run(
        ["git", "archive", revision, "acceleration", "kernels", "presets", "nodes", "__init__.py"], cwd=ROOT, capture_output=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"git knows no revision {revision!r}: {made.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")
    spec = importlib.util.spec_from_file_location(
        BEFORE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[BEFORE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[BEFORE])


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, in microseconds."""
    return {name: round(1e6 * value, 2) for name, value in
            (("median_us", statistics.median(values)), ("min_us", min(values)), ("max_us", max(values)))}  # fmt: skip


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of one call of each, by processor time."""
    times: dict[str, list[float]] = {pack: [] for pack in calls}
    repeats = {}
    for pack, call in calls.items():
        start, count = time.thread_time(), 0
        while time.thread_time() - start < LEAST or not count:
            call()
            count += 1
        repeats[pack] = count
    for turn in range(rounds + 1):
        for pack in calls if turn % 2 else reversed(calls):
            start = time.thread_time()
            for _ in range(repeats[pack]):
                calls[pack]()
            if turn:
                times[pack].append((time.thread_time() - start) / repeats[pack])
    return times


def same(results: list[Any]) -> bool:
    import torch

    return all(torch.equal(results[0], other) for other in results[1:])


def indicators(packs: list[str], rounds: int, only: list[str]) -> dict[str, dict]:
    """Measure what methods that skip nothing add to an evaluation of the demo model, both revisions in turns."""
    import torch

    size = overhead.SIZES["demo"]
    with torch.no_grad():
        model, pair = size.load()
    rows = {}
    for method in INDICATORS:
        name = f"indicator: {method}"
        if only and not any(word in name for word in only):
            continue
        times: dict[str, list[float]] = {pack: [] for pack in packs}
        arms = {pack: overhead.arms_of(model, pack)[f"engaged: {method}"] for pack in packs}
        for turn in range(rounds + 1):
            for pack in packs if turn % 2 else reversed(packs):
                found, _ = overhead.measure(arms[pack], pair, size, 1, pack)
                times[pack] += found if turn else []
        rows[name] = row_of(name, times, None)
    return rows


def row_of(name: str, times: dict[str, list[float]], equal: bool | None) -> dict[str, Any]:
    """Return a row of the table, printing it."""
    row: dict[str, Any] = {"after": spread(times[AFTER]), "goal_us": GOALS.get(name), "same_bits": equal}
    line = f"{name:36s} {row['after']['median_us']:10.1f} us [{row['after']['min_us']:.1f} .. {row['after']['max_us']:.1f}]"
    if BEFORE in times:
        row["before"] = spread(times[BEFORE])
        row["times_as_fast"] = round(row["before"]["median_us"] / row["after"]["median_us"], 3)
        differs = "  DIFFERS" if equal is False else ""
        line += f"  before {row['before']['median_us']:10.1f}  {row['times_as_fast']:5.2f}x{differs}"
    print(line, flush=True)
    return row


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--before", help="a revision of git to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of paths")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "profile.json")
    args = parser.parse_args()
    overhead.prepare(args.comfyui.resolve())
    import torch

    torch.set_num_threads(1)
    packs, rows = [AFTER, *([BEFORE] if args.before else [])], {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if args.before:
            take_out(args.before, Path(folder))
        for name, build in PATHS.items():
            if args.only and not any(word in name for word in args.only):
                continue
            calls = {pack: build(pack) for pack in packs}
            equal = same([call() for call in calls.values()]) if args.before else None
            rows[name] = row_of(name, in_turns(calls, args.rounds), equal)
        rows |= indicators(packs, args.rounds, args.only)
    machine = {
        "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    clock = "processor time, one thread; indicators by the wall clock"
    result = {"machine": machine, "before": args.before, "rounds": args.rounds, "clock": clock, "paths": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
