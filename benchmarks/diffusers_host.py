"""Caches of this pack under diffusers beside those of diffusers and cache-dit, on one transformer: quality and overhead.

    .venv/bin/python benchmarks/diffusers_host.py [--count 8] [--steps 28] [--overhead-runs 12] [--attention-rounds 3]

The demo image model, converted to diffusers' SD3 transformer, in diffusers' own pipeline (fp32, batched guidance). Decoded by
ComfyUI's loader of the demo VAE where ComfyUI is there. Every arm runs every held-out prompt with the same noise; a hook on the
second block counts how often it really ran, in rows of the guided batch. Quality is the PSNR of the pictures to the plain run,
set against a plain run of as many steps as the arm computed. Overhead is the process time that an arm adds to a step which it
computes, in runs that compute everything, one arm after the other in every round.

Sparse attention runs on pictures of 512 x 512 (1,024 tokens; the model knows 64 x 64, where there are 16), so its pictures show
nothing: read how far latents are off, and the process time of a step, set against the pipeline's own dense attention. diffusers
has nothing to set beside it: all backends of its attention dispatcher compute every key. The guidance saver, for which it has
nothing in this pipeline either, is set against fewer steps like the caches. Prints tables and writes
benchmarks/results/diffusers_host.json.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overhead import ROOT, prepare

RESULT = ROOT / "benchmarks" / "results" / "diffusers_host.json"
MODELS = ROOT / "demo" / "models"
GUIDANCE, SIZE = 5.0, 64
#: Side of the pictures that attention is compared on, and their steps.
LARGE, LARGE_STEPS = 512, 8
PARTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Attributes:
        name: in the tables.
        whose: ``"ours"``, ``"diffusers"``, ``"cache-dit"`` or ``""``.
        enter: (pipeline, steps) -> a context in which the pipeline runs that way.
        steps: how many, None for as many as asked for.
    """

    name: str
    whose: str
    enter: Callable
    steps: int | None = None


def ours(force: bool = False, **settings) -> Callable:
    """A cache of this pack; ``force`` keeps it in place where it would skip nothing."""

    def enter(pipe, steps):
        from stretto.acceleration.hosts.diffusers import accelerate
        from stretto.acceleration.plan import Request

        return accelerate(pipe, Request("cache", settings, force=force))

    return enter


def sparse(**settings) -> Callable:
    """Sparse attention of this pack."""

    def enter(pipe, steps):
        from stretto.acceleration.hosts.diffusers import accelerate
        from stretto.acceleration.plan import Request

        numbers = {"min_tokens": 0, "dense_until": 0.0, "probe": False, **settings}
        return accelerate(pipe, Request("attention", numbers, force=True, required=True))

    return enter


def saver(**settings) -> Callable:
    """The guidance saver of this pack."""

    def enter(pipe, steps):
        from stretto.acceleration.hosts.diffusers import accelerate
        from stretto.acceleration.plan import Request

        return accelerate(pipe, Request("guidance", settings, required=True))

    return enter


@contextlib.contextmanager
def text_handed_on(transformer):
    """SD3's last block returns no text, on which hooks of diffusers and cache-dit fail: make it return what it was given."""
    last = transformer.transformer_blocks[-1]
    kind = type(last).forward

    def forward(*args, **kwargs):
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        return text, kind(last, *args, **kwargs)[1]

    last.forward = functools.update_wrapper(forward, last.forward)  # cache-dit reads the signature
    try:
        yield
    finally:
        last.__dict__.pop("forward", None)


def hooked(make: Callable) -> Callable:
    """A cache of diffusers; ``make(steps)`` gives its configuration. SD3's class takes it through the functions alone."""

    @contextlib.contextmanager
    def enter(pipe, steps):
        from diffusers import hooks

        config, registry = make(steps), hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        apply, names = {
            "FirstBlockCacheConfig": (hooks.apply_first_block_cache, ("fbc_leader_block_hook", "fbc_block_hook")),
            "TaylorSeerCacheConfig": (hooks.apply_taylorseer_cache, ("taylorseer_cache",)),
            "MagCacheConfig": (hooks.apply_mag_cache, ("mag_cache_leader_block_hook", "mag_cache_block_hook")),
        }[type(config).__name__]
        try:
            with text_handed_on(pipe.transformer):
                apply(pipe.transformer, config)
                registry._set_context("cond_uncond")  # this pipeline names none, and hooks with state ask for one
                yield
        finally:
            registry._set_context(None)
            for name in names:
                registry.remove_hook(name, recurse=True)
            for module in pipe.transformer.modules():  # the next arm's hooks sit elsewhere, and registries remember
                module.__dict__.pop("_diffusers_hook", None)

    return enter


def dbcache(**settings) -> Callable:
    """cache-dit's DBCache, with its TaylorSeer calibrator where ``taylor`` gives an order."""

    @contextlib.contextmanager
    def enter(pipe, steps):
        import cache_dit

        taylor = settings.get("taylor")
        options = {name: value for name, value in settings.items() if name != "taylor"}
        config = cache_dit.DBCacheConfig(num_inference_steps=steps, **options)
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None
        with text_handed_on(pipe.transformer):
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            try:
                yield
            finally:
                cache_dit.disable_cache(pipe)

    return enter


def plain(pipe, steps):
    """Nothing."""
    return contextlib.nullcontext()


def taylorseer(interval: int, warmup: int, tail: int, lite: bool) -> Callable:
    """TaylorSeer of diffusers: ``lite`` forecasts the network's output, the other form the last block, as ours does."""

    def make(steps):
        import torch
        from diffusers import TaylorSeerCacheConfig

        places = {"skip_predict_identifiers": [r"transformer_blocks\.[0-2]"], "cache_identifiers": [r"transformer_blocks\.3"]}
        return TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=warmup, disable_cache_after_step=steps - tail, max_order=1,
            taylor_factors_dtype=torch.float32, **({"use_lite_mode": True} if lite else places),
        )  # fmt: skip

    return make


def first_block(threshold: float) -> Callable:
    """FirstBlockCache of diffusers."""

    def make(steps):
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold)

    return make


def magnitude(ratios: list[float], threshold: float) -> Callable:
    """MagCache of diffusers, with the ratios that it has measured itself."""

    def make(steps):
        from diffusers.hooks import MagCacheConfig

        return MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, threshold=threshold, max_skip_steps=4)

    return make


def arms_of(steps: int, ratios: list[float], curve: str) -> list[Arm]:
    """The arms of the comparison. MagCache: both sides get the curve that diffusers has measured."""
    found = [Arm("plain", "", plain)]
    found += [Arm(f"{count} steps", "", plain, count) for count in range(steps // 3, steps, 2)]
    for interval in (2, 3, 4):
        settings = {"interval": interval, "warmup": 4, "tail": 3}
        found.append(Arm(f"Taylor, every {interval}", "ours", ours(method="Taylor", **settings)))
        for lite, what in ((False, "last block"), (True, "lite")):
            name = f"TaylorSeer hook, {what}, every {interval}"
            found.append(Arm(name, "diffusers", hooked(taylorseer(**settings, lite=lite))))
    for threshold in (0.05, 0.1, 0.2):
        found.append(Arm(f"FBCache {threshold:g}", "ours", ours(method="FBCache", threshold=threshold, warmup=0, tail=0)))
        found.append(Arm(f"FirstBlockCache hook {threshold:g}", "diffusers", hooked(first_block(threshold))))
        settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4, "residual_diff_threshold": threshold}
        found.append(Arm(f"cache-dit DBCache F1B0 {threshold:g}", "cache-dit", dbcache(**settings)))
        found.append(Arm(f"cache-dit DBCache F1B0 {threshold:g}, TaylorSeer", "cache-dit", dbcache(**settings, taylor=1)))
        ours_too = {"method": "DBCache-Taylor", "threshold": threshold, "coordinate": "logsnr", "max_skips": 3, "tail": 0}
        found.append(Arm(f"DBCache-Taylor {threshold:g}", "ours", ours(**ours_too)))
        found.append(Arm(f"EasyCache {threshold:g}", "ours", ours(method="EasyCache", threshold=threshold, tail=1)))
        found.append(Arm(f"Adaptive {threshold:g}", "ours", ours(method="Adaptive", threshold=threshold, tail=2)))
    for threshold in (0.06, 0.12, 0.24):
        settings = {"method": "MagCache", "threshold": threshold, "max_skips": 4, "warmup": int(0.2 * steps + 0.5), "tail": 0}
        found.append(Arm(f"MagCache {threshold:g}", "ours", ours(curve=curve, **settings)))
        found.append(Arm(f"MagCache hook {threshold:g}", "diffusers", hooked(magnitude(ratios, threshold))))
    for level in ("quality", "balanced", "fast"):
        found.append(Arm(f"Fitted, {level}", "ours", ours(method="Fitted", preset=level, warmup=0, tail=0)))
    for interval in (2, 3, 4):
        settings = {"method": "Periodic", "interval": interval, "warmup": 4, "tail": 3}
        found.append(Arm(f"Guidance Periodic, every {interval}", "ours", saver(**settings)))
    return found


def attention_arms() -> list[Arm]:
    """Dense attention as the pipeline has it, and ours."""
    found = [Arm("dense, as the pipeline has it", "", plain), Arm("all blocks kept", "ours", sparse(keep=1.0))]
    for method, keep in (("Block mass", 0.5), ("Block mass", 0.25), ("Top-k", 0.25), ("Sol", 0.25), ("SLA", 0.25)):
        found.append(Arm(f"{method}, keep {keep:.0%}", "ours", sparse(method=method, keep=keep)))
    return found


def computing_arms(ratios: list[float]) -> list[Arm]:
    """Arms that compute every step, with everything in place that they need for skipping."""
    return [
        Arm("plain", "", plain),
        Arm("Taylor", "ours", ours(method="Taylor", interval=1, force=True)),
        Arm("FBCache", "ours", ours(method="FBCache", threshold=0.0, force=True)),
        Arm("EasyCache", "ours", ours(method="EasyCache", threshold=0.0, force=True)),
        Arm("TaylorSeer hook, last block", "diffusers", hooked(taylorseer(2, 1000, 0, lite=False))),
        Arm("FirstBlockCache hook", "diffusers", hooked(first_block(1e-9))),
        Arm("MagCache hook", "diffusers", hooked(magnitude(ratios, 0.0))),
        Arm(
            "cache-dit DBCache F1B0", "cache-dit",
            dbcache(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=1e-9),
        ),
    ]  # fmt: skip


class Bench:
    """The pipeline, its prompts, and the demo autoencoder."""

    def __init__(self, comfyui: Path):
        prepare(comfyui)
        import comfy.latent_formats
        import comfy.sd
        import comfy.utils
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        from stretto.acceleration.hosts.diffusers_files import load_transformer
        from stretto.demo.text_encoder import load

        transformer = load_transformer(MODELS / "diffusion_models" / "stretto-demo-image.safetensors")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.pipe = StableDiffusion3Pipeline(transformer, scheduler, **dict.fromkeys(PARTS))
        self.pipe.set_progress_bar_config(disable=True)
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / "stretto-demo-image-vae.safetensors")))
        self.latents = comfy.latent_formats.SD3()
        self.text = load(MODELS / "text_encoders" / "stretto-demo-text.safetensors")
        self.calls = 0.0
        # The first block may have to run to decide, the last one to correct; the second is skipped by every cache.
        transformer.transformer_blocks[1].attn.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        self.calls += len(args[0] if args else kwargs["hidden_states"]) / 2  # a step of guidance has two rows

    def run(self, arm: Arm, prompt: str, steps: int, seed: int, size: int = SIZE):
        """Sample: the latent, process seconds, steps whose second block ran, half ones for one branch alone."""
        import torch

        count = arm.steps or steps
        (text, pooled, _), (no_text, no_pooled, _) = self.text.encode([prompt]), self.text.encode([""])
        noise = torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
        self.calls = 0.0
        with arm.enter(self.pipe, count):
            started = time.process_time()
            latent = self.pipe(
                prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_text,
                negative_pooled_prompt_embeds=no_pooled, guidance_scale=GUIDANCE, latents=noise, height=size, width=size,
                sigmas=[1.0 - step / count for step in range(count)], num_inference_steps=count, output_type="latent",
            ).images  # fmt: skip
            seconds = time.process_time() - started
        return latent, seconds, self.calls

    def picture(self, latent):
        """Decode: [1, H, W, 3] in 0..1."""
        return self.vae.decode(self.latents.process_out(latent)).float().detach()

    def ratios(self, prompts: list[str], steps: int) -> list[float]:
        """MagCache's ratios as diffusers measures them, which it prints; the mean over prompts."""
        import ast
        import io

        from diffusers.hooks import MagCacheConfig

        arm = Arm("", "", hooked(lambda count: MagCacheConfig(num_inference_steps=count, calibrate=True)))
        found = []
        for index, prompt in enumerate(prompts):
            with contextlib.redirect_stdout(io.StringIO()) as told:
                self.run(arm, prompt, steps, index)
            found.append(ast.literal_eval(next(line for line in told.getvalue().splitlines() if line.startswith("[1"))))
        return [statistics.mean(values) for values in zip(*found, strict=True)]


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, 120 where they are equal."""
    error = float(((a - b) ** 2).mean())
    return min(-10 * math.log10(error), 120.0) if error else 120.0


def quality(bench: Bench, arms: list[Arm], prompts: list[str], steps: int) -> dict[str, dict]:
    """Run every arm on every prompt."""
    rows = {arm.name: {"whose": arm.whose, "calls": [], "psnr": [], "seconds": []} for arm in arms}
    for index, prompt in enumerate(prompts):
        reference = None
        for arm in arms:
            latent, seconds, calls = bench.run(arm, prompt, steps, 1000 + index)
            picture = bench.picture(latent)
            reference = picture if reference is None else reference
            row = rows[arm.name]
            row["calls"].append(calls)
            row["psnr"].append(psnr(picture, reference))
            row["seconds"].append(seconds)
        print(f"  quality: {index + 1} of {len(prompts)} prompts", flush=True)
    return {
        name: {
            "whose": row["whose"],
            "calls": statistics.mean(row["calls"]),
            "psnr_mean": statistics.mean(row["psnr"]),
            "psnr_worst": min(row["psnr"]),
            "process_seconds": statistics.median(row["seconds"]),
        }
        for name, row in rows.items()
    }


def beyond(rows: dict[str, dict], row: dict, key: str) -> float:
    """By how much a row beats plain sampling with as many steps as it computed, between the two nearest step counts."""
    points = sorted((r["calls"], r[key]) for name, r in rows.items() if name.endswith(" steps"))
    below = [point for point in points if point[0] <= row["calls"]] or points[:1]
    above = [point for point in points if point[0] >= row["calls"]] or points[-1:]
    (c0, v0), (c1, v1) = below[-1], above[0]
    return row[key] - (v0 if c0 == c1 else v0 + (v1 - v0) * (row["calls"] - c0) / (c1 - c0))


def overhead(bench: Bench, arms: list[Arm], prompt: str, steps: int, runs: int) -> dict[str, dict]:
    """Microseconds of process time that each arm adds to a computed step, against the plain run of the same round."""
    added = {arm.name: [] for arm in arms[1:]}
    base = []
    for run in range(runs + 1):
        order = arms[:1] + (arms[1:] if run % 2 else arms[:0:-1])
        seconds = {}
        for arm in order:
            _, seconds[arm.name], calls = bench.run(arm, prompt, steps, run)
            if calls != steps:
                raise RuntimeError(f"{arm.name} computed {calls} of {steps} steps; it should have computed all")
        if run == 0:
            continue  # warm-up
        base.append(seconds["plain"] / steps)
        for name, values in added.items():
            values.append((seconds[name] - seconds["plain"]) / steps * 1e6)
        print(f"  overhead: round {run} of {runs}", flush=True)
    rows = {"plain": {"whose": "", "ms_per_step": statistics.median(base) * 1e3}}
    for arm in arms[1:]:
        low, middle, high = statistics.quantiles(added[arm.name], n=4)
        rows[arm.name] = {"whose": arm.whose, "us_per_step": middle, "quartiles": [low, high]}
    return rows


def attention(bench: Bench, arms: list[Arm], prompt: str, steps: int, rounds: int) -> dict[str, dict]:
    """How far latents are off those of dense attention, and process seconds a step, in turn."""
    rows = {arm.name: {"whose": arm.whose, "seconds": []} for arm in arms}
    for run in range(rounds + 1):
        reference = None
        for arm in arms:
            latent, seconds, _ = bench.run(arm, prompt, steps, 7, LARGE)
            reference = latent if reference is None else reference
            rows[arm.name]["relative_error"] = float((latent - reference).norm() / reference.norm())
            if run:  # the first round warms up
                rows[arm.name]["seconds"].append(seconds / steps)
        print(f"  attention: round {run} of {rounds}", flush=True)
    for row in rows.values():
        seconds = row.pop("seconds")
        row |= {"ms_per_step": statistics.median(seconds) * 1e3, "ms_range": [min(seconds) * 1e3, max(seconds) * 1e3]}
    return rows


def attention_table(rows: dict[str, dict]) -> str:
    """The table of attention as Markdown."""
    tokens = (LARGE // 16) ** 2
    lines = [f"| attention, {tokens:,} tokens | whose | latents off by | ms a step | range |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["ms_range"]
        lines.append(
            f"| {name} | {row['whose']} | {row['relative_error']:.1e} | {row['ms_per_step']:.0f} | {low:.0f} to {high:.0f} |"
        )
    return "\n".join(lines)


def report(rows: dict[str, dict], cost: dict[str, dict], steps: int) -> str:
    """Both tables as Markdown."""
    lines = [
        f"| of {steps} steps | whose | computed | PSNR mean | worst | beyond as many steps | worst beyond |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        row["beyond_mean"], row["beyond_worst"] = (beyond(rows, row, key) for key in ("psnr_mean", "psnr_worst"))
        lines.append(
            f"| {name} | {row['whose']} | {row['calls']:.1f} | {row['psnr_mean']:.1f} | {row['psnr_worst']:.1f} | "
            f"{row['beyond_mean']:+.1f} | {row['beyond_worst']:+.1f} |"
        )
    lines += ["", f"A plain step takes {cost['plain']['ms_per_step']:.2f} ms. Added to a computed step:", ""]
    lines += ["| arm | whose | microseconds, median | quartiles |", "|---|---|---|---|"]
    for name, row in list(cost.items())[1:]:
        low, high = row["quartiles"]
        lines.append(f"| {name} | {row['whose']} | {row['us_per_step']:.0f} | {low:.0f} to {high:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--overhead-runs", type=int, default=12)
    parser.add_argument("--attention-rounds", type=int, default=3)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    bench = Bench(args.comfyui)
    import diffusers

    from stretto.acceleration.caching.magnitude import MagnitudeCurve

    try:
        import cache_dit

        rival = getattr(cache_dit, "__version__", "unknown")
    except ImportError:
        rival = None
        print("cache-dit is not installed: its arms are left out")
    prompts = json.loads((ROOT / "demo" / "heldout_prompts.json").read_text(encoding="utf-8"))[: args.count]
    ratios = bench.ratios(prompts[:4], args.steps)
    bench.pipe.scheduler.set_timesteps(sigmas=[1.0 - step / args.steps for step in range(args.steps)])
    curve = MagnitudeCurve.from_ratios(ratios, bench.pipe.scheduler.sigmas.tolist()).to_text()
    there = [arm for arm in arms_of(args.steps, ratios, curve) if rival or arm.whose != "cache-dit"]
    first = bench.run(there[0], prompts[0], args.steps, 1)[0]
    rows = quality(bench, there, prompts, args.steps)
    computing = [arm for arm in computing_arms(ratios) if rival or arm.whose != "cache-dit"]
    cost = overhead(bench, computing, prompts[0], args.steps, args.overhead_runs)
    spared = attention(bench, attention_arms(), prompts[0], LARGE_STEPS, args.attention_rounds)
    unchanged = bool((bench.run(there[0], prompts[0], args.steps, 1)[0] == first).all())
    table = report(rows, cost, args.steps)
    told = "equal" if unchanged else "NOT equal"
    print(f"\n{table}\n\n{attention_table(spared)}\n\nplain pictures before and after all arms are {told}")
    result = {
        "model": "demo image, in diffusers", "steps": args.steps, "prompts": len(prompts), "cfg": GUIDANCE,
        "cpu": platform.processor() or platform.machine(), "diffusers": diffusers.__version__, "cache_dit": rival,
        "quality": rows, "overhead": cost,
        "attention": {"tokens": (LARGE // 16) ** 2, "steps": LARGE_STEPS, "counterpart_in_diffusers": None, "arms": spared},
        "plain_unchanged": unchanged,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
