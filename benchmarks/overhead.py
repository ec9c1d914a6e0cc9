"""What the hooks cost: time inside our wrappers less the time of what they wrap, per evaluation.

    python benchmarks/overhead.py [--comfyui .comfyui] [--runs 15] [--sizes demo large] [--out benchmarks/results/overhead.json]

Every step is computed (thresholds are 0), so that nothing hides the cost of watching. Two sizes: the demo image model, whose
steps take a few milliseconds, and a random network of SD3's architecture with 1,024 image tokens. Prints medians and the
range over the runs, in microseconds per evaluation and as a share of a step without our wrappers.

Counted: deciding, probing, copying and storing features, and the trace. Not counted: what ComfyUI itself does differently
for a replaced block. On CUDA the clock stops for whatever a probe waits for; judge the CPU's numbers.

Goals: at most 100 microseconds for an idle plan, one in which every technique is off; for an engaged method at most 500
microseconds at demo size, and 2 % of a step from 1,024 tokens on.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IDLE_US, ENGAGED_US, ENGAGED_SHARE = 100.0, 500.0, 0.02
#: Width, blocks and text of the large network. Real ones have two to five times the blocks, so a smaller share.
LARGE_BLOCKS, HEAD, TEXT_TOKENS, TEXT_WIDTH, POOLED = 8, 64, 77, 256, 128
#: Small random weights keep the output tame.
SCALE = 0.02


@dataclass(frozen=True)
class Size:
    """A model to measure on.

    Attributes:
        load: returns MODEL and its CONDITIONING pair.
        latent: [C, H, W].
        tokens: image tokens of one row.
        steps: per run.
        runs: at most so many runs, whatever is asked for; 0 for no limit.
    """

    load: Callable
    latent: tuple[int, int, int]
    tokens: int
    steps: int
    runs: int = 0


def prepare(comfyui: Path) -> None:
    """Make ComfyUI and the pack importable, on the CPU unless there is CUDA."""
    sys.path.insert(0, str(ROOT))
    from load_pack import load_pack

    sys.path.remove(str(ROOT))
    load_pack()
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True


def demo_model():
    """Return the demo MODEL and its CONDITIONING pair."""
    import comfy.sd

    from stretto.demo.text_encoder import load

    models = ROOT / "demo" / "models"
    model = comfy.sd.load_diffusion_model(str(models / "diffusion_models" / "stretto-demo-image.safetensors"))
    encoder = load(models / "text_encoders" / "stretto-demo-text.safetensors")
    pair = []
    for text in ("fluent red heart", ""):
        states, pooled, _ = encoder.encode([text])
        pair.append([[states, {"pooled_output": pooled}]])
    return model, pair


def large_model():
    """Return a MODEL around a random network of SD3's architecture, 512 wide, and a random CONDITIONING pair."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    side = 32
    config = comfy.supported_models.SD3(
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT_WIDTH, "out_features": HEAD * LARGE_BLOCKS},
            },
            "depth": LARGE_BLOCKS,
            "num_patches": side * side,
            "pos_embed_max_size": side,
            "context_processor_layers": None,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for tensor in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, scale=SCALE))
    base.eval()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.get_torch_device()
    pair = [[[random(1, TEXT_TOKENS, TEXT_WIDTH), {"pooled_output": random(1, POOLED)}]] for _ in range(2)]
    return patcher(base, load_device=device, offload_device=torch.device("cpu")), pair


SIZES = {
    "demo": Size(demo_model, (16, 8, 8), 16, 28),
    "large": Size(large_model, (16, 64, 64), 1024, 6, runs=5),
}


def arms_of(model, pack: str = "stretto") -> dict[str, object]:
    """Return every arm by its name: MODELs that skip nothing. ``pack`` is the name under which the pack was imported."""
    host, Request = import_module(f"{pack}.acceleration.hosts.comfy"), import_module(f"{pack}.acceleration.plan").Request

    def engaged(method: str, **settings):
        return host.request(model, Request("cache", {"method": method, **settings}, force=True))

    return {
        "idle: Measure alone": host.request(model, Request("measure", {"nonce": 0})),
        "idle: Cache present, off": host.request(model, Request("cache", {"method": "Taylor", "interval": 1})),
        "engaged: Taylor": engaged("Taylor", interval=1),
        "engaged: EasyCache": engaged("EasyCache", threshold=0.0),
        "engaged: TeaCache": engaged("TeaCache", threshold=0.0),
        "engaged: FBCache": engaged("FBCache", threshold=0.0),
        "engaged: DBCache": engaged("DBCache", threshold=0.0, first_blocks=1, last_blocks=1),
        "engaged: CG-Taylor": engaged("CG-Taylor", threshold=0.0),
    }


@contextmanager
def block_overhead(pack: str = "stretto") -> Iterator[Callable[[], float]]:
    """Clock what our block hooks add to the blocks; the value read is the seconds since the last reading.

    The trace's own figure covers the wrappers around network calls, and takes the hooks inside them for the network.
    """
    RunState = import_module(f"{pack}.acceleration.run").RunState
    spent, hook = 0.0, RunState.block

    def timed(self, call, site, args, original):
        nonlocal spent
        entered, inside = time.perf_counter(), 0.0

        def run(arguments):
            nonlocal inside
            started = time.perf_counter()
            out = original(arguments)
            inside += time.perf_counter() - started
            return out

        out = hook(self, call, site, args, run)
        spent += time.perf_counter() - entered - inside
        return out

    def read() -> float:
        nonlocal spent
        seconds, spent = spent, 0.0
        return seconds

    RunState.block = timed
    try:
        yield read
    finally:
        RunState.block = hook


def measure(model, pair, size: Size, runs: int, pack: str = "stretto") -> tuple[list[float], list[float]]:
    """Return seconds of overhead per evaluation, and the same over a step without it, of ``runs`` runs after a warm-up."""
    import comfy.sample
    import torch

    traces = import_module(f"{pack}.acceleration.hosts.comfy").TRACES
    overheads, shares = [], []
    with block_overhead(pack) as in_blocks:
        for run in range(runs + 1):
            latent = torch.zeros(1, *size.latent)
            noise = comfy.sample.prepare_noise(latent, run)
            in_blocks()
            comfy.sample.sample(
                model, noise, size.steps, 5.0, "euler", "simple", *pair, latent, disable_pbar=True, seed=run
            )
            trace = traces.of_prompt(None)[-1]
            assert trace["totals"]["computed"] == size.steps, "this benchmark is about runs that skip nothing"
            overhead = (trace["seconds"]["overhead"] + in_blocks()) / size.steps
            step = statistics.median(entry["seconds"] for entry in trace["evaluations"])
            overheads.append(overhead)
            shares.append(overhead / max(step - overhead, 1e-9))
    return overheads[1:], shares[1:]


def row_of(name: str, size: Size, overheads: Sequence[float], shares: Sequence[float]) -> dict:
    """Return the figures of an arm, and whether they reach its goal."""
    micros, percents = [value * 1e6 for value in overheads], [value * 100 for value in shares]
    median_us, median_percent = statistics.median(micros), statistics.median(percents)
    if name.startswith("idle"):
        reached = median_us <= IDLE_US
    elif size.tokens >= 1024:
        reached = median_percent <= ENGAGED_SHARE * 100
    else:
        reached = median_us <= ENGAGED_US
    return {
        "median_us": median_us,
        "min_us": min(micros),
        "max_us": max(micros),
        "median_percent": median_percent,
        "min_percent": min(percents),
        "max_percent": max(percents),
        "goal_reached": reached,
    }


def measure_size(name: str, wanted: int) -> dict:
    """Measure every arm at one size, printing as it goes."""
    import torch

    size = SIZES[name]
    runs = min(wanted, size.runs or wanted)
    with torch.no_grad():
        model, pair = size.load()
    print(f"{name}: {size.tokens} image tokens, {size.steps} steps, {runs} runs")
    rows = {}
    for arm, accelerated in arms_of(model).items():
        row = rows[arm] = row_of(arm, size, *measure(accelerated, pair, size, runs))
        print(
            f"  {arm:26s} {row['median_us']:8.1f} us per evaluation [{row['min_us']:.1f} .. {row['max_us']:.1f}]"
            f"  {row['median_percent']:6.3f} % of a step [{row['min_percent']:.3f} .. {row['max_percent']:.3f}]"
            f"{'' if row['goal_reached'] else '  above the goal'}",
            flush=True,
        )
    return {"tokens": size.tokens, "steps": size.steps, "runs": runs, "rows": rows}


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--runs", type=int, default=15, help="runs per arm; the large network takes at most 5")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    sizes = {name: measure_size(name, args.runs) for name in args.sizes}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "sizes": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
