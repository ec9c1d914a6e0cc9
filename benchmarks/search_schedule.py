"""Find masks and forecast weights for the demo models, by real runs: the material of the "Fitted" presets.

    .venv/bin/python benchmarks/search_schedule.py image --steps 28 --computed 16 14 12 10 --minutes 3
    .venv/bin/python benchmarks/search_schedule.py video --steps 20 28 50

For each number of computed steps: the best mask that one plain run predicts (acceleration/caching/fit_search.py), then
hill climbing by real runs, each of which fits its weights as it goes (fitting.py). A run samples eight captions of
*training* names at once, with a seed that no benchmark uses; what counts is the mean and the worst PSNR of the latents to
the plain run, half each. benchmarks/caching.py then measures the result on held-out prompts. Prints every improvement and
writes benchmarks/results/fitted-<model>.json. What the file holds already is where a search goes on; step counts and
numbers of computed steps that are not asked for stay as they are there.
"""

import argparse
import json
import random
import time
from pathlib import Path

from caching import MODELS, RESULTS, Bench
from overhead import ROOT, prepare

CAPTIONS, SEED, CFG = 8, 5000, 5.0
#: How far a computed step moves at once, and the gain in dB that counts, when runs are real.
REACH, BETTER = 2, 0.03
#: Shares of the steps that are computed, when none are named: those of 16, 14, 12 and 10 of 28.
SHARES = (16 / 28, 14 / 28, 12 / 28, 10 / 28)
#: Names of training pictures and clips, of every kind of subject.
TRAINING_NAMES = (
    "red apple", "rocket", "tiger face", "crying face", "red heart", "hamburger", "globe showing americas", "locomotive",
    "winking face", "sunflower", "frog", "trophy",
)  # fmt: skip


def captions(which: str) -> list[str]:
    """Captions of training names: words of the vocabulary, none held out."""
    held = {
        p.split(" ", 1)[1] for p in json.loads((ROOT / "demo" / MODELS[which]["prompts"]).read_text(encoding="utf-8"))
    }
    return [f"fluent {name}" for name in TRAINING_NAMES if name not in held][:CAPTIONS]


class Search:
    """Fitted runs of one model at one number of steps, remembered by mask."""

    def __init__(self, bench: Bench, which: str, steps: int):
        import comfy.samplers
        import torch

        from stretto.acceleration.caching.fitting import PlainSampler

        self.bench, self.steps, self.seen = bench, steps, {}
        rows = [bench.conditioning(text) for text in captions(which)]
        self.pair = [_stack(rows), _stack([bench.conditioning("")] * len(rows))]
        self.empty = torch.zeros(len(rows), *bench.spec["latent"][1:])
        model = bench.model
        self.sigmas = comfy.samplers.KSampler(model, steps, model.load_device, "euler", "simple").sigmas
        plain = PlainSampler()
        self._sample(plain)
        self.states = plain.states

    def _sample(self, function):
        import comfy.sample
        import comfy.samplers
        import torch

        noise = comfy.sample.prepare_noise(self.empty, SEED)
        sampler, model = comfy.samplers.KSAMPLER(function), self.bench.model
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, CFG, sampler, self.sigmas, *self.pair, self.empty, disable_pbar=True, seed=SEED
            )

    def prediction(self):
        """What the plain run, and a few fitted ones, predict of every mask."""
        from stretto.acceleration.caching.fit_search import FitPrediction

        return FitPrediction.of(self.states, self.sigmas.tolist()).suited(lambda mask: self.run(mask)[0])

    def run(self, mask):
        """Fit a mask: the balanced PSNR of the latents, in dB, and the weights."""
        from stretto.acceleration.caching.fit_search import balanced_decibels
        from stretto.acceleration.caching.fitting import FittedWeights, FittingSampler

        if mask not in self.seen:
            sampler = FittingSampler(mask, self.states)
            final = []
            self._sample(lambda *args, **kwargs: final.append(sampler(*args, **kwargs)) or final[0])
            plain = self.states[-1]
            errors = (final[0] - plain).square().flatten(1).mean(1) / plain.square().mean()
            fitted = FittedWeights(mask, sampler.weights, tuple(self.sigmas.tolist()))
            self.seen[mask] = balanced_decibels(errors.tolist()), fitted
        return self.seen[mask]

    def climb(self, mask, until: float):
        """Move single computed steps, in random order, while that helps and time is left."""
        from stretto.acceleration.caching.fit_search import moves
        from stretto.acceleration.caching.masks import strip

        rng, improved = random.Random(sum(mask)), True
        while improved and time.monotonic() < until:
            improved, trials = False, moves(mask, REACH)
            rng.shuffle(trials)
            for trial in trials:
                if time.monotonic() > until:
                    break
                if self.run(trial)[0] > self.run(mask)[0] + BETTER:
                    mask, improved = trial, True
                    print(f"  {strip(mask)}  {self.run(mask)[0]:.2f} dB", flush=True)
                    break
        return mask


def _stack(rows: list) -> list:
    import torch

    states = torch.cat([row[0][0] for row in rows])
    return [[states, {"pooled_output": torch.cat([row[0][1]["pooled_output"] for row in rows])}]]


def find(search: Search, computed: int, minutes: float, before: str | None) -> dict:
    """The best mask found in the time, with its weights, as JSON values; ``before`` is what an earlier search found."""
    from stretto.acceleration.caching.masks import parse_mask, strip

    start = search.prediction().best_mask(computed)
    print(f"{computed} of {search.steps}: {strip(start)}  {search.run(start)[0]:.2f} dB, predicted best", flush=True)
    starts = [start, parse_mask(before)] if before else [start]
    mask = search.climb(max(starts, key=lambda mask: search.run(mask)[0]), time.monotonic() + 60 * minutes)
    quality, fitted = search.run(mask)
    print(f"{computed} of {search.steps}: {strip(mask)}  {quality:.2f} dB", flush=True)
    return {
        **fitted.to_settings(),
        "quality": quality,
        "predicted": strip(start),
        "predicted_quality": search.run(start)[0],
    }


def main() -> None:
    """Search, print, write after every mask: a search that is stopped loses nothing found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, nargs="+", default=[28])
    parser.add_argument("--computed", type=int, nargs="+", help="default: 57, 50, 43 and 36 % of the steps")
    parser.add_argument("--minutes", type=float, default=2.0, help="of climbing per mask")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    args = parser.parse_args()
    prepare(args.comfyui)
    bench, path = Bench(args.model), RESULTS / f"fitted-{args.model}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else {}
    for steps in args.steps:
        search, rows = Search(bench, args.model, steps), found.setdefault(str(steps), {})
        for computed in args.computed or [round(steps * share) for share in SHARES]:
            before = rows.get(str(computed), {}).get("mask")
            rows[str(computed)] = find(search, computed, args.minutes, before)
            about = {"model": args.model, "captions": captions(args.model), "seed": SEED, "cfg": CFG}
            path.write_text(json.dumps({**about, "steps": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
