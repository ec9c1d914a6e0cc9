"""The step timeline as SVG: which model evaluations were computed, forecast or reused, per arm and branch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

Trace = dict[str, Any]

# Okabe and Ito's palette; the height says the same again for those who see no colour.
DECISIONS = {
    "computed": ("#0072B2", 1.0),
    "forecast": ("#E69F00", 0.62),
    "reused": ("#009E73", 0.34),
}
WIDTH, LEFT, RIGHT = 920, 64, 12
HEADING, ROW, GAP, LEGEND, AXIS, SIGNAL = 24, 20, 12, 30, 44, 34
LIMIT = "#D55E00"
MOST_SHOWN = 2.0  # changes beyond this multiple of the threshold are cut off
TICKS = 5


def timeline_svg(named_traces: Sequence[tuple[str, Trace]]) -> str:
    """Draw traces, each under its name; every row spans the whole sampling from left to right.

    A trace has one row for all its branches, one each where they differ, and below, where a method compared something
    with a threshold, what that was.
    Colours of text follow the page (`currentColor`), so one drawing serves light and dark. Returns an `<svg>`
    without namespace declarations, meant to stand inside HTML; a sentence in a paragraph when there are no traces.
    """
    if not named_traces:
        return "<p>No trace: this server lacks the Stretto nodes, so only total times are known.</p>"
    parts: list[str] = [_legend()]
    top = LEGEND
    for name, trace in named_traces:
        drawn, top = _arm(name, trace, top)
        parts += drawn
    parts += _axis(named_traces[0][1], top)
    height = top + AXIS
    label = escape(f"Step timeline of {', '.join(name for name, _ in named_traces)}")
    return (
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{label}" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
        + "".join(parts)
        + "</svg>"
    )


def _legend() -> str:
    """One swatch per decision, in its own colour and height."""
    items, left = [], LEFT
    for name, (colour, share) in DECISIONS.items():
        height = 14 * share
        items.append(
            f'<rect x="{left}" y="{18 - height:.1f}" width="14" height="{height:.1f}" rx="2" fill="{colour}"/>'
            f'<text x="{left + 20}" y="17">{name}</text>'
        )
        left += 104
    return "<g>" + "".join(items) + "</g>"


def _arm(name: str, trace: Trace, top: float) -> tuple[list[str], float]:
    """Heading and rows of one trace; returns the drawing and the next free y."""
    evaluations = trace.get("evaluations", [])
    parts = [
        f'<text x="{LEFT}" y="{top + 17}" font-weight="600">{escape(name)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{top + 17}" text-anchor="end" opacity="0.75">{escape(_caption(trace))}</text>',
    ]
    top += HEADING
    cell = (WIDTH - LEFT - RIGHT) / max(len(evaluations), 1)
    for branch in rows_of(trace):
        parts.append(_label(branch, top + 14))
        for place, evaluation in enumerate(evaluations):
            decision = decision_of(evaluation, branch)
            if decision is not None:
                parts.append(_cell(evaluation, branch, decision, LEFT + place * cell, top, cell))
        top += ROW
    signal = _signal(evaluations, top, cell)
    return parts + signal, top + GAP + (SIGNAL if signal else 0)


def rows_of(trace: Trace) -> list[str]:
    """Names of the rows to draw: branches where they differ, otherwise one without a name."""
    branches = branches_of(trace)
    seen = {tuple(decision_of(evaluation, name) for evaluation in trace["evaluations"]) for name in branches}
    return branches if len(seen) > 1 else [""]


def _label(text: str, y: float) -> str:
    return f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" font-size="12" opacity="0.75">{escape(text)}</text>'


def _signal(evaluations: Sequence[dict[str, Any]], top: float, width: float) -> list[str]:
    """What was compared with the threshold, as bars under the line that it had to stay below; hollow ones did not decide."""
    seen = [
        (place, evaluation)
        for place, evaluation in enumerate(evaluations)
        if evaluation.get("compared") is not None and evaluation.get("threshold")
    ]
    if not seen:
        return []
    scale = (SIGNAL - 6) / (MOST_SHOWN * max(evaluation["threshold"] for _, evaluation in seen))
    bars = (_change(evaluation, LEFT + place * width, top + SIGNAL, width, scale) for place, evaluation in seen)
    return [_label("change", top + SIGNAL - 10), *bars]


def _change(evaluation: dict[str, Any], left: float, bottom: float, width: float, scale: float) -> str:
    """One bar and its piece of the threshold's line."""
    value, threshold = evaluation["compared"], evaluation["threshold"]
    height = min(value * scale, SIGNAL - 6)
    colour, _ = DECISIONS.get(evaluation["decision"], ("#999999", 0.8))
    look = (
        'fill="none" stroke="currentColor" stroke-opacity="0.4"' if evaluation.get("on_rails") else f'fill="{colour}"'
    )
    title = f"evaluation {evaluation.get('index', 0) + 1}: change {value:.3g}, threshold {threshold:.3g}"
    return (
        f'<rect x="{left + 1:.2f}" y="{bottom - height:.2f}" width="{max(width - 2, 0.5):.2f}" height="{height:.2f}" '
        f"{look}><title>{escape(title)}</title></rect>"
        f'<path d="M{left:.2f} {bottom - threshold * scale:.2f}h{width:.2f}" stroke="{LIMIT}" stroke-width="1.5"/>'
    )


def branches_of(trace: Trace) -> list[str]:
    """Names of the branches that occur in a trace, in the order of their first appearance."""
    names = [entry["branch"] for evaluation in trace.get("evaluations", []) for entry in evaluation.get("branches", [])]
    return list(dict.fromkeys(names))


def decision_of(evaluation: dict[str, Any], branch: str) -> str | None:
    """What happened to a branch in an evaluation; None when the branch took no part in it."""
    if not branch:
        return evaluation.get("decision")
    for entry in evaluation.get("branches", []):
        if entry["branch"] == branch:
            return entry["decision"]
    return None


def _cell(evaluation: dict[str, Any], branch: str, decision: str, left: float, top: float, width: float) -> str:
    """One evaluation of one branch, with what is known about it as hover title."""
    colour, share = DECISIONS.get(decision, ("#999999", 0.8))
    height = (ROW - 4) * share
    inset = min(1.0, width * 0.1)
    took = f", {1000 * evaluation['seconds']:.1f} ms" if evaluation.get("seconds") is not None else ""
    title = (
        f"evaluation {evaluation.get('index', 0) + 1}{', ' + branch if branch else ''}: {decision}"
        f"{' (' + evaluation['reason'] + ')' if evaluation.get('reason') else ''}, "
        f"σ {evaluation.get('sigma', 0):.3g}{took}"
    )
    return (
        f'<rect x="{left + inset:.2f}" y="{top + ROW - 4 - height:.2f}" width="{max(width - 2 * inset, 0.5):.2f}" '
        f'height="{height:.2f}" rx="1.5" fill="{colour}"><title>{escape(title)}</title></rect>'
    )


def _caption(trace: Trace) -> str:
    """Counts and seconds of a trace."""
    totals = trace.get("totals", {})
    counts = [f"{totals[name]} {name}" for name in DECISIONS if totals.get(name)]
    return " · ".join([*counts, f"{trace['seconds']['sampler']:.3g} s"])


def _axis(trace: Trace, top: float) -> list[str]:
    """Sigma at equal shares of the sampling, read from the first trace."""
    sigmas = trace.get("sigmas", [])
    span = WIDTH - LEFT - RIGHT
    parts = [f'<line x1="{LEFT}" y1="{top}" x2="{WIDTH - RIGHT}" y2="{top}" stroke="currentColor" opacity="0.35"/>']
    for tick in range(TICKS if len(sigmas) > 1 else 0):
        share = tick / (TICKS - 1)
        x = LEFT + span * share
        anchor = "start" if tick == 0 else "end" if tick == TICKS - 1 else "middle"
        parts.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 5}" stroke="currentColor" opacity="0.5"/>'
            f'<text x="{x:.1f}" y="{top + 19}" text-anchor="{anchor}" font-size="12">'
            f"{_sigma_at(sigmas, share):.3g}</text>"
        )
    parts.append(
        f'<text x="{LEFT + span / 2}" y="{top + 38}" text-anchor="middle" font-size="12" opacity="0.75">'
        "σ, the noise level: sampling runs from left to right</text>"
    )
    return parts


def _sigma_at(sigmas: Sequence[float], share: float) -> float:
    """Sigma after this share of the steps, linear between steps."""
    place = share * (len(sigmas) - 1)
    index = min(int(place), len(sigmas) - 2)
    return sigmas[index] + (place - index) * (sigmas[index + 1] - sigmas[index])
