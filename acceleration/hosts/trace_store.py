"""Traces that outlive their run, bounded in number."""

import threading
from collections import OrderedDict
from typing import Any


class TraceStore:
    """The newest ``limit`` traces, keyed by prompt id, sampler node and run ordinal. Thread-safe."""

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._traces: OrderedDict[tuple[str | None, str | None, int], dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, prompt_id: str | None, node: str | None, trace: dict[str, Any]) -> dict[str, Any]:
        """Keep ``trace``; its prompt id, sampler node and ordinal are filled in. Returns the stored document."""
        with self._lock:
            kept = (key[2] for key in self._traces if key[:2] == (prompt_id, node))
            ordinal = max(kept, default=-1) + 1
            trace = {**trace, "prompt_id": prompt_id, "sampler_node": node, "ordinal": ordinal}
            self._traces[(prompt_id, node, ordinal)] = trace
            while len(self._traces) > self.limit:
                self._traces.popitem(last=False)
            return trace

    def take_record(self, name: str, token: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Take the record ``name`` that carries ``token`` out of its trace; return record and trace, or None."""
        with self._lock:
            for key, trace in reversed(self._traces.items()):
                record = trace.get("records", {}).get(name)
                if record is not None and record["token"] == token:
                    self._traces[key] = kept = {field: trace[field] for field in trace if field != "records"}
                    return record, kept
        return None

    def all(self) -> list[dict[str, Any]]:
        """Return every trace that is kept, oldest first."""
        with self._lock:
            return list(self._traces.values())

    def of_prompt(self, prompt_id: str | None) -> list[dict[str, Any]]:
        """Return the traces of one prompt, in the order they were made."""
        with self._lock:
            return [trace for key, trace in self._traces.items() if key[0] == prompt_id]

    def of_node(self, node: str, prompt_id: str | None = None) -> list[dict[str, Any]]:
        """Return the traces of one sampler node in a prompt; without a prompt id, of its latest prompt."""
        with self._lock:
            found = [(key, trace) for key, trace in self._traces.items() if key[1] == node]
        if prompt_id is None and found:
            prompt_id = found[-1][0][0]
        return [trace for key, trace in found if key[0] == prompt_id]
