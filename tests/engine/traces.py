"""Hand-made traces."""

KINDS = {"#": "computed", "~": "forecast", ".": "reused"}


def make_trace(strip, *, uncond=None, cost=0.1, blocks=0, cfg=5.0, techniques=(), settings=None, seed=1, **changes):
    """Return a trace@1 in which a computed evaluation takes 1 s and a skipped one ``cost`` seconds.

    Args:
        strip: what became of the conditional branch at each evaluation: ``#``, ``~`` or ``.``.
        uncond: the same of the other branch, None for the same.
        cost: seconds of a skipped evaluation.
        blocks: how many of the 4 blocks ran when skipped.
        techniques: (technique, status) or (technique, status, store_bytes, budget_bytes).
        settings: of the cache request in the plan, None for a plan without one.
        changes: fields of the document.
    """
    entries = [_entry(i, pair, cost, blocks, len(strip)) for i, pair in enumerate(zip(strip, uncond or strip))]
    found = [entry["decision"] for entry in entries]
    seconds = sum(entry["seconds"] for entry in entries)
    requests = [] if settings is None else [{"technique": "cache", "settings": settings}]
    return {
        "schema": "trace@1",
        "outcome": "completed",
        "model": {"family": "wan", "network": "WanModel", "blocks": 4, "dtype": "float32", "device": "cpu"},
        "sampler": {"name": "euler", "single_call": True, "multistep": False, "stochastic": False, "known": True},
        "latent_shape": [1, 16, 3, 6, 4],
        "sigmas": [1 - i / len(strip) for i in range(len(strip) + 1)],
        "cfg": cfg,
        "seed": seed,
        "plan": {"schema": "plan@1", "requests": requests},
        "techniques": [_technique(*item) for item in techniques],
        "notes": [],
        "evaluations": entries,
        "totals": {
            "evaluations": len(strip),
            **{kind: found.count(kind) for kind in ("computed", "forecast", "reused", "mixed")},
        },
        "seconds": {"sampler": seconds, "evaluations": seconds, "overhead": 0.0},
        "memory": {"kind": "rss", "peak_bytes": 1 << 30, "store_peak_bytes": 0},
        **changes,
    }


def compare(trace, values, thresholds, rails=()):
    """Put what a policy compared into the entries of ``trace``; None where nothing was known."""
    for place, (entry, value) in enumerate(zip(trace["evaluations"], values)):
        limit = thresholds[place] if isinstance(thresholds, list) else thresholds
        entry |= {"signal": value, "compared": value, "threshold": limit, "on_rails": place in rails}
    return trace


def _entry(index, pair, cost, blocks, steps):
    decisions = [KINDS[mark] for mark in pair]
    skipped = "computed" not in decisions
    return {
        "index": index,
        "position": float(index),
        "sigma": 1 - index / steps,
        "decision": decisions[0] if len(set(decisions)) == 1 else "mixed",
        "reason": "",
        "seconds": cost if skipped else 1.0,
        "branches": [
            {
                "branch": name,
                "decision": decision,
                "blocks_computed": 4 if decision == "computed" else blocks,
                "blocks_total": 4,
                "tokens": 18,
            }
            for name, decision in zip(("cond", "uncond"), decisions)
        ],
    }


def _technique(name, status, store_bytes=0, budget_bytes=0):
    memory = {"store_bytes": store_bytes, "budget_bytes": budget_bytes} if store_bytes else {}
    return {"technique": name, "status": status, "reason": "because", **memory}
