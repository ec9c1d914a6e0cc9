"""Guidance saver and progressive resolution beside fewer steps and the published forms: quality for seconds.

    .venv/bin/python benchmarks/guidance_resolution.py [--parts image wide video large analytic] [--count 3] [--batch 8]
                                                       [--arms REGEX] [--threads 1] [--comfyui .comfyui] [--out FILE]

In process, the arms of a prompt one after the other (drifts of the machine hit all alike), after a discarded warm-up.
Quality is the PSNR of the decoded pictures to the plain run of 28 Euler steps at CFG 5, the mean and the worst of the
prompts. Speed-ups are medians over the prompts of plain over arm, in seconds on the clock and in seconds of processor time
(a busy machine disturbs the clock). "Work" is what goes through the blocks, rows x latent pixels, over the plain run's.

image, video: the demo models on held-out prompts. wide: the image model at 256x256 pixels, sixteen times its own size, where
time goes by the pixel; its pictures there are no good, and how close an arm stays to the plain run is told all the same.
large: a random network of SD3's architecture with 1,024 image tokens,
for the time alone. analytic: a flow of a Gaussian mixture whose velocity is known, 32x32, in fp64. Prints tables and writes
benchmarks/results/guidance-resolution.json; parts that were not asked for stay in the file.
"""

import argparse
import itertools
import json
import platform
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from overhead import ROOT, large_model, prepare

RESULTS = ROOT / "benchmarks" / "results" / "guidance-resolution.json"
STEPS, LARGE_STEPS, CFG = 28, 14, 5.0
#: At least so much faster than the plain run, for each kind of arm.
GOALS = {"guidance": 1.25, "progressive": 1.3}
PARTS = ("analytic", "image", "wide", "video", "large")
WIDE = 32
#: Arms of the parts that take longer.
SHORT = re.compile(
    r"plain|(22|21|20|18|16) steps|every 2, from|Periodic, from|Cor|Coupled, half size to (20|40)|every 2$|stacked: .*corrected"
)
HALF = {"stages": [0.5, 1.0], "min_side": 2}


@dataclass(frozen=True)
class Arm:
    """One way of sampling: requests by technique, or fewer steps."""

    name: str
    requests: tuple[tuple[str, dict], ...] = ()
    steps: int = STEPS
    sampler: str = "euler"


@dataclass
class Figures:
    """What one arm gave, per prompt."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)


def arms() -> Iterator[Arm]:
    """Plain, fewer steps, the guidance saver, progressive resolution, and both with a cache."""
    yield Arm("plain")
    for steps in (25, 23, 22, 21, 20, 18, 16, 14):
        yield Arm(f"{steps} steps", steps=steps)
    saver = {
        "Periodic": {"method": "Periodic"},
        "Periodic every 2": {"method": "Periodic", "interval": 2},
        "Periodic every 4": {"method": "Periodic", "interval": 4},
        "Periodic, from 10 %": {"method": "Periodic", "guide_from": 0.1, "warmup": 2},
        "Periodic every 2, from 10 %": {"method": "Periodic", "interval": 2, "guide_from": 0.1, "warmup": 2},
        "FasterCache": {"method": "FasterCache"},
        "Interval from 10 %": {"method": "Interval", "guide_from": 0.1},
        "Interval from 20 %": {"method": "Interval", "guide_from": 0.2},
        "Interval until 70 %": {"method": "Interval", "guide_until": 0.7},
        "Adaptive 0.98": {"method": "Adaptive", "agreement": 0.98},
    }
    for name, settings in saver.items():
        yield Arm(f"guidance: {name}", (("guidance", settings),))
    for switch in (0.2, 0.4, 0.6):
        for method in ("Coupled", "SPEED", "Fresh noise"):
            yield Arm(f"progressive: {method}, half size to {switch:.0%}", (progressive(switch, method),))
    for switch, refresh in ((0.4, 4), (0.57, 4), (0.54, 5), (0.64, 3), (0.71, 4)):
        yield Arm(
            f"progressive: Corrected every {refresh}, half size to {switch:.0%}",
            (progressive(switch, "Corrected", refresh=refresh),),
        )
    for switch in (0.2, 0.4):
        yield Arm(f"progressive: Coupled, 0.75 to {switch:.0%}", (progressive(switch, stages=(0.75, 1.0)),))
    yield Arm(
        "progressive: Coupled, 0.25 and 0.5 to 30 % and 60 %", (progressive((0.3, 0.6), stages=(0.25, 0.5, 1.0)),)
    )
    cache = ("cache", {"method": "Taylor", "interval": 2, "warmup": 4, "tail": 5})
    periodic, seldom = ("guidance", saver["Periodic"]), ("guidance", saver["Periodic every 4"])
    yield Arm("cache: Taylor every 2", (cache,))
    yield Arm("stacked: guidance, cache", (periodic, cache))
    yield Arm("stacked: guidance every 4, cache", (seldom, cache))
    yield Arm("stacked: progressive 40 %, cache", (progressive(0.4), cache))
    yield Arm("stacked: corrected to 57 %, cache", (progressive(0.57, "Corrected", refresh=4), cache))
    yield Arm("stacked: guidance, corrected to 57 %", (periodic, progressive(0.57, "Corrected", refresh=4)))
    yield Arm("stacked: guidance, progressive 40 %", (periodic, progressive(0.4)))
    yield Arm("stacked: guidance, progressive 40 %, cache", (periodic, progressive(0.4), cache))


def progressive(
    switches: float | tuple[float, ...], method: str = "Coupled", stages: tuple = (0.5, 1.0), refresh: int = 4
) -> tuple[str, dict]:
    """Return a request for stages that end at given shares of the steps."""
    shares = list(switches) if isinstance(switches, tuple) else [switches]
    return "resolution", {"stages": list(stages), "min_side": 2, "switches": shares, "method": method, "refresh": refresh}


def patched(model, arm: Arm):
    """Return MODEL with the requests of an arm."""
    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.plan import Request

    for technique, settings in (*arm.requests, ("measure", {"nonce": 1})):
        model = host.request(model, Request(technique, settings, required=technique != "measure"))
    return model


class Work:
    """Counts rows x latent pixels that really go through the second block, which every technique of ours may skip."""

    def __init__(self, network, blocks: str):
        self.total = self._now = 0
        network.register_forward_pre_hook(self._enter)
        getattr(network, blocks)[1].register_forward_pre_hook(self._add)

    def _enter(self, module, args) -> None:
        self._now = args[0].shape[0] * args[0][0, 0].numel()

    def _add(self, module, args) -> None:
        self.total += self._now

    def take(self) -> int:
        """Return the count and begin anew."""
        found, self.total = self.total, 0
        return found


def sample(model, arm: Arm, pair, shape: tuple[int, ...], seed: int):
    """Return the latent and seconds on the clock and of processor time."""
    import comfy.sample
    import torch

    empty = torch.zeros(shape)
    noise = comfy.sample.prepare_noise(empty, seed)
    clock, processor = time.perf_counter(), time.process_time()
    latent = comfy.sample.sample(
        model, noise, arm.steps, CFG, arm.sampler, "simple", *pair, empty, disable_pbar=True, seed=seed
    )
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return latent, clock, processor


def measure_demo(
    which: str, prompts: list[str], batch: int, chosen: list[Arm], side: int | None = None
) -> dict[str, Figures]:
    """Run every arm on every prompt of a demo model, at its own size or with ``side`` latent pixels."""
    import torch
    from caching import Bench, psnr

    bench = Bench(which)
    work = Work(bench.model.model.diffusion_model, bench.spec["blocks"])
    shape = (batch, *bench.spec["latent"][1:])
    shape = shape if side is None else (*shape[:-2], side, side)
    figures = {arm.name: Figures() for arm in chosen}
    with torch.inference_mode():
        models = {arm.name: patched(bench.model, arm) for arm in chosen}
        for arm in chosen[:3]:
            sample(models[arm.name], arm, (bench.conditioning(prompts[0]), bench.conditioning("")), shape, 1)
        work.take()
        for index, prompt in enumerate(prompts):
            pair, plain = (bench.conditioning(prompt), bench.conditioning("")), None
            for arm in chosen:
                latent, clock, processor = sample(models[arm.name], arm, pair, shape, 1000 + index)
                pictures = bench.vae.decode(latent).float()
                plain = pictures if plain is None else plain
                row = figures[arm.name]
                row.clock.append(clock)
                row.processor.append(processor)
                row.work.append(work.take())
                row.psnr.append(min(psnr(pictures, plain), 120.0))
            print(f"  {which}, batch {batch}: {index + 1} of {len(prompts)} prompts", flush=True)
    return figures


def measure_large(runs: int, wanted: list[Arm]) -> dict[str, Figures]:
    """Time alone, on a random network whose time goes by the token."""
    import torch

    with torch.inference_mode():
        model, pair = large_model()
        work = Work(model.model.diffusion_model, "joint_blocks")
        chosen = [arm for arm in wanted if SHORT.search(arm.name) and not arm.name.endswith(" steps")]
        chosen = [Arm(arm.name, arm.requests, LARGE_STEPS) for arm in chosen]
        figures = {arm.name: Figures() for arm in chosen}
        models = {arm.name: patched(model, arm) for arm in chosen}
        sample(models["plain"], Arm("plain", steps=2), pair, (1, 16, 64, 64), 0)
        work.take()
        for index in range(runs):
            for arm in chosen:
                _, clock, processor = sample(models[arm.name], arm, pair, (1, 16, 64, 64), index)
                figures[arm.name].clock.append(clock)
                figures[arm.name].processor.append(processor)
                figures[arm.name].work.append(work.take())
            print(f"  large: {index + 1} of {runs} runs", flush=True)
    return figures


def rows_of(figures: dict[str, Figures]) -> dict[str, dict]:
    """Return medians, means and the worst of every arm."""
    plain, rows = figures["plain"], {}
    for name, found in figures.items():
        ratios = [p / a for p, a in zip(plain.processor, found.processor, strict=True)]
        rows[name] = {
            "speedup_clock": statistics.median(p / a for p, a in zip(plain.clock, found.clock, strict=True)),
            "speedup_processor": statistics.median(ratios),
            "spread_processor": [min(ratios), max(ratios)],
            "seconds": statistics.median(found.clock),
            "work": statistics.mean(a / p for p, a in zip(plain.work, found.work, strict=True)),
        }
        if found.psnr:
            rows[name] |= {
                "psnr_mean": statistics.mean(found.psnr),
                "psnr_worst": min(found.psnr),
                "per_prompt": [round(value, 2) for value in found.psnr],
            }
    return rows


def rival(rows: dict[str, dict], row: dict, key: str) -> float:
    """Return the PSNR of plain sampling in fewer steps at the same ``key`` (work or processor time), between two counts."""
    steps = [
        (1.0, None),
        *((other[key], other["psnr_mean"]) for name, other in rows.items() if name.endswith(" steps")),
    ]
    points = sorted(point for point in steps if point[1] is not None)
    below = [point for point in points if point[0] <= row[key]] or points[:1]
    above = [point for point in points if point[0] >= row[key]] or points[-1:]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (row[key] - x0) / (x1 - x0)


def table(rows: dict[str, dict]) -> str:
    """Return the rows as Markdown; "beyond" is the PSNR less that of fewer plain steps of as much work or as fast."""
    lines = [
        "| arm | work | speed-up (clock) | (processor) | PSNR mean | worst | beyond, same work | beyond, same speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        line = f"| {name} | {row['work']:.2f} | {row['speedup_clock']:.2f}x | {row['speedup_processor']:.2f}x |"
        if "psnr_mean" in row:
            line += f" {row['psnr_mean']:.1f} | {row['psnr_worst']:.1f} |"
            if name == "plain" or name.endswith(" steps"):
                line += " | |"
            else:
                work, speed = rival(rows, row, "work"), rival(rows, row, "speedup_processor")
                line += f" {row['psnr_mean'] - work:+.1f} | {row['psnr_mean'] - speed:+.1f} |"
        lines.append(line)
    return "\n".join(lines)


class MixtureFlow:
    """Exact predictions of a flow of a Gaussian mixture over DCT coefficients, at any size.

    Args:
        side: of the full latent.
        components: of the mixture; coarse structure tells them apart.
        law: power spectrum.
        spread: share of the power that lies within a component.
    """

    def __init__(self, side: int, components: int, law, spread: float):
        import torch

        from stretto.acceleration.resolution.spectral import dct, idct, ratio

        self._dct, self._idct, self._ratio, self.full = dct, idct, ratio, (side, side)
        place = torch.arange(side, dtype=torch.float64) / 2
        frequency = (place[:, None] ** 2 + place**2).sqrt().clamp(min=0.5)
        power = law.amplitude * frequency**-law.exponent
        draws = torch.randn(components, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.means = draws * ((1 - spread) * power / (1 + frequency)).sqrt()
        self.variance = spread * power

    def denoised(self, x, sigma: float):
        """Return E[x0 | x] for x [B, H, W] at ``sigma``."""
        import torch

        height, width = x.shape[-2:]
        r, keep = self._ratio(self.full, (height, width)), 1.0 - sigma
        means, variance = self.means[:, :height, :width] / r, self.variance[:height, :width] / r**2
        state = self._dct(x)[:, None]
        total = keep**2 * variance + sigma**2
        share = torch.softmax((-0.5 * (state - keep * means) ** 2 / total).sum((-1, -2)), 1)
        return self._idct((share[..., None, None] * (means + keep * variance / total * (state - keep * means))).sum(1))


def euler(flow: MixtureFlow, x, sigmas):
    """Return where ``x`` ends, and the last prediction."""
    denoised = x
    for now, then in itertools.pairwise(sigmas):
        denoised = flow.denoised(x, now)
        x = x + (then - now) * (x - denoised) / now
    return x, denoised


def in_stages(flow: MixtureFlow, plan, start):
    """Return where Euler's method ends in the stages of ``plan``."""
    import torch

    from stretto.acceleration.resolution.corrected import Correction
    from stretto.acceleration.resolution.stages import Path as StagePath

    if plan.refresh:
        correction = Correction(plan)
        corrected = SimpleNamespace(
            denoised=lambda x, sigma: correction.predict(
                x, sigma, lambda: flow.denoised(x, sigma), lambda latent, q, place: flow.denoised(latent, q)
            )
        )
        return euler(corrected, start, plan.sigmas)[0]
    path = StagePath(plan, start, torch.zeros_like(start), seed=2)
    x = path.start()
    for place, stage in enumerate(plan.stages):
        x, denoised = euler(flow, x, stage.sigmas)
        x = path.switch(place, x, denoised) if place + 1 < len(plan.stages) else x
    return x


def measure_analytic(count: int) -> dict[str, dict]:
    """Progressive forms on the analytic flow: PSNR to the full run, and the work, for fixed and for chosen switches."""
    import torch

    from stretto.acceleration.resolution.settings import ResolutionSettings
    from stretto.acceleration.resolution.spectrum import SPECTRA
    from stretto.acceleration.resolution.stages import plan_stages

    rows, side, steps = {}, 32, 30
    flow = MixtureFlow(side, 8, SPECTRA["FLUX"], 0.3)
    start = torch.randn(count, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def levels(number: int) -> tuple[float, ...]:
        return tuple(3.0 * t / (1 + 2.0 * t) for t in (1 - step / number for step in range(number + 1)))

    truth, _ = euler(flow, start, levels(steps))
    reach = truth.amax((1, 2)) - truth.amin((1, 2))

    def add(name: str, result, work: float) -> None:
        error = (result - truth).square().mean((1, 2))
        decibels = (10 * torch.log10(reach**2 / error.clamp(min=1e-30))).tolist()
        rows[name] = {"work": work, "psnr_mean": statistics.mean(decibels), "psnr_worst": min(decibels)}

    for number in (29, 28, 27, 25, 23, 21, 18):
        add(f"{number} steps", euler(flow, start, levels(number))[0], number / steps)
    cases = [{"switches": (share,)} for share in (0.1, 0.2, 1 / 3, 0.5)] + [{"delta": delta} for delta in (0.01, 0.05)]
    for case in cases:
        for method in ("Coupled", "Corrected", "SPEED", "Fresh noise"):
            settings = ResolutionSettings(**HALF, method=method, **case)
            plan = plan_stages(settings, levels(steps), (side, side))
            if isinstance(plan, str):
                continue
            x = in_stages(flow, plan, start)
            what = f"to {case['switches'][0]:.0%}" if "switches" in case else f"delta {case['delta']:g}"
            add(f"progressive: {method}, half size {what} ({plan.stages[0].last} of {steps} steps)", x, plan.cost)
    return rows


def short_table(rows: dict[str, dict]) -> str:
    """Return the analytic rows as Markdown."""
    lines = ["| arm | work | PSNR mean | worst |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['work']:.2f} | {r['psnr_mean']:.1f} | {r['psnr_worst']:.1f} |" for n, r in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="large takes longest")
    parser.add_argument("--count", type=int, default=3, help="held-out prompts")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="pictures at once (image)")
    parser.add_argument("--arms", default="", help="only arms whose name matches this expression; plain runs stay")
    parser.add_argument("--runs", type=int, default=3, help="of the large network")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves them")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    chosen = [
        arm for arm in arms() if arm.name == "plain" or arm.name.endswith(" steps") or re.search(args.arms, arm.name)
    ]
    if args.threads:
        torch.set_num_threads(args.threads)
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result |= {
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "goals": GOALS,
    }

    def keep(name: str, title: str, rows: dict, words: str) -> None:
        result[name] = {"title": title, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\n{title}\n\n{words}\n", flush=True)

    for part in args.parts:
        if part == "analytic":
            rows = measure_analytic(16)
            keep(
                "analytic", "analytic Gaussian-mixture flow, 32x32, 30 Euler steps, 16 samples", rows, short_table(rows)
            )
        elif part == "large":
            rows = rows_of(measure_large(args.runs, chosen))
            title = f"random SD3 network, 1,024 image tokens, {LARGE_STEPS} steps, CFG {CFG:g}, time alone"
            keep("large", title, rows, table(rows))
        else:
            which, side = ("image", WIDE) if part == "wide" else (part, None)
            prompts = "heldout_prompts.json" if which == "image" else "heldout_video_prompts.json"
            texts = json.loads((ROOT / "demo" / prompts).read_text(encoding="utf-8"))[: args.count]
            for batch in args.batch if part == "image" else [1]:
                wanted = chosen if part == "image" else [arm for arm in chosen if SHORT.search(arm.name)]
                rows = rows_of(measure_demo(which, texts, batch, wanted, side))
                size = f" at {side * 8}x{side * 8} pixels" if side else ""
                title = (
                    f"demo {which} model{size}, {STEPS} Euler steps, CFG {CFG:g}, batch {batch}, {len(texts)} held-out prompts"
                )
                keep(f"{part}, batch {batch}", title, rows, table(rows))


if __name__ == "__main__":
    main()
