"""Every caching method on the demo models, beside fewer steps and ComfyUI's own caches: quality for seconds.

    .venv/bin/python benchmarks/caching.py image [--steps 20 28 50] [--count 16] [--arms REGEX] [--comfyui .comfyui]
    .venv/bin/python benchmarks/caching.py video

In process, batch 1, one prompt at a time, the arms of a prompt one after the other (so drifts of the machine hit all alike),
after a discarded warm-up. Quality is the PSNR of the decoded pictures (all frames of a clip at once) to the plain run of as
many steps, and to a plain run of 200 steps. "Calls" counts how often the second block really ran, by a hook that every arm
carries. Prints a table per step count and writes benchmarks/results/caching-<model>.json and, with matplotlib, the curves.
"""

import argparse
import json
import math
import platform
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from overhead import ROOT, prepare

RESULTS = ROOT / "benchmarks" / "results"
REFERENCE_STEPS = 200
MODELS = {
    "image": {
        "transformer": "diffusion_models/stretto-demo-image.safetensors",
        "vae": "vae/stretto-demo-image-vae.safetensors",
        "prompts": "heldout_prompts.json",
        "latent": (1, 16, 8, 8),
        "blocks": "joint_blocks",
    },
    "video": {
        "transformer": "diffusion_models/stretto-demo-video.safetensors",
        "vae": "vae/stretto-demo-video-vae.safetensors",
        "prompts": "heldout_video_prompts.json",
        "latent": (1, 16, 5, 8, 8),
        "blocks": "blocks",
        "shift": 3.0,
    },
}


@dataclass(frozen=True)
class Arm:
    """One way of sampling: settings of Stretto Cache, or a core node with its arguments, or a sampler and steps."""

    name: str
    settings: dict | None = None
    core: tuple[str, float] | None = None
    sampler: str = "euler"
    steps: int | None = None


@dataclass
class Figures:
    """What one arm gave, per prompt."""

    calls: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    to_reference: list[float] = field(default_factory=list)

    def row(self) -> dict:
        """Means, the worst, and the median of the seconds."""
        finite = [min(v, 120.0) for v in self.psnr]
        return {
            "calls": statistics.mean(self.calls),
            "seconds": statistics.median(self.seconds),
            "seconds_spread": [min(self.seconds), max(self.seconds)],
            "psnr_mean": statistics.mean(finite),
            "psnr_worst": min(finite),
            "psnr_median": statistics.median(finite),
            "reference_mean": statistics.mean(self.to_reference),
            "per_prompt": [round(v, 3) for v in finite],
        }


def arms_for(steps: int, which: str) -> list[Arm]:
    """The arms of one step count: plain, its cheap rivals, core's caches, and the rows of our table.

    The fitted masks and weights come from search_schedule.py.
    """
    arms = [Arm("plain")]
    arms += [
        Arm(f"{c} steps", steps=c) for c in dict.fromkeys(round(steps * p / 28) for p in (20, 18, 16, 15, 14, 12, 10))
    ]
    arms += [
        Arm(f"dpmpp_2m, {c} steps", sampler="dpmpp_2m", steps=c)
        for c in dict.fromkeys(round(steps * p / 28) for p in (16, 14, 12, 10))
    ]
    arms += [Arm(f"core EasyCache {t:g}", core=("EasyCache", t)) for t in (0.05, 0.1, 0.2)]
    arms += [Arm(f"core LazyCache {t:g}", core=("LazyCache", t)) for t in (0.05, 0.1, 0.2)]

    def ours(name: str, method: str, **settings) -> None:
        arms.append(Arm(name, {"method": method, **settings}))

    for interval, tail in ((2, 5), (3, 5), (3, 3), (4, 3), (5, 2)):
        ours(f"Taylor every {interval}, tail {tail}", "Taylor", interval=interval, tail=tail)
    for threshold in (0.02, 0.05, 0.1, 0.2):
        ours(f"EasyCache {threshold:g}", "EasyCache", threshold=threshold, tail=1)
        ours(f"Adaptive {threshold:g}", "Adaptive", threshold=threshold, tail=2)
    for method in ("TaylorSeer", "HiCache", "FORA", "Output"):
        ours(f"{method} every 3, tail 3", method, interval=3, tail=3)
    ours("Spectrum 0.75", "Spectrum", warmup=5, tail=1)
    for threshold in (0.05, 0.1, 0.2):
        ours(f"FBCache {threshold:g}", "FBCache", threshold=threshold, warmup=2, tail=1)
        ours(f"TeaCache {threshold:g}", "TeaCache", threshold=threshold, warmup=1, tail=1)
    for threshold in (0.01, 0.03, 0.08):
        ours(f"CG-Taylor {threshold:g}", "CG-Taylor", threshold=threshold, warmup=6, tail=1)
    for threshold in (0.1, 0.3):
        ours(f"SpeCa {threshold:g}", "SpeCa", threshold=threshold, warmup=6, tail=1)
        ours(f"DiCache {threshold:g}", "DiCache", threshold=threshold, warmup=6, tail=1)
    for threshold in (0.01, 0.02, 0.05):
        ours(f"AdaCache {threshold:g}", "AdaCache", threshold=threshold, interval=4, warmup=2, tail=1)
        ours(f"LazyCache {threshold:g}", "LazyCache", threshold=threshold, tail=1)
    ours("DBCache F1B1 0.1", "DBCache", threshold=0.1, first_blocks=1, last_blocks=1, warmup=2, tail=1)
    for level in ("slow", "medium", "fast"):
        ours(f"SCM {level}", "SCM", level=level, warmup=0, tail=0)
    searched = RESULTS / f"fitted-{which}.json"
    found = json.loads(searched.read_text(encoding="utf-8"))["steps"] if searched.exists() else {}
    for computed, row in sorted(found.get(str(steps), {}).items(), key=lambda item: -int(item[0])):
        numbers = {name: row[name] for name in ("mask", "weights", "sigmas")}
        ours(f"Fitted, {computed} of {steps}", "Fitted", **numbers, warmup=0, tail=0)
    return arms


class Bench:
    """The demo model in process, and how to run an arm on it."""

    def __init__(self, which: str):
        import comfy.sd
        import comfy.utils

        from stretto.demo.text_encoder import load

        self.spec = MODELS[which]
        models = ROOT / "demo" / "models"
        self.model = comfy.sd.load_diffusion_model(str(models / self.spec["transformer"]))
        if "shift" in self.spec:
            from comfy_extras.nodes_model_advanced import ModelSamplingSD3

            (self.model,) = ModelSamplingSD3().patch(self.model, self.spec["shift"])
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / self.spec["vae"])))
        self.text = load(models / "text_encoders" / "stretto-demo-text.safetensors")
        self.wide = which == "video"
        self.calls = 0
        blocks = getattr(self.model.model.diffusion_model, self.spec["blocks"])
        # The first block may have to run to decide, the last one to correct; the second is skipped by every method.
        blocks[1].register_forward_pre_hook(self._count)

    def _count(self, module, args) -> None:
        self.calls += 1

    def conditioning(self, text: str):
        """CONDITIONING of a caption, as Stretto Demo Text makes it."""
        import torch

        states, pooled, _ = self.text.encode([text])
        if self.wide:
            states = torch.nn.functional.pad(states, (0, 4096 - states.shape[-1]))
        return [[states, {"pooled_output": pooled}]]

    def patched(self, arm: Arm):
        """The model of an arm."""
        from stretto.acceleration.hosts import comfy as host
        from stretto.acceleration.plan import Request

        if arm.core:
            import comfy_extras.nodes_easycache as core

            name, threshold = arm.core
            node = getattr(core, f"{name}Node").execute(self.model, threshold, 0.15, 0.95, False)
            return node.result[0]
        return host.request(self.model, Request("cache", arm.settings)) if arm.settings else self.model

    def run(self, arm: Arm, prompt: str, steps: int, seed: int):
        """Sample and decode: pictures [N, H, W, 3] in 0..1, seconds in the sampler, calls of the last block."""
        import comfy.sample
        import torch

        empty = torch.zeros(self.spec["latent"])
        noise = comfy.sample.prepare_noise(empty, seed)
        pair = self.conditioning(prompt), self.conditioning("")
        model, self.calls = self.patched(arm), 0
        started = time.perf_counter()
        latent = comfy.sample.sample(
            model, noise, arm.steps or steps, 5.0, arm.sampler, "simple", *pair, empty, disable_pbar=True, seed=seed
        )
        seconds = time.perf_counter() - started
        pictures = self.vae.decode(latent).float()
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
        return pictures, seconds, self.calls


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, all at once."""
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def measure(bench: Bench, steps: int, prompts: list[str], arms: list[Arm], references: dict) -> dict[str, dict]:
    """Run every arm on every prompt; returns a row of figures per arm."""
    import torch

    figures = {arm.name: Figures() for arm in arms}
    with torch.inference_mode():
        for arm in arms[:3]:
            bench.run(arm, prompts[0], steps, 1)
        for index, prompt in enumerate(prompts):
            seed = 1000 + index
            if index not in references:
                references[index] = bench.run(Arm("reference", steps=REFERENCE_STEPS), prompt, steps, seed)[0]
            plain = None
            for arm in arms:
                pictures, seconds, calls = bench.run(arm, prompt, steps, seed)
                plain = pictures if plain is None else plain
                row = figures[arm.name]
                row.calls.append(calls)
                row.seconds.append(seconds)
                row.psnr.append(psnr(pictures, plain))
                row.to_reference.append(psnr(pictures, references[index]))
            print(f"  {steps} steps: {index + 1} of {len(prompts)} prompts", flush=True)
    rows = {name: row.row() for name, row in figures.items()}
    for row in rows.values():
        row["speedup"] = rows[arms[0].name]["seconds"] / row["seconds"]
    return rows


def rival(rows: dict[str, dict], calls: float, key: str) -> float:
    """What plain sampling with as many network calls gives, between the two nearest step counts."""
    points = sorted((row["calls"], row[key]) for name, row in rows.items() if re.fullmatch(r"plain|\d+ steps", name))
    points = [(c, v) for c, v in points if v < 119]
    below = [p for p in points if p[0] <= calls] or points[:1]
    above = [p for p in points if p[0] >= calls] or points[-1:]
    (c0, v0), (c1, v1) = below[-1], above[0]
    return v0 if c1 == c0 else v0 + (v1 - v0) * (calls - c0) / (c1 - c0)


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown, and by how much each beats as many plain steps."""
    lines = [
        "| arm | calls | speed-up | PSNR mean | worst | beyond as many steps | worst beyond | to 200 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mean = row["psnr_mean"] - rival(rows, row["calls"], "psnr_mean")
        worst = row["psnr_worst"] - rival(rows, row["calls"], "psnr_worst")
        lines.append(
            f"| {name} | {row['calls']:.1f} | {row['speedup']:.2f}x | {row['psnr_mean']:.1f} | {row['psnr_worst']:.1f} | "
            f"{mean:+.1f} | {worst:+.1f} | {row['reference_mean']:.1f} |"
        )
    return "\n".join(lines)


#: Families of arms in the picture: label, how their names begin, colour (Okabe-Ito).
GROUPS = (
    ("fewer Euler steps", re.compile(r"\d+ steps$"), "#000000"),
    ("fewer DPM++ 2M steps", re.compile("dpmpp"), "#999999"),
    ("core's EasyCache", re.compile("core EasyCache"), "#D55E00"),
    ("core's LazyCache", re.compile("core LazyCache"), "#8B4513"),
    ("Taylor, fixed steps", re.compile("Taylor every"), "#0072B2"),
    ("EasyCache, ours", re.compile("EasyCache"), "#009E73"),
    ("Adaptive", re.compile("Adaptive"), "#56B4E9"),
    ("CG-Taylor", re.compile("CG-Taylor"), "#CC79A7"),
    ("Fitted", re.compile("Fitted"), "#E69F00"),
)


def draw(rows: dict[str, dict], title: str, path: Path) -> None:
    """Computed steps against PSNR, mean as a line and the worst prompt as crosses, for the families that make curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    for label, pattern, colour in GROUPS:
        points = sorted((r["calls"], r["psnr_mean"], r["psnr_worst"]) for n, r in rows.items() if pattern.match(n))
        points = [p for p in points if p[1] < 90]
        if points:
            calls, mean, worst = zip(*points)
            axis.plot(calls, mean, "o-", color=colour, label=label, linewidth=1.5, markersize=4)
            axis.plot(calls, worst, "x", color=colour, markersize=5)
    axis.set(
        xlabel="network calls (of the plain run's steps)", ylabel="PSNR to the plain run, dB (o mean, x worst prompt)"
    )
    axis.set_title(title, fontsize=10)
    axis.invert_xaxis()
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28, 50])
    parser.add_argument("--count", type=int, default=16, help="held-out prompts")
    parser.add_argument("--arms", default="", help="only arms whose name matches this expression; plain runs stay")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare(args.comfyui)
    bench = Bench(args.model)
    prompts = json.loads((ROOT / "demo" / MODELS[args.model]["prompts"]).read_text(encoding="utf-8"))[: args.count]
    references: dict = {}
    out = args.out or RESULTS / f"caching-{args.model}.json"
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}  # other step counts stay
    result |= {"model": f"demo {args.model}", "prompts": len(prompts), "cpu": platform.processor() or platform.machine()}
    for steps in args.steps:
        arms = [arm for arm in arms_for(steps, args.model) if arm.name == "plain" or arm.steps or re.search(args.arms, arm.name)]
        rows = measure(bench, steps, prompts, arms, references)
        result[f"{steps} steps"] = rows
        print(f"\n{args.model}, {steps} steps, {len(prompts)} held-out prompts, CFG 5\n\n{table(rows)}\n", flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for steps in args.steps:
        title = f"demo {args.model}, {steps} Euler steps, CFG 5, {len(prompts)} held-out prompts"
        try:
            draw(result[f"{steps} steps"], title, out.with_name(f"{out.stem}-{steps}.png"))
        except ImportError:
            print("matplotlib is not installed: no curves were drawn")
            return


if __name__ == "__main__":
    main()
