"""torch.compile beside each technique: does it work, in both orders, and what becomes of graphs and time?

    python benchmarks/torch_compile.py                         every technique, graphs counted; the compiler of loops for a few
    python benchmarks/torch_compile.py --only Taylor --family flux-dev --timed Taylor

A narrow random network of Wan's architecture (--family: FLUX's, Qwen-Image's), through ComfyUI's own function for compiling, the
one its TorchCompileModel node calls: the network as a whole, as that node does, or block by block, as other packs do. "graphs"
are what torch's front end made of the first run; "later" those that a second run added: it should be none. A difference is the
latent's against the same technique without compiling, relative; the front end alone (aot_eager) changes no bit. Seconds are of
processor time, one thread, of a run after the first, eager and compiled in turns.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import size_models
from size_models import ROOT, SHAPES

STEPS, DEPTH, WIDTH = 8, 2, 0.15
WHOLE, BLOCKS = "network", "blocks"
ORDERS = ("technique, compile", "compile, technique")
FRONT_END, FULL = "aot_eager", "inductor"
#: Rows whose time is taken with the whole compiler.
TIMED = ("plain", "Taylor", "TeaCache", "region", "sparse attention")


def requests() -> dict[str, Any]:
    """Return every technique that acts while sampling, by name, lively enough to skip some steps of eight."""
    from stretto.acceleration.plan import Request

    def cache(method: str, **settings: Any) -> Request:
        return Request("cache", {"method": method, "warmup": 2, "tail": 1, **settings})

    sparse = {"min_tokens": 0, "block": 16, "dense_until": 0.0, "keep": 0.5}
    return {
        "plain": None,
        "Taylor": cache("Taylor", interval=2),
        "EasyCache": cache("EasyCache", threshold=0.6),
        "TeaCache": cache("TeaCache", threshold=0.95, max_skips=3),
        "FBCache": cache("FBCache", threshold=1.0, max_skips=3),
        "DBCache": cache("DBCache", threshold=1.0, max_skips=3, first_blocks=1, last_blocks=0),
        "FORA modules": cache("FORA modules", interval=2),
        "guidance": Request("guidance", {"method": "Periodic", "interval": 3, "warmup": 2, "tail": 1}),
        "resolution": Request("resolution", {"stages": [0.5, 1.0], "switches": [0.4], "min_side": 2}),
        "region": Request("region", {"ratio": 0.5, "start": 2, "tail": 0, "refresh_every": 3, "min_tokens": 0}),
        "sparse attention": Request("attention", {"method": "Block mass", **sparse}),
        "feature tables": Request("temporal_features", {"mode": "exact", "prompt": True}),
        "int8 layers": None,
    }


class Studio:
    """A narrow network, eager or compiled, with a technique or without."""

    def __init__(self, family: str, device: str) -> None:
        self.shape, self.device = SHAPES[family], device
        self.models = {"": size_models.build(self.shape, device, DEPTH, WIDTH)}

    def model(self, name: str) -> Any:
        """Return a clone of the network, with quantized layers where ``name`` says so."""
        form = "int8" if name.startswith("int8") else ""
        if form not in self.models:
            self.models[form] = size_models.build(self.shape, self.device, DEPTH, WIDTH)
            size_models.quantize(self.models[form], form)
        return self.models[form].clone()

    def compiled(self, model: Any, scope: str, backend: str) -> Any:
        """Return a clone of MODEL that ComfyUI runs compiled."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        clone = model.clone()
        set_torch_compile_wrapper(clone, backend, keys=self.keys(model) if scope == BLOCKS else ["diffusion_model"])
        return clone

    def keys(self, model: Any) -> list[str]:
        from stretto.acceleration.models import describe

        network = model.model.diffusion_model
        lists = [name for _, name in describe(network).block_lists if hasattr(network, name)]
        return [f"diffusion_model.{name}.{index}" for name in lists for index in range(len(getattr(network, name)))]

    def made(self, name: str, request: Any, scope: str, order: str, backend: str) -> Any:
        """Return a compiled MODEL with the technique, put together in ``order``."""
        from stretto.acceleration.hosts import comfy as host

        def with_technique(model: Any) -> Any:
            return model if request is None else host.request(model, request)

        model = self.model(name)
        if order == ORDERS[0]:
            return self.compiled(with_technique(model), scope, backend)
        return with_technique(self.compiled(model, scope, backend))

    def tolerance(self, backend: str) -> float:
        """Return the relative difference that compiling may make: fused loops round elsewhere, in bf16 on a GPU."""
        return 1e-6 if backend == FRONT_END else 1e-3 if self.device == "cpu" else 5e-2

    def sample(self, model: Any) -> tuple[Any, float]:
        """Return the latent and the seconds of a run: of the processor, on a GPU by the clock."""
        import comfy.sample
        import torch

        latent = torch.zeros(1, *self.shape.small_latent)
        noise = comfy.sample.prepare_noise(latent, 1)
        pair = size_models.conditioning(self.shape, 3, True), size_models.conditioning(self.shape, 4, True)
        now = time.process_time if self.device == "cpu" else time.perf_counter
        start = now()
        out = comfy.sample.sample(model, noise, STEPS, 5.0, "euler", "simple", *pair, latent, disable_pbar=True, seed=1).cpu()
        return out, now() - start


def decisions(request: Any) -> str:
    """Return what the last run did, a letter per evaluation, and whether the technique was active."""
    from stretto.acceleration.hosts.comfy import TRACES

    if request is None:
        return ""
    trace = TRACES.of_prompt(None)[-1]
    strip = "".join("#" if entry["decision"] == "computed" else "." for entry in trace["evaluations"])
    return f"{strip} {'/'.join(item['status'] for item in trace['techniques'])}"


def counted(studio: Studio, name: str, request: Any, scope: str, order: str, backend: str) -> dict[str, Any]:
    """Run twice compiled and once eager; return a row of the table."""
    import torch
    from torch._dynamo.utils import counters

    from stretto.acceleration.hosts import comfy as host

    torch._dynamo.reset()
    counters.clear()
    row: dict[str, Any] = {"technique": name, "scope": scope, "order": order, "backend": backend}
    try:
        eager = studio.model(name) if request is None else host.request(studio.model(name), request)
        right, _ = studio.sample(eager)
        expected = decisions(request)
        model = studio.made(name, request, scope, order, backend)
        ours, row["first_seconds"] = studio.sample(model)
        row["graphs"] = counters["stats"].get("unique_graphs", 0)
        again, _ = studio.sample(model)
        row["later"] = counters["stats"].get("unique_graphs", 0) - row["graphs"]
        row["breaks"] = sum(counters["graph_break"].values())
        row["difference"] = float((ours - right).norm() / right.norm())
        row["repeats"] = bool(torch.equal(ours, again))
        row["decisions"] = decisions(request)
        row["works"] = row["decisions"] == expected and row["difference"] < studio.tolerance(backend)
        if backend == FULL:
            turns = [(studio.sample(eager)[1], studio.sample(model)[1]) for _ in range(3)]
            row["eager_seconds"], row["seconds"] = (statistics.median(each[i] for each in turns) for i in (0, 1))
        if not row["works"]:
            row["reason"] = f"decided {row['decisions']!r} where the same without compiling decides {expected!r}"
    except Exception as error:  # whatever stops a technique is what the table is for
        row |= {"works": False, "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    return row


def words(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    head = f"{row['technique']:17s} {row['scope']:8s} {row['order']:19s} {row['backend']:10s}"
    if "graphs" not in row:
        return f"{head} does not work: {row['reason']}"
    tail = "" if row["works"] else f"  DIFFERS: {row.get('reason', '')}"
    if "seconds" in row:
        tail = f"  {1e3 * row['eager_seconds']:.0f} -> {1e3 * row['seconds']:.0f} ms a run" + tail
    return (
        f"{head} {row['graphs']:3d} graphs, {row['later']} later, {row['breaks']:2d} breaks, difference {row['difference']:.1e}, "
        f"first run {row['first_seconds']:5.1f} s{tail}"
    )


def measure(args: argparse.Namespace, save: Callable[[list], None]) -> list[dict[str, Any]]:
    """Fill the table, printing as it goes."""
    studio, rows = Studio(args.family, args.device), []
    wanted = {name: request for name, request in requests().items() if not args.only or name in args.only}
    passes = [(FRONT_END, list(wanted), ORDERS), (FULL, [name for name in wanted if name in args.timed], ORDERS[1:])]
    for backend, names, orders in passes:
        for name in names:
            for scope in (WHOLE, BLOCKS):
                several = wanted[name] is not None and scope == WHOLE
                for order in orders if several else orders[:1]:
                    rows.append(counted(studio, name, wanted[name], scope, order, backend))
                    print(words(rows[-1]), flush=True)
                    save(rows)
    return rows


def compiler() -> str:
    """Return why torch's compiler of loops does not run here, "" where it does."""
    import torch

    try:
        torch.compile(lambda x: x.sin() + 1.0, backend=FULL)(torch.ones(4))
    except Exception as error:  # a missing compiler shows as almost any error
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return ""


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--family", choices=SHAPES, default="wan-1.3b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="names of techniques; rows of others in the file stay")
    parser.add_argument("--timed", nargs="*", default=list(TIMED), help="techniques whose time is taken with the whole compiler")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "torch-compile.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    size_models.prepare(args.comfyui.resolve(), args.device)
    import torch

    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    missing = compiler() if args.timed else "not asked for"
    if missing:
        args.timed = []
        print(f"The whole compiler ({FULL}) is left out: {missing}")
    machine = {
        "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }  # fmt: skip
    head = {"machine": machine, "family": args.family, "steps": STEPS, "blocks": DEPTH, "compiler_left_out": missing}

    before = json.loads(args.out.read_text(encoding="utf-8")) if args.only and args.out.is_file() else {}
    old = before.get("rows", ()) if before.get("machine") == machine else ()
    kept = [row for row in old if row["technique"] not in args.only]

    def save(rows: list) -> None:
        rows = [*kept, *rows]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    started = time.monotonic()
    with torch.no_grad():
        rows = measure(args, save)
    failed = sum(not row["works"] for row in rows)
    print(f"{len(rows)} rows, {failed} of them do not work; {time.monotonic() - started:.0f} s; written: {args.out}")


if __name__ == "__main__":
    main()
