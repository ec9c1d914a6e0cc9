"""Reports: strips, gains, memory, and one test for every piece of advice."""

import jsonschema
import pytest

from stretto.acceleration.advice import RULES, advice
from stretto.acceleration.figures import comparisons, counts, plain_run, rows, speed_up, strip
from stretto.acceleration.savings import expected, savings
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import NO_PLAIN, gain, summary

from .traces import compare, make_trace

MIB = 2**20
TAYLOR = {"method": "Taylor", "order": 1}
ACTIVE = [("cache", "active")]


def strips(trace):
    return {name: strip(row) for name, row in rows(trace).items()}


def test_the_hand_made_traces_are_traces():
    trace = make_trace("##~.", uncond="###.", techniques=[("cache", "active", 1, 2)], settings=TAYLOR)
    jsonschema.validate(compare(trace, [None, 0.1, 0.2, 0.3], 0.5, {0}), schema("trace"))


def test_branches_that_agree_share_a_strip():
    trace = make_trace("##~#.")
    assert strips(trace) == {"all": "##~#."}
    assert "##~#.   # computed 3  ~ forecast 1  . reused 1" in summary(trace)


def test_branches_that_differ_have_a_strip_each():
    trace = make_trace("##~#.", uncond="###..")
    assert strips(trace) == {"cond": "##~#.", "uncond": "###.."}
    lines = summary(trace).splitlines()
    assert lines[1:4] == ["cond    ##~#.", "uncond  ###..", "# computed 2  . reused 1  + partly 2"]


def test_a_branch_that_took_no_part_leaves_a_blank():
    trace = make_trace("####")
    del trace["evaluations"][2]["branches"][1]
    assert strips(trace) == {"cond": "####", "uncond": "## #"}


def test_runs_without_branches_have_the_evaluations_strip():
    trace = make_trace("###")
    for entry in trace["evaluations"]:
        entry["branches"] = []
    assert strips(trace) == {"all": "###"} and counts(trace)["computed"] == 3


def test_a_table_computes_steps_in_part():
    """The same blocks ran, but only a table decides about single ones: elsewhere they are the method's front."""
    trace = make_trace("#...", blocks=2)
    assert strips(trace) == {"all": "#..."}
    for entry, share in zip(trace["evaluations"], (1.0, 0.5, 0.25, 0.0)):
        entry["computed_share"] = share
    assert strips(trace) == {"all": "#++."} and counts(trace)["mixed"] == 2


def test_the_prediction_counts_what_skipped_steps_cost():
    trace = make_trace("##~~", cost=0.5)
    assert expected(trace) == pytest.approx(4 / (2 + 0.5 * 2))
    assert "A skipped step costs 50% of a computed one: 1.33x is the most this run could gain." in summary(trace)
    assert expected(make_trace("####")) is None


def thin(trace, alone=(), small=(), seconds=1.0):
    """Take the unconditional branch from some evaluations, and make some a quarter as large; seconds follow the work."""
    for entry in trace["evaluations"]:
        if entry["index"] in alone:
            del entry["branches"][1]
        for branch in entry["branches"]:
            branch["tokens"] = 4 if entry["index"] in small else 16
        entry["seconds"] *= sum(branch["tokens"] for branch in entry["branches"]) / 32
    trace["seconds"]["sampler"] = sum(entry["seconds"] for entry in trace["evaluations"])
    return trace


def test_saved_guidance_and_small_stages_are_predicted_from_rows_and_tokens():
    guided = thin(make_trace("########", techniques=[("guidance", "active")]), alone=(2, 3, 5, 6))
    assert savings(guided) == {"guidance": pytest.approx(16 / 12)}
    assert "Predicted: guidance saved 1.33x, by what this run's own steps took." in summary(guided)
    staged = thin(make_trace("########", techniques=[("resolution", "active")]), small=(0, 1, 2, 3))
    assert savings(staged) == {"resolution": pytest.approx(8 / 5)}
    assert gain(staged, make_trace("########")).startswith("predicted 1.60x · measured 1.60x")
    assert savings(thin(make_trace("####"), alone=(1,))) == {}, "no technique of ours left that row out"


def test_together_techniques_save_the_product_of_what_each_saves():
    techniques = [("cache", "active"), ("guidance", "active"), ("resolution", "active")]
    trace = thin(make_trace("####~~##~~", cost=0.25, techniques=techniques), alone=(2, 6, 8), small=(0, 1, 2))
    factors = savings(trace)
    assert list(factors) == ["resolution", "guidance", "caching"]
    left = [2, 2, 1, 8, 8 / 4, 8 / 4, 4, 8, 4 / 4, 8 / 4]  # rows x tokens / 4, skipped ones at a quarter
    assert expected(trace) == pytest.approx(80 / sum(left))
    assert expected(trace) == pytest.approx(factors["resolution"] * factors["guidance"] * factors["caching"])
    assert f"together {expected(trace):.2f}x" in summary(trace) and "by skipping." in summary(trace)


def test_the_prediction_goes_by_the_run_s_own_clock():
    """A row alone takes three quarters of two, and a tenth of the sampler's time passes between evaluations."""
    trace = thin(make_trace("########", techniques=[("guidance", "active")]), alone=(2, 3, 5, 6))
    for entry in trace["evaluations"]:
        entry["seconds"] = 1.0 if len(entry["branches"]) == 2 else 0.75
    trace["evaluations"][0]["seconds"] = 3.0  # warm-up, which a plain run pays for too
    trace["seconds"]["sampler"] = 9.0 + 1.0
    assert savings(trace, by_clock=False) == {"guidance": pytest.approx(16 / 12)}
    assert savings(trace) == {"guidance": pytest.approx((8 + 3) / (7 + 3))}


def test_steps_that_something_else_made_cheaper_stand_for_no_plain_one():
    trace = make_trace("######~~", cost=0.1)
    for entry in trace["evaluations"][2:5]:
        entry |= {"attention_kept": 0.25, "seconds": 0.4}
    trace["seconds"]["sampler"] = sum(entry["seconds"] for entry in trace["evaluations"])
    assert savings(trace) == {"caching": pytest.approx(8 / 6.2)}


def test_small_evaluations_that_only_measure_are_not_the_plain_runs():
    trace = thin(make_trace("####", techniques=[("resolution", "active")]), small=(1, 2))
    trace["resolution"] = {"method": "Corrected"}
    trace["evaluations"][1]["position"] = trace["evaluations"][0]["position"]
    assert savings(trace) == {"resolution": pytest.approx(3 / 2.5)}


def test_the_measurement_names_its_plain_run():
    trace, plain = make_trace("##~~~~~~", cost=0.0), make_trace("#" * 8, seed=5)
    assert speed_up(trace, plain) == 4.0
    assert "4.00x was measured against the plain run with seed 5 (8.000 s in the sampler)" in summary(trace, plain)
    assert gain(trace, plain) == "predicted 4.00x · measured 4.00x"
    assert NO_PLAIN in summary(trace) and gain(trace, None).endswith("no plain run to compare with")
    assert NO_PLAIN not in summary(plain) and gain(plain, None) == "", "nothing was to be gained"


def test_a_gain_beyond_the_possible_one_is_doubted():
    trace, slow = make_trace("##~~", cost=0.0), make_trace("####")
    assert "loaded the model" not in summary(trace, slow)
    slow["seconds"]["sampler"] = 40.0
    assert "the plain run may have loaded the model first" in summary(trace, slow)


def test_a_plain_run_did_the_same_work_and_all_of_it():
    trace = make_trace("##~~", techniques=[("measure", "active"), ("cache", "active")])
    fitting = make_trace("####", techniques=[("measure", "active"), ("cache", "off")], seed=7)
    newer = make_trace("####", techniques=[("measure", "active")], seed=8)
    others = [
        make_trace("##~~"),
        make_trace("#####"),
        make_trace("####", cfg=1.0),
        make_trace("####", latent_shape=[2, 16, 3, 6, 4]),
        make_trace("####", model={**trace["model"], "blocks": 30}),
        make_trace("####", sampler={**trace["sampler"], "name": "heun"}),
        make_trace("####", outcome="interrupted"),
        make_trace("####", techniques=[("profile", "active")]),
        make_trace("####", techniques=ACTIVE),
    ]
    assert plain_run(trace, others) is None
    assert plain_run(trace, [*others, fitting, *others]) is fitting
    assert plain_run(trace, [fitting, newer]) is newer
    assert plain_run(newer, [newer]) is None


def test_memory_is_held_against_what_was_announced():
    techniques = [("cache", "active", 14 * MIB, 600 * MIB), ("table", "off", 800 * MIB, 600 * MIB)]
    trace = make_trace("##~~", techniques=techniques)
    assert "Stored features" not in summary(trace)
    trace["memory"]["store_peak_bytes"] = 12 * MIB
    assert "Stored features: 12 MiB at most, 14 MiB announced, 600 MiB allowed." in summary(trace)
    trace["techniques"] = []
    assert "Stored features: 12 MiB at most." in summary(trace)


def test_changes_are_those_of_free_steps():
    trace = compare(make_trace("##.#.#"), [None, 0.9, 0.02, 0.08, 0.04, 0.9], 0.05, rails={0, 1, 5})
    assert [seen.place for seen in comparisons(trace) if seen.free and seen.skipped] == [2, 4]
    assert "Change where steps were free: 0.02 to 0.08, threshold 0.05." in summary(trace)
    falling = compare(make_trace("##.#"), [None, 0.1, 0.02, 0.08], [0.08, 0.06, 0.04, 0.02])
    assert "threshold 0.06 to 0.02." in summary(falling)


def test_an_unfinished_run_says_so():
    assert "This run was failed" not in summary(make_trace("###"))
    assert "This run was interrupted" in summary(make_trace("###", outcome="interrupted"))


# Advice: when it comes, and when it stays away.


def only(trace, text):
    """The trace brings this advice and no other."""
    found = advice(trace)
    assert len(found) == 1 and text in found[0], found
    assert f"Advice: {found[0]}" in summary(trace)


def test_good_runs_need_no_advice():
    assert advice(make_trace("####~~#~~#~~#~~###", techniques=ACTIVE, settings=TAYLOR)) == []
    assert advice(make_trace("#" * 28, techniques=[("measure", "active")])) == []
    assert len(RULES) == len(set(RULES))


def test_advice_about_memory():
    off = make_trace("#" * 28, techniques=[("cache", "off", 812 * MIB, 600 * MIB)], settings=TAYLOR)
    only(off, "812 MiB of features do not fit into the 600 MiB they may take")
    assert advice(make_trace("#" * 28, techniques=[("cache", "off")], settings=TAYLOR)) == []


def test_advice_about_a_threshold_too_low():
    values = [None, 0.01, 0.2, 0.083, 0.1, 0.02]
    trace = compare(make_trace("######" + "#" * 6, techniques=ACTIVE), values, 0.05, rails={0, 1, 5})
    only(trace, "the smallest change was 0.083, the threshold there 0.05. A threshold above 0.083 lets steps be skipped")
    assert advice(compare(make_trace("###.##" + "#" * 6, techniques=ACTIVE), values, 0.09, rails={0, 1, 5})) == []


def test_advice_about_few_steps():
    short = make_trace("#######~", techniques=ACTIVE, settings=TAYLOR)
    only(short, "8 steps: caching gains at most 1.13x here; attention, quantization or the VAE nodes help more")
    assert advice(make_trace("##~~~~~~", techniques=ACTIVE, settings=TAYLOR)) == []
    assert advice(make_trace("#" * 27 + "~", techniques=ACTIVE, settings=TAYLOR)) == []


def test_advice_about_noisy_samplers():
    def run(method, status, sampler="euler_ancestral"):
        stochastic = {"name": sampler, "stochastic": sampler != "euler"}
        return make_trace(
            "####..#..#..####", techniques=[("cache", status)], settings={"method": method}, sampler=stochastic
        )

    only(run("Taylor", "reduced"), "euler_ancestral adds noise at every step")
    for other in (run("EasyCache", "reduced"), run("Taylor", "active"), run("Taylor", "reduced", "euler")):
        assert advice(other) == []


def test_advice_about_expensive_skips():
    def run(method, blocks=0, cost=0.45):
        return make_trace(
            "####..#..#..####", cost=cost, blocks=blocks, techniques=ACTIVE, settings={"method": method}
        )

    only(run("Taylor"), "costs 45% of a computed one: embeddings and head dominate at this size; EasyCache and Output")
    only(run("EasyCache"), "embeddings and head dominate at this size. Larger")
    only(run("DBCache", blocks=2), "50% of the blocks run in it. Fewer first_blocks")
    assert advice(run("Taylor", cost=0.2)) == []
    table = run("Taylor", blocks=2)
    table["evaluations"][4]["computed_share"] = 0.5
    assert advice(table) == [], "a table is meant to compute parts"
