"""The README's numbers for the demo video model: Taylor and EasyCache at their defaults, and fewer steps.

Needs a running ComfyUI with this pack, and the panel's environment; starts nothing itself:

    python benchmarks/demo_video.py --server http://127.0.0.1:8188

Scores are per frame (mean and worst) and for the changes from frame to frame, on frames without compression. Prints a
table, writes the report to report/benchmark/ and its numbers to benchmarks/results/.
"""

import sys

from demo_comparison import ROOT, Benchmark, main

BENCHMARK = Benchmark(
    name="demo_video",
    description=__doc__.partition("\n")[0],
    workflows=("demo-video-taylor", "demo-video-easycache"),
    prompts=ROOT / "demo" / "heldout_video_prompts.json",
    count=30,
    batches=(1,),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
