"""A run as a page shows it: figures, strips and words of a ``trace@1``, without what no page draws."""

from typing import Any

from ...acceleration.advice import advice
from ...acceleration.figures import counts, rows, run_level, speed_up, steps_of
from ...acceleration.savings import expected, savings
from .plan_facts import FACTOR_OF

SCHEMA = "run-digest@1"


def digest(trace: dict[str, Any], plain: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``run-digest@1`` of a trace, JSON.

    Args:
        trace: a ``trace@1`` document.
        plain: a plain run of the same work, None where none is known: then nothing was measured.
    """
    entries, factors = trace["evaluations"], savings(trace)
    return {
        "schema": SCHEMA,
        "prompt_id": trace.get("prompt_id"),
        "sampler_node": trace.get("sampler_node"),
        "outcome": trace["outcome"],
        "model": trace["model"]["family"] or trace["model"]["network"],
        "sampler": trace["sampler"]["name"],
        "steps": steps_of(trace),
        "seconds": trace["seconds"]["sampler"],
        "plain_seconds": None if plain is None else plain["seconds"]["sampler"],
        "predicted": expected(trace),
        "measured": None if plain is None else speed_up(trace, plain),
        "counts": counts(trace),
        "rows": rows(trace),
        "step_seconds": [entry["seconds"] for entry in entries],
        "levels": [run_level(trace, entry) for entry in entries],
        "reasons": [entry["reason"] or "" for entry in entries],
        "techniques": [
            {
                "technique": item["technique"],
                "status": item["status"],
                "reason": item["reason"],
                "factor": factors.get(FACTOR_OF.get(item["technique"], "")),
            }
            for item in trace["techniques"]
        ],
        "advice": advice(trace),
    }
