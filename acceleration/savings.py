"""What each technique of a run saves, told from its ``trace@1``: factors whose product is the predicted speed-up."""

import math
from collections.abc import Callable
from statistics import median

from .facts import OFF
from .figures import SKIPPED, Trace
from .resolution.settings import CORRECTED

Entry = dict
#: What a factor is called, in the order in which techniques act.
RESOLUTION, GUIDANCE, CACHING = "resolution", "guidance", "caching"


def savings(trace: Trace, by_clock: bool = True) -> dict[str, float]:
    """Return the factor by which each technique makes the run shorter, those that change its length only.

    Fewer tokens are counted first, then rows left out of what is left, then evaluations skipped of what is left then: so the
    product of all is the plain run's length over this one's. Sparse attention is not counted.

    Args:
        trace: a ``trace@1`` document.
        by_clock: what work costs is taken from the run itself: an evaluation of as many rows and tokens takes what such ones
            took when they were computed, a skipped one what it took, and what the sampler does between evaluations stays.
            Otherwise, and where nothing was timed, work is rows x tokens, and only skipped evaluations go by the clock.
    """
    entries = [entry for entry in trace["evaluations"] if entry["branches"]]
    if not entries:
        return {}
    full = max(branch["tokens"] for entry in entries for branch in entry["branches"])
    staged, saving = _active(trace, RESOLUTION), _active(trace, GUIDANCE)
    both = max((len(entry["branches"]) for entry in entries if not _alone(entry)), default=None)
    known = _medians(entries) if by_clock else {}
    cost = _cost(known, full)
    share = share_of_skipped(trace)
    plain = small = asked = done = 0.0
    for place, entry in enumerate(entries):
        rows = len(entry["branches"])
        wanted = min(2 * rows, both or 2 * rows) if saving and _alone(entry) else rows
        tokens = _tokens(entry) if staged else full
        plain += 0.0 if place and _measures(trace, entries[place - 1], entry) else cost(wanted, full)
        small += cost(wanted, tokens)
        asked += cost(rows, tokens)
        if entry["decision"] not in SKIPPED:
            done += cost(rows, tokens)
        elif known and entry["seconds"] is not None:
            done += entry["seconds"]
        else:
            done += cost(rows, tokens) * (1.0 if share is None else share)
    between = max((trace["seconds"]["sampler"] or 0.0) - done, 0.0) if known else 0.0
    plain, small, asked, done = (value + between for value in (plain, small, asked, done))
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


def _medians(entries: list[Entry]) -> dict[tuple[int, int], float]:
    """Return the seconds of a computed evaluation by rows and tokens, the first left out: it also pays for warm-up.

    Sparse attention, tables and resting regions make computed evaluations cheaper: those stand for no plain one.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for entry in entries[1:]:
        cheaper = any(entry.get(name) is not None for name in ("attention_kept", "computed_share", "active_share"))
        if entry["decision"] == "computed" and not cheaper and entry["seconds"] is not None:
            found.setdefault((len(entry["branches"]), _tokens(entry)), []).append(entry["seconds"])
    return {size: median(seconds) for size, seconds in found.items()}


def _cost(known: dict[tuple[int, int], float], full: int) -> Callable[[int, int], float]:
    """Return what an evaluation of some rows and tokens costs: as measured, else in proportion to the largest measured."""
    if not known:
        return lambda rows, tokens: rows * tokens / max(full, 1)
    (rows, tokens), seconds = max(known.items(), key=lambda item: math.prod(item[0]))
    each = seconds / max(rows * tokens, 1)
    return lambda rows, tokens: known.get((rows, tokens), each * rows * tokens)


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
