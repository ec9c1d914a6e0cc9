"""Numbers in the README and the help pages: each has a JSON behind it, and tables and pages are what the results make."""

import importlib
import json
import math
import sys

import pytest

from load_pack import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
lab = importlib.import_module("lab")
chart, claims, numbers, page, readme, runner, suites, tables = (
    importlib.import_module(f"lab.{name}")
    for name in ("chart", "claims", "numbers", "page", "readme", "runner", "suites", "tables")
)
sys.path.remove(str(ROOT / "benchmarks"))
README = ROOT / "README.md"


def problems(text, path=README, said=None, exempt=None):
    return numbers.problems(path, text, claims.CLAIMS if said is None else said, claims.EXEMPT if exempt is None else exempt)


@pytest.mark.parametrize("path", readme.files(), ids=lambda path: path.name)
def test_every_figure_has_a_measurement_behind_it(path):
    assert problems(path.read_text(encoding="utf-8"), path) == []


def test_what_is_made_of_the_results_is_as_they_make_it():
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in page.generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run benchmarks/run.py --page"


@pytest.mark.parametrize(
    "words",
    ["It is 3.2x as fast.", "at 41 dB", "takes 12 ms", "+7.5 dB more", "a loss of 0.4893", "saves 20 %", "uses 1.5 GB",
     "5 to 8 %", "three runs took 4 minutes", "| arm | 17 |\n", "| arm | 1.44 |\n", "| arm | **2.10** | 40.1 / 33.3 dB |\n"],
)  # fmt: skip
def test_a_figure_that_nobody_measured_is_found(words):
    assert len(problems(f"# Title\n\n{words}", said=[], exempt=[])) >= 1


@pytest.mark.parametrize(
    "words",
    ["28 Euler steps, 64 x 64 pixels", "`--share 0.8`", "[page](results/v1.2.md)", "```\n1.25 s\n```", "| 8-bit | text |\n"],
)
def test_settings_code_and_addresses_are_no_figures(words):
    assert problems(f"# Title\n\n{words}", said=[], exempt=[]) == []


def test_a_table_without_its_marks_is_found():
    text = README.read_text(encoding="utf-8")
    assert len(problems(text.replace("<!-- numbers: caching-image -->\n", "", 1))) > 100


def test_claims_are_compared_with_the_results_and_made_anew():
    said = numbers.Claim("README.md", "A probe\ntook {:.1f} % of {} runs.", (lambda: 4.84, lambda: 5))
    assert problems("A probe took\n4.8 % of 5 runs.", said=[said], exempt=[]) == []
    wrong = "A probe took\n4.9 % of 5 runs."
    assert len(problems(wrong, said=[said], exempt=[])) == 2  # the claim is not there, and its figure has nothing behind it
    assert said.refreshed(wrong) == "A probe took\n4.8 % of 5 runs."
    with pytest.raises(KeyError):
        numbers.Claim("README.md", "{:.1f}", ("overhead/sizes/none",)).text()


def test_an_exemption_that_is_no_longer_needed_is_found():
    assert problems("Nothing.", said=[], exempt=[numbers.Exempt("README.md", "about 6 GB", "a download")]) != []


def test_the_front_is_what_nothing_beats_in_both():
    arms = {"a": (1.0, 60.0), "b": (2.0, 40.0), "c": (1.5, 39.0), "d": (3.0, 41.0)}
    found = [chart.Point(name, *values) for name, values in arms.items()]
    assert [point.name for point in chart.front(found)] == ["a", "d"]


def test_a_page_is_made_of_whatever_was_measured():
    text = page.page({}, {}, None)
    assert text.count("not measured yet") == len([job for suite in suites.SUITES for job in suite.jobs])
    part = {"quality": {"20 steps": {"psnr_mean": 40.0, "psnr_worst": 39.0}}, "speed": {"SLA": {"kept": 0.25}}}
    region = {"status": "failed", "seconds": 6, "reason": "R"}
    state = {"started": "2026-01-01", "machine": {"cpu": "one"}, "suites": {"region": region}}
    stamp = {"command": "C", "date": "2026-01-01", "seconds": 1, "machine": {"cpu": "one"}, "seeds": "S", "complete": False}
    text = page.page({}, {"sparse-attention": {**part, "lab": stamp}}, state)
    assert "| 20 steps |  | 40.0 / 39.0 dB |" in text and "**Not complete.**" in text
    assert "| region | failed | 0.1 min | R |" in text


def test_fewer_steps_are_read_between_their_neighbours():
    rows = {f"{calls} steps": {"calls": calls, "psnr": value} for calls, value in ((10, 30.0), (20, 40.0))}
    rows["plain"] = {"calls": 28, "psnr": math.inf}
    assert tables.rival(rows, 15, "psnr") == 35.0


def test_everything_fits_an_hour_and_every_script_is_named_once():
    assert sum(suite.minutes for suite in suites.SUITES) < 60
    results = [job.result for suite in suites.SUITES for job in suite.jobs]
    assert len(results) == len(set(results))
    with pytest.raises(KeyError, match="no suite is called 'cashing'"):
        suites.named(["cashing"])


SCRIPTS = {
    "good": "import json, sys; open(sys.argv[-1], 'w').write(json.dumps({'rows': 1}))",
    "bad": "import sys; print('the reason'); sys.exit(3)",
    "hangs": "import sys, time; open(sys.argv[-1], 'w').write('{\"half\": 1}'); time.sleep(60)",
    "silent": "",
}


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder of four scripts, and `suite(name, seconds)` around one of them."""
    (tmp_path / "benchmarks").mkdir()
    for name, text in SCRIPTS.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(text)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    return lambda name, seconds=30: suites.Suite(name, name, seconds / 60, (suites.Job(name, f"{name}-result", "", "", ""),), "1")


def test_a_suite_that_fails_or_hangs_costs_the_others_nothing(scripts, tmp_path):
    told = []
    run = runner.Runner(tmp_path / "run", suites.USUAL, 60, told.append)
    assert not run.run([scripts("bad"), scripts("hangs", 1), scripts("none"), scripts("silent"), scripts("good")])
    ends = {name: entry["status"] for name, entry in run.state["suites"].items()}
    assert ends == {"bad": "failed", "hangs": "timed out", "none": "absent", "silent": "failed", "good": "finished"}
    assert any("the reason" in line for line in told) and "bad" in run.ended()
    stamp = json.loads((tmp_path / "run" / "good-result.json").read_text())["lab"]
    assert stamp["complete"] and stamp["suite"] == "good" and stamp["machine"]["cpu"] and stamp["seconds"] >= 0
    assert json.loads((tmp_path / "run" / "hangs-result.json").read_text())["lab"]["complete"] is False


def test_a_run_goes_on_where_it_stopped(scripts, tmp_path, monkeypatch):
    run = runner.Runner(tmp_path / "run", suites.USUAL, 60, lambda line: None)
    assert run.run([scripts("good")])

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "_wait", stop)
    again = runner.Runner(tmp_path / "run", suites.USUAL, 60, lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        again.run([scripts("good"), scripts("bad")])
    assert {name: entry["status"] for name, entry in again.state["suites"].items()} == {"good": "finished", "bad": "interrupted"}
    with pytest.raises(ValueError, match="usual run"):
        runner.Runner(tmp_path / "run", suites.QUICK, 60)


def test_no_time_left_is_said(scripts, tmp_path):
    run = runner.Runner(tmp_path / "run", suites.USUAL, 0, lambda line: None)
    assert not run.run([scripts("good")]) and run.state["suites"]["good"]["status"] == "timed out"
