"""Splits made by time, order and hash: sizes, who is last, and that newcomers change nothing for others."""

import json
import time
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.config import SplitShares
from raymerge.errors import PersonaError
from raymerge.personas import SPLITS, PersonaSource, read_personas
from raymerge.personas.splits import TEST, TRAIN, VALIDATION, hashed_shares, last_shares

shares = st.sampled_from([(v, t) for v in (0.0, 0.1, 0.2, 0.45, 0.7) for t in (0.0, 0.1, 0.2, 0.45, 0.7) if v + t < 1])
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40)


@given(rows, shares)
def test_the_last_are_tested_and_everybody_is_trained(made, parts):
    personas = np.array([p for p, _ in made], dtype=np.int64)
    times = np.array([t for _, t in made], dtype=np.int64)
    validation, test = parts
    splits = last_shares(personas, times, validation, test)
    for persona in set(personas.tolist()):
        mine = np.flatnonzero(personas == persona)
        ordered = mine[np.argsort(times[mine], kind="stable")]
        assert splits[ordered].tolist() == sorted(splits[mine].tolist())  # train, validation, test: in this order
        counts = np.bincount(splits[mine], minlength=3)
        assert counts[TRAIN] >= 1
        if len(mine) >= 10 and test < 0.7:
            assert counts[TEST] == max(np.floor(len(mine) * test + 0.5), test > 0)
        if len(mine) == 2:
            assert counts.tolist() == ([1, 0, 1] if test else [1, 1, 0] if validation else [2, 0, 0])
        if len(mine) >= 3:
            assert (counts[VALIDATION] > 0, counts[TEST] > 0) == (validation > 0, test > 0)


pairs_of = st.lists(
    st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from("qrs"), st.sampled_from("abc"), st.integers(0, 9)),
    min_size=1, max_size=30,
)  # fmt: skip


@pytest.mark.parametrize("by", ["time", "order", "random"])
@settings(max_examples=60, deadline=None)
@given(made=pairs_of, parts=shares)
def test_no_row_of_a_persona_stands_in_two_splits(tmp_path_factory, by, made, parts):
    file = tmp_path_factory.mktemp("twice") / "p.jsonl"
    keys = ("persona", "prompt", "response", "said")
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in made))
    column = {"column": "said"} if by == "time" else {}
    validation, test = parts
    source = PersonaSource(path=str(file), split={"by": by, **column, "validation": validation, "test": test})
    if by == "random" and not (hashed_shares([r[0] for r in made], [r[1] for r in made], source.split) == TRAIN).any():
        with pytest.raises(PersonaError, match="leave nobody with training rows"):
            read_personas(source)
        return
    found = read_personas(source)
    examples = [e for name in found.names for e in found.examples(name)]
    assert len(examples) == len(made)
    where = {}
    for e in examples:
        assert where.setdefault((e.persona, e.prompt, e.response), e.split) == e.split
    if by == "random":
        return
    for name in found.names:  # as if each pair had stood once, where it stood first
        rows = sorted((r for r in made if r[0] == name), key=lambda r: r[3] if by == "time" else 0)
        once = list(dict.fromkeys(row[1:3] for row in rows))
        said = last_shares(np.zeros(len(once), np.int64), None, validation, test)
        assert [SPLITS.index(where[(name, *pair)]) for pair in once] == said.tolist()


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (10, [6, 2, 2]), (40, [24, 8, 8])]
)
def test_sizes(size, expected):
    splits = last_shares(np.zeros(size, np.int64), None, 0.2, 0.2)
    assert np.bincount(splits, minlength=3).tolist() == expected
    assert splits.tolist() == sorted(splits.tolist())


def test_halves_are_rounded_up():
    splits = last_shares(np.zeros(10, np.int64), None, 0.25, 0.45)
    assert np.bincount(splits, minlength=3).tolist() == [2, 3, 5]


words = st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.text(max_size=4)), max_size=20)


@given(words, words, st.integers(0, 3))
def test_no_row_has_a_say_in_the_split_of_another(made, newcomers, seed):
    def split(those):
        named = SplitShares(by="random", seed=seed, validation=0.3, test=0.3)
        return hashed_shares([p for p, _ in those], [q for _, q in those], named).tolist()

    together = split([*newcomers, *made])
    assert together[len(newcomers) :] == split(made)
    assert len(set(zip([*newcomers, *made], together, strict=True))) == len({*newcomers, *made})


def test_hashed_shares_are_as_large_as_asked_and_differ_by_seed():
    names, prompts = ["ann", "bob"] * 5000, [f"q{i // 2}" for i in range(10_000)]
    made = [hashed_shares(names, prompts, SplitShares(by="random", seed=s, validation=0.1, test=0.3)) for s in (0, 1)]
    assert np.bincount(made[0]) / 10_000 == pytest.approx([0.6, 0.1, 0.3], abs=0.03)  # six standard deviations
    assert 0.4 < np.mean(made[0] == made[1]) < 0.55  # 0.6² + 0.1² + 0.3² where the seeds are independent
    assert 0.4 < np.mean(made[0][::2] == made[0][1::2]) < 0.55  # and so are personas


def write(folder, times, name="p.jsonl"):
    made = [{"persona": "ann", "prompt": f"q{i}", "response": "r", "said": t} for i, t in enumerate(times)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(made), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return PersonaSource(
        path=str(folder / name), split={"by": "time", "column": "said", "validation": 0.25, "test": 0.5}
    )


def in_time(source):
    """Numbers of the rows that are train, validation and test."""
    found = read_personas(source)
    return [[int(e.prompt[1:]) for e in found.examples("ann", split)] for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    "times",
    [
        [3, 1, 4, 2],
        [3.5, 1.5, 4.5, 2.5],
        [3, 1.5, 4, 2.5],
        ["3", "1", "10", "2.5"],
        ["2024-01-03", "2023-12-31", "2024-02-01", "2024-01-01"],
        ["2024-01-01T12:00:00Z", "2024-01-01T10:00:00Z", "2024-01-01T13:00:00+00:00", "2024-01-01T14:00:00+03:00"],
        ["2024-01-01 12:00", "2024-01-01", "2024-01-01 12:00:00.5", "2024-01-01T11:00:00Z"],
        [2**53 + 3, 2**53 + 1, 2**53 + 4, 2**53 + 2],
    ],
)
def test_times_in_any_form_are_sorted(tmp_path, times):
    assert in_time(write(tmp_path, times)) == [[1], [3], [0, 2]]
    if len({type(t) for t in times}) == 1:
        assert in_time(write(tmp_path, times, "p.parquet")) == [[1], [3], [0, 2]]


@pytest.mark.parametrize("zone", [None, UTC, timezone(timedelta(hours=2))])
def test_timestamps_of_parquet_are_sorted(tmp_path, zone):
    times = [datetime(2024, 1, day, tzinfo=zone) for day in (3, 1, 4, 2)]
    assert in_time(write(tmp_path, times, "p.parquet")) == [[1], [3], [0, 2]]
    assert in_time(write(tmp_path, [t.date() for t in times], "p.parquet")) == [[1], [3], [0, 2]]


def test_nanoseconds_are_read_even_where_a_row_needs_a_look(tmp_path):
    source = write(tmp_path, [3, 1, 4, 2], "p.parquet")
    table = pq.read_table(source.path)
    times = pa.array([n * 1000 + 1 for n in (3, 1, 4, 2)]).cast(pa.timestamp("ns"))
    pq.write_table(table.set_column(3, "said", times), source.path)
    assert in_time(source) == [[1], [3], [0, 2]]
    pq.write_table(
        table.set_column(3, "said", times).set_column(0, "persona", pa.array([0.5] * 4)), source.path
    )  # a name that Arrow does not write as Python does
    assert [e.split for e in read_personas(source).examples("0.5")] == ["test", "train", "test", "validation"]


def test_a_time_without_a_zone_is_utc_wherever_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        times = ["2024-01-01T12:00", "2024-01-01T11:00Z", "2024-01-01T13:00Z"]
        assert in_time(write(tmp_path, times)) == [[1], [0], [2]]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    assert in_time(write(tmp_path, ["2024-01-01"] * 4)) == [[0], [1], [2, 3]]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1, "yesterday"], r":2: said cannot be read as a time; found 'yesterday'.\nExpected a number, or a date"),
        (["2024-13-01"], ":1: said cannot be read as a time"),
        ([True], ":1: said cannot be read as a time; found True"),
        ([1, None], r":2: has no said"),
        ([1, "2024-01-01"], ":1: its time is a number, that of .*:2 is a date"),
        ([float("inf"), 1], ":1: said cannot be read as a time; found inf"),
    ],
)
def test_a_time_that_is_none_is_named(tmp_path, times, message):
    with pytest.raises(PersonaError, match=f"p.jsonl{message}"):
        read_personas(write(tmp_path, times))


def test_dates_and_numbers_in_two_files_are_refused(tmp_path):
    write(tmp_path, [1, 2], "a.jsonl")
    source = write(tmp_path, ["2024-01-01"], "b.jsonl")
    with pytest.raises(PersonaError, match="said is a date in one file and a number in another"):
        read_personas(source.model_copy(update={"path": str(tmp_path)}))


def test_order_and_hash_need_no_column(tmp_path):
    source = write(tmp_path, [4, 3, 2, 1])
    order = source.model_copy(update={"split": SplitShares(by="order", validation=0.25, test=0.5)})
    assert in_time(order) == [[0], [1], [2, 3]]
    everything = source.model_copy(update={"split": SplitShares(by="random", validation=0.0, test=0.999999)})
    with pytest.raises(PersonaError, match=r"leave nobody with training rows: 4 rows, validation 0, test 0\.999999\."):
        read_personas(everything)
