"""The step timeline: one row per branch that differs, one mark per evaluation, the same drawing in light and dark."""

import re
import sys
import xml.etree.ElementTree as ET

import pytest

from stretto.web.panel.measure.timeline import DECISIONS, LIMIT, branches_of, rows_of, timeline_svg

trace = sys.modules["fake_comfy"].trace


@pytest.fixture
def taylor():
    return trace("id", 28, {"interval": 2}, 0.01)


def titles_of(*named):
    return [title.text for title in ET.fromstring(timeline_svg(named)).iter("title")]


def test_one_mark_per_evaluation(taylor):
    titles = titles_of(("Plain", trace("id", 28, None, 0.01)), ("Taylor", taylor))
    assert len(titles) == 2 * 28
    assert titles[-1] == "evaluation 28: computed, σ 0.0357, 10.0 ms"
    assert "evaluation 5: forecast (interval), σ 0.857, 0.5 ms" in titles


def test_branches_that_differ_have_a_row_each(taylor):
    assert rows_of(taylor) == [""]
    taylor["evaluations"][5]["branches"][1]["decision"] = "reused"
    assert rows_of(taylor) == ["cond", "uncond"]
    titles = titles_of(("Taylor", taylor))
    assert len(titles) == 2 * 28
    assert titles[-1] == "evaluation 28, uncond: computed, σ 0.0357, 10.0 ms"


def test_what_was_compared_stands_under_its_threshold(taylor):
    assert LIMIT not in timeline_svg([("Taylor", taylor)])
    for place, evaluation in enumerate(taylor["evaluations"]):
        evaluation |= {"compared": None if place == 0 else 0.01 * place, "threshold": 0.1, "on_rails": place < 3}
    svg = timeline_svg([("FBCache", taylor)])
    assert svg.count(LIMIT) == 27 and svg.count('fill="none"') == 2
    assert "evaluation 6: change 0.05, threshold 0.1" in titles_of(("FBCache", taylor))


def test_counts_colours_and_axis(taylor):
    svg = timeline_svg([("Taylor <b>", taylor)])
    assert svg.count(DECISIONS["forecast"][0]) == 12 + 1, "marks and the legend"
    assert "16 computed · 12 forecast" in svg and "Taylor &lt;b&gt;" in svg
    assert [float(tick) for tick in re.findall(r'font-size="12">([\d.]+)</text>', svg)] == [1, 0.75, 0.5, 0.25, 0]
    assert "xmlns" not in svg and "currentColor" in svg


def test_traces_with_missing_parts(taylor):
    bare = {
        **taylor,
        "sigmas": [],
        "evaluations": [{**e, "branches": [], "seconds": None} for e in taylor["evaluations"]],
    }
    assert branches_of(bare) == [] and branches_of(taylor) == ["cond", "uncond"]
    assert len(list(ET.fromstring(timeline_svg([("Bare", bare)])).iter("title"))) == 28
    assert "total times" in timeline_svg([])


def test_a_branch_that_sat_out_leaves_a_gap(taylor):
    taylor["evaluations"][5]["branches"] = taylor["evaluations"][5]["branches"][:1]
    assert len(list(ET.fromstring(timeline_svg([("Taylor", taylor)])).iter("title"))) == 2 * 28 - 1
