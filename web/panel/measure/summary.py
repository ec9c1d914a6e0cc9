"""From single measurements to one row per arm: times, ratios, calls, quality, memory, ceiling and verdict."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from .arms import Arm, get_steps
from .interleave import Measurement
from .metrics import Spread, from_json_number, paired_ratios, quality, spread
from .perceptual import METRICS
from .scores import PictureScores

SMALLEST_EFFECT = 0.02  # a ratio closer to 1 than this is never called a difference
FEWEST_ROUNDS = 3  # fewer rounds give no verdict
T_99 = {3: 9.925, 4: 5.841, 5: 4.604}  # Student's t by number of rounds, two-sided 99 %
BASELINES = {"plain": "baseline", "reference": "reference"}  # roles that are not judged
SKIPPED = ("forecast", "reused")


def verdict_of(ratios: Sequence[float]) -> str:
    """Ratios (plain seconds / arm seconds, one per round) in words.

    From six rounds on the 95 % interval of their median decides. Fewer have none: that all of three stand on one side of 1 is
    chance in a quarter of all cases, so there the mean of the logarithms must also differ from 0 in a t test at 99 %.
    """
    interval = spread(ratios)
    if interval is None:
        return "not measured"
    if interval.count < FEWEST_ROUNDS:
        return "too few rounds for a verdict"
    if interval.low <= 1.0 <= interval.high or abs(interval.median - 1.0) < SMALLEST_EFFECT:
        return "no measurable difference"
    if interval.count in T_99:
        logs = [math.log(ratio) for ratio in ratios]
        if abs(mean(logs)) <= T_99[interval.count] * stdev(logs) / math.sqrt(len(logs)):
            return "too few rounds for a verdict"
    return "faster" if interval.median > 1.0 else "slower"


def by_arm(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The counted runs of each arm in order of rounds; when a round was measured twice the later run wins."""
    latest = {(m.arm, m.round): m for m in measurements if not m.warmup}
    grouped: dict[str, list[Measurement]] = defaultdict(list)
    for (arm, _), measurement in sorted(latest.items(), key=lambda item: item[0][1]):
        grouped[arm].append(measurement)
    return dict(grouped)


def arm_row(
    arm: Arm, runs: Sequence[Measurement], plain: Sequence[Measurement], scores: Iterable[PictureScores]
) -> dict[str, Any]:
    """The report's entry of one arm; `plain` are the plain arm's runs, `scores` the arm's picture scores per cell."""
    traces = [trace for run in runs for trace in run.traces or []]
    sampler = spread([run.sampler_seconds for run in runs if run.sampler_seconds is not None])
    total = spread([run.seconds for run in runs])
    plain = [] if arm.role in BASELINES else plain
    ratios = {"sampler": _ratios(runs, plain, "sampler_seconds"), "total": _ratios(runs, plain, "seconds")}
    row: dict[str, Any] = {
        "name": arm.name,
        "label": arm.label,
        "role": arm.role,
        "steps": get_steps(arm.workflow),
        "runs": len(runs),
        "seconds": {"sampler": _json(sampler), "total": _json(total)},
        "ratio": {key: _json(spread(values)) for key, values in ratios.items()},
        "verdict": BASELINES.get(arm.role) or verdict_of(ratios["sampler"] or ratios["total"]),
        "calls": _calls(runs),
        "ceiling": _ceiling(runs),
        "quality": _quality(list(scores)),
        "memory": _memory(traces),
        "techniques": _techniques(traces),
        "reasons": _reasons(traces),
        "notes": list(dict.fromkeys(note for trace in traces for note in trace.get("notes", []))),
        "traces": (runs[0].traces or []) if runs else [],
        "workflow": arm.workflow,
    }
    row["likeness"] = likeness_of(row["quality"])
    row["notes"] += _repeatability(arm, runs)
    return row


def _json(value: Spread | None) -> dict[str, Any] | None:
    return value.to_json() if value else None


def _ratios(runs: Sequence[Measurement], plain: Sequence[Measurement], field: str) -> list[float]:
    """plain / arm over the rounds that have both."""
    baseline = {run.round: getattr(run, field) for run in plain}
    pairs = [
        (baseline[run.round], getattr(run, field))
        for run in runs
        if baseline.get(run.round) is not None and getattr(run, field) is not None
    ]
    return paired_ratios([first for first, _ in pairs], [second for _, second in pairs])


def _calls(runs: Sequence[Measurement]) -> dict[str, Any] | None:
    """Median model evaluations of a run by decision, and the extremes of the computed ones."""
    counted = [Counter() for run in runs if run.traces]
    for counts, run in zip(counted, (run for run in runs if run.traces), strict=True):
        for trace in run.traces or []:
            counts.update({key: trace["totals"].get(key, 0) for key in ("evaluations", "computed", *SKIPPED)})
    if not counted:
        return None
    calls: dict[str, Any] = {
        key: median(counts[key] for counts in counted) for key in ("evaluations", "computed", *SKIPPED)
    }
    calls["skipped"] = median(counts["evaluations"] - counts["computed"] for counts in counted)
    calls["computed_range"] = [
        min(counts["computed"] for counts in counted),
        max(counts["computed"] for counts in counted),
    ]
    return calls


def _ceiling(runs: Sequence[Measurement]) -> dict[str, Any] | None:
    """The speed-up if nothing but the model cost time: evaluations / (computed + share * skipped).

    `share` is the median time of an evaluation that was skipped (or, separately, only partly computed) over the
    median time of one that was computed. None where nothing was skipped.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    per_run = []
    for run in runs:
        kinds = [_kind(evaluation) for trace in run.traces or [] for evaluation in trace["evaluations"]]
        per_run.append(Counter(kinds))
        for trace in run.traces or []:
            for evaluation in trace["evaluations"]:
                if evaluation.get("seconds") is not None:
                    seconds[_kind(evaluation)].append(evaluation["seconds"])
    if not seconds["computed"] or not (seconds["skipped"] or seconds["mixed"]):
        return None
    whole = median(seconds["computed"])
    share = {
        kind: (median(seconds[kind]) / whole if seconds[kind] and whole > 0 else 0.0) for kind in ("skipped", "mixed")
    }
    ceilings = [
        sum(kinds.values())
        / (kinds["computed"] + share["skipped"] * kinds["skipped"] + share["mixed"] * kinds["mixed"])
        for kinds in per_run
        if kinds["computed"]
    ]
    return {"ratio": median(ceilings), "share_of_skipped": share["skipped"]}


def _kind(evaluation: Mapping[str, Any]) -> str:
    decision = evaluation["decision"]
    return "skipped" if decision in SKIPPED else str(decision)


def _quality(scores: Sequence[PictureScores]) -> dict[str, Any]:
    """Every metric to the plain arm, and PSNR to the reference with many steps, over all pictures or frames; None: no values.

    `change_psnr` is over clips: the PSNR of their frame-to-frame changes to the plain arm's.
    """

    def gather(key: str) -> list[float]:
        return [from_json_number(value) for cell in scores for value in cell.get(key, [])]

    summaries = {name: quality(gather(name), metric.perfect, metric.lower_is_better) for name, metric in METRICS.items()}
    for name in ("reference_psnr", "change_psnr"):
        summaries[name] = quality(gather(name), math.inf)
    return {key: value.to_json() if value else None for key, value in summaries.items()}


def likeness_of(quality: Mapping[str, Any]) -> str | None:
    """Whether an arm's pictures are those of the plain arm, in words; None where nothing tells."""
    psnr = quality["psnr"]
    if psnr is None:
        return None
    if psnr["identical"] == psnr["count"]:
        return "identical"
    return f"{psnr['identical']} of {psnr['count']} identical" if psnr["identical"] else "different"


def _memory(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Highest peaks in bytes over all runs."""
    memories = [trace["memory"] for trace in traces if trace.get("memory")]
    if not memories:
        return None
    return {
        "kind": memories[0].get("kind", ""),
        "peak_bytes": max(m.get("peak_bytes", 0) for m in memories),
        "store_peak_bytes": max(m.get("store_peak_bytes", 0) for m in memories),
    }


def _techniques(traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every distinct resolution of a technique and in how many sampler runs it was so."""
    seen = Counter(
        (entry["technique"], entry["status"], entry.get("reason", ""))
        for trace in traces
        for entry in trace.get("techniques", [])
    )
    return [
        {"technique": technique, "status": status, "reason": reason, "runs": count}
        for (technique, status, reason), count in seen.items()
    ]


def _reasons(traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Why evaluations were computed or skipped, counted over all runs, most frequent first."""
    seen = Counter(
        (evaluation["decision"], evaluation.get("reason", ""))
        for trace in traces
        for evaluation in trace["evaluations"]
    )
    return [
        {"decision": decision, "reason": reason, "evaluations": count}
        for (decision, reason), count in seen.most_common()
    ]


def _repeatability(arm: Arm, runs: Sequence[Measurement]) -> list[str]:
    """A note when one seed gave two different pictures or clips: every other number is in doubt then."""
    hashes: dict[int, set[str]] = defaultdict(set)
    for run in runs:
        if run.pixels:
            hashes[run.cell].add(run.pixels)
    unstable = sum(len(found) > 1 for found in hashes.values())
    if not unstable:
        return []
    things = "clips" if any(run.frames > 1 for run in runs) else "pictures"
    return [f"{arm.label}: repeats with one seed gave different {things} for {unstable} of {len(hashes)} prompts."]
