"""Quantized formats on the demo image model: size, quality and time, mixed precision against uniform, and the writer's speed.

    python benchmarks/quantization.py [--comfyui .comfyui] [--prompts 8] [--steps 20] [--out benchmarks/results/quantization.json]

Pictures are compared with those of the 16-bit file, same seed, decoded by the demo autoencoder: PSNR over all pictures, and
that of the worst one. Ten random low-rank changes stand for LoRAs, in both modes, against the same changes of the 16-bit model.
Seconds are of one sampling run with one thread, processor time, so that other work on the machine does not count.

Goals: int8 (W8A8) at least 35 dB, w6a8 28, w4a8 20; mixed precision better than uniform at equal bytes; the writer at least
100 MB/s on two cores.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
SOURCE = MODELS / "diffusion_models" / "stretto-demo-image.safetensors"
GOALS = {"int8": 35.0, "w6a8": 28.0, "w4a8": 20.0}
FORMATS = ("int8", "fp8", "fp8_rows", "w6a8", "w4a8", "w4a16")
GUIDANCE, SEED, RANK, LORA_SCALE = 5.0, 7, 4, 0.02
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


def writer_speed(folder: Path) -> list[dict]:
    """Quantize 256 MB of random bf16 weights; MB/s of processor time and of the clock."""
    import torch
    from safetensors.torch import save_file

    from stretto.acceleration.quantization.quantizing import plan_file, write_file
    from stretto.acceleration.quantization.recipes import Recipe, Rule

    generator = torch.Generator().manual_seed(0)
    path = folder / "big.safetensors"
    save_file(
        {f"layer{i}.weight": (torch.randn(4096, 4096, generator=generator) * 0.02).bfloat16() for i in range(8)}, path
    )
    rows = []
    for form in ("int8", "fp8", "w6a8", "w4a8"):
        plan = plan_file(path, Recipe(rules=(Rule("layer", form),)))
        wall, processor = time.perf_counter(), time.process_time()
        with plan.checkpoint:
            write_file(plan, folder / "out.safetensors", replace=True, workers=2)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        size = path.stat().st_size / 1e6
        rows.append(
            {
                "format": form,
                "mb_per_s_wall": round(size / wall, 1),
                "mb_per_s_two_cores": round(2 * size / processor, 1),
            }
        )
    return rows


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
        result["writer"] = writer_speed(folder)
        for row in result["writer"]:
            print(
                f"writer {row['format']:6s} {row['mb_per_s_two_cores']:.0f} MB/s of two cores' time, "
                f"{row['mb_per_s_wall']:.0f} by the clock"
            )
    return result


def main() -> None:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantization.json")
    args = parser.parse_args()
    prepare(args.comfyui.resolve())
    result = run(args.prompts, args.steps)
    import torch

    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
