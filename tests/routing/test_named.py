"""Experts named one by one: the table says what the recipe says, for everybody or for each persona."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.clusters import Clusters
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.strategies import needs_of, resolve_parameters, route

NAMES = [f"p{i}" for i in range(4)]
FURTHER = ["maths", "poems"]
INPUTS = RoutingInputs(NAMES, NAMES[:3], clusters=Clusters({n: f"cluster_{i % 2:02d}" for i, n in enumerate(NAMES)}))

rows = st.dictionaries(
    st.sampled_from([*NAMES[:3], *FURTHER, "unified"]), st.floats(-2, 4), min_size=1
).filter(lambda row: sum(row.values()) > 0.01)  # fmt: skip


@given(rows)
def test_weights_for_everybody_are_one_row(row):
    table, notes = route("named", {"weights": row}, INPUTS)
    assert all(table.row(name) == {e: w for e, w in sorted(row.items()) if w != 0} for name in NAMES)
    [group] = table.groups()
    assert (group.adapter, group.personas, notes) == ("all", tuple(NAMES), ())
    reordered, _ = route("named", {"weights": dict(reversed(row.items()))}, INPUTS)
    assert reordered.to_bytes() == table.to_bytes()


@given(st.dictionaries(st.sampled_from(NAMES), rows, min_size=1))
def test_weights_for_each_persona_are_its_row_and_who_has_none_gets_the_base(given):
    table, notes = route("named", {"weights": given}, INPUTS)
    for name in NAMES:
        assert table.row(name) == {e: w for e, w in sorted(given.get(name, {}).items()) if w != 0}
    without = [name for name in NAMES if name not in given]
    said = (f"{without[0]}: is given no weights and gets the base ({len(without)} such personas)",) if without else ()
    assert notes == said


@given(st.dictionaries(st.sampled_from(FURTHER), st.floats(0.1, 4), min_size=1), st.integers(0, 100))
def test_a_control_keeps_the_weights_and_draws_other_experts(row, seed):
    control, _ = route("random_k", {"of": {"strategy": "named", "weights": row}, "seed": seed}, INPUTS)
    assert control.row("p0").keys() <= set(NAMES[:3])
    assert sorted(control.row("p0").values()) == pytest.approx(sorted(row.values()))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "weights is None.\nExpected the experts' weights, such as {ann: 0.7, bob: 0.3}"),
        ({}, "weights is {}"),
        ({"a": "much"}, "the weight of a is 'much'.\nExpected a finite number"),
        ({"a": float("nan")}, "the weight of a is nan"),
        ({"a": True}, "the weight of a is True"),
        ({"p0": {"a": 1}, "b": 1}, "the weight of p0 is {'a': 1}"),
        ({"p0": {"a": 1}, "p1": {"a": 1, "b": -1.5}}, "the weights for p1 sum to -0.5.\nExpected a sum above 0"),
        ({"p0": {}}, "the weights for p0 sum to 0"),
        ({"p3": 1.0}, "p3 has no adapter"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(RoutingError, match=re.escape(message)):
        route("named", {"weights": weights}, INPUTS)


def test_of_what_it_names_it_needs_what_is_trained_for_many():
    assert needs_of("named", {"weights": {"ann": 1}}) == frozenset()
    assert needs_of("named", {"weights": {"unified": 1, "cluster_00": 1}}) == {"unified", "cluster_adapters"}
    assert needs_of("random_k", {"of": {"strategy": "named", "weights": {"p0": {"unified": 1}}}}) == {"own", "unified"}
    with pytest.raises(RoutingError, match="`of` is named, which asks no neighbours"):
        resolve_parameters("neighbours_trained", {"of": {"strategy": "named", "weights": {"ann": 1}}})
