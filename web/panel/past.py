"""The history of comparisons: a list to search, to open again, to lay side by side, to resume and to forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import views
from .measure.errors import MeasureError
from .measure.history import FAILED, INTERRUPTED, STOPPED, Entry
from .session import Session

RESUMABLE = (INTERRUPTED, STOPPED, FAILED)


@dataclass(frozen=True)
class Past:
    """The components of the tab, and the line that offers to resume."""

    search: gr.Textbox
    entries: gr.CheckboxGroup
    open: gr.Button
    across: gr.Button
    resume: gr.Button
    forget: gr.Button
    confirm: gr.Column
    question: gr.HTML
    yes: gr.Button
    no: gr.Button
    table: gr.HTML


def build() -> Past:
    """Lay the components out."""
    search = gr.Textbox(label="Search", placeholder="workflow, prompt, machine, day", elem_id="search")
    with gr.Row(elem_classes="acts"):
        opened = gr.Button("Open", variant="primary", size="sm", min_width=80, elem_id="open")
        across = gr.Button("Compare", size="sm", min_width=80, elem_id="across")
        resume = gr.Button("Resume", size="sm", min_width=80, elem_id="resume-entry")
        forget = gr.Button("Forget", size="sm", min_width=80, elem_id="forget")
    with gr.Column(visible=False, elem_classes="confirm") as confirm:
        question = gr.HTML()
        with gr.Row():
            yes = gr.Button("Forget", variant="stop", size="sm", min_width=80, elem_id="forget-yes")
            no = gr.Button("Keep", size="sm", min_width=80, elem_id="forget-no")
    table = gr.HTML(elem_id="across-table")
    entries = gr.CheckboxGroup([], label="Comparisons, newest first", elem_id="entries", elem_classes="entries")
    return Past(search, entries, opened, across, resume, forget, confirm, question, yes, no, table)


def listed(session: Session, search: str = "") -> Any:
    """The list as an update; nothing stays ticked."""
    entries = session.history.list(search=search or "")
    return gr.update(choices=[(views.entry_label(entry), entry.id) for entry in entries], value=[])


def unfinished(session: Session) -> Entry | None:
    """The newest comparison that was interrupted by a crash, if the last ones hold one and nothing runs."""
    if session.running:
        return None
    newest = session.history.list(limit=1)
    return next((entry for entry in newest if entry.state == INTERRUPTED), None)


def wire(session: Session, past: Past) -> None:
    """Connect what stays inside the tab."""

    def compare(ids: list[int]) -> str:
        if len(ids) < 2:
            return views.trouble("Tick two comparisons or more to lay them side by side.")
        return views.across(session.history.across(ids))

    def ask(ids: list[int]) -> list[Any]:
        if not ids:
            return [gr.update(visible=False), gr.skip(), views.trouble("Tick what is to be forgotten.")]
        many = f"these {len(ids)} comparisons" if len(ids) > 1 else "this comparison"
        words = f'<p class="line">Forget {many}? The list forgets; files stay on the disk.</p>'
        return [gr.update(visible=True), words, ""]

    def forget(ids: list[int], search: str) -> list[Any]:
        message = ""
        for entry in ids:
            try:
                session.history.forget(entry)
            except MeasureError as error:
                message = views.trouble(str(error))
        return [listed(session, search), gr.update(visible=False), message]

    quiet = {"show_progress": "hidden"}
    past.search.change(lambda search: listed(session, search), past.search, past.entries, **quiet)
    past.across.click(compare, past.entries, past.table, **quiet)
    past.forget.click(ask, past.entries, [past.confirm, past.question, past.table], **quiet)
    past.yes.click(forget, [past.entries, past.search], [past.entries, past.confirm, past.table], **quiet)
    past.no.click(lambda: gr.update(visible=False), outputs=past.confirm, **quiet)
