"""Arrow's way for a whole file and Python's for single rows agree, wherever Arrow's is taken."""

from datetime import UTC, datetime

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raymerge.personas.columns import checked_row, clean_table, table_of, wanted_columns
from raymerge.personas.examples import PersonaSource

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
names = st.one_of(
    st.lists(st.sampled_from(["ann", "7", "Zoë"]), min_size=3, max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.sampled_from([7.0, -0.0, 10.0]), min_size=3, max_size=3),
)
moments = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1), timezones=st.sampled_from([None, UTC]))
times = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    st.lists(moments.map(datetime.isoformat), min_size=3, max_size=3),
    st.lists(st.integers().filter(lambda n: abs(n) < 2**63).map(str), min_size=3, max_size=3),
)
COLUMNS = wanted_columns(PersonaSource(path="p", persona="who", split={"by": "time", "column": "said"}))
NAMED = wanted_columns(PersonaSource(path="p"))
MEANINGS = {"train": "train", "dev": "validation", "test": "test"}


def by_rows(made, columns):
    return table_of((checked_row(row, columns, MEANINGS, "row") for row in made), "time" in columns)


@given(names, times, st.lists(text, min_size=3, max_size=3))
def test_names_and_times(people, said, texts):
    made = [
        {"who": p, "said": t, "prompt": x, "response": x} for p, t, x in zip(people, said, texts, strict=True)
    ]  # fmt: skip
    columns = [pa.array([row[name] for row in made]) for name in made[0]]
    table = clean_table(pa.table(columns, names=list(made[0])), COLUMNS, MEANINGS)
    assert table is not None
    rows = by_rows(made, COLUMNS)
    for name in ("persona", "prompt", "response", "turns", "time"):
        assert table[name].to_pylist() == rows[name].to_pylist()


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(sorted(MEANINGS))), min_size=1))
def test_splits(pairs):
    made = [{"persona": name, "prompt": "p", "response": "r", "split": split} for name, split in pairs]
    table = clean_table(pa.Table.from_pylist(made), NAMED, MEANINGS)
    assert table is not None
    assert table.select(["persona", "split", "turns"]).to_pylist() == [
        {name: row[name] for name in ("persona", "split", "turns")} for row in by_rows(made, NAMED).to_pylist()
    ]


@given(st.lists(st.sampled_from(["ann", "a/b", None, "train", "other"]), min_size=1))
def test_a_fault_is_left_to_the_rows(values):
    made = [{"persona": v, "prompt": "p", "response": "r", "split": "train"} for v in values]
    raw = pa.Table.from_pylist(made, schema=pa.schema([(n, pa.string()) for n in made[0]]))
    assert (clean_table(raw, NAMED, MEANINGS) is None) == (not {"a/b", None}.isdisjoint(values))
    split = [{"persona": "ann", "prompt": "p", "response": "r", "split": v} for v in values]
    raw = pa.Table.from_pylist(split, schema=raw.schema)
    assert (clean_table(raw, NAMED, MEANINGS) is None) == (not set(values) <= set(MEANINGS))
