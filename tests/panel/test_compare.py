"""Whole comparisons against a fake server: the numbers, the files, and what happens when something breaks."""

import itertools
import json
import re
import threading

import jsonschema
import pytest

from stretto.web.panel.measure import arms as edit
from stretto.web.panel.measure.arms import Arm
from stretto.web.panel.measure.client import ComfyClient
from stretto.web.panel.measure.compare import arms_of, compare
from stretto.web.panel.measure.errors import MeasureError, ReportError, ServerDied, Stopped, WorkflowError
from stretto.web.panel.measure.interleave import schedule
from stretto.web.panel.measure.report import read_report, render_html, table_html, write_report

PROMPTS = ["flat hot dog", "noto blue heart"]


@pytest.fixture
def run(fake, workflow, tmp_path):
    """`run(server options, **compare options)` compares the cache workflow with its plain form."""

    def go(options=None, arms=None, prompts=PROMPTS, configure=lambda server: None, **settings):
        server, url = fake(**(options or {}))
        configure(server)
        plain, found = arms_of([("taylor", workflow)])
        settings = {"repeats": 3, "warmup": 1, "reference_steps": 200, "command": "python cli.py compare x", **settings}
        with ComfyClient(url) as client:
            report = compare(
                client, plain, found if arms is None else arms(plain), prompts, [7], out_dir=tmp_path, **settings
            )
        return report, server

    return go


def arm_of(report, name):
    return next(arm for arm in report["arms"] if arm["name"] == name)


def test_a_comparison_measures_what_the_server_did(run):
    report, server = run()
    assert [arm["role"] for arm in report["arms"]] == ["plain", "accelerated", "fewer-steps", "reference"]
    taylor, fewer = report["arms"][1], report["arms"][2]
    assert taylor["calls"]["computed"] == 16 and taylor["calls"]["skipped"] == 12
    assert fewer["steps"] == 16, "the competitor has as many steps as the accelerated arm computed"
    assert taylor["ratio"]["sampler"]["median"] == pytest.approx(28 / (16 + 0.05 * 12))
    assert taylor["ceiling"] == pytest.approx({"ratio": 28 / (16 + 0.05 * 12), "share_of_skipped": 0.05})
    assert taylor["verdict"] == "faster"
    assert taylor["quality"]["psnr"]["mean"] > fewer["quality"]["psnr"]["mean"]
    assert arm_of(report, "plain")["quality"]["reference_psnr"]["count"] == 2, (
        "the plain row has its distance to 200 steps too"
    )
    assert taylor["memory"] == {"kind": "rss", "peak_bytes": 500_000_000, "store_peak_bytes": 65536}
    assert {"decision": "forecast", "reason": "interval", "evaluations": 72} in taylor["reasons"]
    assert len(server.runs) == 1 + 3 * (1 + 2 * 3) + 2, "probe, warm-up, rounds, references"


def test_every_arm_carries_measure_with_a_new_nonce_and_saves_nothing(run):
    _, server = run()
    nonces = [
        node["inputs"]["nonce"]
        for api in server.runs
        for node in api.values()
        if node["class_type"] == "StrettoMeasure"
    ]
    assert len(nonces) == len(set(nonces)) == len(server.runs)
    assert not any(node["class_type"] in ("SaveImage", "StrettoReport") for api in server.runs for node in api.values())


def test_report_follows_its_schema_and_the_page_is_complete_and_offline(run, schema, tmp_path):
    jsonschema.Draft202012Validator.check_schema(schema)
    report, _ = run(batch=2)
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert read_report(tmp_path / "report.json") == report
    assert "/x/y" not in json.dumps(report["server"]), "paths of the server's machine stay out"
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 2 + 2 * (4 + 3 + 2)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page) and "@import" not in page and "url(" not in page
    assert (
        "<svg" in page and "flat hot dog" in page and "python cli.py compare x" in page and "4 times brighter" in page
    )


def test_pages_escape_what_people_type(run, tmp_path):
    run(prompts=['<script>alert("x")</script>'])
    assert "<script>alert" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_plain_against_plain_shows_no_difference(run):
    noise = itertools.cycle([1.0, 1.04, 0.97, 1.02, 0.99, 1.01, 0.98])
    report, _ = run(
        {"drift": lambda n: next(noise) * (1 + 0.004 * n)},
        arms=lambda plain: [Arm("again", "Plain again", plain)],
        repeats=5,
    )
    again = arm_of(report, "again")
    assert again["ratio"]["sampler"]["low"] <= 1.0 <= again["ratio"]["sampler"]["high"]
    assert again["verdict"] == "no measurable difference"
    assert again["quality"]["psnr"] == {"mean": "inf", "worst": "inf", "count": 2, "identical": 2}
    assert not any(arm["role"] == "fewer-steps" for arm in report["arms"])
    assert "identical" in table_html(report) and "identical pictures" in report["headline"][0]


def test_drift_does_not_reach_the_ratio(run, monkeypatch):
    def ratio():
        report, _ = run({"drift": lambda n: 1 + 0.03 * n}, repeats=6, reference_steps=0)
        return report["arms"][1]["ratio"]["sampler"]["median"]

    assert ratio() == pytest.approx(28 / 16.6, rel=0.03)

    def one_arm_after_the_other(arms, cells, repeats, warmup):
        return sorted(schedule(arms, cells, repeats, warmup), key=lambda slot: (not slot.warmup, arms.index(slot.arm)))

    monkeypatch.setattr("stretto.web.panel.measure.compare.schedule", one_arm_after_the_other)
    assert ratio() < 0.9 * 28 / 16.6, "without interleaving the second arm pays for the drift"


def test_server_without_the_pack_gives_total_time_only(run, schema):
    def fewer(plain):
        return [Arm("short", "Half the steps", edit.fewer_steps(plain, 14))]

    report, server = run({"with_pack": False}, arms=fewer, reference_steps=0)
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    short = arm_of(report, "short")
    assert (
        report["server"]["timing"] == "total only"
        and short["ratio"]["sampler"] is None
        and short["ratio"]["total"]["count"] == 6
    )
    assert "The server lacks the Stretto nodes: total time only." in report["notes"]
    assert len({json.dumps(api, sort_keys=True) for api in server.runs}) == len(server.runs), (
        "the node cache never hits"
    )


def test_a_run_from_the_node_cache_is_refused(run, monkeypatch):
    monkeypatch.setattr("stretto.web.panel.measure.compare.secrets.randbits", lambda bits: 5)
    with pytest.raises(MeasureError, match="node cache"):
        run()


def test_a_dead_server_loses_nothing_and_resume_continues(run, tmp_path, schema):
    def die_late(server):
        server.fail, server.fail_at = "die", 12

    with pytest.raises(ServerDied):
        run(configure=die_late)
    kept = (tmp_path / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == 1 + 12 - 4, "header, and all runs but probe and warm-up"
    report, server = run(resume=True)
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert len(report["measurements"]) == 3 * 6 + 2
    assert len(server.runs) == 1 + 3 + 3 * (6 - 2) + 2, "two rounds were complete"


def test_resume_refuses_another_plan(run):
    run()
    with pytest.raises(ReportError, match="another comparison"):
        run(resume=True, steps=20)


def test_stop_reports_the_complete_rounds(run):
    stop = threading.Event()

    def after_ten(progress):
        if progress.done == 10:
            stop.set()

    report, _ = run(stop=stop, progress=after_ten)
    assert not report["settings"]["complete"] and report["arms"][1]["runs"] == 2
    assert "Stopped early: 2 of 6 rounds were measured." in report["notes"]


def test_stop_before_a_complete_round_says_so(run):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match=r"nothing to report|Stopped"):
        run(stop=stop)


def test_progress_counts_to_the_end(run):
    seen = []
    run(progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 1 + 3 * 7 + 2
    assert {p.phase for p in seen} == {"probe", "warm-up", "measuring", "reference", "scoring"}
    assert sum(p.finished is not None and p.phase == "measuring" for p in seen) == 18


def test_pictures_that_change_between_repeats_are_reported(run, monkeypatch):
    def unstable(server):
        original, count = server._finish, itertools.count()

        def finish(key, api, sampler, number):
            api[sampler]["inputs"]["seed"] += next(count)
            original(key, api, sampler, number)

        server._finish = finish

    report, _ = run(configure=unstable)
    assert "repeats with one seed gave different pictures for 2 of 2 prompts" in report["arms"][0]["notes"][0]


def test_prompt_and_seed_of_the_workflow_are_the_default(fake, workflow, tmp_path):
    _, url = fake()
    plain, arms = arms_of([("x", workflow)])
    with ComfyClient(url) as client:
        report = compare(client, plain, arms, repeats=1, warmup=0, out_dir=tmp_path, reference_steps=0)
    assert report["settings"]["prompts"] == ["flat hot dog"] and report["settings"]["seeds"] == [7]
    assert arm_of(report, "plain")["seconds"]["sampler"]["count"] == 1
    assert report["arms"][1]["verdict"] == "too few rounds for a verdict"


def test_reports_of_other_versions_are_refused(run, tmp_path):
    report, _ = run()
    for content, message in (
        (json.dumps({**report, "schema": "report@2"}), "report@2; this version reads report@1"),
        (json.dumps({"schema": "trace@1"}), "not a report"),
        ("[]", "not a report"),
        ("{", "not a JSON file"),
    ):
        (tmp_path / "other.json").write_text(content, encoding="utf-8")
        with pytest.raises(ReportError, match=message):
            read_report(tmp_path / "other.json")
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def test_a_report_can_be_drawn_again_from_its_json(run, tmp_path):
    report, _ = run()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert render_html(read_report(tmp_path / "report.json"), tmp_path) == page
    write_report(report, tmp_path)


def test_only_workflows_that_differ_from_plain_become_arms(workflow):
    plain, arms = arms_of(
        [("taylor", workflow), ("plain", edit.set_seed(edit.plain(workflow), 99)), ("again", workflow)]
    )
    assert [arm.name for arm in arms] == ["taylor-every-2-order-1", "taylor-every-2-order-1-2"]
    with pytest.raises(WorkflowError, match="nothing to compare"):
        arms_of([("plain", plain)])


def test_nonsense_counts_are_refused(run):
    with pytest.raises(WorkflowError, match="at least one repeat"):
        run(repeats=0)
