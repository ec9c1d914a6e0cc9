"""What a run computed, as data: steps x branches x blocks x tokens x seconds (``trace@1``)."""

import math
from collections.abc import Callable
from typing import Any

from .evaluation import Call, Evaluation

SCHEMA = "trace@1"


class TraceBuilder:
    """Collects the decisions of one run on the CPU, cheaply, and writes them as ``trace@1``."""

    def __init__(self, header: dict[str, Any]) -> None:
        """``header`` holds the facts known before the first evaluation (model, sampler, plan, ...)."""
        self.header = header
        self.evaluations: list[dict[str, Any]] = []
        self._seconds: list[Callable[[], float]] = []

    def open(self, evaluation: Evaluation) -> None:
        """Begin the entry of ``evaluation``."""
        self.evaluations.append(
            {
                "index": evaluation.index,
                "position": evaluation.position,
                "sigma": evaluation.sigma,
                "decision": "computed",
                "reason": evaluation.reason,
                "signal": None,
                "compared": None,
                "threshold": None,
                "on_rails": False,
                "computed_share": None,
                "attention_kept": None,
                "active_share": None,
                "seconds": None,
                "branches": [],
            }
        )

    def add(self, call: Call, blocks_total: int) -> None:
        """Add the branches of one network call to the open entry."""
        entry = self.evaluations[-1]
        if call.evaluation.skip and "computed" in call.decisions:
            entry["reason"] = "nothing usable is stored yet"
        for branch, decision in zip(call.branches, call.decisions, strict=True):
            entry["branches"].append(
                {
                    "branch": branch.name,
                    "decision": decision,
                    "blocks_computed": blocks_total if decision == "computed" else call.blocks_computed,
                    "blocks_total": blocks_total,
                    "tokens": call.tokens,
                }
            )

    def close(self, evaluation: Evaluation, seconds: Callable[[], float]) -> None:
        """End the open entry. ``seconds`` is read when the document is made, not now."""
        entry = self.evaluations[-1]
        entry["reason"] = entry["reason"] or evaluation.reason  # known late where a probe decides
        for name in ("signal", "compared", "threshold", "on_rails", "computed_share", "attention_kept", "active_share"):
            entry[name] = getattr(evaluation, name)
        decisions = {branch["decision"] for branch in entry["branches"]} or {"computed"}
        entry["decision"] = decisions.pop() if len(decisions) == 1 else "mixed"
        self._seconds.append(seconds)

    def document(self, outcome: str, sampler_seconds: float, overhead: float, memory: dict) -> dict[str, Any]:
        """Return the finished ``trace@1`` document. Reads the clocks, so call it after the run."""
        for entry, seconds in zip(self.evaluations, self._seconds, strict=False):
            entry["seconds"] = seconds()
        for entry in self.evaluations:
            if entry["attention_kept"] is not None:
                entry["attention_kept"] = float(entry["attention_kept"])
        timed = [entry["seconds"] for entry in self.evaluations if entry["seconds"] is not None]
        count = dict.fromkeys(("computed", "forecast", "reused", "mixed"), 0)
        for entry in self.evaluations:
            count[entry["decision"]] += 1
        return {
            "schema": SCHEMA,
            **self.header,
            "outcome": outcome,
            "evaluations": self.evaluations,
            "totals": {"evaluations": len(self.evaluations), **count},
            "seconds": {
                "sampler": sampler_seconds,
                "evaluations": math.fsum(timed),
                "overhead": overhead,
            },
            "memory": memory,
        }
