"""Quantized formats on the demo image model: size, quality, time; mixed precision against uniform; products; the writer's speed.

    python benchmarks/quantization.py [--comfyui .comfyui] [--prompts 8] [--steps 20] [--parts quality products writer]
    python benchmarks/quantization.py --parts products          on a GPU: the table of products at FLUX's and Wan's shapes

Pictures are compared with those of the 16-bit file, same seed, decoded by the demo autoencoder: PSNR over all pictures, and
that of the worst one. Ten random low-rank changes stand for LoRAs, in both modes, against the same changes of the 16-bit model.
Seconds are of one sampling run with one thread, processor time, so that other work on the machine does not count.

Products are whole linear layers, quantizing the activation included, against the same in bf16.

Goals: int8 (W8A8) at least 35 dB, w6a8 28, w4a8 20; mixed precision better than uniform at equal bytes; the writer at least
100 MB/s on two cores in less than 1 GB; on a GPU products at least 1.45 times as fast as bf16.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from quantization_peers import peers

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
SOURCE = MODELS / "diffusion_models" / "stretto-demo-image.safetensors"
GOALS = {"int8": 35.0, "w6a8": 28.0, "w4a8": 20.0}
FORMATS = ("int8", "fp8", "fp8_rows", "w6a8", "w4a8", "w4a16")
PARTS = ("quality", "products", "writer")
GUIDANCE, SEED, RANK, LORA_SCALE = 5.0, 7, 4, 0.02
#: (rows, input, output channels): FLUX at 1024 x 1024, Wan 14B at 480p and 720p, a text encoder.
GPU_SHAPES = (
    (4608, 3072, 12288), (4608, 3072, 9216), (32760, 5120, 5120), (32760, 5120, 13824), (75600, 5120, 5120), (512, 4096, 10240),
)  # fmt: skip
CPU_SHAPES = ((256, 1536, 1536), (1024, 1024, 4096), (1024, 3072, 3072))
#: Runs that sensitivities are measured on; none of these prompts is compared.
CALIBRATION_STEPS = 10
CALIBRATION = (
    "fluent teapot",
    "noto kimono",
    "flat school on blue",
    "fluent wheelchair symbol",
    "flat person walking",
    "noto red apple",
)


def prepare(comfyui: Path) -> None:
    """Make ComfyUI and the pack importable, with one thread."""
    sys.path.insert(0, str(ROOT))
    from load_pack import load_pack

    sys.path.remove(str(ROOT))
    load_pack()
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    torch.set_num_threads(1)


class Studio:
    """The demo model's prompts, sampler and autoencoder."""

    def __init__(self, prompts: list[str], steps: int) -> None:
        import comfy.sd
        import comfy.utils

        from stretto.demo.text_encoder import load

        self.prompts, self.steps = prompts, steps
        self.encoder = load(MODELS / "text_encoders" / "stretto-demo-text.safetensors")
        self.vae = comfy.sd.VAE(
            sd=comfy.utils.load_torch_file(str(MODELS / "vae" / "stretto-demo-image-vae.safetensors"))
        )

    def encode(self, texts: list[str]):
        states, pooled, _ = self.encoder.encode(texts)
        return [[states, {"pooled_output": pooled}]]

    def job(self, model, text: str, seed: int):
        import torch

        from stretto.acceleration.hosts.comfy_sampling import SamplingJob

        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        return SamplingJob(
            model, self.encode([text]), self.encode([""]), latent, seed, self.steps, GUIDANCE, "euler", "simple"
        )

    def __call__(self, model):
        """Return pictures [B, H, W, C] and the processor seconds of a run."""
        import torch

        self.job(model, self.prompts[0], SEED)(steps=2, callback=lambda *arguments: None)  # loading does not count
        start = time.process_time()
        latents = [
            self.job(model, text, SEED + i)(callback=lambda *arguments: None) for i, text in enumerate(self.prompts)
        ]
        seconds = (time.process_time() - start) / len(latents)
        return self.vae.decode(torch.cat(latents)).detach(), seconds


def quality(pictures, reference) -> dict[str, float]:
    """PSNR over all pictures and of the worst one, in dB."""
    from stretto.acceleration.quality import psnr

    each = [psnr(picture, right, 1.0) for picture, right in zip(pictures, reference)]
    return {
        "psnr": round(psnr(pictures, reference, 1.0), 2),
        "worst": round(min(each), 2),
        "mean": round(sum(each) / len(each), 2),
    }


def write(target: Path, recipe=None, form: str | None = None) -> int:
    """Write the demo model in a format or by a recipe; return the file's bytes."""
    from stretto.acceleration.quantization.quantizing import plan_file, write_file

    plan = plan_file(SOURCE, recipe, format=form)
    with plan.checkpoint:
        return write_file(plan, target, replace=True, workers=1).nbytes


def load(path: Path, lora: str | None = None):
    """Load a file on the pack's own path."""
    from stretto.acceleration.hosts import comfy_quantization as host

    return host.load_diffusion_model(str(path), loader=host.STRETTO, lora=lora or host.BRANCH)[0]


def with_loras(model):
    """Return a clone with ten random low-rank changes, the same for every model."""
    import comfy.lora
    import comfy.utils
    import torch

    generator, sd, keys = torch.Generator().manual_seed(1), {}, {}
    shapes = {}
    for index in range(3):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            shapes[f"diffusion_model.joint_blocks.{index}.x_block.{part}"] = part
    for name in list(shapes)[:10]:
        layer = comfy.utils.get_attr(model.model, name)
        sd[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, RANK, generator=generator) * LORA_SCALE
        sd[f"{name}.lora_down.weight"] = torch.randn(RANK, layer.in_features, generator=generator) * LORA_SCALE * 4
        sd[f"{name}.alpha"] = torch.tensor(float(RANK))
        keys[name] = f"{name}.weight"
    clone = model.clone()
    clone.add_patches(comfy.lora.load_lora(sd, keys))
    return clone


def sensitivities(studio: Studio, formats: tuple[str, ...]) -> tuple[list, dict]:
    """Measure what every layer in every format does to the end of short runs; return cells and shapes."""
    import comfy.sd
    import comfy.utils
    import torch

    from stretto.acceleration.quantization.checkpoints import open_checkpoint
    from stretto.acceleration.quantization.layouts import fitting
    from stretto.acceleration.quantization.quantizing import plan_file
    from stretto.acceleration.quantization.sensitivity import measure

    model = comfy.sd.load_diffusion_model(str(SOURCE))
    network = model.model.diffusion_model
    plan = plan_file(open_checkpoint(SOURCE))
    shapes = {layer: choice.shape for layer, choice in plan.quantized.items()}
    plan.checkpoint.close()

    def call(index: int) -> torch.Tensor:
        return studio.job(model, CALIBRATION[index], 100 + index)(
            steps=CALIBRATION_STEPS, callback=lambda *arguments: None
        )

    @contextmanager
    def swapped(layer: str, form: str):
        from stretto.acceleration.quantization.arena import LayerState, arena_linear

        module = comfy.utils.get_attr(network, layer)
        layout = fitting(form, *shapes[layer])
        packed = layout.quantize(module.weight.detach().float())
        state, arena, bias = LayerState(layout, shapes[layer]), packed.arena(), module.bias.detach()
        module.forward = lambda x: arena_linear(state, x, arena, bias)
        try:
            yield
        finally:
            del module.forward

    return measure(call, [0.0] * len(CALIBRATION), dict.fromkeys(shapes, formats), swapped, ranges=1), shapes


def mixed(studio: Studio, reference, folder: Path) -> list[dict]:
    """Compare mixed precision with uniform at the bytes of the uniform file."""
    from stretto.acceleration.quantization.architectures import architecture
    from stretto.acceleration.quantization.layouts import fitting
    from stretto.acceleration.quantization.recipes import preset_for
    from stretto.acceleration.quantization.sensitivity import mixed_recipe

    cells, shapes = sensitivities(studio, ("w4a8", "w6a8", "int8"))
    sd3, rows = architecture("sd3"), []
    from stretto.acceleration.quantization.recipes import Recipe

    for uniform in ("w6a8", "w4a8 and w6a8 in turns"):
        if uniform == "w6a8":
            budget = sum(fitting("w6a8", *shape).nbytes(*shape) for shape in shapes.values())
            base = folder / "w6a8.safetensors"
        else:  # half the layers, as they come, in 4 bits and half in 6: what a rule of thumb gives
            layers = {layer: ("w4a8" if index % 2 else "w6a8") for index, layer in enumerate(shapes)}
            budget = sum(fitting(form, *shapes[layer]).nbytes(*shapes[layer]) for layer, form in layers.items())
            base = folder / "alternating.safetensors"
            write(base, Recipe(layers=layers))
        for by_group in (False, True):
            recipe = mixed_recipe(preset_for(sd3), sd3, shapes, cells, budget, by_group)
            path = folder / "mixed.safetensors"
            size = write(path, recipe)
            ours, _ = studio(load(path))
            theirs, _ = studio(load(base))
            counts = {form: list(recipe.layers.values()).count(form) for form in ("w4a8", "w6a8", "int8")}
            rows.append({
                "uniform": uniform, "uniform_bytes": base.stat().st_size, "uniform_quality": quality(theirs, reference),
                "by_group": by_group, "mixed_bytes": size, "mixed_quality": quality(ours, reference), "layers": counts,
            })  # fmt: skip
    return rows


def balanced(studio: Studio, reference, folder: Path) -> list[dict]:
    """Compare 4-bit files with and without factors per channel that are folded in (ViDiT-Q); statistics of one other prompt."""
    import comfy.sd

    from stretto.acceleration.hosts.comfy_quantization_statistics import record_statistics
    from stretto.acceleration.quantization.planning import Wishes, plan_wishes
    from stretto.acceleration.quantization.quantizing import write_file

    job = studio.job(comfy.sd.load_diffusion_model(str(SOURCE)), CALIBRATION[0], 100)
    found, rows = record_statistics(job, False, 1), []
    for form in ("int8", "w4a8"):
        plan = plan_wishes(Wishes(SOURCE, format=form, statistics=found, balance=True))
        with plan.checkpoint:
            size = write_file(plan, folder / "balanced.safetensors", replace=True, workers=1).nbytes
        pictures, _ = studio(load(folder / "balanced.safetensors"))
        rows.append({"format": form, "bytes": size, **quality(pictures, reference)})
        print(f"balanced {form}: {rows[-1]}", flush=True)
    return rows


#: Run in a process of its own, whose peak memory is then that of the writer.
WRITE = """
import json, sys, time
def peak():  # resource's own figure starts at that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import torch
torch.set_num_threads(1)
from stretto.acceleration.quantization.quantizing import plan_file, write_file
from stretto.acceleration.quantization.recipes import Recipe, Rule
before = peak()
plan = plan_file({source!r}, Recipe(rules=(Rule("layer", {form!r}),)))
wall, processor = time.perf_counter(), time.process_time()
with plan.checkpoint:
    write_file(plan, {target!r}, replace=True, workers=2)
wall, processor = time.perf_counter() - wall, time.process_time() - processor
print(json.dumps([plan.checkpoint.nbytes / 1e6, wall, processor,
                  (peak() - before) / 1024]))
"""
MEMORY_LIMIT = 1024


def writer_speed(folder: Path) -> list[dict]:
    """Quantize 2 GB of random bf16 weights: MB/s by the clock and of processor time, MB of memory beyond the interpreter's."""
    import torch

    from stretto.acceleration.quantization.writer import Spec, StreamWriter

    path, side, layers = folder / "big.safetensors", 8192, 15
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(side // 8, side, generator=generator) * 0.02).bfloat16()
    with StreamWriter(path, [Spec(f"layer{i}.weight", rows.dtype, (side, side)) for i in range(layers)], {}) as writer:
        for i in range(layers):
            for start in range(0, side, rows.shape[0]):
                writer.write(f"layer{i}.weight", rows, start)
    found = []
    for form in ("int8", "fp8", "w6a8", "w4a8"):
        code = WRITE.format(root=str(ROOT), source=str(path), target=str(folder / "out.safetensors"), form=form)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        size, wall, processor, memory = json.loads(done.stdout)
        if memory > MEMORY_LIMIT:
            raise SystemExit(f"writer {form}: {memory:.0f} MB of memory; {MEMORY_LIMIT} are allowed")
        row = {
            "format": form, "source_mb": round(size, 1), "mb_per_s_wall": round(size / wall, 1),
            "mb_per_s_two_cores": round(2 * size / processor, 1), "memory_mb": round(memory, 1),
        }  # fmt: skip
        found.append(row)
        print(
            f"writer {form:6s} {row['mb_per_s_wall']:.0f} MB/s by the clock, {row['mb_per_s_two_cores']:.0f} of two cores' time, "
            f"{memory:.0f} MB of memory",
            flush=True,
        )
    return found


def products(device: str, shapes: tuple[tuple[int, int, int], ...], repeats: int) -> list[dict]:
    """Time whole linear layers, quantizing the activation included: 16 bit, and each format by each product that runs here."""
    import torch

    from stretto.acceleration.quantization.layouts import fitting
    from stretto.kernels import quantized_linear

    cuda, rows = device == "cuda", []

    def seconds(ways: dict) -> dict[str, float]:
        """Interleaved, so that a change of the machine's clock meets all of them; median of the rounds."""
        found = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, way in ways.items():
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter() if cuda else time.process_time()
                way()
                if cuda:
                    torch.cuda.synchronize()
                if turn:
                    found[name].append((time.perf_counter() if cuda else time.process_time()) - start)
        return {name: statistics.median(values) for name, values in found.items()}

    for m, k, n in shapes:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        weight = (torch.randn(n, k, device=device) * 0.02).bfloat16()
        bias = torch.zeros(n, device=device)
        packed = {form: fitting(form, n, k).quantize(weight) for form in ("int8", "w4a8", "fp8_rows")}
        ways = {"16 bit": lambda x=x, w=weight, b=bias: torch.nn.functional.linear(x, w, b.bfloat16())}
        codes = packed["int8"].parts
        for name, way in quantized_linear.int8_ways(
            x, codes["weight"], codes["weight_scale"], bias, packed["int8"].layout.rotation, None, None
        ).items():
            ways[f"int8, {name}"] = way
        grid = packed["w4a8"]
        ways["w4a8, decoded each time"] = lambda g=grid, x=x, b=bias: quantized_linear.int8_linear(
            x, g.layout.int8(g.parts), g.parts["weight_s_channel"], b, g.layout.rotation
        )
        fp8 = packed["fp8_rows"].parts
        if quantized_linear.why_not_fp8(x, fp8["weight"]) is None:
            ways["fp8, torch._scaled_mm"] = lambda p=fp8, x=x, b=bias: quantized_linear.fp8_linear(
                x, p["weight"], p["weight_scale"], b
            )
        with torch.inference_mode():
            others, absent = peers(x, weight, bias)
            ways |= others
            took = seconds(ways)
        row = {"absent": absent, "m": m, "k": k, "n": n, "ms": {name: round(1e3 * value, 3) for name, value in took.items()}}
        row["times_16_bit"] = {name: round(took["16 bit"] / value, 2) for name, value in took.items()}
        rows.append(row)
        print(f"{m} x {k} x {n}: " + ", ".join(
            f"{name} {row['ms'][name]:.2f} ms ({row['times_16_bit'][name]:.2f}x)" for name in took), flush=True)  # fmt: skip
    return rows


def gemm() -> dict:
    """The table of products at the shapes of FLUX, Wan and a text encoder on a GPU; small ones on this processor otherwise."""
    import torch

    result: dict = {"cpu": products("cpu", CPU_SHAPES, 5)}
    if torch.cuda.is_available():
        result["gpu"] = products("cuda", GPU_SHAPES, 20)
        result["gpu_name"] = torch.cuda.get_device_name()
    else:
        result["gpu"], result["skipped"] = [], "torch finds no CUDA device here"
        print("table of products on a GPU: skipped, torch finds no CUDA device here", flush=True)
    return result


def run(prompts: int, steps: int) -> dict:
    """Measure everything; prints as it goes."""
    import comfy.sd
    import comfy.utils

    from stretto.acceleration.hosts import comfy_quantization as host

    comfy.utils.PROGRESS_BAR_ENABLED = False
    words = json.loads((ROOT / "demo" / "heldout_prompts.json").read_text(encoding="utf-8"))
    studio = Studio(words[:: max(len(words) // prompts, 1)][:prompts], steps)
    plain = comfy.sd.load_diffusion_model(str(SOURCE))
    reference, seconds = studio(plain)
    changed, _ = studio(with_loras(plain))
    result = {"model": SOURCE.name, "prompts": studio.prompts, "steps": steps, "load": os.getloadavg(),
              "lora_change": quality(changed, reference), "formats": []}  # fmt: skip
    print(
        f"{'format':10s} {'MB':>7s} {'of 16 bit':>9s} {'PSNR dB':>8s} {'worst':>6s} {'goal':>5s} {'CPU s':>6s}  "
        "LoRAs beside / in the weights, dB"
    )
    print(f"{'16 bit':10s} {SOURCE.stat().st_size / 1e6:7.2f} {'100 %':>9s} {'':8s} {'':6s} {'':5s} {seconds:6.2f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form in FORMATS:
            path = folder / f"{form}.safetensors"
            size = write(path, form=form)
            pictures, took = studio(load(path))
            row = {
                "format": form,
                "bytes": size,
                **quality(pictures, reference),
                "cpu_seconds": round(took, 3),
                "goal": GOALS.get(form),
            }
            for mode in (host.BRANCH, host.REQUANTIZE):
                row["lora " + mode] = (
                    quality(studio(with_loras(load(path, mode)))[0], changed)["psnr"] if form in GOALS else None
                )
            result["formats"].append(row)
            loras = f"{row['lora ' + host.BRANCH]} / {row['lora ' + host.REQUANTIZE]}" if form in GOALS else ""
            print(f"{form:10s} {size / 1e6:7.2f} {size / SOURCE.stat().st_size:9.0%} {row['psnr']:8.2f} {row['worst']:6.2f} "
                  f"{GOALS.get(form, ''):>5} {took:6.2f}  {loras}", flush=True)  # fmt: skip
        result["cpu_seconds_16_bit"] = round(seconds, 3)
        result["mixed"] = mixed(studio, reference, folder)
        for row in result["mixed"]:
            print(f"mixed {row['mixed_bytes'] / 1e6:.2f} MB {row['mixed_quality']} against "
                f"{row['uniform']} {row['uniform_bytes'] / 1e6:.2f} MB "
                  f"{row['uniform_quality']}; {row['layers']}, by group: {row['by_group']}", flush=True)  # fmt: skip
        result["balanced"] = balanced(studio, reference, folder)
    return result


def main() -> None:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantization.json")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; other parts of the file stay"
    )
    args = parser.parse_args()
    prepare(args.comfyui.resolve())
    import torch

    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    result = run(args.prompts, args.steps) if "quality" in args.parts else {}
    if "products" in args.parts:
        result["products"] = gemm()
    if "writer" in args.parts:
        with tempfile.TemporaryDirectory() as name:
            result["writer"] = writer_speed(Path(name))
    result = {**before, **result}
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
