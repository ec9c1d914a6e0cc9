"""How fast block-sparse attention is: ours beside dense SDPA and compiled FlexAttention, run in turns.

    python benchmarks/sparse_kernel.py                         # what this machine has: CUDA, else the CPU
    python benchmarks/sparse_kernel.py --json results.json
    python benchmarks/sparse_kernel.py --threads 1             # on a busy machine: threads would wait for each other

The lists are what a method would make: per query block its neighbours and the key blocks with the highest mean-pooled
scores. Building them is timed apart. Every round runs all forms once, one after the other, so that a busy machine slows
them alike; the first round is discarded. Speed-up is the ratio of medians to dense SDPA, efficiency is speed-up times the
share of kept blocks: 1.00 would be a sparse kernel that wastes nothing.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_pack import load_pack

load_pack()
from stretto.kernels.block_sparse_attention import (  # noqa: E402
    BlockList,
    block_sparse_attention,
    choose_backend,
    pool_blocks,
)

KEEP = (0.5, 0.25, 0.1)


def build(q: torch.Tensor, k: torch.Tensor, keep: float, q_block: int, kv_block: int) -> BlockList:
    """Return the lists of the nearest block and the best ones by mean-pooled score, ``keep`` of all in every row."""
    rows, columns = pool_blocks(q, q_block)[0], pool_blocks(k, kv_block)[0]
    scores = rows @ columns.mT
    near = torch.arange(rows.shape[2], device=q.device) * columns.shape[2] // rows.shape[2]
    scores.scatter_(-1, near[:, None].expand(*scores.shape[:3], 1), torch.inf)
    best = scores.topk(max(1, round(keep * columns.shape[2])), -1).indices
    return BlockList.from_mask(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True), q_block, kv_block)


def in_turns(forms: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of every form, run one after the other ``rounds`` times after a discarded round."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            form()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def dense_forms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return dense SDPA; on CUDA by each library that takes the tensors, for the fastest is the one to beat."""
    if q.device.type == "cpu":
        return {"dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def limited(kind: SDPBackend) -> Callable[[], object]:
        def form() -> object:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)

        return form

    forms = {}
    for name, kind in (("dense cuDNN", SDPBackend.CUDNN_ATTENTION), ("dense Flash", SDPBackend.FLASH_ATTENTION)):
        try:
            limited(kind)()
            forms[name] = limited(kind)
        except RuntimeError as error:
            print(f"  {name} does not run: {str(error).splitlines()[0]}")
    return forms


def measure(
    tokens: int, size: int, dtype: torch.dtype, heads: int, rounds: int, flex: bool, device: torch.device
) -> list:
    """Measure one shape at every share of kept blocks, and return its rows of the table."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, heads, tokens, size), generator=generator).to(device, dtype) for _ in range(3))
    q_block = 64 if device.type == "cpu" else 128
    forms, lists, building = dense_forms(q, k, v), {}, {}
    dense = list(forms)
    for keep in KEEP:
        lists[keep] = build(q, k, keep, q_block, 64)
        took = in_turns({"list": lambda keep=keep: build(q, k, keep, q_block, 64)}, 3, device)
        building[keep] = statistics.median(took["list"])
        backends = [choose_backend(q, k, v, lists[keep])[0], *(["flex"] if flex else [])]
        for backend in backends:
            name = f"{backend} {keep:.0%}"
            forms[name] = lambda keep=keep, backend=backend: block_sparse_attention(
                q, k, v, lists[keep], backend=backend
            )
            try:
                forms[name]()
            except Exception as error:  # a missing compiler shows as almost any error
                print(f"  {name} does not run: {type(error).__name__}: {str(error).splitlines()[:1]}")
                del forms[name]
    times = in_turns(forms, rounds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(dense, key=medians.__getitem__)
    table = []
    for name, values in times.items():
        keep = next((x for x in KEEP if name.endswith(f" {x:.0%}")), None)
        density = 1.0 if keep is None else float(lists[keep].count.float().mean()) / -(-tokens // 64)
        speedup = medians[best] / medians[name]
        row = {
            "threads": torch.get_num_threads(),
            "tokens": tokens, "heads": heads, "head_size": size, "dtype": str(dtype).removeprefix("torch."), "form": name,
            "density": round(density, 4), "milliseconds": round(medians[name] * 1e3, 2),
            "fastest": round(min(values) * 1e3, 2), "slowest": round(max(values) * 1e3, 2),
            "speedup": round(speedup, 2), "efficiency": round(speedup * density, 2),
            "list_milliseconds": None if keep is None else round(building[keep] * 1e3, 2),
        }  # fmt: skip
        table.append(row)
        print(
            f"{tokens:>6} {size:>4} {row['dtype']:>9}  {name:<16} {row['milliseconds']:>9.2f} "
            f"[{row['fastest']:.2f} .. {row['slowest']:.2f}]  {speedup:>6.2f}x  {row['efficiency']:>5.2f}"
            + ("" if keep is None else f"  list {row['list_milliseconds']:.2f}"),
            flush=True,
        )
    return table


def machine(device: torch.device) -> dict:
    """Return what the numbers depend on, and nothing that names this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (
                x.split(":")[1].strip()
                for x in info.read_text(encoding="utf-8").splitlines()
                if x.startswith("model name")
            ),
            model,
        )
    found = {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths to measure")
    parser.add_argument("--flex", action="store_true", help="on the CPU too, where compiling takes a minute per shape")
    parser.add_argument(
        "--threads", type=int, help="threads of an operation; 1 where other programs keep the cores busy"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No CUDA device is there, or none is wanted: measuring the CPU.")
    if options.threads:
        torch.set_num_threads(options.threads)
    described = machine(device)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print("tokens size     dtype  form             ms median [min .. max]  speed-up  efficiency")
    if device.type == "cpu":
        shapes = [
            (n, d, t) for n in options.tokens or (4096, 16384) for t in ("float32", "bfloat16") for d in (64, 128)
        ]
    else:
        shapes = [(n, d, "bfloat16") for n in options.tokens or (16384, 33024, 75600) for d in (64, 128)]
    table = []
    with torch.no_grad():
        for tokens, size, dtype in shapes:
            small = device.type == "cpu" and tokens > 8192
            heads = (1 if small else 4) if device.type == "cpu" else 24
            rounds = 5 if small else 9
            flex = device.type == "cuda" or options.flex
            table += measure(tokens, size, getattr(torch, dtype), heads, rounds, flex, device)
    if options.json:
        options.json.write_text(json.dumps({"machine": described, "rows": table}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
