"""The list of described workflows, for the README."""
from __future__ import annotations

from collections.abc import Sequence

from .graphs import Workflow


def table(workflows: Sequence[Workflow]) -> str:
    """Return a Markdown table: a row a model, its workflows, and their twins that run at once."""
    rows: dict[str, list[Workflow]] = {}
    for workflow in workflows:
        if not workflow.model.demo:
            rows.setdefault(workflow.model.title, []).append(workflow)
    lines = ["| Model | Workflows (the demo twin that runs at once) |", "|---|---|"]
    for title, group in rows.items():
        entries = ", ".join(f"`{workflow.name}` ({workflow.twin.removeprefix('demo-')})" for workflow in group)
        lines.append(f"| {title} | {entries} |")
    return "\n".join(lines)
