"""Search the compute masks behind the measured presets, by real runs on the demo models.

    .venv/bin/python benchmarks/search_schedule.py image --computed 16 14 12 10 --minutes 5
    .venv/bin/python benchmarks/search_schedule.py video

For each number of computed steps: starts from the best of the even masks with several warm-ups and tails and of several
dampings of the line, then moves one computed step at a time as long as that helps (hill climbing). A run samples eight
captions of *training* names at once, with seeds that no benchmark uses; what counts is the mean and the worst PSNR of
the latents to the plain run, half each. benchmarks/caching.py then measures the masks on held-out prompts. Prints one
line per improvement and writes benchmarks/results/schedules-<model>.json.
"""

import argparse
import json
import random
import time
from pathlib import Path

from caching import MODELS, RESULTS, Bench
from overhead import ROOT, prepare

CAPTIONS, SEED, FIRST, LAST = 8, 5000, 2, 1
DAMPINGS = (1.0, 0.8, 0.6, 0.4)


def captions(which: str) -> list[str]:
    """Captions of training names, drawn with a seed: words of the vocabulary, none held out."""
    held = {
        p.split(" ", 1)[1] for p in json.loads((ROOT / "demo" / MODELS[which]["prompts"]).read_text(encoding="utf-8"))
    }
    names = [n for n in TRAINING_NAMES if n not in held]
    return [f"fluent {n}" for n in names[:CAPTIONS]]


#: Names of training pictures and clips, of every kind of subject.
TRAINING_NAMES = (
    "red apple", "rocket", "tiger face", "crying face", "red heart", "hamburger", "globe showing americas", "locomotive",
    "winking face", "sunflower", "frog", "trophy",
)  # fmt: skip


class Search:
    """Quality of a mask, remembered."""

    def __init__(self, bench: Bench, which: str, steps: int):
        import torch

        self.bench, self.steps, self.seen = bench, steps, {}
        rows = [bench.conditioning(text) for text in captions(which)]
        empty = bench.conditioning("")
        self.pair = [_stack(rows), _stack([empty] * len(rows))]
        self.empty = torch.zeros(len(rows), *bench.spec["latent"][1:])
        self.plain = self._sample(None)

    def _sample(self, mask: str | None, damping: float = 1.0):
        import comfy.sample
        import torch

        from stretto.acceleration.hosts import comfy as host
        from stretto.acceleration.plan import Request

        model = self.bench.model
        if mask:
            settings = {"method": "Schedule", "mask": mask, "order": 1, "damping": damping, "warmup": 0, "tail": 0}
            model = host.request(model, Request("cache", settings))
        noise = comfy.sample.prepare_noise(self.empty, SEED)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, self.steps, 5.0, "euler", "simple", *self.pair, self.empty, disable_pbar=True, seed=SEED
            )

    def quality(self, mask: str, damping: float = 1.0) -> float:
        """Half the mean and half the worst PSNR of the latents over the captions, in dB."""
        if (mask, damping) not in self.seen:
            error = (self._sample(mask, damping) - self.plain).square().flatten(1).mean(1)
            spread = self.plain.square().mean()
            values = (-10 * (error / spread).clamp(min=1e-12).log10()).tolist()
            self.seen[mask, damping] = 0.5 * sum(values) / len(values) + 0.5 * min(values)
        return self.seen[mask, damping]


def _stack(rows: list) -> list:
    import torch

    states = torch.cat([row[0][0] for row in rows])
    return [[states, {"pooled_output": torch.cat([row[0][1]["pooled_output"] for row in rows])}]]


def even_masks(steps: int, computed: int):
    """Masks with a warm-up, a tail and evenly spread steps between, of exactly ``computed`` computed steps."""
    for warmup in range(FIRST, min(7, computed)):
        for tail in range(LAST, min(8, computed - warmup)):
            middle, room = computed - warmup - tail, steps - warmup - tail
            spots = {warmup + round((i + 1) * room / (middle + 1)) - 1 for i in range(middle)}
            mask = [i < warmup or i >= steps - tail or i in spots for i in range(steps)]
            if sum(mask) == computed:
                yield "".join("#" if m else "." for m in mask)


def climb(search: Search, mask: str, damping: float, until: float, rng: random.Random) -> str:
    """Move single computed steps while that helps and time is left."""
    best = search.quality(mask, damping)
    improved = True
    while improved and time.monotonic() < until:
        improved = False
        moves = [(i, j) for i in range(FIRST, len(mask) - LAST) for j in range(FIRST, len(mask) - LAST)]
        moves = [(i, j) for i, j in moves if mask[i] == "#" and mask[j] == "." and abs(i - j) <= 4]
        rng.shuffle(moves)
        for i, j in moves:
            if time.monotonic() > until:
                break
            moved = list(mask)
            moved[i], moved[j] = ".", "#"
            trial = "".join(moved)
            if search.quality(trial, damping) > best + 0.02:
                mask, best, improved = trial, search.quality(trial, damping), True
                print(f"  {mask}  {best:.2f} dB", flush=True)
                break
    return mask


def main() -> None:
    """Search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--computed", type=int, nargs="+", default=[16, 14, 12, 10])
    parser.add_argument("--minutes", type=float, default=2.0, help="time per number of computed steps")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    args = parser.parse_args()
    prepare(args.comfyui)
    search, found = Search(Bench(args.model), args.model, args.steps), {}
    for computed in args.computed:
        until = time.monotonic() + 60 * args.minutes
        start = max(even_masks(args.steps, computed), key=search.quality)
        damping = max(DAMPINGS, key=lambda d: search.quality(start, d))
        print(f"{computed} computed: {start}  {search.quality(start):.2f} dB, the best even mask", flush=True)
        mask = climb(search, start, damping, until, random.Random(computed))
        damping = max(DAMPINGS, key=lambda d: search.quality(mask, d))
        found[computed] = {
            "mask": mask,
            "damping": damping,
            "quality": search.quality(mask, damping),
            "even": start,
            "even_quality": search.quality(start),
        }
        print(f"{computed} computed: {mask}  damping {damping:g}  {search.quality(mask, damping):.2f} dB", flush=True)
    document = {
        "model": args.model,
        "steps": args.steps,
        "captions": captions(args.model),
        "seed": SEED,
        "masks": found,
    }
    path = RESULTS / f"schedules-{args.model}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
