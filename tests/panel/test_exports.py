"""Exports and the drawing of speed against quality."""

import csv
import io
import itertools
import json
import math
import random
import re
from xml.etree import ElementTree

import pytest

from stretto.web.panel.measure.exports import csv_of, json_of
from stretto.web.panel.measure.front import front_svg, pareto, points_of


def spread(median, low=None, high=None):
    low, high = low or median, high or median
    return {"count": 6, "median": median, "q1": low, "q3": high, "minimum": low, "maximum": high, "low": low, "high": high}


def quality(mean, worst):
    return {"mean": mean, "worst": worst, "count": 4, "identical": 4 if mean == "inf" else 0}


def arm(label, role, ratio, psnr, reference=None):
    return {
        "label": label, "role": role, "verdict": "faster", "steps": 28, "runs": 6,
        "seconds": {"sampler": spread(1.5), "total": None},
        "ratio": {"sampler": ratio, "total": None}, "calls": {"evaluations": 28, "computed": 16, "forecast": 12, "reused": 0},
        "ceiling": None, "quality": {"psnr": psnr, "ssim": None, "reference_psnr": reference},
        "memory": {"kind": "rss", "peak_bytes": 5, "store_peak_bytes": 6},
    }  # fmt: skip


@pytest.fixture
def report():
    return {
        "created": "2026-01-01T00:00:00+00:00", "settings": {"reference_steps": 0},
        "arms": [
            arm("Plain", "plain", None, None),
            arm("Taylor <every 2>", "accelerated", spread(1.7, 1.6, 1.8), quality(36.0, 31.0)),
            arm("=HYPERLINK()", "accelerated", spread(1.4, 1.3, 1.5), quality(33.0, 29.0)),
            arm("Same sampler", "fewer-steps", spread(1.72, 1.71, 1.73), quality(25.0, 20.0)),
            arm("Lossless", "accelerated", spread(1.1), quality("inf", "inf")),
        ],
    }  # fmt: skip


def test_csv_has_every_number_and_no_formula(report):
    rows = list(csv.DictReader(io.StringIO(csv_of(report))))
    assert [row["label"] for row in rows] == ["Plain", "Taylor <every 2>", "'=HYPERLINK()", "Same sampler", "Lossless"]
    taylor = rows[1]
    assert (taylor["ratio_sampler_median"], taylor["ratio_sampler_low"], taylor["psnr_mean"]) == ("1.7", "1.6", "36.0")
    assert taylor["calls_computed"] == "16" and taylor["memory_peak_bytes"] == "5" and taylor["ssim_mean"] == ""
    assert rows[4]["psnr_mean"] == "inf" and rows[0]["ratio_sampler_median"] == ""


def test_json_is_the_report(report):
    assert json.loads(json_of(report)) == report


def test_pareto_by_hand():
    assert pareto([(1.0, 40.0), (1.5, 30.0), (1.4, 25.0), (2.0, 20.0)]) == [0, 1, 3]
    assert pareto([(1.0, math.inf), (1.0, 20.0), (0.9, math.inf)]) == [0]
    assert sorted(pareto([(1.0, 1.0), (1.0, 1.0)])) == [0, 1] and pareto([]) == []
    assert pareto([(math.nan, 1.0), (1.0, math.nan), (1.0, 1.0)]) == [2]


def test_pareto_against_its_definition():
    rng = random.Random(1)
    for _ in range(300):
        points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(rng.randint(1, 9))]
        beaten = {
            i for (i, a), b in itertools.product(enumerate(points), points)
            if b != a and b[0] >= a[0] and b[1] >= a[1]
        }  # fmt: skip
        assert set(pareto(points)) == set(range(len(points))) - beaten


def test_the_drawing_holds_every_arm_and_the_front(report):
    svg = front_svg(report)
    ElementTree.fromstring(svg)
    assert svg.count("<title>") == 5 and "Taylor &lt;every 2&gt;: 1.70× [1.60, 1.80], 36.0 dB, 31.0 dB at worst" in svg
    assert "identical" in svg and "PSNR to plain" in svg
    assert "#fff" in svg and "nan" not in svg and "inf" not in svg
    line = re.search(r'class="pareto" d="M([^"]+)"', svg)[1]
    assert line.count("L") == 2, "lossless, Taylor, fewer steps; plain and the other arm are beaten"


def test_against_a_reference_the_plain_run_has_its_own_distance(report):
    report["settings"]["reference_steps"] = 200
    for number, one in enumerate(report["arms"]):
        one["quality"]["reference_psnr"] = quality(30.0 - number, 25.0)
    points, title = points_of(report)
    assert points[0].quality == 30.0 and title == "PSNR to 200 steps, dB"
    assert "identical" not in front_svg(report)


def test_with_one_arm_there_is_nothing_to_draw(report):
    report["arms"] = report["arms"][:1]
    assert front_svg(report).startswith("<p>")


def test_one_arm_that_equals_the_plain_one_still_has_a_scale(report):
    report["arms"] = [report["arms"][0], arm("Again", "accelerated", spread(1.0), quality("inf", "inf"))]
    ElementTree.fromstring(front_svg(report))
