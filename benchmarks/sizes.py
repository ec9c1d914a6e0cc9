"""What the techniques give at real sizes: transformers of FLUX, Qwen-Image, Wan and HunyuanVideo shape with random weights.

    python benchmarks/sizes.py                                    on a GPU: every shape as people run it
    python benchmarks/sizes.py --shapes wan-14b --depth 8         fewer blocks, seconds scaled to all of them and labelled so
    python benchmarks/sizes.py --device cpu                       narrow networks, few tokens: the code, no figures

Speed only: what random weights yield has no quality. Every arm is a run of a few steps through ComfyUI's own sampler with a
cache whose schedule is written out, so that it computes and skips the same steps everywhere; on CUDA evaluations are timed by
events on the device. A step is the median of the computed evaluations after the first. A whole run is made where it would
take less than --run-limit seconds, and otherwise added up from the measured seconds of computed and skipped steps ("added up").

Arms: dense 16 bit, sparse attention, quantized layers (int8, fp8), both, and each of these under the cache. Beside them: where
the time of a step goes by class of operator (a picture), and the most that each technique can give there (Amdahl). A model that
does not fit is left out with the reason.

Goals on an H200: Wan-14B shape at 720p at least 2.5 times as fast per step with attention and quantization, more than 4 times
over 50 steps with caching; FLUX shape at 1024 x 1024 at least 3 times over 28 steps.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import operators
import size_models
from size_models import ROOT, SHAPES, Shape

#: Steps of the timed runs: first one aside, three computed and two skipped.
MASK = "##.##.#"
#: Whole runs: so many computed steps first, then one of three, the last computed.
WARMUP, EVERY = 4, 3
FORMATS = ("int8", "fp8_rows")
#: Depth of the networks, share of their width on a processor.
SMALL_DEPTH, SMALL_WIDTH = 1, 0.15
GOALS = {"wan-14b": {"step": 2.5, "run": 4.0}, "flux-dev": {"run": 3.0}}


def whole_mask(steps: int) -> str:
    """Return which steps of a whole run are computed."""
    body = ["#" if i < WARMUP or (i - WARMUP + 1) % EVERY == 0 else "." for i in range(steps - 1)]
    return "".join(body) + "#"


def arm(model: Any, shape: Shape, sparse: bool, mask: str, small: bool) -> Any:
    """Return MODEL with the measured clock, and sparse attention and a scheduled cache where wanted."""
    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.plan import Request

    model = host.request(model, Request("measure", {"nonce": 0}))
    if sparse:
        settings = {"method": "Block mass", "keep": shape.keep, "dense_until": 0.0, "min_tokens": 0}
        settings |= {"block": 16} if small else {}
        model = host.request(model, Request("attention", settings))
    if "." in mask:
        settings = {"method": "Schedule", "mask": mask, "warmup": 0, "tail": 0}
        model = host.request(model, Request("cache", settings))
    return model


def sample(model: Any, shape: Shape, steps: int, small: bool) -> dict[str, Any]:
    """Run the sampler once and return the run's trace."""
    import comfy.sample
    import torch

    from stretto.acceleration.hosts.comfy import TRACES

    latent = torch.zeros(1, *(shape.small_latent if small else shape.latent))
    noise = comfy.sample.prepare_noise(latent, 1)
    pair = size_models.conditioning(shape, 3, small), size_models.conditioning(shape, 4, small)
    comfy.sample.sample(model, noise, steps, shape.cfg, "euler", "simple", *pair, latent, disable_pbar=True, seed=1)
    return TRACES.of_prompt(None)[-1]


def seconds_of(trace: dict[str, Any]) -> tuple[float, float | None]:
    """Return the median seconds of computed and of skipped evaluations, the first one aside."""
    timed = trace["evaluations"][1:]
    computed = [entry["seconds"] for entry in timed if entry["decision"] == "computed"]
    skipped = [entry["seconds"] for entry in timed if entry["decision"] != "computed"]
    return statistics.median(computed), statistics.median(skipped) if skipped else None


class BlockClock:
    """Share of a network call that is spent in blocks, by events around each of them."""

    def __init__(self, network: Any, cuda: bool) -> None:
        self.network, self.cuda, self.pairs, self.calls, self.handles = network, cuda, [], [], []

    def __enter__(self) -> "BlockClock":
        from stretto.acceleration.models import describe

        descriptor = describe(self.network)
        blocks = [
            block for _, name in descriptor.block_lists for block in getattr(self.network, name, ())
        ]
        for module, into in [(self.network, self.calls), *((block, self.pairs) for block in blocks)]:
            self.handles.append(module.register_forward_pre_hook(lambda *_, into=into: into.append([self._now(), None])))
            self.handles.append(module.register_forward_hook(lambda *_, into=into: into[-1].__setitem__(1, self._now())))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _now(self) -> Any:
        import torch

        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share(self) -> float:
        """Return the share, once the device is done."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()

        def total(pairs: list) -> float:
            return sum(start.elapsed_time(end) / 1e3 if self.cuda else end - start for start, end in pairs if end is not None)

        return total(self.pairs) / max(total(self.calls), 1e-12)


class Bench:
    """One shape: its model, what was measured, and how it is written down."""

    def __init__(self, shape: Shape, args: argparse.Namespace) -> None:
        self.shape, self.args = shape, args
        self.cuda, self.small = args.device == "cuda", args.device == "cpu"
        self.depth = args.depth or (SMALL_DEPTH if self.small else 0)
        self.width = SMALL_WIDTH if self.small else 1.0
        config = size_models.reduced(shape, self.depth, self.width)
        self.blocks = sum(config[name] for name in shape.depths)
        self.row: dict[str, Any] = {
            "title": shape.title, "blocks": shape.blocks, "blocks_measured": self.blocks, "width": self.width,
            "latent": list(shape.small_latent if self.small else shape.latent), "steps": shape.steps, "cfg": shape.cfg,
            "keep": shape.keep, "arms": {},
        }  # fmt: skip
        self.row["scaled"] = self.blocks < shape.blocks and not self.small

    def scale(self, seconds: float, share: float) -> float:
        """Return seconds of the whole network: those in blocks grow with their number."""
        if not self.row["scaled"]:
            return seconds
        return seconds * (1 - share) + seconds * share * self.shape.blocks / self.blocks

    def measure(self, name: str, model: Any, sparse: bool) -> None:
        """Time an arm without and under the cache."""
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        shape, network = self.shape, model.model.diffusion_model
        accelerated = arm(model, shape, sparse, MASK, self.small)
        sample(accelerated, shape, len(MASK), self.small)  # kernels compile and are chosen
        with BlockClock(network, self.cuda) as clock:
            sample(arm(model, shape, sparse, "#", self.small), shape, 2, self.small)
            share = clock.share()
        rounds = [seconds_of(sample(accelerated, shape, len(MASK), self.small)) for _ in range(self.args.rounds)]
        computed = [self.scale(each[0], share) for each in rounds]
        skipped = statistics.median(each[1] for each in rounds)
        row = {
            "step": statistics.median(computed), "step_spread": [min(computed), max(computed)], "skipped_step": skipped,
            "share_in_blocks": round(share, 4), "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else None,
        }  # fmt: skip
        mask = whole_mask(shape.steps)
        row["run"] = row["step"] * shape.steps
        row["cached_run"] = row["step"] * mask.count("#") + skipped * mask.count(".")
        row["cached_run_computed"] = mask.count("#")
        row["how"] = "added up"
        if not self.row["scaled"] and row["run"] < self.args.run_limit and not self.small:
            row |= self.whole_runs(model, sparse, mask)
        self.row["arms"][name] = row
        plain = self.row["arms"]["dense 16 bit"]
        row["times_step"], row["times_run"] = plain["step"] / row["step"], plain["run"] / row["cached_run"]
        print(
            f"  {name:28s} step {1e3 * row['step']:10.1f} ms  {row['times_step']:5.2f}x   skipped {1e3 * skipped:8.1f} ms   "
            f"{shape.steps} steps, cached {row['cached_run']:8.2f} s  {row['times_run']:5.2f}x ({row['how']})",
            flush=True,
        )

    def whole_runs(self, model: Any, sparse: bool, mask: str) -> dict[str, Any]:
        """Make the runs instead of adding them up."""
        found = {"how": "measured"}
        for name, steps in (("run", "#" * len(mask)), ("cached_run", mask)):
            accelerated = arm(model, self.shape, sparse, steps if "." in steps else "#", self.small)
            trace = sample(accelerated, self.shape, self.shape.steps, self.small)
            found[name] = trace["seconds"]["sampler"]
        return found

    def operators(self, model: Any) -> None:
        """Write down where the time of a dense step goes, of the decoder and of the text encoder."""
        import torch

        plain = arm(model, self.shape, False, "#", self.small)
        step = operators.breakdown(lambda: sample(plain, self.shape, 1, self.small), self.args.device)
        self.row["operators"] = operators.shares(step)
        self.row["parts"] = {}
        for name, build in (("VAE decoder", size_models.decoder), ("text encoder", size_models.text_encoder)):
            if self.cuda and torch.cuda.mem_get_info()[0] < 14e9:
                self.row["parts"][name] = {"absent": "less than 14 GB of memory are free beside the network"}
                continue
            try:
                self.row["parts"][name] = self.part(build)
            except torch.OutOfMemoryError:
                self.row["parts"][name] = {"absent": "out of memory"}
            self.free()

    def part(self, build: Any) -> dict[str, Any]:
        import torch

        call, size = build(self.shape, self.args.device, self.small)
        lead = (1, *size) if len(size) == 2 else size
        given = torch.randn(lead, device=self.args.device, dtype=torch.float32 if self.small else torch.bfloat16)
        with torch.no_grad():
            if build is size_models.decoder and self.shape.decoder == "wan" and self.cuda:
                given = given[:, :, :3]  # time by frame: the decoder goes through a clip in pieces
            call(given)
            self.wait()
            started = time.perf_counter()
            call(given)
            self.wait()
            seconds = time.perf_counter() - started
            shares = operators.shares(operators.breakdown(lambda: call(given), self.args.device, False))
        frames = size[2] if len(size) == 5 else 1
        scaled = frames / given.shape[2] if given.ndim == 5 else 1.0
        return {"seconds": seconds * scaled, "scaled": scaled != 1.0, "operators": shares}

    def wait(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def limits(self) -> None:
        """Write down what each technique can give at most, of a step and of a whole generation."""
        share, plain = self.row["operators"], self.row["arms"]["dense 16 bit"]
        parts = [part.get("seconds", 0.0) for part in self.row["parts"].values()]
        sampling = plain["run"] / (plain["run"] + sum(parts))
        mask = whole_mask(self.shape.steps)
        skipped = 1 - plain["skipped_step"] / plain["step"]
        lines = {
            "sparse attention": share[operators.ATTENTION],
            "quantized layers": share[operators.LINEAR],
            "both": share[operators.ATTENTION] + share[operators.LINEAR],
            "cache at this schedule": skipped * mask.count(".") / len(mask),
        }
        self.row["at_most"] = {
            name: {
                "share_of_step": round(value, 4), "run": _finite(operators.at_most(value)),
                "generation": _finite(operators.at_most(value * sampling)),
                "run_if_twice_as_fast": round(operators.at_most(value, 2.0), 3),
            }
            for name, value in lines.items()
        }  # fmt: skip
        print("  at most: " + ", ".join(f"{name} {row['run']}x" for name, row in self.row["at_most"].items()), flush=True)

    def run(self) -> dict[str, Any]:
        """Measure every arm; a model that does not fit is left out with the reason."""
        import torch

        print(f"{self.shape.title}: {self.blocks} of {self.shape.blocks} blocks", flush=True)
        try:
            self._arms()
        except torch.OutOfMemoryError as error:
            self.row["left_out"] = f"out of memory: {str(error).splitlines()[0]}"
            print(f"  {self.row['left_out']}; try --depth", flush=True)
        self.free()
        return self.row

    def _arms(self) -> None:
        model = size_models.build(self.shape, self.args.device, self.depth, self.width)
        self.measure("dense 16 bit", model, False)
        self.measure("sparse attention", model, True)
        self.operators(model)
        self.limits()
        for form in FORMATS:
            if form != FORMATS[0]:
                del model
                self.free()
                model = size_models.build(self.shape, self.args.device, self.depth, self.width)
            reason = _why_not(form, self.args.device)
            if reason:
                self.row["arms"][form] = {"absent": reason}
                print(f"  {form}: {reason}", flush=True)
                continue
            self.row["quantized_layers"] = size_models.quantize(model, form)
            self.free()
            self.measure(form, model, False)
            self.measure(f"{form}, sparse attention", model, True)
        goals = {}
        for kind, factor in GOALS.get(self.shape.name, {}).items():
            best = max(row.get(f"times_{kind}", 0.0) for row in self.row["arms"].values())
            goals[kind] = {"goal": factor, "best": best, "reached": bool(best >= factor) if self.cuda else None}
        self.row["goals"] = goals


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def _why_not(form: str, device: str) -> str:
    """Return why a format's product cannot run here, "" where it does."""
    import torch

    from stretto.kernels import quantized_linear

    if form != "fp8_rows":
        return ""
    x = torch.zeros(32, 32, device=device)
    return quantized_linear.why_not_fp8(x, x.to(torch.float8_e4m3fn)) or ""


def picture_rows(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the bars of the picture: every transformer, then each kind of decoder and text encoder once."""
    few = ", few tokens" if result["reduced"] else ""
    rows = {
        SHAPES[name].title.partition(",")[0] + few if few else SHAPES[name].title: row["operators"]
        for name, row in result["shapes"].items()
        if "operators" in row
    }
    for name, row in result["shapes"].items():
        for part, found in row.get("parts", {}).items():
            if "operators" in found:
                kind = f" ({'clips' if SHAPES[name].decoder == 'wan' else 'pictures'})" if part == "VAE decoder" else ""
                rows[part + kind] = found["operators"]
    return rows


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    import torch

    found = {
        "device": device, "processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__,
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def main() -> None:
    """Measure, print, draw, and write JSON after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--depth", type=int, default=0, help="at most so many blocks of each kind; 0 for all")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs per arm")
    parser.add_argument("--run-limit", type=float, default=40.0, help="longest whole run that is made, in seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sizes.json")
    args = parser.parse_args()
    import torch

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here")
    size_models.prepare(args.comfyui.resolve(), args.device)
    if args.device == "cpu":
        print("No CUDA device is there, or none is wanted: narrow networks of few blocks, which show the code and not its speed.")
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    same = before.get("machine") == machine(args.device)
    result: dict[str, Any] = {"machine": machine(args.device), "mask": MASK, "shapes": before.get("shapes", {}) if same else {}}
    result["reduced"] = args.device == "cpu"
    with torch.no_grad():
        for name in args.shapes:
            result["shapes"][name] = Bench(SHAPES[name], args).run()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = picture_rows(result)
    if rows:
        title = "Where the time of a dense step goes" + (": narrow networks on a processor" if result["reduced"] else "")
        try:
            operators.draw(rows, args.out.with_suffix(".png"), title)
        except ImportError:
            print("matplotlib is not installed: no picture was drawn")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
