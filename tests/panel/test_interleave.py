"""The order of runs cancels drift, and no finished run is lost."""

import json
import threading
from statistics import median

import pytest

from stretto.web.panel.measure.arms import Arm
from stretto.web.panel.measure.errors import ReportError, Stopped
from stretto.web.panel.measure.interleave import (
    Measurement,
    MeasurementFile,
    cells_of,
    order_of,
    read_measurements,
    remaining,
    run_interleaved,
    schedule,
)

COST = {"plain": 1.0, "fast": 0.5, "same": 1.0}


@pytest.fixture
def arms():
    return [Arm(name, name, {}, "plain" if name == "plain" else "accelerated") for name in COST]


def measured(slot, seconds=1.0):
    return Measurement(
        slot.arm.name,
        slot.cell.index,
        slot.cell.prompt,
        slot.cell.seed,
        slot.repeat,
        slot.round,
        slot.position,
        "id",
        seconds,
    )


def ratios(measurements, arm):
    seconds = {(m.round, m.arm): m.seconds for m in measurements if not m.warmup}
    return [seconds[r, "plain"] / seconds[r, arm] for r, name in seconds if name == arm]


def run_with_drift(slots, drift):
    clock = iter(range(len(slots)))
    return [measured(slot, COST[slot.arm.name] * drift(next(clock))) for slot in slots]


@pytest.mark.parametrize(
    "drift", [lambda n: 1 + 0.05 * n, lambda n: 1 / (1 + 0.03 * n), lambda n: 1.0 if n < 30 else 1.8]
)
def test_interleaving_survives_drift_that_fools_block_order(arms, drift):
    slots = schedule(arms, cells_of(["a", "b", "c", "d"], [1]), repeats=6, warmup=1)
    interleaved = run_with_drift(slots, drift)
    assert median(ratios(interleaved, "same")) == pytest.approx(1.0, abs=0.03)
    assert median(ratios(interleaved, "fast")) == pytest.approx(2.0, abs=0.06)

    blocks = sorted((slot for slot in slots if not slot.warmup), key=lambda slot: list(COST).index(slot.arm.name))
    assert abs(median(ratios(run_with_drift(blocks, drift), "same")) - 1.0) > 0.2


def test_every_pair_stands_equally_far_in_either_order(arms):
    for first in arms:
        for second in arms:
            distances = [order.index(first) - order.index(second) for order in (order_of(n, arms) for n in range(6))]
            assert sum(distances) == 0


def test_each_arm_starts_equally_often(arms):
    starts = [order_of(n, arms)[0].name for n in range(6)]
    assert {name: starts.count(name) for name in COST} == dict.fromkeys(COST, 2)


def test_schedule_counts_and_warmup_first(arms):
    slots = schedule(arms, cells_of(["a", "b"], [1, 2]), repeats=3, warmup=2)
    assert [slot.warmup for slot in slots].index(False) == 2 * len(arms)
    assert len(slots) == (2 + 4 * 3) * len(arms)
    assert len({(slot.arm.name, slot.cell, slot.repeat) for slot in slots if not slot.warmup}) == 4 * 3 * len(arms)


def test_a_crash_keeps_what_finished_and_resume_repeats_the_torn_round(tmp_path, arms):
    slots = schedule(arms, cells_of(["a", "b"], [1]), repeats=2, warmup=1)
    file = MeasurementFile(tmp_path / "m.jsonl", "plan")
    assert file.start(resume=False) == []

    def crash_on_the_ninth(slot):
        if slots.index(slot) == 8:
            raise OSError("gone")
        return measured(slot)

    with pytest.raises(OSError, match="gone"):
        list(run_interleaved(slots, crash_on_the_ninth, file.append))
    with (tmp_path / "m.jsonl").open("a", encoding="utf-8") as torn:
        torn.write('{"arm": "pla')

    finished = MeasurementFile(tmp_path / "m.jsonl", "plan").start(resume=True)
    assert len(finished) == 8
    left = remaining(slots, finished)
    assert [slot.round for slot in left] == [-1] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert remaining(slots, [measured(slot) for slot in slots]) == []


def test_a_file_of_another_plan_is_not_continued(tmp_path):
    MeasurementFile(tmp_path / "m.jsonl", "one").start(resume=False)
    with pytest.raises(ReportError, match="another comparison"):
        MeasurementFile(tmp_path / "m.jsonl", "two").start(resume=True)
    MeasurementFile(tmp_path / "m.jsonl", "two").start(resume=False)
    assert (tmp_path / "m.previous.jsonl").exists()


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "not a file of measurements"),
        ('{"schema": "measurements@2"}\n', "not a file"),
        ('{"schema": "measurements@1"}\nbroken\n{}\n', "damaged in line 2"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, text, message):
    path = tmp_path / "m.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=message):
        read_measurements(path)


def test_stop_ends_before_the_next_run(arms):
    stop, done = threading.Event(), []
    slots = schedule(arms, cells_of(["a"], [1]), repeats=2, warmup=0)

    def execute(slot):
        stop.set()
        return measured(slot)

    with pytest.raises(Stopped):
        list(run_interleaved(slots, execute, done.append, stop=stop))
    assert len(done) == 1


def test_sampler_seconds_add_up_over_samplers():
    run = Measurement(
        "a", 0, "p", 1, 0, 0, 0, "id", 9.0, traces=[{"seconds": {"sampler": 1.5}}, {"seconds": {"sampler": 2.0}}]
    )
    assert run.sampler_seconds == 3.5
    assert json.loads(json.dumps(run.__dict__))["traces"] == run.traces
    assert Measurement("a", 0, "p", 1, 0, 0, 0, "id", 9.0).sampler_seconds is None
