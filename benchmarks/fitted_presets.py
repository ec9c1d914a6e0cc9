"""Write the demo models' "Fitted" presets from what search_schedule.py found and caching.py measured.

    .venv/bin/python benchmarks/fitted_presets.py

One file per model and number of steps in presets/caching: quality, balanced and fast are the masks of 57, 50 and 43 % of
the steps. A mask that caching.py has not measured on held-out prompts is left out.
"""

import json

from caching import RESULTS
from overhead import ROOT
from search_schedule import CFG, SHARES

FAMILIES = {"image": ("sd3", "stretto-demo-image"), "video": ("wan", "stretto-demo-video")}
LEVELS = dict(zip(("quality", "balanced", "fast"), SHARES, strict=False))
FOLDER = ROOT / "presets" / "caching"


def preset(which: str, steps: int, found: dict, measured: dict) -> dict | None:
    """The preset of a model at a number of steps as JSON values; None where nothing of it was measured."""
    family, variant = FAMILIES[which]
    levels, figures = {}, {}
    for level, share in LEVELS.items():
        computed = str(round(steps * share))
        row = measured.get(f"Fitted, {computed} of {steps}")
        if row is None or computed not in found:
            continue
        levels[level] = {name: found[computed][name] for name in ("mask", "weights", "sigmas")}
        figures[level] = {
            "calls": round(row["calls"], 1),
            "psnr_mean_db": round(row["psnr_mean"], 1),
            "psnr_worst_db": round(row["psnr_worst"], 1),
        }
    if not levels:
        return None
    about = {"benchmark": "benchmarks/caching.py", "sampler": f"euler, {steps} steps, CFG {CFG:g}", "levels": figures}
    return {
        "schema": "preset@1",
        "technique": "cache",
        "family": family,
        "variant": variant,
        "method": "Fitted",
        "settings": {"warmup": 0, "tail": 0},
        "levels": levels,
        "steps": [steps, steps],
        "data": {},
        "provenance": {
            "source": "Stretto, benchmarks/search_schedule.py",
            "kind": "measured",
            "measured": {**about, "prompts": len(next(iter(measured.values()))["per_prompt"])},
        },
    }


def main() -> None:
    """Write what there is."""
    for which, (family, _) in FAMILIES.items():
        found = json.loads((RESULTS / f"fitted-{which}.json").read_text(encoding="utf-8"))["steps"]
        measured = json.loads((RESULTS / f"caching-{which}.json").read_text(encoding="utf-8"))
        for steps, rows in found.items():
            document = preset(which, int(steps), rows, measured.get(f"{steps} steps", {}))
            if document is not None:
                path = FOLDER / f"fitted-{family}-demo-{steps}.json"
                path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
                print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
