"""What a ``trace@1`` document says, as numbers and strips. Pure functions; :mod:`.summary` and the timeline put them in words
and pictures."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

Trace = dict[str, Any]
MARKS = {"computed": "#", "forecast": "~", "reused": ".", "mixed": "+"}
#: What a user reads for each decision.
WORDS = {"computed": "computed", "forecast": "forecast", "reused": "reused", "mixed": "partly"}
SKIPPED = ("forecast", "reused")
#: Techniques that make computed steps cheaper.
CHEAPER_STEPS = ("attention", "attention_plan", "guidance", "resolution", "region")
BRANCHES = ("cond", "uncond", "other")


def rows(trace: Trace) -> dict[str, list[str | None]]:
    """Return one decision an evaluation for each guidance branch, None where it took no part.

    Where all branches agree there is one row, named ``"all"``. Decisions are those of the trace; ``"mixed"`` also stands
    for a step in which a table had some blocks computed and others reused.
    """
    entries = trace["evaluations"]
    seen = {branch["branch"] for entry in entries for branch in entry["branches"]}
    found = {
        name: [decision_of(entry, name) for entry in entries]
        for name in BRANCHES
        if name in seen
    }
    if len({tuple(row) for row in found.values()}) > 1:
        return found
    return {"all": [decision_of(entry) for entry in entries]}


def decision_of(entry: dict[str, Any], name: str | None = None) -> str | None:
    """Return what became of a branch at one evaluation, None where it took no part; without a name, of all branches."""
    if name is None:
        found = {entry["decision"]}
    else:
        found = {branch["decision"] for branch in entry["branches"] if branch["branch"] == name}
    if len(found) == 1 and found != {"computed"} and entry.get("computed_share"):
        return "mixed"  # a table had some blocks computed
    return None if not found else found.pop() if len(found) == 1 else "mixed"


def strip(row: Iterable[str | None]) -> str:
    """Return a row as text: ``#`` computed, ``~`` forecast, ``.`` reused, ``+`` partly, a blank where nothing was asked."""
    return "".join(" " if decision is None else MARKS[decision] for decision in row)


def counts(trace: Trace) -> dict[str, int]:
    """Return how many evaluations were computed, forecast, reused and ``"mixed"``, as :func:`rows` tells them."""
    found = Counter(decision_of(entry) for entry in trace["evaluations"])
    return {decision: found[decision] for decision in MARKS}


def steps_of(trace: Trace) -> int:
    """Return the number of sampler steps."""
    return max(len(trace["sigmas"]) - 1, 0)


def skipped_of(trace: Trace) -> int:
    """Return the number of evaluations that were forecast or reused."""
    return sum(trace["totals"][decision] for decision in SKIPPED)


def plain_run(trace: Trace, others: Iterable[Trace]) -> Trace | None:
    """Return the last of ``others`` that did the same work as ``trace`` without skipping any of it, or None.

    The same work: model, sampler, latent shape, number of steps and guidance scale. Seeds and prompts may differ.
    """
    wanted, found = _work(trace), None
    for other in others:
        if other is not trace and _is_plain(other) and _work(other) == wanted:
            found = other
    return found


def speed_up(trace: Trace, plain: Trace) -> float:
    """Return the measured speed-up: seconds in the sampler of ``plain`` over those of ``trace``."""
    return plain["seconds"]["sampler"] / max(trace["seconds"]["sampler"], 1e-9)


@dataclass(frozen=True)
class Compared:
    """What a policy saw at one evaluation.

    Attributes:
        place: number of the evaluation in the trace.
        value: what was held against the threshold.
        threshold: what it had to stay below.
        free: whether that decided; otherwise the evaluation stood on rails.
        skipped: whether the evaluation was skipped.
    """

    place: int
    value: float
    threshold: float
    free: bool
    skipped: bool


def comparisons(trace: Trace) -> list[Compared]:
    """Return what was compared with a threshold, in the order of evaluations; nothing for schedules known beforehand."""
    return [
        Compared(
            place,
            entry["compared"],
            entry["threshold"],
            not entry.get("on_rails", False),
            entry["decision"] in SKIPPED,
        )
        for place, entry in enumerate(trace["evaluations"])
        if entry.get("compared") is not None and entry.get("threshold") is not None
    ]


def mebibytes(size: int) -> str:
    """Return bytes as a person reads them: three digits, in MiB."""
    value = size / 2**20
    return f"{value:.0f} MiB" if value >= 100 else f"{value:.3g} MiB"


def _work(trace: Trace) -> tuple:
    return (
        tuple(sorted(trace["model"].items())),
        trace["sampler"]["name"],
        tuple(trace["latent_shape"]),
        len(trace["sigmas"]),
        trace.get("cfg"),
    )


def _is_plain(trace: Trace) -> bool:
    totals = trace["totals"]
    idle = all(item["technique"] == "measure" or item["status"] == "off" for item in trace["techniques"])
    return idle and trace["outcome"] == "completed" and 0 < totals["evaluations"] == totals["computed"]


def kept_by_layer(attention: dict[str, Any]) -> dict[int, float]:
    """Return the mean share of key blocks that the heads of each layer kept, of a trace's ``attention``."""
    return {item["layer"]: math.fsum(item["kept"]) / len(item["kept"]) for item in attention["layers"]}


def sizes(trace: Trace) -> list[float] | None:
    """Return the image tokens of each evaluation over those of the largest; None where all have as many."""
    tokens = [max((branch["tokens"] for branch in entry["branches"]), default=0) for entry in trace["evaluations"]]
    largest = max(tokens, default=0)
    if not trace.get("resolution") or not largest or min(tokens) == largest:
        return None
    return [count / largest for count in tokens]


def run_level(trace: Trace, entry: dict[str, Any]) -> float:
    """Return the run's noise level at an evaluation; a smaller stage has levels of its own, which stand for it."""
    levels, position = trace["sigmas"], entry["position"]
    if not trace.get("resolution") or len(levels) < 2:
        return entry["sigma"]
    step = min(int(position), len(levels) - 2)
    return levels[step] + (position - step) * (levels[step + 1] - levels[step])


def saves_work(trace: Trace) -> bool:
    """Whether a technique other than caching made steps cheaper: its gain is measured, not predicted from skipped steps."""
    return any(item["technique"] in CHEAPER_STEPS and item["status"] != "off" for item in trace["techniques"])


def sparse_share(trace: Trace) -> float | None:
    """Return the mean share of key blocks that sparse attention kept; None where none was sparse."""
    layers = (trace.get("attention") or {}).get("layers")
    if not layers:
        return None
    kept = kept_by_layer(trace["attention"])
    return math.fsum(kept.values()) / len(kept)


def worst_layers(trace: Trace) -> list[tuple[int, float]]:
    """Return (layer, error) of every layer that was compared with full attention, worst first.

    The error is the root mean square, over heads and steps, of the relative L2 distance.
    """
    squares: dict[int, list[float]] = {}
    for sample in (trace.get("attention") or {}).get("samples", ()):
        squares.setdefault(sample["layer"], []).extend(error**2 for error in sample["relative_l2"])
    errors = ((layer, math.sqrt(math.fsum(found) / len(found))) for layer, found in squares.items())
    return sorted(errors, key=lambda item: -item[1])


def sparse_seconds(trace: Trace) -> tuple[float, float] | None:
    """Return the median seconds of a computed evaluation with full and with sparse attention; None without both.

    The first evaluation is left out: it also pays for warm-up.
    """
    computed = [entry for entry in trace["evaluations"][1:] if entry["decision"] == "computed" and entry["seconds"] is not None]
    pair = [
        [entry["seconds"] for entry in computed if (entry.get("attention_kept") is None) == full] for full in (True, False)
    ]
    return (median(pair[0]), median(pair[1])) if all(pair) else None
