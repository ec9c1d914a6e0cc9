"""The README's numbers for the demo image model: Taylor and EasyCache at their defaults, and fewer steps, batch 1 and 8.

Needs a running ComfyUI with this pack, and the panel's environment; starts nothing itself:

    python benchmarks/demo_image.py --server http://127.0.0.1:8188

Prints a table per batch size, writes the reports to report/benchmark/ and their numbers to benchmarks/results/.
"""

import sys

from demo_comparison import ROOT, Benchmark, main

BENCHMARK = Benchmark(
    name="demo_image",
    description=__doc__.partition("\n")[0],
    workflows=("demo-image-taylor", "demo-image-easycache"),
    prompts=ROOT / "demo" / "heldout_prompts.json",
    count=16,
    batches=(1, 8),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
