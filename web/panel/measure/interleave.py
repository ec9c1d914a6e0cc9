"""Interleaved measuring: which run comes when, and a file in which every finished run survives a crash."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .arms import Arm
from .errors import ReportError, Stopped
from .files import write_whole

FILE_SCHEMA = "measurements@1"


@dataclass(frozen=True)
class Cell:
    """What all arms of a round have in common."""

    index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Slot:
    """One run to be made: the arm at `position` of a round. Warm-up rounds have negative numbers."""

    round: int
    position: int
    arm: Arm
    cell: Cell
    repeat: int

    @property
    def warmup(self) -> bool:
        """Whether the run is discarded."""
        return self.round < 0


@dataclass(frozen=True)
class Measurement:
    """One finished run. `seconds` is wall time of the whole run, `traces` the pack's (None without the pack).

    `pictures` are file names relative to the folder of the report; `pixels` hashes all pixels of the run. With
    `frames` above 1 they are the frames of clips, that many to a clip, one clip after the other.
    """

    arm: str
    cell: int
    prompt: str
    seed: int
    repeat: int
    round: int
    position: int
    prompt_id: str
    seconds: float
    traces: list[dict[str, Any]] | None = None
    pictures: list[str] = field(default_factory=list)
    pixels: str = ""
    frames: int = 1

    @property
    def warmup(self) -> bool:
        """Whether the run is discarded."""
        return self.round < 0

    @property
    def sampler_seconds(self) -> float | None:
        """Seconds inside the samplers, or None when no trace tells."""
        if not self.traces:
            return None
        return sum(trace["seconds"]["sampler"] for trace in self.traces)


def cells_of(prompts: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every prompt with every seed."""
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    return [Cell(index, prompt, seed) for index, (prompt, seed) in enumerate(pairs)]


def order_of(round_number: int, arms: Sequence[Arm]) -> list[Arm]:
    """The order of the arms in a round.

    The start rotates every second round, and every odd round runs backwards (ABC, CBA, BCA, ACB, ...): over two
    rounds each pair of arms stands equally often and equally far in either order, so a steady drift cancels.
    """
    start = (round_number // 2) % len(arms)
    rotated = [*arms[start:], *arms[:start]]
    return rotated[::-1] if round_number % 2 else rotated


def schedule(arms: Sequence[Arm], cells: Sequence[Cell], repeats: int, warmup: int) -> list[Slot]:
    """All runs in order: `warmup` discarded rounds on the first cell, then `repeats` rounds of every cell."""
    slots = []
    for index in range(warmup):
        slots += [
            Slot(index - warmup, position, arm, cells[0], 0) for position, arm in enumerate(order_of(index, arms))
        ]
    rounds = [(cell, repeat) for repeat in range(repeats) for cell in cells]
    for number, (cell, repeat) in enumerate(rounds):
        slots += [Slot(number, position, arm, cell, repeat) for position, arm in enumerate(order_of(number, arms))]
    return slots


def remaining(slots: Iterable[Slot], finished: Iterable[Measurement]) -> list[Slot]:
    """The slots still to run after an interruption.

    A round counts when all its arms finished: arms are compared only when they ran back to back, so a torn round
    is measured again. Warm-up runs are repeated, because the server may be a new one.
    """
    slots = list(slots)
    done = {(m.round, m.arm) for m in finished}
    complete = {slot.round for slot in slots} - {
        slot.round for slot in slots if (slot.round, slot.arm.name) not in done
    }
    left = [slot for slot in slots if not slot.warmup and slot.round not in complete]
    return [slot for slot in slots if slot.warmup] + left if left else []


def run_interleaved(
    slots: Sequence[Slot],
    execute: Callable[[Slot], Measurement],
    sink: Callable[[Measurement], None],
    *,
    before: Callable[[int, Slot], None] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Measurement]:
    """Run the slots in order and yield each measurement after the sink has it; `before(index, slot)` announces a run.

    Raises `Stopped` when `stop` is set, and whatever `execute` raises; what has finished is in the sink then.
    """
    for index, slot in enumerate(slots):
        if stop is not None and stop.is_set():
            raise Stopped("Stopped; the finished measurements are kept.")
        if before is not None:
            before(index, slot)
        measurement = execute(slot)
        sink(measurement)
        yield measurement


class MeasurementFile:
    """A JSON Lines file: a header with the plan's fingerprint, then one line per finished run, each flushed to disk."""

    def __init__(self, path: Path, fingerprint: str):
        """`fingerprint` identifies the plan; a file of another plan is never continued."""
        self.path, self.fingerprint = path, fingerprint

    def start(self, resume: bool) -> list[Measurement]:
        """Open for appending and return what is there: with `resume` the finished runs of the same plan.

        Without `resume` an older file is kept beside it under the name *.previous.jsonl.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            found, measurements = read_measurements(self.path)
            if found != self.fingerprint:
                raise ReportError(f"{self.path.name} belongs to another comparison, so it cannot be resumed.")
            self._write({"schema": FILE_SCHEMA, "fingerprint": self.fingerprint}, measurements)
            return measurements
        if self.path.exists():
            self.path.replace(self.path.with_suffix(".previous.jsonl"))
        self._write({"schema": FILE_SCHEMA, "fingerprint": self.fingerprint}, [])
        return []

    def append(self, measurement: Measurement) -> None:
        """Write one finished run and wait until the disk has it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measurement)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write(self, header: dict[str, Any], measurements: list[Measurement]) -> None:
        """Write the whole file anew, which also drops a last line torn by a crash."""
        lines = [json.dumps(header), *(json.dumps(asdict(m)) for m in measurements)]
        write_whole(self.path, "\n".join(lines) + "\n")


def read_measurements(path: Path) -> tuple[str, list[Measurement]]:
    """Fingerprint and runs of a file; a torn last line is left out, anything else unreadable raises `ReportError`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        header = json.loads(lines[0])
    except json.JSONDecodeError:
        header = {}
    if not isinstance(header, dict) or header.get("schema") != FILE_SCHEMA:
        raise ReportError(f"{path.name} is not a file of measurements this version can read.")
    measurements = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            measurements.append(Measurement(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines):
                break
            raise ReportError(f"{path.name} is damaged in line {number}.") from error
    return header.get("fingerprint", ""), measurements
