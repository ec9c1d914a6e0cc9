"""What would help, by rules on the facts of a trace. Each rule gives a sentence or nothing."""

from collections.abc import Callable
from typing import Any

from .caching.methods import METHODS
from .caching.tap import BLOCKS, TABLE
from .facts import OFF, REDUCED
from .figures import (
    SKIPPED,
    Trace,
    comparisons,
    counts,
    mebibytes,
    skipped_of,
    sparse_seconds,
    steps_of,
    worst_layers,
)
from .savings import CACHING, savings, share_of_skipped

#: Runs this short have few steps to skip, and their first and last ones matter most.
FEW_STEPS = 10
#: A gain that is not worth the loss of quality.
SMALL_GAIN = 1.3
#: From this share of a computed step on, what a skipped step still costs decides over the gain.
EXPENSIVE = 0.3
#: A sparse step that takes more than this share of a full one gains nothing worth having.
NO_GAIN = 0.98
#: A layer stands out when it is this many times further off than the median of at least so many, and so far off at all.
OUTLIER, MANY_LAYERS, BAD_LAYER = 4.0, 4, 0.2
#: Methods that skip the whole network.
WHOLE_NETWORK = tuple(method.name for method in METHODS.values() if method.tap not in (BLOCKS, TABLE))


def advice(trace: Trace) -> list[str]:
    """Return what the run of ``trace`` could have had better, most important first."""
    return [words for words in (rule(trace) for rule in RULES) if words]


def no_memory(trace: Trace) -> str | None:
    """The cache is off because its features do not fit."""
    for item in trace["techniques"]:
        needed, allowed = item.get("store_bytes", 0), item.get("budget_bytes", 0)
        if item["status"] == OFF and needed > allowed:
            return (
                f"{mebibytes(needed)} of features do not fit into the {mebibytes(allowed)} they may take: "
                "another setting of store, order 0 or a smaller batch needs less."
            )
    return None


def threshold_too_low(trace: Trace) -> str | None:
    """Every step was computed although some were free: no change lay below the threshold."""
    free = [seen for seen in comparisons(trace) if seen.free]
    if not free or skipped_of(trace) or trace["totals"].get("mixed"):
        return None
    nearest = min(free, key=lambda seen: seen.value - seen.threshold)
    return (
        f"Everything was computed: the smallest change was {nearest.value:.3g}, the threshold there {nearest.threshold:.3g}. "
        f"A threshold above {nearest.value:.3g} lets steps be skipped."
    )


def few_steps(trace: Trace) -> str | None:
    """A short run gains little from caching."""
    steps, gain = steps_of(trace), savings(trace).get(CACHING)
    if gain is None or steps > FEW_STEPS or gain >= SMALL_GAIN:
        return None
    return f"{steps} steps: caching gains at most {gain:.2f}x here; attention, quantization or the VAE nodes help more."


def stochastic(trace: Trace) -> str | None:
    """A method that forecasts had to repeat features instead."""
    method = METHODS.get(_settings(trace).get("method", ""))
    fell_back = method is not None and method.forecaster != "reuse" and _status(trace, "cache") == REDUCED
    if not (fell_back and trace["sampler"]["stochastic"] and trace["totals"]["reused"]):
        return None
    return (
        f"{trace['sampler']['name']} adds noise at every step, so skipped steps repeat features instead of forecasting them: "
        "a sampler that adds none, such as euler or dpmpp_2m, keeps the forecast."
    )


def expensive_skips(trace: Trace) -> str | None:
    """Skipped steps cost much of a computed one."""
    share = share_of_skipped(trace)
    if share is None or share < EXPENSIVE or counts(trace)["mixed"]:
        return None
    blocks = _blocks_of_skipped(trace)
    if blocks >= share / 2:
        return (
            f"A skipped step costs {share:.0%} of a computed one: {blocks:.0%} of the blocks run in it. "
            "Fewer first_blocks and last_blocks would skip more."
        )
    way_out = "" if _settings(trace).get("method") in WHOLE_NETWORK else "; EasyCache and Output skip those too"
    return (
        f"A skipped step costs {share:.0%} of a computed one: embeddings and head dominate at this size{way_out}. "
        "Larger latents and deeper models gain more."
    )


def sparse_too_short(trace: Trace) -> str | None:
    """Sparse attention ran, and steps did not become faster."""
    seconds = sparse_seconds(trace)
    if seconds is None or seconds[1] < NO_GAIN * seconds[0]:
        return None
    tokens = max(item["tokens"] for item in trace["attention"]["layers"])
    return (
        f"Sparse attention did not make steps faster here ({seconds[1]:.3f} s against {seconds[0]:.3f} s): at {tokens:,} tokens "
        "attention is a small part of a step. It pays on longer clips and larger pictures."
    )


def one_bad_layer(trace: Trace) -> str | None:
    """One layer is much further off than the others."""
    worst = worst_layers(trace)
    if len(worst) < MANY_LAYERS or worst[0][1] < BAD_LAYER or worst[0][1] < OUTLIER * worst[len(worst) // 2][1]:
        return None
    layer, error = worst[0]
    return f"Layer {layer} is {error:.0%} off, far more than the others: dense_layers = {layer} keeps its attention complete."


RULES: tuple[Callable[[Trace], str | None], ...] = (
    no_memory,
    threshold_too_low,
    few_steps,
    stochastic,
    expensive_skips,
    sparse_too_short,
    one_bad_layer,
)


def _settings(trace: Trace) -> dict[str, Any]:
    """Return the settings of the run's cache request, empty without one."""
    requests = trace["plan"].get("requests", ())
    return next((request["settings"] for request in requests if request["technique"] == "cache"), {})


def _status(trace: Trace, technique: str) -> str | None:
    return next((item["status"] for item in trace["techniques"] if item["technique"] == technique), None)


def _blocks_of_skipped(trace: Trace) -> float:
    """Return the share of blocks that run in skipped steps."""
    branches = [
        branch for entry in trace["evaluations"] for branch in entry["branches"] if branch["decision"] in SKIPPED
    ]
    total = sum(branch["blocks_total"] for branch in branches)
    return sum(branch["blocks_computed"] for branch in branches) / total if total else 0.0
