"""What each technique of a run saves, counted from its ``trace@1``: factors whose product is the predicted speed-up."""

import math
from collections.abc import Callable

from .facts import OFF
from .figures import SKIPPED, Trace
from .resolution.settings import CORRECTED

Entry = dict
#: What a factor is called, in the order in which techniques act.
RESOLUTION, GUIDANCE, CACHING = "resolution", "guidance", "caching"


def savings(trace: Trace) -> dict[str, float]:
    """Return the factor by which each technique makes the run shorter, those that save something only.

    Work is rows x image tokens that go through the network. Fewer tokens are counted first, then rows left out of what is
    left, then evaluations skipped of what is left then: so the product of all is the plain run's work over this one's. What
    a skipped evaluation costs is taken from the run's own seconds. Sparse attention is not counted: what it saves depends on
    the share of attention in a step.
    """
    entries = [entry for entry in trace["evaluations"] if entry["branches"]]
    if not entries:
        return {}
    share = share_of_skipped(trace)
    full = max(branch["tokens"] for entry in entries for branch in entry["branches"])
    staged, saving = _active(trace, RESOLUTION), _active(trace, GUIDANCE)
    both = max((len(entry["branches"]) for entry in entries if not _alone(entry)), default=None)
    plain = small = asked = done = 0.0
    for place, entry in enumerate(entries):
        rows = len(entry["branches"])
        wanted = min(2 * rows, both or 2 * rows) if saving and _alone(entry) else rows
        size = _tokens(entry) / full if staged and full else 1.0
        plain += 0.0 if place and _measures(trace, entries[place - 1], entry) else wanted
        small += wanted * size
        asked += rows * size
        done += rows * size * (share if entry["decision"] in SKIPPED and share is not None else 1.0)
    factors = {RESOLUTION: plain / small, GUIDANCE: small / asked, CACHING: asked / max(done, 1e-9)}
    return {name: factor for name, factor in factors.items() if abs(factor - 1.0) > 1e-9}


def expected(trace: Trace) -> float | None:
    """Return the predicted speed-up of all techniques together; None where nothing is saved or it cannot be told."""
    factors = savings(trace)
    return math.prod(factors.values()) if factors else None


def share_of_skipped(trace: Trace) -> float | None:
    """Return seconds of a skipped evaluation over those of a computed one for the same work; None where none was skipped.

    The first evaluation is left out: it also pays for warm-up.
    """
    timed = [entry for entry in trace["evaluations"][1:] if entry["seconds"] is not None]
    skipped = _seconds_per_token(timed, lambda decision: decision in SKIPPED)
    computed = _seconds_per_token(timed, lambda decision: decision == "computed")
    return skipped / computed if skipped is not None and computed else None


def _seconds_per_token(entries: list[Entry], wanted: Callable[[str], bool]) -> float | None:
    found = [entry for entry in entries if wanted(entry["decision"])]
    work = sum(branch["tokens"] for entry in found for branch in entry["branches"]) or len(found)
    return math.fsum(entry["seconds"] for entry in found) / work if found else None


def _active(trace: Trace, technique: str) -> bool:
    return any(item["technique"] == technique and item["status"] != OFF for item in trace["techniques"])


def _alone(entry: Entry) -> bool:
    """Whether the conditional branch was asked and no other."""
    return {branch["branch"] for branch in entry["branches"]} == {"cond"}


def _tokens(entry: Entry) -> int:
    return max(branch["tokens"] for branch in entry["branches"])


def _measures(trace: Trace, before: Entry, entry: Entry) -> bool:
    """Whether a small evaluation only measures what it misses of the full one before it: a plain run has none such."""
    corrected = (trace.get(RESOLUTION) or {}).get("method") == CORRECTED
    return corrected and before["position"] == entry["position"] and _tokens(entry) < _tokens(before)
