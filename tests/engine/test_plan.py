"""Plans: frozen, independent of order, faithful through JSON."""

import copy
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.compatibility import TECHNIQUES, add_request, compatible
from stretto.acceleration.errors import ConflictError, SchemaError, StrettoError
from stretto.acceleration.plan import Plan, Request
from stretto.acceleration.schemas import schema

values = st.one_of(st.integers(-5, 5), st.floats(-1, 1), st.booleans(), st.text(max_size=4))
requests = st.builds(
    Request,
    technique=st.sampled_from(["cache", "measure", "region"]),
    settings=st.dictionaries(st.text(max_size=5), values, max_size=4),
    interval=st.tuples(st.floats(0, 0.4), st.floats(0.5, 1)),
    required=st.booleans(),
)


@given(st.lists(requests, max_size=5).flatmap(lambda items: st.tuples(st.just(items), st.permutations(items))))
def test_order_never_matters(pair):
    items, shuffled = pair
    first, second = Plan(), Plan()
    for item in items:
        first = first.with_request(item)
    for item in shuffled:
        second = second.with_request(item)
    assert first == second and first.to_json() == second.to_json()


@given(st.lists(requests, max_size=4))
def test_json_round_trip_and_schema(items):
    plan = Plan(tuple(items))
    document = json.loads(json.dumps(plan.to_json()))
    jsonschema.validate(document, schema("plan"))
    assert Plan.from_json(document) == plan


def test_frozen_and_shared_by_deepcopy():
    plan = Plan((Request("cache", {"method": "Taylor"}),))
    assert copy.deepcopy({"a": [plan]})["a"][0] is plan
    with pytest.raises(TypeError):
        plan.requests[0].settings["method"] = "EasyCache"


@pytest.mark.parametrize("document", [{"schema": "plan@2", "requests": []}, {"schema": "trace@1"}, [], {"requests": []}])
def test_foreign_documents_are_refused(document):
    with pytest.raises(SchemaError, match="plan"):
        Plan.from_json(document)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.9, 0.1)])
def test_bad_interval_names_itself(interval):
    with pytest.raises(StrettoError, match="interval"):
        Request("cache", interval=interval)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "Magic"}, "method is 'Magic'; known methods: Taylor, EasyCache"),
        ({"interval": 0}, r"interval is 0; it must be a whole number in \[1, 16\]"),
        ({"order": 4}, r"order is 4; .* in \[0, 3\]"),
        ({"warmup": -1}, "warmup is -1"),
        ({"tail": 1.5}, "tail is 1.5"),
        ({"threshold": 10.5}, r"threshold is 10.5; it must be a number in \[0, 10\]"),
        ({"threshold": "much"}, "threshold is 'much'"),
        ({"speed": 2}, "unknown setting 'speed'"),
    ],
)
def test_bad_settings_name_field_value_and_range(settings, message):
    with pytest.raises(StrettoError, match=message):
        add_request(Plan(), Request("cache", settings))


def test_conflicts_are_symmetric():
    for first in TECHNIQUES:
        for second in TECHNIQUES:
            assert compatible(first, second) == compatible(second, first)


def test_second_cache_is_refused_and_second_measure_replaces():
    plan = add_request(Plan(), Request("cache", {"method": "Taylor"}))
    with pytest.raises(ConflictError, match=r"\(EasyCache\).*\(Taylor\)"):
        add_request(plan, Request("cache", {"method": "EasyCache"}))
    plan = add_request(plan, Request("measure", {"nonce": 1}))
    plan = add_request(plan, Request("measure", {"nonce": 2}))
    assert [dict(request.settings) for request in plan.of("measure")] == [{"nonce": 2}]
