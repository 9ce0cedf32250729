"""The routing table: what it holds, what it refuses, what its file says."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.lines import SCHEMA
from raymerge.routing.table import RoutingTable

names = st.sampled_from(["ann", "bob", "cy", "dee", "eve"])
weights = st.floats(0.01, 1.0)
rows = st.dictionaries(names, st.dictionaries(names, weights))


def flat(by_persona):
    return [(p, e, w) for p, row in by_persona.items() for e, w in row.items()]


@given(rows, st.randoms())
def test_the_file_keeps_everything_in_any_order(by_persona, dice):
    lines = flat(by_persona)
    table = RoutingTable.from_rows(by_persona, lines)
    dice.shuffle(lines)
    again = RoutingTable.from_rows(sorted(by_persona, reverse=True), lines)
    assert table.to_bytes() == again.to_bytes()
    for most_lines in (0, 100):
        read = read_back(table, most_lines)
        assert read.personas == table.personas == tuple(sorted(by_persona))
        assert {p: read.row(p) for p in read.personas} == {p: dict(sorted(r.items())) for p, r in by_persona.items()}
        assert read.assignments().equals(table.assignments())
        assert read == table == pickle.loads(pickle.dumps(table))
    assert table.num_rows == len(lines)


def read_back(table, most_lines):
    from raymerge.routing.lines import read_lines

    return RoutingTable.build(*read_lines(table.to_arrow(most_lines), "x"))


def test_write_and_read_keep_personas_without_contributors(tmp_path):
    table = RoutingTable.from_rows(["b", "a", "c"], [("a", "x", 0.25), ("a", "y", 0.75)])
    location = str(tmp_path / "deep" / "routing.parquet")
    table.write(location)
    assert RoutingTable.read(location) == table
    stored = pq.read_table(location)
    assert stored.schema.equals(SCHEMA)
    assert stored["persona"].to_pylist() == ["a", "a", "b", "c"]
    assert stored["expert"].to_pylist() == ["x", "y", None, None]
    assert stored["module_group"].to_pylist() == ["*", "*", None, None]


def test_a_shared_row_is_referred_to_where_the_file_would_be_too_long():
    shared = dict.fromkeys("abc", "all")
    table = RoutingTable.from_rows("abc", [(p, e, 0.5) for p in "abc" for e in "xy"], adapters=shared)
    assert len(table.rows) == 1
    assert len(table.to_arrow()) == 6
    short = table.to_arrow(most_lines=5)
    assert short["same_as"].to_pylist() == [None, None, "a", "a"]
    assert read_back(table, 5) == table
    [group] = table.groups()
    assert (group.adapter, group.personas, group.experts) == ("all", ("a", "b", "c"), (("x", 0.5), ("y", 0.5)))


def test_equal_rows_are_one_group_and_an_empty_row_is_the_base():
    table = RoutingTable.from_rows(
        "abcd", [("a", "x", 0.1 + 0.2), ("a", "y", 0.7), ("c", "y", 0.7), ("c", "x", 0.3), ("d", "x", 1.0)]
    )
    groups = {g.adapter: g for g in table.groups()}
    assert set(groups) == {"a", "base", "d"}
    assert groups["a"].personas == ("a", "c")  # 0.1 + 0.2 and 0.3 are the same weight
    assert (groups["a"].single, groups["base"].single, groups["d"].single) == (None, None, "x")
    assert table.assignments().to_pydict() == {"persona": [*"abcd"], "adapter": ["a", None, "a", "d"]}


def test_a_row_that_labels_share_is_set_apart_for_each_and_written_so():
    rows = [(p, "x", 1.0) for p in "abcd"] + [("e", "y", 1.0), ("f", "y", 1.0)]
    labels = {"b": "left", "c": "right", "d": "right", "e": "left", "f": "left"}
    own = RoutingTable.from_rows("abcdefg", rows).apart(labels)
    groups = {g.adapter: g.personas for g in own.groups()}
    assert groups == {"a": ("a",), "b": ("b",), "c": ("c", "d"), "e": ("e", "f"), "base": ("g",)}
    assert [own.row(name) for name in "abcd"] == [{"x": 1.0}] * 4
    named = RoutingTable.from_rows("abcdefg", rows[:4], adapters=dict.fromkeys("abcd", "all")).apart(labels)
    groups = {g.adapter: g.personas for g in named.groups()}
    assert groups == {"all": ("a",), "all_left": ("b",), "all_right": ("c", "d"), "base": ("e", "f", "g")}
    for table in (own, named):
        assert read_back(table, 99).assignments().equals(table.assignments())
        assert table.apart(labels) == table


def test_what_people_read():
    table = RoutingTable.from_rows("ab", [("a", "x", 1 / 3), ("a", "y", 2 / 3)])
    info = table.info(strategy="top_k", parameters={"k": 2}, notes=["n"], clusters={"a": "cluster_00"})
    assert info == {
        "strategy": "top_k", "parameters": {"k": 2}, "notes": ["n"],
        "personas": {
            "a": {"adapter": "a", "cluster": "cluster_00",
                  "experts": [{"expert": "y", "weight": 0.666667}, {"expert": "x", "weight": 0.333333}]},
            "b": {"adapter": None, "experts": []},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("persona_1", "x", 1.0)], "'persona_1', who is no persona of it. Did you mean persona_01"),
        ([("persona_01", "x", 1.0), ("persona_01", "x", 0.5)], "two weights for the expert x"),
        ([("persona_01", "x", float("nan"))], "the weight of x for persona_01 is nan"),
        ([("persona_01", "x", float("inf"))], "is inf"),
        ([("persona_01", "x", -1.0), ("persona_01", "y", 0.5)], "sum to -0.5"),
    ],
)
def test_impossible_rows_are_refused(lines, message):
    with pytest.raises(RoutingError, match=message):
        RoutingTable.from_rows(["persona_01", "persona_02"], lines)


def test_names_are_checked():
    with pytest.raises(RoutingError, match="the persona 'a' is given twice"):
        RoutingTable.from_rows("aba", [])
    with pytest.raises(RoutingError, match="two different rows are called 'all'"):
        RoutingTable.from_rows("ab", [("a", "x", 1.0), ("b", "y", 1.0)], adapters={"a": "all", "b": "all"})
    with pytest.raises(RoutingError, match="Did you mean ann"):
        RoutingTable.from_rows(["ann"], []).row("an")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"persona": ["a"], "expert": ["x"]}, "has no column weight"),
        ({"persona": ["a"], "expert": ["x"], "weight": [1.0], "module_group": ["layers.0"]}, "module group 'layers.0'"),
        ({"persona": ["a"], "expert": [None], "weight": [None], "same_as": ["z"]}, "refers to the row of 'z'"),
        ({"persona": ["a"], "expert": ["x"], "weight": pa.array([None], pa.float64())}, "is nan"),
    ],
)
def test_a_file_that_is_no_routing_table_is_refused(tmp_path, columns, message):
    location = str(tmp_path / "r.parquet")
    columns = {k: pa.array(v, pa.string()) if k in ("expert", "same_as") else v for k, v in columns.items()}
    pq.write_table(
        pa.table(
            {
                k: v if k != "weight" or isinstance(v, pa.Array) else pa.array(v, pa.float64())
                for k, v in columns.items()
            }
        ),
        location,
    )
    with pytest.raises(RoutingError, match=message) as caught:
        RoutingTable.read(location)
    assert location in str(caught.value)


def test_three_plain_columns_are_enough(tmp_path):
    location = str(tmp_path / "r.parquet")
    pq.write_table(pa.table({"persona": ["b", "a"], "expert": ["x", "x"], "weight": [1, 2]}), location)
    assert RoutingTable.read(location).row("a") == {"x": 2.0}


def test_more_personas_get_the_base(tmp_path):
    table = RoutingTable.from_rows(["b", "d"], [("b", "x", 1.0), ("d", "y", 2.0)])
    more = table.with_base(["c", "a"])
    assert more.personas == ("a", "b", "c", "d")
    assert [more.row(name) for name in more.personas] == [{}, {"x": 1.0}, {}, {"y": 2.0}]
    more.write(str(tmp_path / "routing.parquet"))
    assert RoutingTable.read(str(tmp_path / "routing.parquet")) == more
    with pytest.raises(RoutingError, match="'b' is given twice"):
        table.with_base(["b"])
