"""The page of all results, and the tables of the README and the help pages: made from the JSONs, nothing typed by hand."""

import json
from pathlib import Path

from . import RESULTS, ROOT, USUAL_RESULTS
from .chart import chart
from .claims import CLAIMS
from .readme import files, filled
from .runner import STATE
from .suites import SUITES, Job, Suite
from .tables import Table, tables_of

PAGE, CHART = "README.md", "speed-quality.svg"
#: What results older than the lab say about their machine.
OLDER = ("cpu", "torch", "threads", "diffusers", "cache_dit")
#: A longer table is folded.
SHORT = 12
HEAD = """# Results

Made by `.venv/bin/python benchmarks/run.py --page` from the JSON files beside this page; nothing here is typed by hand.
`benchmarks/run.py --all` measures everything again in less than an hour on two cores, in reduced settings, and writes to
[lab](lab); the figures that the README quotes come from the longer runs, whose commands stand below.
A speed-up is plain sampling's time over the arm's; PSNR is that of the decoded pictures to the plain run of the same prompt and
seed. The dashed line of the chart joins the arms that no other one beats in speed and in closeness at once."""


def read(folder: Path) -> dict[str, dict]:
    """Return the results of a folder by name."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: document for name, document in found.items() if isinstance(document, dict) and f"{name}.json" != STATE}


def page(results: dict[str, dict], usual: dict[str, dict], state: dict | None) -> str:
    """Return the page.

    Args:
        results: the results that the README quotes, by name.
        usual: those of the last run of everything.
        state: how that run ended, suite by suite; None where there was none.
    """
    parts = [HEAD, f"![Speed against quality]({CHART})", *_last_run(state)]
    shown = set()
    for suite in SUITES:
        parts.append(f"## {suite.title}")
        parts += _peers(suite)
        for name in dict.fromkeys(job.result for job in suite.jobs):
            shown.add(name)
            parts += _result(suite, name, results.get(name), usual.get(name))
    rest = [name for name in results if name not in shown]
    parts += ["## Other files"] if rest else []
    for name in rest:
        parts += [f"### [{name}.json]({name}.json)", *map(_shown, tables_of(name, results[name]))]
    return "\n\n".join(parts) + "\n"


def _last_run(state: dict | None) -> list[str]:
    if not state:
        return []
    rows = [
        [name, entry["status"], f"{entry['seconds'] / 60:.1f} min", entry["reason"]]
        for name, entry in state["suites"].items()
    ]
    total = sum(entry["seconds"] for entry in state["suites"].values()) / 60
    words = f"{state['started'][:10]}, {total:.0f} minutes, {_machine(state['machine'])}."
    return ["## The last run of everything", words, Table("", ("Suite", "Ended", "Time", ""), rows).markdown()]


def _peers(suite: Suite) -> list[str]:
    lines = [f"Beside ours: {'; '.join(suite.peers)}."] if suite.peers else []
    lines += [f"Absent: {name} ({why})." for name, why in suite.missing]
    return ["  \n".join(lines)] if lines else []


def _result(suite: Suite, name: str, document: dict | None, usual: dict | None) -> list[str]:
    job = next(job for job in suite.jobs if job.result == name)
    if document is None and usual is None:
        return [f"*{name}: not measured yet (`{_command(job)}`).*"]
    parts = [f"### [{name}.json]({name if document else 'lab/' + name}.json)"]
    if document is not None:
        parts += [_provenance(job, document), *map(_shown, tables_of(name, document))]
        parts += [f"![Curves]({path.name})" for path in sorted(RESULTS.glob(f"{name}-28.png"))]
    if usual is not None:
        made = "\n\n".join(_titled(table) for table in tables_of(name, usual))
        head = "The same in the last run of everything" if document else "From the last run of everything"
        parts.append(f"<details><summary>{head}</summary>\n\n{_provenance(job, usual)}\n\n{made}\n\n</details>")
    return parts


def _shown(table: Table) -> str:
    if len(table.rows) <= SHORT:
        return _titled(table)
    return f"<details><summary>{table.title or 'All rows'} ({len(table.rows)} rows)</summary>\n\n{table.markdown()}\n\n</details>"


def _titled(table: Table) -> str:
    return f"{table.title}\n\n{table.markdown()}" if table.title else table.markdown()


def _provenance(job: Job, document: dict) -> str:
    stamp = document.get("lab")
    if stamp is None:
        known = document.get("machine", {name: document[name] for name in OLDER if name in document})
        words = known if isinstance(known, str) else _machine(known)
        return (
            f"`{_command(job)}`  \nMachine: {words or 'not recorded'}. This file is older than the lab: its date and the options "
            "it was made with were not recorded."
        )
    taken = f"{stamp['seconds']:.0f} s, " if stamp.get("seconds") else ""
    words = (
        f"`{stamp['command']}`  \n{stamp['date'][:10]}, {taken}{_machine(stamp['machine'])}. "
        f"Seeds: {stamp['seeds']}."
    )
    words += f" Note: {stamp['note']}." if stamp.get("note") else ""
    return words if stamp["complete"] else f"{words} **Not complete.**"


def _machine(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _command(job: Job) -> str:
    return f".venv/bin/python benchmarks/{job.script}.py {' '.join(job.arguments('full'))}".rstrip()


def generated() -> dict[Path, str]:
    """Return every file that is made of the results, with what it is to hold."""
    results, usual = read(RESULTS), read(USUAL_RESULTS)
    state = USUAL_RESULTS / STATE
    made = {
        RESULTS / PAGE: page(results, usual, json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None),
        RESULTS / CHART: chart(results),
    }
    return made | {path: _refreshed(path) for path in files()}


def _refreshed(path: Path) -> str:
    """Return the README or a help page with its tables and its claims made of the results."""
    text = filled(path.read_text(encoding="utf-8"))
    for claim in CLAIMS:
        if path == ROOT / claim.file:
            text = claim.refreshed(text)
    return text


def write_pages() -> list[Path]:
    """Write what differs; return the files written."""
    written = []
    for path, text in generated().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written
