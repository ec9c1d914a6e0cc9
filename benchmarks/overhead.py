"""What the hooks cost when nothing is skipped: time inside our wrappers minus time inside what they wrap.

    .venv/bin/python benchmarks/overhead.py [--comfyui .comfyui] [--runs 15] [--out benchmarks/results/overhead.json]

Runs the demo image model in process (28 Euler steps, CFG 5, 64 px) and prints microseconds per evaluation.
Goal: at most 100 for an idle plan, one in which every technique is off.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 28


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


def load_model():
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


def measure(model, pair, runs: int) -> list[float]:
    """Return overhead per evaluation, in microseconds, of ``runs`` runs after one warm-up."""
    import comfy.sample
    import torch

    from stretto.acceleration.hosts.comfy import TRACES

    values = []
    for run in range(runs + 1):
        latent = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(latent, run)
        comfy.sample.sample(model, noise, STEPS, 5.0, "euler", "simple", *pair, latent, disable_pbar=True, seed=run)
        trace = TRACES.of_prompt(None)[-1]
        assert trace["totals"]["computed"] == STEPS, "this benchmark is about runs that skip nothing"
        values.append(trace["seconds"]["overhead"] / STEPS * 1e6)
    return values[1:]


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.plan import Request

    model, pair = load_model()
    off = host.request(model, Request("cache", {"method": "Taylor", "interval": 1}))
    arms = {
        "idle: Measure alone": host.request(model, Request("measure", {"nonce": 0})),
        "idle: Cache present, off": off,
        "engaged: Taylor, everything computed": host.request(
            model, Request("cache", {"method": "Taylor", "interval": 1}, force=True)
        ),
        "engaged: EasyCache, everything computed": host.request(
            model, Request("cache", {"method": "EasyCache", "threshold": 0.0}, force=True)
        ),
    }
    rows = {}
    for name, arm in arms.items():
        values = sorted(measure(arm, pair, args.runs))
        rows[name] = {"median_us": statistics.median(values), "min_us": values[0], "max_us": values[-1]}
        row = rows[name]
        print(f"{name:42s} {row['median_us']:7.1f} us per evaluation  [{row['min_us']:.1f} .. {row['max_us']:.1f}]")
    if args.out:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"machine": machine, "steps": STEPS, "runs": args.runs, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
