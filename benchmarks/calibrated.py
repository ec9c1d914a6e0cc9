"""Does a calibrated preset keep its promise on seeds that it was not calibrated with?

    .venv/bin/python benchmarks/calibrated.py image --count 16
    .venv/bin/python benchmarks/calibrated.py video --count 6 --targets psnr:40 speed:1.8

For each held-out prompt and target: Stretto Profile and Stretto Calibrate as their nodes run them (28 Euler steps, CFG 5,
three extra seeds), then the preset on fresh seeds. A target is met where the median over the fresh seeds reaches it. Prints one
line per target and writes benchmarks/results/calibrated-<model>.json. Speeds are those of the evaluations, so run a speed
target on an idle machine.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path

from caching import MODELS, RESULTS, Bench, psnr
from overhead import ROOT, prepare

STEPS, CFG, SEED = 28, 5.0, 7000
WORDS = {"psnr": "PSNR at least (dB)", "ssim": "SSIM at least", "speed": "speed at least (x)"}


class Calibration:
    """Calibrates through the nodes, and tries presets."""

    def __init__(self, which: str, forecaster: str):
        import stretto

        self.bench, self.forecaster = Bench(which), forecaster
        extension = asyncio.run(stretto.comfy_entrypoint())
        self.nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}

    def profile(self, prompt: str):
        """Run Stretto Profile on a prompt."""
        import torch

        return self.nodes["StrettoProfile"].execute(
            model=self.bench.model, positive=self.bench.conditioning(prompt), negative=self.bench.conditioning(""),
            latent_image={"samples": torch.zeros(self.bench.spec["latent"])}, seed=SEED, steps=STEPS, cfg=CFG,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        ).result[0]  # fmt: skip

    def calibrate(self, profile, kind: str, value: float):
        """Run Stretto Calibrate; returns its preset, or its error in words."""
        from stretto.acceleration.errors import StrettoError

        try:
            return self.nodes["StrettoCalibrate"].execute(
                profile=profile, target=WORDS[kind], value=value, forecaster=self.forecaster, extra_seeds=3, probes=5,
                name="", vae=self.bench.vae,
            ).result[0]  # fmt: skip
        except StrettoError as error:
            return str(error)

    def fresh(self, profile, preset, kind: str, seeds: int) -> list[float]:
        """What the preset gives on fresh seeds, in the target's unit."""
        from stretto.acceleration.hosts import comfy as host
        from stretto.acceleration.hosts.comfy_profile import evaluation_seconds, traced
        from stretto.acceleration.plan import Request
        from stretto.acceleration.quality import ssim

        job, found = profile.job, []
        settings = {"method": preset.method, **preset.settings}
        arms = [host.request(job.model, Request("measure")), host.request(job.model, Request("cache", settings))]
        for seed in range(SEED + 100, SEED + 100 + seeds):
            pictures, seconds = [], []
            for model in arms:
                latent, trace = traced(model, lambda model, seed=seed: job(model, seed=seed, callback=lambda *_: None))
                decoded = self.bench.vae.decode(latent).float().clamp(0, 1)
                pictures.append(decoded.reshape(-1, *decoded.shape[-3:]))
                seconds.append(evaluation_seconds(trace))
            if kind == "speed":
                found.append(seconds[0] / seconds[1])
            else:
                found.append(min(psnr(*pictures), 120.0) if kind == "psnr" else ssim(*pictures))
        return found


def main() -> None:
    """Calibrate, try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--count", type=int, default=16, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=3, help="fresh seeds per prompt")
    parser.add_argument("--targets", nargs="+", default=["psnr:35", "psnr:45", "ssim:0.97", "speed:1.8"])
    parser.add_argument("--forecaster", default="fitted", choices=("fitted", "line", "reuse"))
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    prepare(args.comfyui)
    import folder_paths
    import torch

    prompts = json.loads((ROOT / "demo" / MODELS[args.model]["prompts"]).read_text(encoding="utf-8"))[: args.count]
    rows = {target: [] for target in args.targets}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        folder_paths.set_temp_directory(folder)
        calibration = Calibration(args.model, args.forecaster)
        for number, prompt in enumerate(prompts, start=1):
            profile = calibration.profile(prompt)
            for target in args.targets:
                kind, value = target.split(":")
                preset = calibration.calibrate(profile, kind, float(value))
                row = {"prompt": prompt}
                if isinstance(preset, str):
                    row["refused"] = preset
                else:
                    fresh = calibration.fresh(profile, preset, kind, args.seeds)
                    row |= {"mask": preset.settings["mask"], "fresh": [round(v, 4) for v in fresh]}
                    row |= {"median": round(statistics.median(fresh), 4), "met": statistics.median(fresh) >= float(value)}
                rows[target].append(row)
            print(f"  {number} of {len(prompts)} prompts", flush=True)
    head = "| target | met on fresh seeds | refused | computed steps, mean | median over prompts | worst |"
    lines = [head, "|---|---|---|---|---|---|"]
    for target, found in rows.items():
        tried = [row for row in found if "median" in row]
        if not tried:
            lines.append(f"| {target} | - | {len(found)} | | | |")
            continue
        computed = statistics.mean(row["mask"].count("#") for row in tried)
        medians = [row["median"] for row in tried]
        lines.append(
            f"| {target} | {sum(row['met'] for row in tried)} of {len(tried)} | {len(found) - len(tried)} | {computed:.1f} | "
            f"{statistics.median(medians):.3g} | {min(medians):.3g} |"
        )
    print("\n".join([f"\ndemo {args.model}, {args.forecaster}, {STEPS} Euler steps", "", *lines]))
    out = args.out or RESULTS / f"calibrated-{args.model}.json"
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    document[args.forecaster] = {"steps": STEPS, "cfg": CFG, "fresh_seeds": args.seeds, "targets": rows}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
