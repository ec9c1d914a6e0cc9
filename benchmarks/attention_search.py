"""Plans of attention on the demo video model: how long they take to find, and what they are worth beside uniform settings.

    .venv/bin/python benchmarks/attention_search.py [--side 256] [--steps 20] [--target 30] [--methods Budgets ...]
        [--tries 5] [--extra-seeds 1] [--count 3] [--uniform] [--no-schedules] [--save FOLDER]

In process, batch 1, 17 frames of SIDE x SIDE: 64 is what the model was trained for (80 tokens), 256 makes 1,280 and 512 makes
5,120 of them; above 64 pictures mean little, and closeness to the plain run is what counts. One prompt and seed find the plans;
then the arms run in turn on held-out prompts and seeds: plain, fewer steps, published schedules, sparse attention with one
setting for all heads, and the plans. Seconds are those of all evaluations, after a discarded warm-up, medians over prompts; PSNR
of all frames is to the plain run of the prompt. Prints tables, writes its JSON under benchmarks/results; --save keeps the plans.
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

from caching import MODELS, RESULTS, Bench, psnr
from overhead import ROOT, prepare

FRAMES, SEED = 5, 2000
#: (share of the blocks, share of the steps that stay dense) of sparse attention with one setting for all.
UNIFORM = ((0.5, 0.2), (0.5, 0.5), (0.25, 0.2), (0.25, 0.5), (0.1, 0.5))
SCHEDULES = (("DiTFastAttn", 0.25), ("Re-ttention", 0.03125), ("Re-ttention, rho only", 0.25), ("Re-ttention, routed", 0.25))


class Runs:
    """Sampling of one size, with any MODEL."""

    def __init__(self, bench: Bench, side: int, steps: int) -> None:
        import torch

        self.bench, self.steps, self.plain = bench, steps, {}
        self.latent = {"samples": torch.zeros(1, 16, FRAMES, side // 8, side // 8)}

    def job(self, prompt: str, seed: int, steps: int | None = None):
        """The sampling of a prompt."""
        from stretto.acceleration.hosts.comfy_sampling import SamplingJob

        pair = self.bench.conditioning(prompt), self.bench.conditioning("")
        return SamplingJob(self.bench.model, *pair, self.latent, seed, steps or self.steps, 5.0, "euler", "simple")

    def decode(self, latent):
        """Frames [N, H, W, 3] in 0..1."""
        pictures = self.bench.vae.decode(latent).float()
        return pictures.reshape(-1, *pictures.shape[-3:])

    def run(self, request, prompt: str, seed: int, steps: int | None = None):
        """Frames, seconds of all evaluations, trace."""
        from stretto.acceleration.hosts import comfy as host
        from stretto.acceleration.hosts.comfy_profile import evaluation_seconds, traced

        job = self.job(prompt, seed, steps)
        latent, trace = traced(host.request(self.bench.model, request), lambda model: job(model, callback=lambda *_: None))
        return self.decode(latent), evaluation_seconds(trace), trace


def find(runs: Runs, args: argparse.Namespace, prompt: str, block: int) -> dict:
    """Plans of the methods, with what it took to find them."""
    from stretto.acceleration.errors import StrettoError
    from stretto.acceleration.hosts.comfy_attention_search import QUALITY, ProbedRun, probe, search

    found, job = {}, runs.job(prompt, 1000)
    probes = {}
    for method in args.methods:
        order = "tiles" if method == "Budgets" else "rows"
        if order not in probes:
            begun = time.perf_counter()
            probed, latent = probe(job.model, lambda model: job(model, callback=lambda *_: None), order, block)
            probes[order] = ProbedRun(probed, job, latent), time.perf_counter() - begun
            looked, sampler = probed.seconds
            print(f"  probe in {order}: {looked:.2f} of {sampler:.2f} s in the sampler, {looked / sampler:.1%}", flush=True)
        run, probing = probes[order]
        begun = time.perf_counter()
        try:
            result = search(run, method, QUALITY, args.target, args.tries, runs.decode, extra_seeds=args.extra_seeds)
        except StrettoError as error:
            print(f"  {method}: {error}", flush=True)
            found[method] = {"error": str(error)}
            continue
        seconds = time.perf_counter() - begun + probing
        row = {
            "seconds_to_find": seconds,
            "probe_share": run.probed.seconds[0] / run.probed.seconds[1],
            "predicted_cost": result.plan.achieved["predicted_cost"],
            "psnr_where_found": result.quality,
            "tried": [[item.knob, item.cost, item.quality] for item in result.tried],
            "curve": [list(point) for point in result.problem.curve()],
        }
        found[method] = {**row, "plan": result.plan}
        print(f"  {method}: {seconds:.0f} s, attention {row['predicted_cost']:.0%}, {result.quality:.1f} dB", flush=True)
        if args.save is not None:
            from stretto.acceleration.attention.search import save_plan

            name = method.lower().replace("ditfastattnv2", "ditfastattn-v2")
            save_plan(args.save / f"demo-video-{name}.safetensors", result.plan)
    return found


def arms_of(plans: dict[str, str], block: int, steps: int, uniform: bool, schedules: bool) -> dict:
    """Request and number of steps of every arm."""
    from stretto.acceleration.plan import Request

    arms: dict = {"plain": (Request("measure"), None)}
    for share in (0.9, 0.75, 0.6):
        arms[f"{round(steps * share)} steps"] = (Request("measure"), round(steps * share))
    for name, keep in SCHEDULES if schedules else ():
        settings = {"schedule": name, "min_tokens": 0, "compare": False, "keep": keep}
        arms[name] = (Request("attention_plan", settings, required=True), None)
    for keep, dense in UNIFORM if uniform else ():
        settings = {"keep": keep, "dense_until": dense, "min_tokens": 0, "block": block, "probe": False}
        arms[f"Block mass {keep:.0%}, dense until {dense:.0%}"] = (Request("attention", settings, required=True), None)
    for method, file in plans.items():
        settings = {"file": file, "min_tokens": 0, "compare": False}
        arms[f"found: {method}"] = (Request("attention_plan", settings, force=True), None)
    return arms


def measure(runs: Runs, arms: dict, prompts: list[str]) -> dict:
    """Seconds and PSNR of every arm over prompts, in turn."""
    rows: dict = {name: {"seconds": [], "psnr": [], "peak_mib": 0.0} for name in arms}
    runs.run(*next(iter(arms.values()))[:1], prompts[0], SEED - 1, 2)  # warm-up
    for index, prompt in enumerate(prompts):
        plain = None
        for name, (request, steps) in arms.items():
            frames, seconds, trace = runs.run(request, prompt, SEED + index, steps)
            plain = frames if plain is None else plain
            rows[name]["seconds"].append(seconds)
            rows[name]["psnr"].append(min(psnr(frames, plain), 120.0))
            rows[name]["peak_mib"] = max(rows[name]["peak_mib"], trace["memory"]["store_peak_bytes"] / 2**20)
            print(f"  {index + 1} of {len(prompts)}, {name}: {seconds:.1f} s, {rows[name]['psnr'][-1]:.1f} dB", flush=True)
    return rows


def table(rows: dict) -> str:
    """The arms as text."""
    lines = [f"{'arm':40}{'speed':>8}{'spread':>14}{'PSNR':>8}{'worst':>8}{'kept MiB':>10}"]
    for name, row in rows.items():
        gains = [a / b for a, b in zip(rows["plain"]["seconds"], row["seconds"], strict=True)]
        row["speed"], row["spread"] = statistics.median(gains), [min(gains), max(gains)]
        row["psnr_mean"], row["psnr_worst"] = statistics.mean(row["psnr"]), min(row["psnr"])
        spread = f"[{row['spread'][0]:.2f}, {row['spread'][1]:.2f}]"
        quality = f"{row['psnr_mean']:8.1f}{row['psnr_worst']:8.1f}" if name != "plain" else " " * 16
        lines.append(f"{name:40}{row['speed']:7.2f}x{spread:>14}{quality}{row['peak_mib']:10.1f}")
    return "\n".join(lines)


def main() -> None:
    """Find, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--target", type=float, default=30.0, help="dB")
    parser.add_argument("--methods", nargs="*", default=["Budgets", "DiTFastAttn", "DiTFastAttnV2", "Sparse-vDiT", "Re-ttention"])
    parser.add_argument("--tries", type=int, default=5, help="plans that are run for each method")
    parser.add_argument("--extra-seeds", type=int, default=1, help="seeds beside the probe's that a plan must hold with")
    parser.add_argument("--count", type=int, default=3, help="held-out prompts")
    parser.add_argument("--uniform", action="store_true", help="also sparse attention with one setting for all heads")
    parser.add_argument("--no-schedules", action="store_true", help="leave published schedules out")
    parser.add_argument("--save", type=Path, help="folder for the plans")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention-search.json")
    args = parser.parse_args()
    prepare(ROOT / ".comfyui")
    import tempfile

    import torch

    from stretto.acceleration.attention.search import save_plan

    bench = Bench("video")
    prompts = json.loads((ROOT / "demo" / MODELS["video"]["prompts"]).read_text(encoding="utf-8"))
    tokens = FRAMES * (args.side // 16) ** 2
    block = 64 if tokens >= 1024 else 16
    print(f"{tokens:,} tokens, {args.steps} steps, plans for {args.target:g} dB", flush=True)
    runs = Runs(bench, args.side, args.steps)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        found = find(runs, args, prompts[0], block)
        files = {}
        for method, row in found.items():
            if "plan" in row:
                files[method] = str(Path(folder) / f"{method}.safetensors")
                save_plan(files[method], row.pop("plan"))
        rows = measure(runs, arms_of(files, block, args.steps, args.uniform, not args.no_schedules), prompts[1 : 1 + args.count])
    print(table(rows))
    path = args.out
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document[f"{tokens} tokens"] = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "steps": args.steps,
        "target": args.target,
        "prompts": args.count,
        "found": found,
        "arms": {name: _rounded(row) for name, row in rows.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _rounded(row: dict) -> dict:
    tidy = lambda value: round(value, 4) if isinstance(value, float) and math.isfinite(value) else value  # noqa: E731
    return {name: [tidy(x) for x in value] if isinstance(value, list) else tidy(value) for name, value in row.items()}


if __name__ == "__main__":
    main()
