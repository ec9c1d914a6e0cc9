"""A trace in a few plain sentences."""

from .advice import advice
from .facts import OFF
from .figures import (
    MARKS,
    WORDS,
    Trace,
    comparisons,
    counts,
    mebibytes,
    rows,
    saves_work,
    sparse_seconds,
    sparse_share,
    speed_up,
    steps_of,
    strip,
    worst_layers,
)
from .frame_rate.schedule import FrameRateSchedule
from .savings import CACHING, GUIDANCE, RESOLUTION, expected, savings, share_of_skipped

#: A measured speed-up this far above the possible one has another cause.
TOO_GOOD = 1.1
#: What users call what a technique leaves out.
WORK_OF = {RESOLUTION: "smaller stages", GUIDANCE: "guidance saved", CACHING: "steps skipped"}
#: What the middle of a run on fewer latent frames does.
MIDDLE = {"decode": "decoding", "choose": "choosing frames", "encode": "encoding"}
NO_PLAIN = (
    "No plain run to compare with: queue the same workflow with the accelerating nodes bypassed (Stretto Measure stays), "
    "then this one again."
)


def summary(trace: Trace, plain: Trace | None = None) -> str:
    """Return what a run did, with its step strip, why, and what would help.

    Args:
        trace: a ``trace@1`` document.
        plain: a plain run of the same work (:func:`~.figures.plain_run`), None where none is known.
    """
    lines = [
        f"{trace['model']['family'] or trace['model']['network']} · {trace['sampler']['name']} · "
        f"{steps_of(trace)} steps · {trace['seconds']['sampler']:.3f} s in the sampler",
        *_strips(trace),
        *_prediction(trace),
        *_measurement(trace, plain),
        *_line(storage(trace)),
        *_line(_changes(trace)),
        *_attention(trace),
        *_features(trace),
        *_frame_rate(trace),
        *(f"{item['technique']}: {item['status']}. {item['reason']}" for item in trace["techniques"]),
        *trace["notes"],
        *(f"Advice: {words}" for words in advice(trace)),
    ]
    if trace["outcome"] != "completed":
        lines.append(f"This run was {trace['outcome']}; the figures cover what was done until then.")
    return "\n".join(lines)


def gain(trace: Trace, plain: Trace | None) -> str:
    """Return predicted and measured speed-up in a few words, ``""`` where nothing was skipped."""
    predicted = expected(trace)
    if predicted is None and not saves_work(trace):
        return ""
    measured = "no plain run to compare with" if plain is None else f"measured {speed_up(trace, plain):.2f}x"
    return measured if predicted is None else f"predicted {predicted:.2f}x · {measured}"


def storage(trace: Trace) -> str:
    """Return what stored features took and were to take, ``""`` where none were stored."""
    peak = trace["memory"]["store_peak_bytes"]
    techniques = [item for item in trace["techniques"] if item["status"] != OFF and item.get("store_bytes")]
    if not peak:
        return ""
    words = f"Stored features: {mebibytes(peak)} at most"
    if techniques:
        announced = sum(item["store_bytes"] for item in techniques)
        allowed = min(item["budget_bytes"] for item in techniques)
        words += f", {mebibytes(announced)} announced, {mebibytes(allowed)} allowed"
    return f"{words}."


def _features(trace: Trace) -> list[str]:
    """Return, by component, what tables stood for: bytes before and after, and whether they were exact."""
    section = trace.get("features")
    if not section:
        return []
    lines = [f"Feature tables: {mebibytes(section['table_bytes'])} for {section['entries']} timesteps and prompts."]
    if section.get("saved"):
        lines.append(f"Saved table: {section['saved']}.")
    for item in section["components"]:
        left = f" ({item['left']} left as they were)" if item["left"] else ""
        exact = "equal to the bit" if item["exact"] else "rounded as one product rounds them"
        lines.append(
            f"{item['name']}: {item['layers']} layers, weights {mebibytes(item['weight_bytes'])}, of which "
            f"{mebibytes(item['loaded_bytes'])} loaded; {item['computed']} computed, {item['reused']} looked up{left}; {exact}."
        )
    return lines


def _frame_rate(trace: Trace) -> list[str]:
    """Say what a shortened video kept, which layers knew its real places in time, and what came before this run."""
    found = trace.get("frame_rate")
    if not found:
        return []
    schedule = FrameRateSchedule.from_json(found["schedule"])
    kept = f"{schedule.latents} of {schedule.full_latents} latent frames"
    words = f"Frame rate: this run had {kept}, {schedule.ratio:.0%} of the tokens"
    layers = found["global_layers"]
    if found["positions_refused"]:
        words += "; original places were not given to any layer: something else had changed the model's positions"
    elif layers:
        words += f"; {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} saw their original places in time"
    else:
        words += "; every layer saw them as neighbours"
    return [f"{words}.", *_line(between_passes(trace))]


def between_passes(trace: Trace) -> str:
    """Return what the work between the two passes of a shortened video took, ``""`` where there was none or nobody told."""
    seconds = (trace.get("frame_rate") or {}).get("seconds")
    if not seconds:
        return ""
    parts = ", ".join(f"{MIDDLE.get(name, name)} {value:.2f} s" for name, value in seconds.items())
    return f"Before these steps, not in the sampler's time: {parts}."


def _strips(trace: Trace) -> list[str]:
    found, number = rows(trace), counts(trace)
    legend = "  ".join(
        f"{mark} {WORDS[decision]} {number[decision]}"
        for decision, mark in MARKS.items()
        if number[decision] or decision == "computed"
    )
    if len(found) == 1:
        return [f"{strip(next(iter(found.values())))}   {legend}"]
    width = max(map(len, found))
    return [*(f"{name:{width}}  {strip(row)}" for name, row in found.items()), legend]


def _prediction(trace: Trace) -> list[str]:
    """Say what the run could gain, and what each technique adds to that."""
    factors, share, lines = savings(trace), share_of_skipped(trace), []
    if CACHING in factors and share is not None:
        lines.append(
            f"A skipped step costs {share:.0%} of a computed one: {factors[CACHING]:.2f}x is the most this run could gain"
            + (" by skipping." if len(factors) > 1 else ".")
        )
    parts = [f"{WORK_OF[name]} {factor:.2f}x" for name, factor in factors.items()]
    if len(parts) > 1:
        lines.append(f"Predicted: {', '.join(parts)}; together {expected(trace):.2f}x.")
    elif parts and CACHING not in factors:
        lines.append(f"Predicted: {parts[0]}, by what this run's own steps took.")
    return lines


def _measurement(trace: Trace, plain: Trace | None) -> list[str]:
    """Say what was gained, where something was to be gained."""
    predicted = expected(trace)
    if predicted is None and not saves_work(trace):
        return []
    if plain is None:
        return [NO_PLAIN]
    measured = speed_up(trace, plain)
    seed = "" if plain.get("seed") is None else f" with seed {plain['seed']}"
    words = (
        f"{measured:.2f}x was measured against the plain run{seed} ({plain['seconds']['sampler']:.3f} s in the sampler); "
        "one run each."
    )
    if predicted is not None and measured > TOO_GOOD * predicted and not saves_work(trace):
        words += " That is more than skipping explains: the plain run may have loaded the model first. Queue it once more."
    return [words]


def _changes(trace: Trace) -> str:
    free = [seen for seen in comparisons(trace) if seen.free]
    if not free:
        return ""
    values, thresholds = [seen.value for seen in free], [seen.threshold for seen in free]
    limit = f"{thresholds[0]:.3g}" if min(thresholds) == max(thresholds) else f"{thresholds[0]:.3g} to {thresholds[-1]:.3g}"
    return f"Change where steps were free: {min(values):.3g} to {max(values):.3g}, threshold {limit}."


def _attention(trace: Trace) -> list[str]:
    """Say what sparse attention kept, what a step of it took, and how far off it was."""
    found = trace.get("attention")
    if not found or not found["layers"]:
        return _line(_dense_calls(found))
    words = f"Attention: {sparse_share(trace):.0%} of the key blocks kept where it was sparse"
    seconds = sparse_seconds(trace)
    if seconds:
        words += f"; such a step took {seconds[1]:.3f} s, one with full attention {seconds[0]:.3f} s"
    lines = [f"{words}."]
    worst = worst_layers(trace)
    if worst:
        named = ", ".join(f"layer {layer} {error:.1%}" for layer, error in worst[:4])
        lines.append(f"Off from full attention, worst first (relative L2 of sampled blocks): {named}.")
    return lines + _line(_dense_calls(found))


def _dense_calls(found: dict | None) -> str:
    if not found or not found["dense"]:
        return ""
    reasons = "; ".join(f"{reason}: {count}" for reason, count in found["dense"].items())
    return f"Attention calls left as they are: {reasons}."


def _line(words: str) -> list[str]:
    return [words] if words else []
