"""The performance lab: which benchmarks there are, how they are run together, and the page made of what they wrote."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: What the last run of everything wrote, in the reduced settings that fit an hour.
USUAL_RESULTS = RESULTS / "lab"
