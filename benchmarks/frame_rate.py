"""Dynamic frame rate: what a schedule costs, what a video loses, what a sampler gains.

    .venv/bin/python benchmarks/frame_rate.py [--parts schedule roundtrip sampler quality] [--clips .cache/demo]
                     [--mixed 8] [--uniform 4] [--sides 128 192] [--prompts 4] [--threads 1] [--out FILE]
                     [--picture docs/frame-rate.webp]

schedule: 81 frames of 832 x 480, from frames to rates. roundtrip: held-out clips of 65 frames through the demo video VAE,
mixed (calm, wild, calm parts of different clips) and uniform (one clip to and fro), at 60 % of the latents: the schedule
that was fitted, even rates with equally many latents, and features pooled inside the VAE; PSNR and SSIM to the clip.
sampler: the demo video model at sizes it was not trained for, for the time alone, 10 Euler steps without guidance, the
first at full length; plain and dynamic runs take turns. quality: 33 frames at 64 px, PSNR of the decoded video to the plain
run of 20 steps, beside the same sampler with fewer steps.

picture (only with --picture): the second mixed clip beside its round trips, with the strip of rates below.

Seconds are of processor time, one thread: a busy machine disturbs the clock. Prints tables and writes
benchmarks/results/frame-rate.json; parts that were not asked for stay in the file.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from overhead import ROOT, prepare

RESULTS = ROOT / "benchmarks" / "results" / "frame-rate.json"
PARTS = ("schedule", "roundtrip", "sampler", "quality")
KEEP, FRAMES = 0.6, 65


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clips", type=Path, default=ROOT / ".cache" / "demo", help="where demo/clips.py keeps its clips")
    parser.add_argument("--mixed", type=int, default=8)
    parser.add_argument("--uniform", type=int, default=4, help="clips of the calm and of the wild third each")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 192], help="pixels, multiples of 16")
    parser.add_argument("--pairs", type=int, default=2, help="plain and dynamic runs of each size")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="draw this animation, and do nothing else")
    arguments = parser.parse_args()
    prepare(arguments.comfyui)
    import comfy.utils
    import torch

    torch.set_num_threads(arguments.threads)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    if arguments.picture:
        with torch.inference_mode():
            draw_picture(arguments)
        return 0
    document = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    document |= {"keep": KEEP, "threads": arguments.threads, "torch": torch.__version__}
    work = {"schedule": schedule_part, "roundtrip": roundtrip_part, "sampler": sampler_part, "quality": quality_part}
    for name in arguments.parts:
        started = time.perf_counter()
        with torch.inference_mode():
            document[name] = work[name](arguments)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def schedule_part(arguments: argparse.Namespace) -> dict:
    """Time a schedule for 81 frames at 480p."""
    import torch

    from stretto.acceleration.frame_rate.fitting import fit_ratio
    from stretto.acceleration.frame_rate.similarity import loss_of

    frames = torch.rand(81, 480, 832, 3)
    seconds = []
    for _ in range(6):
        started = time.process_time()
        fit_ratio(loss_of(frames), KEEP)
        seconds.append(time.process_time() - started)
    found = {"frames": 81, "size": [832, 480], "seconds": spread(seconds[1:])}
    print(f"schedule of 81 frames at 832 x 480: {found['seconds']['median']:.2f} s", flush=True)
    return found


def roundtrip_part(arguments: argparse.Namespace) -> dict:
    """Measure what held-out clips lose at 60 % of the latents."""
    from stretto.acceleration.frame_rate.fitting import fit_ratio, uniform_rates
    from stretto.acceleration.frame_rate.schedule import FEATURES, FLOW, FrameRateSchedule
    from stretto.acceleration.frame_rate.similarity import loss_of
    from stretto.acceleration.hosts.comfy_video_vae import DynamicRateVAE

    vae, rows = video_vae(), []
    for kind, name, clip in clips_of(arguments):
        loss = loss_of(clip)
        rates = fit_ratio(loss, KEEP)
        even = uniform_rates(loss.latents, len(rates))
        arms = {
            "full": FrameRateSchedule.full(FRAMES),
            "uniform": FrameRateSchedule(FRAMES, even),
            "dynamic": FrameRateSchedule(FRAMES, rates),
            "dynamic, motion": FrameRateSchedule(FRAMES, rates, restore=FLOW),
            "dynamic, features": FrameRateSchedule(FRAMES, rates, coding=FEATURES),
        }
        row = {"kind": kind, "clip": name, "rates": list(rates), "latents": 1 + len(rates), "psnr": {}, "ssim": {}}
        latents = None
        for arm, schedule in arms.items():
            dynamic = DynamicRateVAE(vae, schedule)
            if arm != "dynamic, motion":  # which decodes the same latents as the arm before it
                latents = dynamic.encode(clip)
            row["psnr"][arm], row["ssim"][arm] = closeness(dynamic.decode(latents)[0], clip)
        rows.append(row)
        print(f"{kind:6} {name:40}", "  ".join(f"{arm} {value:.2f}" for arm, value in row["psnr"].items()), flush=True)
    table = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [row for row in rows if row["kind"] == kind]
        table[kind] = {
            measure: {arm: statistics.mean(row[measure][arm] for row in chosen) for arm in chosen[0][measure]}
            for measure in ("psnr", "ssim")
        } | {
            "clips": len(chosen),
            "worst_against_uniform": min(row["psnr"]["dynamic"] - row["psnr"]["uniform"] for row in chosen),
        }
        print(kind, json.dumps(table[kind]), flush=True)
    return {"frames": FRAMES, "kinds": table, "clips": rows}


def draw_picture(arguments: argparse.Namespace) -> None:
    """Save an animation: a clip, its round trip at even rates and at its schedule's, and where its latents go."""
    import numpy as np
    from PIL import Image, ImageDraw

    from stretto.acceleration.frame_rate.fitting import fit_ratio, uniform_rates
    from stretto.acceleration.frame_rate.schedule import FrameRateSchedule
    from stretto.acceleration.frame_rate.similarity import loss_of
    from stretto.acceleration.hosts.comfy_video_vae import DynamicRateVAE

    side, gap, strip, label = 144, 12, 18, 16
    colours = {1: "#56B4E9", 2: "#E69F00", 4: "#009E73"}
    arguments.mixed, arguments.uniform = 2, 0
    (_, _, clip) = list(clips_of(arguments))[1]
    loss, vae = loss_of(clip), video_vae()
    rates = fit_ratio(loss, KEEP)
    shown = [("original, 17 latent frames", FrameRateSchedule.full(FRAMES), clip)]
    for words, chosen in (("even rates", uniform_rates(loss.latents, len(rates))), ("its own schedule", rates)):
        schedule = FrameRateSchedule(FRAMES, chosen)
        dynamic = DynamicRateVAE(vae, schedule)
        video = dynamic.decode(dynamic.encode(clip))[0]
        quality = closeness(video, clip)[0]
        shown.append((f"{words}, {schedule.latents}: {quality:.1f} dB", schedule, video))
    frames = []
    for t in range(FRAMES):
        sheet = Image.new("RGB", (len(shown) * (side + gap) + gap, side + strip + label + 3 * gap), "#FAFAFA")
        canvas = ImageDraw.Draw(sheet)
        for i, (words, schedule, video) in enumerate(shown):
            left, top = gap + i * (side + gap), gap
            canvas.text((left, top - 6), words, fill="#3C3C3C")
            pixels = (video[t].clamp(0, 1) * 255).round().byte().numpy().astype(np.uint8)
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (left, top + label))
            below, cuts = top + label + side + gap, schedule.legal_cuts()
            for first, end, rate in zip(cuts[:-1], cuts[1:], (1, *schedule.rates), strict=True):
                box = (left + side * first / FRAMES, below, left + side * end / FRAMES - 1, below + strip)
                canvas.rectangle(box, fill=colours[rate])
            canvas.line([(left + side * (t + 0.5) / FRAMES, below - 4), (left + side * (t + 0.5) / FRAMES, below + strip + 4)],
                        fill="#000000", width=2)  # fmt: skip
        frames.append(sheet)
    frames[0].save(arguments.picture, save_all=True, append_images=frames[1:], duration=125, loop=0, quality=80, method=6)
    print(f"{arguments.picture}: {arguments.picture.stat().st_size / 1024:.0f} KB", flush=True)


def sampler_part(arguments: argparse.Namespace) -> dict:
    """Time plain and dynamic runs of growing sizes."""
    import torch

    from stretto.acceleration.frame_rate.schedule import schedule_of_latent
    from stretto.acceleration.hosts.comfy_frame_rate import DynamicSettings, sample_dynamic

    model, vae, encode = video_model(), video_vae(), text_encoder()
    latents, found = 1 + (FRAMES - 1) // 4, []
    for side in arguments.sides:
        shape = (1, 16, latents, side // 8, side // 8)
        job = job_of(model, encode, "fluent blue heart", torch.zeros(shape), 10, 1.0)
        plain, sampler, total, parts = [], [], [], {}
        for _ in range(arguments.pairs):
            started = time.process_time()
            job()
            plain.append(time.process_time() - started)
            latent, seconds = sample_dynamic(job, vae, DynamicSettings(KEEP, after=0.1), time.process_time)
            sampler.append(seconds["first"] + seconds["second"])
            total.append(sum(seconds.values()))
            parts = seconds
        schedule = schedule_of_latent(latent)
        tokens = latents * (side // 16) ** 2
        row = {
            "side": side, "tokens": tokens, "kept": schedule.ratio, "plain": spread(plain), "sampler": spread(sampler),
            "total": spread(total), "parts": parts,
            "sampler_speedup": statistics.median(a / b for a, b in zip(plain, sampler, strict=True)),
            "total_speedup": statistics.median(a / b for a, b in zip(plain, total, strict=True)),
        }  # fmt: skip
        found.append(row)
        print(
            f"{side} px, {tokens} tokens, {schedule.ratio:.0%} kept: plain {row['plain']['median']:.1f} s, in the sampler "
            f"{row['sampler_speedup']:.2f}x, with the middle {row['total_speedup']:.2f}x",
            flush=True,
        )
    return {"frames": FRAMES, "steps": 10, "at_full_length": 1, "sizes": found}


def quality_part(arguments: argparse.Namespace) -> dict:
    """Compare dynamic runs with the plain run, beside fewer steps."""
    import torch

    from stretto.acceleration.frame_rate.schedule import schedule_of_latent
    from stretto.acceleration.hosts.comfy_frame_rate import DynamicSettings, sample_dynamic
    from stretto.acceleration.hosts.comfy_video_vae import DynamicRateVAE

    model, vae, encode = video_model(), video_vae(), text_encoder()
    prompts = json.loads((ROOT / "demo" / "heldout_video_prompts.json").read_text(encoding="utf-8"))[: arguments.prompts]
    arms = {
        "near positions": DynamicSettings(KEEP, layers=[]),
        "original positions": DynamicSettings(KEEP, layers=list(range(8))),
        "original positions, as published": DynamicSettings(KEEP, layers=list(range(8)), fresh=True),
    }
    rows = []
    for prompt in prompts:
        job = job_of(model, encode, prompt, torch.zeros(1, 16, 9, 8, 8), 20, 5.0)
        plain = vae.decode(job())[0]
        row = {"prompt": prompt, "13 steps": closeness(vae.decode(job(steps=13))[0], plain)[0]}
        for arm, settings in arms.items():
            latent, _ = sample_dynamic(job, vae, settings)
            row[arm] = closeness(DynamicRateVAE(vae, schedule_of_latent(latent)).decode(latent["samples"])[0], plain)[0]
        rows.append(row)
        print(" ".join(f"{name} {value:.1f}" if isinstance(value, float) else value for name, value in row.items()), flush=True)
    means = {arm: statistics.mean(row[arm] for row in rows) for arm in rows[0] if arm != "prompt"}
    print(json.dumps(means), flush=True)
    return {"frames": 33, "steps": 20, "cfg": 5.0, "psnr_to_plain": means, "prompts": rows}


def clips_of(arguments: argparse.Namespace):
    """Yield (kind, name, frames [65, 64, 64, 3]) of held-out clips on white."""
    import numpy as np
    import torch

    from stretto.demo.clips import prepare as prepare_clips

    clips = prepare_clips(arguments.clips, 64, lambda words: print(words, flush=True))
    held = sorted(np.nonzero(clips.held_out)[0], key=lambda clip: clips.motion[clip])

    def window(clip: int, count: int) -> torch.Tensor:
        pixels = clips.window(clip, 0, count).astype(np.float32) / 255
        return torch.from_numpy(pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:])

    calm, wild = held[: len(held) // 3], held[-(len(held) // 3) :]
    for i in range(arguments.mixed):
        parts = calm[i % len(calm)], wild[i % len(wild)], calm[(i + 3) % len(calm)]
        name = " + ".join(clips.name[part] for part in parts)
        yield "mixed", name, torch.cat([window(parts[0], 25), window(parts[1], 16), window(parts[2], 24)])
    for kind, group in (("calm", calm), ("wild", wild)):
        for i in range(min(arguments.uniform, len(group))):
            clip = group[i * len(group) // arguments.uniform]
            yield kind, clips.name[clip], window(clip, FRAMES)


def video_vae():
    """Return the demo video VAE."""
    import comfy.sd
    import comfy.utils

    path = ROOT / "demo" / "models" / "vae" / "stretto-demo-video-vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def video_model():
    """Return the demo video MODEL."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(
        str(ROOT / "demo" / "models" / "diffusion_models" / "stretto-demo-video.safetensors")
    )


def text_encoder():
    """Return a function from a text to CONDITIONING of the video model's width."""
    import torch

    from stretto.demo.text_encoder import load

    encoder = load(ROOT / "demo" / "models" / "text_encoders" / "stretto-demo-text.safetensors")

    def encode(text: str) -> list:
        states, pooled, _ = encoder.encode([text])
        return [[torch.nn.functional.pad(states, (0, 4096 - states.shape[-1])), {"pooled_output": pooled}]]

    return encode


def job_of(model, encode, prompt: str, samples, steps: int, cfg: float):
    """Return a sampling job of the demo video model."""
    from stretto.acceleration.hosts.comfy_sampling import SamplingJob

    return SamplingJob(model, encode(prompt), encode(""), {"samples": samples}, 7, steps, cfg, "euler", "simple")


def closeness(video, reference) -> tuple[float, float]:
    """Return PSNR and SSIM of a video [T, H, W, 3] to another."""
    from stretto.acceleration.quality import psnr, ssim

    return psnr(video, reference, 1.0), ssim(video, reference)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    sys.exit(main())
